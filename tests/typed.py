# SPDX-License-Identifier: Apache-2.0
"""What a type checker has to say of programs that use ``vmm``: `make check` runs mypy over it, nothing else does.

An ``ignore`` that ignores nothing is an error of mypy's, so each line with one is a mistake that mypy finds.
"""

from __future__ import annotations

from vmm import Exit, Machine


def constructor() -> None:
    """Parameters are held by name and type."""
    Machine("vmlinux", memory="1G", cpus=2)
    Machine(kernel="vmlinux")
    Machine("vmlinux", memry="1G")  # type: ignore[call-arg]
    Machine("vmlinux", cpus="two")  # type: ignore[arg-type]


async def run(vm: Machine) -> Exit:
    """An exit is not None where there is no time limit."""
    return await vm.run()
