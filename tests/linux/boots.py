# SPDX-License-Identifier: Apache-2.0
"""Boot Linux again and again, each time from a new Machine to a shell's last word and a reboot; say how many did.

python -m tests.linux.boots [COUNT]      # 100; where KVM runs Debian's kernel that one, else r3
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from tests.linux.kernels import kernel
from vmm import Machine, StopReason
from vmm.images import initramfs

PATIENCE = 60.0
# stty waits until what was written is out; a forced reboot does not.
INIT = initramfs.LOAD_MODULES + "echo 'user space'; head -c 8 /dev/hwrng | wc -c; stty echo; reboot -f\n"


def boot(path: str, initrd: str) -> tuple[float, str]:
    """One boot; seconds until the shell spoke, and what was wrong, empty: nothing."""
    heard, spoke = bytearray(), 0.0
    start = time.monotonic()

    def hear(data: bytes) -> None:
        nonlocal spoke
        heard.extend(data)
        if not spoke and b"user space" in heard:
            spoke = time.monotonic() - start

    with Machine(kernel=path, initrd=initrd, memory="256M", append="quiet", console="none", entropy=True) as vm:
        vm.on_console(hear)
        vm.start()
        stop = vm.wait(PATIENCE)
    if stop is not None and stop.reason is StopReason.RESET and spoke and b"\n8\r\n" in heard:
        return spoke, ""
    return spoke, f"{stop}: {bytes(heard[-500:])!r}"


def main(count: int = 100) -> int:
    """Boot so often."""
    made = kernel()
    times, failures = [], 0
    with tempfile.TemporaryDirectory() as directory:
        initrd = Path(directory, "initrd")
        initrd.write_bytes(made.initrd(("virtio_mmio", "virtio_rng"), INIT))
        for number in range(1, count + 1):
            seconds, wrong = boot(made.path, str(initrd))
            times.append(seconds)
            if wrong:
                failures += 1
                print(f"boot {number}: {wrong}")
    times.sort()
    print(f"{count - failures} of {count} boots; to user space {times[0]:.2f} s, median {times[count // 2]:.2f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
