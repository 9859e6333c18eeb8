# SPDX-License-Identifier: Apache-2.0
"""``vmm.testing``'s tiny guests for /dev/kvm, and 64-bit ones by Linux's own protocol."""

from __future__ import annotations

from pathlib import Path

from tests.boot.kernel_images import MIB, Phdr, elf
from vmm.testing import PATIENCE, assemble, registers, run, tiny_elf

__all__ = ["PATIENCE", "assemble", "registers", "run", "write_guest"]


def write_guest(directory: Path, source: str, bits: int = 32) -> str:
    """A kernel file with that code: PVH (32-bit protected mode), or for 64 bits an ELF by Linux's 64-bit protocol."""
    path = directory / "guest.elf"
    code = assemble(source, bits)
    path.write_bytes(tiny_elf(code) if bits == 32 else elf([Phdr(data=code, paddr=MIB)]))
    return str(path)
