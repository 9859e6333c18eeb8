# SPDX-License-Identifier: Apache-2.0
"""Launch: process start to the exit of a guest whose first instructions end it; on this host's /dev/kvm."""

from __future__ import annotations

import tempfile
from pathlib import Path

from benches.peers import common
from benches.peers.common import FIRECRACKER_NAME, MEMORY_MIB, QEMU_NAME, Row, compare
from vmm.testing import tiny_elf

ROUNDS = 25
STATUS = 42
# mov al, value; out port, al; hlt. Firecracker has no exit port; it ends when its guest resets by the i8042.
EXIT = bytes((0xB0, STATUS, 0xE6, 0xF4, 0xF4))
RESET = bytes((0xB0, 0xFE, 0xE6, 0x64, 0xF4))


def rows() -> list[Row]:
    """Wall time and CPU time of a launch, beside QEMU microvm and Firecracker."""
    common.need_kvm()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        guest, reset = directory / "exit.elf", directory / "reset.elf"
        guest.write_bytes(tiny_elf(EXIT))
        reset.write_bytes(tiny_elf(RESET))
        ours = [*common.pyvmm(), "--memory", f"{MEMORY_MIB}M", str(guest)]
        microvm = common.qemu_command(guest, "-device", "isa-debug-exit,iobase=0xf4,iosize=4")
        fire = common.firecracker_command(directory, reset)
        runs = common.in_turn(
            ROUNDS,
            pyvmm=lambda: common.timed(ours, STATUS),
            qemu=lambda: common.timed(microvm, STATUS << 1 | 1),
            firecracker=lambda: common.timed(fire, 0),
        )
    wall = {name: [run.wall_ms for run in done] for name, done in runs.items()}
    cpu = {name: [run.cpu_ms for run in done] for name, done in runs.items()}
    return [
        compare("launch, wall", "ms", wall["pyvmm"], wall["qemu"], QEMU_NAME, 1.0),
        compare("launch, wall", "ms", wall["pyvmm"], wall["firecracker"], FIRECRACKER_NAME, 2.0),
        compare("launch, CPU", "ms", cpu["pyvmm"], cpu["qemu"], QEMU_NAME, 1.0),
        compare("launch, CPU", "ms", cpu["pyvmm"], cpu["firecracker"], FIRECRACKER_NAME, None),
    ]
