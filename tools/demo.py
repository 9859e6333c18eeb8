# SPDX-License-Identifier: Apache-2.0
"""``make demo``: a tiny guest on this host's /dev/kvm, then a stock Debian from a virtio disk, to its power-off."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from vmm import images
from vmm.commands.check import findings
from vmm.commands.cli import STATUS_INTERRUPTED
from vmm.kvm.vm import runs_linux
from vmm.testing import tiny_elf

PYVMM = str(Path(sys.executable).with_name("pyvmm"))
TINY_STATUS = 42

# Run by the guest from a disk of its own, /dev/vdb; the guest powers off when it ends, with its status.
SCRIPT = """
echo "-- uname:   $(uname -sr)"
echo "-- system:  $(. /etc/os-release; echo "$PRETTY_NAME")"
echo "-- cpu:     $(nproc) x $(grep -m1 '^model name' /proc/cpuinfo | cut -d: -f2-)"
echo "-- memory:  $(grep MemTotal /proc/meminfo | tr -s ' ' | cut -d' ' -f2-)"
echo "-- root:    $(grep ' / ' /proc/mounts)"
echo "written $(date -u)" > /root/demo; sync; echo 3 > /proc/sys/vm/drop_caches
echo "-- file:    /root/demo: $(cat /root/demo), read back after sync"
exit 0
"""


def say(text: str) -> None:
    print(f"demo: {text}", flush=True)


def run_tiny() -> int:
    with tempfile.TemporaryDirectory() as directory:
        guest = Path(directory, "tiny.elf")
        guest.write_bytes(tiny_elf(bytes((0xB0, TINY_STATUS, 0xE6, 0xF4, 0xF4))))  # mov al, 42; out 0xf4, al; hlt
        start = time.perf_counter()
        status = subprocess.run([PYVMM, "run", str(guest)]).returncode
        took = (time.perf_counter() - start) * 1e3
    if status != TINY_STATUS:
        say(f"the tiny guest ended with status {status}, not {TINY_STATUS}; `pyvmm check` says what is missing")
        return 1
    say(f"a tiny guest on /dev/kvm: from process start to its exit status {status} in {took:.0f} ms")
    return 0


def run_debian(*, lab: bool) -> int:
    say("Debian from a virtio disk, " + ("in the lab: this host's KVM cannot run Linux" if lab else "on /dev/kvm"))
    with tempfile.TemporaryDirectory() as directory:
        script = Path(directory, "script")
        script.write_text(SCRIPT + "\n" * (-len(SCRIPT) % 512))  # a disk is whole sectors
        command = [PYVMM, "run", "debian", "--disk", f"{script},ro", "--append", "-- sh /dev/vdb"]
        start = time.perf_counter()
        status = subprocess.run([*command, *(["--lab"] if lab else [])], stdin=subprocess.DEVNULL).returncode
    say(f"the guest powered off after {time.perf_counter() - start:.0f} s; exit status {status}")
    return status


def main() -> int:
    """Run both; the guest's own status is ours."""
    usable = not any(status == "FAIL" for status, _, _ in findings("/dev/kvm"))
    if usable:
        if run_tiny():
            return 1
    else:
        say("no usable /dev/kvm here, so the tiny guest is left out; `pyvmm check` says why")
    if images.resolve("debian") is None and subprocess.run([PYVMM, "pull", "debian"]).returncode:
        return 1
    return run_debian(lab=not runs_linux())


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(STATUS_INTERRUPTED)
