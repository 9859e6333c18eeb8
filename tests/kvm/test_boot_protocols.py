# SPDX-License-Identifier: Apache-2.0
"""What a guest finds at its first instruction, told by the guest itself: every way to boot, on /dev/kvm."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest

from tests.boot.kernel_images import MIB, Phdr, bzimage, compress, elf, pvh_elf, vmlinux
from tests.kvm.guests import assemble, run
from vmm import Machine, StopReason

NOTES = 0x60_0000  # the guest writes down here what it found
EXIT = "mov al, 7\n mov dx, 0xf4\n out dx, al\n"

# The first bytes of command line, initrd and RSDP by way of the zero page, then the length of the memory map.
BY_ZERO_PAGE = f"""
    mov edi, {NOTES}
    mov eax, [rsi + 0x228]
    mov rax, [rax]
    mov [rdi], rax
    mov eax, [rsi + 0x218]
    mov rax, [rax]
    mov [rdi + 8], rax
    mov rax, [rsi + 0x70]
    mov rax, [rax]
    mov [rdi + 16], rax
    movzx eax, byte ptr [rsi + 0x1e8]
    mov [rdi + 24], rax
    lea rax, [rip + _start]
    mov [rdi + 32], rax
"""
# The same by way of PVH's start info, 32 bits at a time.
BY_START_INFO = f"""
    mov edi, {NOTES}
    mov ecx, [ebx + 24]
    mov eax, [ecx]
    mov [edi], eax
    mov ecx, [ebx + 16]
    mov ecx, [ecx]
    mov eax, [ecx]
    mov [edi + 8], eax
    mov ecx, [ebx + 32]
    mov eax, [ecx]
    mov [edi + 16], eax
    mov eax, [ebx + 48]
    mov [edi + 24], eax
    lea eax, [_start]
    mov [edi + 32], eax
"""


class Boot(Protocol):
    """Boots a kernel file, and gives what the guest found."""

    def __call__(self, image: bytes, *, protocol: str = "auto", unpack: str = "auto") -> dict[str, object]: ...


@pytest.fixture
def boot(tmp_path: Path) -> Iterator[Boot]:
    machines: list[Machine] = []

    def start(image: bytes, *, protocol: str = "auto", unpack: str = "auto") -> dict[str, object]:
        (tmp_path / "kernel").write_bytes(image)
        (tmp_path / "initrd").write_bytes(b"INITRD!!" * 1000)
        vm = Machine(
            kernel=str(tmp_path / "kernel"), initrd=str(tmp_path / "initrd"), cmdline="commandline",
            memory="8M", protocol=protocol, unpack=unpack,
        )  # fmt: skip
        machines.append(vm)
        stop = run(vm)
        assert (stop.reason, stop.code) == (StopReason.GUEST_EXIT, 7)
        found = vm.memory.read(NOTES, 40)
        return {
            "protocol": vm.loaded.protocol,
            "unpacked": vm.loaded.unpacked,
            "cmdline": found[0:8].rstrip(b"\0"),
            "initrd": found[8:16].rstrip(b"\0"),
            "rsdp": found[16:24].rstrip(b"\0"),
            "e820": found[24],
            "start": int.from_bytes(found[32:40], "little"),
        }

    yield start
    for vm in machines:
        vm.close()


LONG = {"cmdline": b"commandl", "initrd": b"INITRD!!", "rsdp": b"RSD PTR ", "e820": 3}
SHORT = {"cmdline": b"comm", "initrd": b"INIT", "rsdp": b"RSD ", "e820": 3}


def test_a_bzimage_as_it_is_starts_at_its_64_bit_entry(boot: Boot) -> None:
    code = assemble(BY_ZERO_PAGE + EXIT, 64)
    image = bzimage(code, payload_offset=0x200, payload_length=0, pref_address=2 * MIB, init_size=MIB)
    found = boot(image, unpack="never")
    assert found == {"protocol": "linux64", "unpacked": "", "start": 2 * MIB + 0x200, **LONG}


@pytest.mark.parametrize("method", ["gzip", "xz", "lzma", "bzip2", "zstd", "lz4"])
def test_a_bzimage_unpacked_by_the_host(boot: Boot, method: str) -> None:
    code = assemble(BY_ZERO_PAGE + EXIT, 64)
    image = bzimage(compress(method, vmlinux(code, paddr=2 * MIB)), pref_address=2 * MIB, init_size=4 * MIB)
    found = boot(image, unpack="always")
    assert found == {"protocol": "linux64", "unpacked": method, "start": 2 * MIB, **LONG}


def test_an_elf_by_linuxs_64_bit_protocol(boot: Boot) -> None:
    code = assemble(BY_ZERO_PAGE + EXIT, 64)
    found = boot(elf([Phdr(data=code, paddr=3 * MIB, vaddr=0xFFFFFFFF80300000)], entry=0xFFFFFFFF80300000))
    assert found == {"protocol": "linux64", "unpacked": "", "start": 3 * MIB, **LONG}


@pytest.mark.parametrize("bits", [32, 64])
def test_an_elf_by_pvh(boot: Boot, bits: int) -> None:
    found = boot(pvh_elf(assemble(BY_START_INFO + EXIT, 32), bits=bits))
    assert found == {"protocol": "pvh", "unpacked": "", "start": MIB, **SHORT}


def test_a_bzimage_by_pvh(boot: Boot) -> None:
    text = bytes(16) + assemble(BY_START_INFO + EXIT, 32, 2 * MIB + 16)
    image = bzimage(compress("lz4", vmlinux(text, paddr=2 * MIB)), pref_address=2 * MIB, init_size=4 * MIB)
    found = boot(image, protocol="pvh")
    assert found == {"protocol": "pvh", "unpacked": "lz4", "start": 2 * MIB + 16, **SHORT}


def test_bss_is_zero_and_the_stack_can_be_pushed_to(boot: Boot) -> None:
    code = assemble("push 5\n pop rax\n add rax, [rip + bss]\n add al, 2\n mov dx, 0xf4\n out dx, al\n bss:", 64)
    boot(elf([Phdr(data=code, paddr=MIB, memsz=len(code) + 4096)]))
