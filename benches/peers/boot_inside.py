# SPDX-License-Identifier: Apache-2.0
"""The part of the boot bench that runs where KVM runs Linux: ``python -m benches.peers.boot_inside DIR``.

One round: each program once. Finds bzImage, vmlinux and initrd in the directory, and adds a line to its file
``runs`` for each: the seconds it took, or what is missing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benches.peers import common
from benches.peers.api import connected
from benches.peers.common import PYVMM
from benches.peers.firecracker import Missing, firecracker

MEMORY_MIB = 256
MARK = b"@init@"
PATIENCE = 60.0
CMDLINE = "console=ttyS0 quiet reboot=k panic=-1 pci=off i8042.noaux i8042.nomux i8042.dumbkbd"


def seconds(command: Sequence[str], requests: Sequence[tuple[str, object]] = (), path: Path = Path()) -> float:
    """Time from the start of a VMM to its guest's mark; from the last of `requests` where there are any.

    :param requests: paths and bodies of PUTs to the socket at `path`
    :raises Missing: the guest did not print its mark
    """
    if requests:
        path.unlink(missing_ok=True)
    start = time.perf_counter()
    null = subprocess.DEVNULL
    process = subprocess.Popen(command, stdin=null, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0)
    assert process.stdout is not None
    heard = b""
    try:
        os.set_blocking(process.stdout.fileno(), False)
        client = connected(path) if requests else None
        for where, body in requests:
            start = time.perf_counter()
            assert client is not None
            client.request("PUT", where, body)
        while True:
            ended = process.poll() is not None  # then its last words are there to be read
            heard += process.stdout.read(65536) or b""
            if MARK in heard:
                return time.perf_counter() - start
            if ended or time.perf_counter() - start > PATIENCE:
                tail = heard[-2000:].decode(errors="replace")
                raise Missing(f"no sign of its guest's init: {' '.join(command)}\n{tail}")
            time.sleep(0.002)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def main(name: str) -> int:
    """Measure one round."""
    directory = Path(name)
    initrd, memory = directory / "initrd", MEMORY_MIB
    elf, packed = directory / "vmlinux", directory / "bzImage"
    more = ("-initrd", str(initrd), "-append", CMDLINE, "-serial", "stdio")
    options = ["--initrd", str(initrd), "--cmdline", CMDLINE, "--memory", f"{memory}M"]
    commands = {
        "pyvmm": [*PYVMM, str(elf), *options],
        "qemu": common.qemu_command(elf, *more, memory=memory, cpu="host"),
        "firecracker": common.firecracker_command(directory, elf, initrd=initrd, cmdline=CMDLINE, memory=memory),
        "pyvmm_bzimage": [*PYVMM, str(packed), *options],
        "qemu_bzimage": common.qemu_command(packed, *more, memory=memory, cpu="host"),
    }
    # By the socket: configured by the first requests, started by the last.
    path = Path("/dev/shm/pyvmm-boot.sock")  # the lab's directories are the host's, by 9p, where no socket can be
    source = {"kernel_image_path": str(elf), "initrd_path": str(initrd), "boot_args": CMDLINE}
    machine = {"vcpu_count": 1, "mem_size_mib": memory}
    requests: list[tuple[str, object]] = [("/boot-source", source), ("/machine-config", machine)]
    if common.lacks_xsave():
        requests.append(("/cpu-config", {"kvm_capabilities": [f"!{common.KVM_CAP_XCRS}"]}))
    requests.append(("/actions", {"action_type": "InstanceStart"}))
    by_socket = {
        "pyvmm_api": [PYVMM[0], "serve", "--api-sock", str(path)],
        "firecracker_api": [firecracker(), "--api-sock", str(path), "--level", "Error"],
    }
    # The lab reads all files from the host, over 9p, the first time: not what is to be measured.
    for program in (PYVMM[0], common.QEMU, firecracker()):
        subprocess.run([program, "--version"], stdout=subprocess.DEVNULL, check=False)
    subprocess.run([*commands["pyvmm"], "--dry-run"], stdout=subprocess.DEVNULL, check=False)
    for file in (elf, packed, initrd):
        file.read_bytes()
    with (directory / "runs").open("a") as runs:
        for program, command in {**commands, **by_socket}.items():
            try:
                asked = requests if program in by_socket else ()
                result: dict[str, object] = {"program": program, "seconds": seconds(command, asked, path)}
            except Missing as problem:
                result = {"program": program, "missing": str(problem)}
            print(f"boot: {result}", file=sys.stderr, flush=True)
            runs.write(json.dumps(result) + "\n")
            runs.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
