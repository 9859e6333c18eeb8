# SPDX-License-Identifier: Apache-2.0
"""Memory: a VMM's resident memory, without guest RAM, while its guest idles; on this host's /dev/kvm."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benches.peers import common
from benches.peers.common import FIRECRACKER_NAME, MEMORY_MIB, QEMU_NAME, Row, alone, compare
from benches.peers.firecracker import Missing
from vmm.testing import tiny_elf

ROUNDS = 5
GOAL_MIB = 25.0
PATIENCE = 120.0  # for 50 at once
MARK = b"@"
# mov dx, 0x3f8; mov al, '@'; out dx, al; cli; hlt; jmp to the hlt
IDLE = bytes((0x66, 0xBA, 0xF8, 0x03, 0xB0, MARK[0], 0xEE, 0xFA, 0xF4, 0xEB, 0xFD))


def resident_mib(pid: int, share: str = "Rss", ram_mib: int = MEMORY_MIB) -> float:
    """Memory of a process in MiB, less the mappings that are guest RAM.

    :param ram_mib: the size of that; nothing else in a VMM is as large
    :param share: ``Rss``, or ``Pss``: what several processes share is counted once in all
    :raises Missing: no mapping is large enough to be guest RAM
    """
    total = guests = 0
    text = Path(f"/proc/{pid}/smaps").read_text()
    for size, kib in re.findall(rf"^Size: +(\d+) kB\n(?:.*\n)*?{share}: +(\d+) kB", text, re.MULTILINE):
        if int(size) >= ram_mib << 10:
            guests += 1
        else:
            total += int(kib)
    if not guests:
        raise Missing(f"process {pid} maps no {ram_mib} MiB of guest RAM")
    return total / 1024


@contextlib.contextmanager
def running(commands: Sequence[Sequence[str]], mark: bytes) -> Iterator[list[int]]:
    """The processes of VMMs, started all at once, when each guest has said `mark` on its serial port; then killed.

    :raises Missing: a guest has not printed `mark` within ``PATIENCE`` seconds
    """
    processes = [
        subprocess.Popen(each, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0)
        for each in commands
    ]
    try:
        end = time.monotonic() + PATIENCE
        for process, command in zip(processes, commands, strict=True):
            assert process.stdout is not None
            os.set_blocking(process.stdout.fileno(), False)
            said = b""
            while mark not in said:
                if process.poll() is not None or time.monotonic() > end:
                    raise Missing(f"no sign of its guest: {' '.join(command)}")
                said += process.stdout.read(65536) or b""
                time.sleep(0.01)
        yield [process.pid for process in processes]
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.communicate()


def idle(command: Sequence[str]) -> float:
    """Start a VMM, wait for its guest's mark on the serial port, measure, end it."""
    with running([command], MARK) as (pid,):
        time.sleep(0.2)  # what runs beside the guest has come to rest
        return resident_mib(pid)


def rows() -> list[Row]:
    """Resident memory beside QEMU microvm and Firecracker, and against the goal."""
    common.need_kvm()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        guest = directory / "idle.elf"
        guest.write_bytes(tiny_elf(IDLE))
        ours = [*common.pyvmm(), "--memory", f"{MEMORY_MIB}M", str(guest)]
        microvm = common.qemu_command(guest, "-serial", "stdio")
        fire = common.firecracker_command(directory, guest)
        found = common.in_turn(
            ROUNDS, pyvmm=lambda: idle(ours), qemu=lambda: idle(microvm), firecracker=lambda: idle(fire)
        )
    name = "memory, resident without guest RAM"
    return [
        alone(name, "MiB", found["pyvmm"], GOAL_MIB),
        compare(name, "MiB", found["pyvmm"], found["qemu"], QEMU_NAME, 1.0),
        compare(name, "MiB", found["pyvmm"], found["firecracker"], FIRECRACKER_NAME, None),
    ]
