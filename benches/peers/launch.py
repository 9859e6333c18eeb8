# SPDX-License-Identifier: Apache-2.0
"""Launch: process start to the exit of a guest whose first instructions write its exit status; on /dev/kvm."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from benches.peers.common import PYVMM, Missing, Row, Run, compare, firecracker, in_turn, pvh_elf, qemu, timed

ROUNDS = 15
STATUS = 42


def _checked(command: list[str], status: int) -> Run:
    run = timed(command)
    if run.status != status:
        raise Missing(f"{Path(command[0]).name} ended with {run.status}, not {status}: {' '.join(command)}")
    return run


def rows() -> list[Row]:
    """Wall time and CPU time of a launch, beside QEMU microvm and Firecracker."""
    with tempfile.TemporaryDirectory() as directory:
        # mov al, status; out port, al; hlt
        ours = Path(directory, "ours.elf")
        ours.write_bytes(pvh_elf(bytes((0xB0, STATUS, 0xE6, 0xF4, 0xF4))))
        reset = Path(directory, "reset.elf")
        reset.write_bytes(pvh_elf(bytes((0xB0, 0xFE, 0xE6, 0x64, 0xF4))))
        config = Path(directory, "firecracker.json")
        config.write_text(
            json.dumps(
                {
                    "boot-source": {"kernel_image_path": str(reset), "boot_args": ""},
                    "drives": [],
                    "machine-config": {"vcpu_count": 1, "mem_size_mib": 128},
                }
            )
        )
        microvm = [
            qemu(), "-M", "microvm", "-accel", "kvm", "-cpu", "host,-arch-capabilities", "-m", "128", "-nodefaults",
            "-no-user-config", "-display", "none", "-device", "isa-debug-exit,iobase=0xf4,iosize=4", "-kernel",
            str(ours),
        ]  # fmt: skip
        fire = [firecracker(), "--no-api", "--config-file", str(config)]
        runs = in_turn(
            ROUNDS,
            pyvmm=lambda: _checked([*PYVMM, "run", "--memory", "128M", str(ours)], STATUS),
            qemu=lambda: _checked(microvm, STATUS << 1 | 1),
            firecracker=lambda: _checked(fire, 0),
        )
    wall = {name: [run.wall_ms for run in done] for name, done in runs.items()}
    cpu = {name: [run.cpu_ms for run in done] for name, done in runs.items()}
    return [
        compare("launch, wall", "ms", wall["pyvmm"], wall["qemu"], "QEMU microvm", 1.0),
        compare("launch, wall", "ms", wall["pyvmm"], wall["firecracker"], "Firecracker 1.12.1", 2.0),
        compare("launch, CPU", "ms", cpu["pyvmm"], cpu["qemu"], "QEMU microvm", 1.0),
    ]
