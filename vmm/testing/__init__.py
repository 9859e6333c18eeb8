# SPDX-License-Identifier: Apache-2.0
"""Tiny guests for tests of your own devices and programs: a few instructions that run in milliseconds.

with Machine(tiny_guest(directory, "mov al, 7; out 0xf4, al"), memory="4M") as vm:
    assert run(vm) == Exit(StopReason.GUEST_EXIT, 7)

They run on every KVM, including a software KVM. ``virtio.testing`` tests a device without a VM.
"""

from __future__ import annotations

import functools
import os
import struct
import subprocess
import tempfile

from vmm.errors import ConfigError, VmmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.exits import Exit
    from vmm.machine.machine import Machine

ENTRY = 1 << 20
PATIENCE = 30.0


def tiny_elf(code: bytes) -> bytes:
    """A kernel file of `code` alone. It is loaded at 1 MiB and entered there in 32-bit protected mode, without paging.

    Source: System V ABI, ELF header and program headers; Xen's PVH boot protocol, the note.
    """
    at = 64 + 2 * 56
    note = struct.pack("<III4sI", 4, 4, 18, b"Xen\0", ENTRY)
    header = b"\x7fELF\2\1\1".ljust(16, b"\0")
    header += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, ENTRY, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    load = struct.pack("<IIQQQQQQ", 1, 7, at, ENTRY, ENTRY, len(code), len(code), 1)
    notes = struct.pack("<IIQQQQQQ", 4, 4, at + len(code), 0, 0, len(note), len(note), 4)
    return header + load + notes + code + note


@functools.cache
def assemble(source: str, bits: int = 32, origin: int = ENTRY) -> bytes:
    """Assemble `source` (GNU as, Intel syntax), linked at `origin`; the machine code. Needs ``as`` and ``ld``.

    :param bits: 16, 32 or 64
    :raises ConfigError: the assembler refuses the source, or is not installed
    """
    text = f".intel_syntax noprefix\n.code{bits}\n.globl _start\n_start:\n{source}\n"
    with tempfile.TemporaryDirectory() as directory:
        base = os.path.join(directory, "guest")
        with open(f"{base}.s", "w") as file:
            file.write(text)
        for command in (
            ["as", "--64", "-o", f"{base}.o", f"{base}.s"],
            ["ld", "-Ttext", hex(origin), "--oformat", "binary", "-o", f"{base}.bin", f"{base}.o"],
        ):
            try:
                done = subprocess.run(command, capture_output=True, text=True)
            except FileNotFoundError:
                raise ConfigError(command[0], "", "is not installed; Debian's package is binutils") from None
            if done.returncode:
                raise ConfigError(command[0], "", done.stderr.strip().splitlines()[-1])
        with open(f"{base}.bin", "rb") as file:
            return file.read()


def tiny_guest(directory: str | os.PathLike[str], code: bytes | str, name: str = "guest.elf") -> str:
    """Write a kernel of machine code or assembler source into `directory`; its path.

    :raises ConfigError: see :func:`assemble`
    """
    path = os.path.join(directory, name)
    with open(path, "wb") as file:
        file.write(tiny_elf(assemble(code) if isinstance(code, str) else code))
    return path


def run(vm: Machine, timeout: float = PATIENCE) -> Exit:
    """Start `vm` and wait for its end.

    :param timeout: seconds
    :raises VmmError: the VM did not end in time; the message has the rip of each vCPU
    """
    vm.start()
    ended = vm.wait(timeout)
    if ended is None:
        raise VmmError(f"the guest did not end in {timeout:g} s, rip {registers(vm)}")
    return ended


def registers(vm: Machine) -> str:
    """The rip of each vCPU, for a guest that hangs. The guest is paused afterwards."""
    vm.pause()
    return ", ".join(hex(vcpu.regs.rip) for vcpu in vm.vcpus)
