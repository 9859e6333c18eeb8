# SPDX-License-Identifier: Apache-2.0
"""What a type checker has to say of programs that use ``vmm``: mypy reads it, and nothing runs it.

An ``ignore`` that ignores nothing is an error of mypy's, so each line with one is a mistake that mypy finds.
"""

from __future__ import annotations

from vmm import DriveConfig, Exit, Machine, VmConfig


def constructor() -> None:
    """Parameters are held by name and type."""
    Machine("vmlinux", memory="1G", cpus=2)
    Machine(kernel="vmlinux")
    Machine("vmlinux", memry="1G")  # type: ignore[call-arg]
    Machine("vmlinux", cpus="two")  # type: ignore[arg-type]


def configuration() -> None:
    """So are those of what a VM and a device is to be, and their attributes."""
    config = VmConfig("vmlinux", memory="1G", entropy=True, drives=[DriveConfig("a", read_only=True)])
    memory: int = config.memory
    DriveConfig("a", readonly=True)  # type: ignore[call-arg]
    DriveConfig("a", queues="2")  # type: ignore[arg-type]
    DriveConfig("a", True)  # type: ignore[call-arg]
    DriveConfig()  # type: ignore[call-arg]
    VmConfig("vmlinux", memory=memory, drives=["a"])  # type: ignore[list-item]
    config.kernel = None  # type: ignore[assignment]


async def run(vm: Machine) -> Exit:
    """An exit is not None where there is no time limit."""
    return await vm.run()
