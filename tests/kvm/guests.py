# SPDX-License-Identifier: Apache-2.0
"""Tiny guests for /dev/kvm: GNU as makes their code, a PVH ELF carries it, a Machine runs it."""

from __future__ import annotations

import functools
import subprocess
import tempfile
from pathlib import Path

from tests.boot.kernel_images import MIB, Phdr, elf, pvh_elf
from vmm import Exit, Machine

# Every guest ends by itself; a guest that does not is a failed test after this many seconds.
PATIENCE = 30


@functools.cache
def assemble(source: str, bits: int = 32, origin: int = MIB) -> bytes:
    """Machine code of GNU assembler `source` (Intel syntax), linked at `origin`."""
    with tempfile.TemporaryDirectory() as directory:
        base = Path(directory, "guest")
        text = f".intel_syntax noprefix\n.code{bits}\n.globl _start\n_start:\n{source}\n"
        base.with_suffix(".s").write_text(text)
        subprocess.run(["as", "--64", "-o", f"{base}.o", f"{base}.s"], check=True)
        subprocess.run(
            ["ld", "-Ttext", hex(origin), "--oformat", "binary", "-o", f"{base}.bin", f"{base}.o"], check=True
        )
        return base.with_suffix(".bin").read_bytes()


def write_guest(directory: Path, source: str, bits: int = 32) -> str:
    """A kernel file with that code: PVH (32-bit protected mode), or for 64 bits an ELF by Linux's 64-bit protocol."""
    path = directory / "guest.elf"
    code = assemble(source, bits)
    path.write_bytes(pvh_elf(code) if bits == 32 else elf([Phdr(data=code, paddr=MIB)]))
    return str(path)


def run(vm: Machine) -> Exit:
    """Start `vm` and wait for its end."""
    vm.start()
    stop = vm.wait(PATIENCE)
    assert stop is not None, f"the guest did not end in {PATIENCE} s, rip {registers(vm)}"
    return stop


def registers(vm: Machine) -> str:
    """Where a guest hangs."""
    vm.pause()
    return ", ".join(hex(vcpu.regs.rip) for vcpu in vm.vcpus)
