# SPDX-License-Identifier: Apache-2.0
"""ELF kernels: what is loaded where, and a clear line for each thing that can be wrong."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from boot import layout
from boot.load import load, probe
from tests.boot.conftest import KernelFile, refused
from tests.boot.kernel_images import MIB, PT_INTERP, PT_NOTE, Phdr, elf, note, pvh_elf, pvh_note, vmlinux
from vmm.memory import GuestMemory

HIGH = 0xFFFFFFFF80000000


def test_a_pvh_guest_of_one_instruction(memory: GuestMemory, kernel: KernelFile) -> None:
    loaded = load(memory, kernel(pvh_elf(b"\xf4")), cmdline="hello")
    assert (loaded.protocol, loaded.entry) == ("pvh", MIB)
    assert (loaded.kind, loaded.unpacked, loaded.kernel, loaded.initrd) == ("elf", "", (MIB, 1), (0, 0))
    assert not loaded.needs_ring0
    assert memory.read(MIB, 2) == b"\xf4\0"
    assert memory.read(layout.CMDLINE, 6) == b"hello\0"


def test_a_32_bit_elf_boots_by_pvh_only(memory: GuestMemory, kernel: KernelFile) -> None:
    path = kernel(pvh_elf(b"\xf4\x90", bits=32))
    assert load(memory, path).entry == MIB
    assert memory.read(MIB, 2) == b"\xf4\x90"
    assert "32-bit ELF" in refused(memory, path, protocol="linux64")


def test_vmlinux_by_both_protocols(kernel: KernelFile) -> None:
    path = kernel(vmlinux(b"text" * 16))
    kind = probe(path)
    assert (kind.kind, kind.needs_ring0) == ("elf", True)
    for protocol, entry in (("auto", 16 * MIB + 0x10), ("pvh", 16 * MIB + 0x10), ("linux64", 16 * MIB)):
        with GuestMemory(64 * MIB) as memory:
            loaded = load(memory, path, protocol=protocol)
            assert loaded.entry == entry
            assert loaded.protocol == ("linux64" if protocol == "linux64" else "pvh")
            assert loaded.kernel == (16 * MIB, 2 * MIB + 256 + 8192)
            assert memory.read(16 * MIB, 64) == b"text" * 16
            assert memory.read(18 * MIB, 256 + 8192) == b"data" * 64 + bytes(8192)


def test_an_entry_linked_high_is_translated(memory: GuestMemory, kernel: KernelFile) -> None:
    image = elf([Phdr(data=b"\x90\xf4", paddr=2 * MIB, vaddr=HIGH + 2 * MIB)], entry=HIGH + 2 * MIB + 1)
    loaded = load(memory, kernel(image))
    assert (loaded.protocol, loaded.entry) == ("linux64", 2 * MIB + 1)


def test_segments_need_no_order_and_may_touch(memory: GuestMemory, kernel: KernelFile) -> None:
    image = elf([Phdr(data=b"bb", paddr=MIB + 2), Phdr(data=b"aa", paddr=MIB), Phdr(data=b"", memsz=0, paddr=0)])
    load(memory, kernel(image))
    assert memory.read(MIB, 5) == b"aabb\0"


def test_a_position_independent_file_loads_where_it_says(memory: GuestMemory, kernel: KernelFile) -> None:
    assert load(memory, kernel(elf([Phdr(data=b"\xf4")], kind=3))).entry == MIB


def test_a_segment_may_end_at_the_last_byte_of_memory(memory: GuestMemory, kernel: KernelFile) -> None:
    load(memory, kernel(elf([Phdr(data=b"\xf4"), Phdr(data=b"end", paddr=64 * MIB - 3)])))
    assert memory.read(64 * MIB - 3, 3) == b"end"


def test_low_memory_between_the_boot_areas_is_free(memory: GuestMemory, kernel: KernelFile) -> None:
    image = elf([Phdr(data=b"low", paddr=0x10000), Phdr(data=b"\xf4", paddr=0x7C00 + 0x8000)], entry=0x10000)
    load(memory, kernel(image))
    assert memory.read(0x10000, 3) == b"low"


def test_a_segment_above_4_gib(kernel: KernelFile) -> None:
    with GuestMemory(4 << 30) as memory:
        load(memory, kernel(elf([Phdr(data=b"\xf4"), Phdr(data=b"high", paddr=4 << 30)])))
        assert memory.read(4 << 30, 4) == b"high"


def test_an_entry_above_4_gib_is_not_mapped(kernel: KernelFile) -> None:
    with GuestMemory(4 << 30) as memory:
        image = elf([Phdr(data=b"\xf4", paddr=4 << 30)], entry=4 << 30)
        assert "entry point at 0x100000000, above 4 GiB" in refused(memory, kernel(image))


@pytest.mark.parametrize(("name", "start", "end"), layout.BOOT_AREAS)
def test_a_segment_on_what_the_vmm_writes(
    memory: GuestMemory, kernel: KernelFile, name: str, start: int, end: int
) -> None:
    for paddr, size in ((start, 1), (end - 1, 1), (start, end - start), (end - 1, 2)):
        text = refused(memory, kernel(elf([Phdr(data=b"x" * size, paddr=paddr)], entry=paddr)))
        assert f"on the {name} ({start:#x} to {end:#x})" in text


@pytest.mark.parametrize(
    ("phdrs", "found"),
    [
        ([Phdr(data=b"ab"), Phdr(data=b"cd", paddr=MIB + 1)], "overlapping segments"),
        ([Phdr(data=b"a", memsz=64), Phdr(data=b"b", paddr=MIB + 63)], "overlapping segments"),
        ([Phdr(data=b"a", paddr=64 * MIB)], "outside guest memory (0x0 to 0x4000000)"),
        ([Phdr(data=b"a", paddr=64 * MIB - 1, memsz=2)], "outside guest memory"),
        ([Phdr(data=b"a", memsz=0xFFFF_FFFF)], "outside guest memory"),
        ([Phdr(data=b"a", paddr=2**64 - 1, vaddr=0, memsz=2)], "wrap around"),
        ([Phdr(data=b"a", vaddr=2**64 - 1, memsz=2)], "wrap around"),
        ([Phdr(data=b"abc", memsz=2)], "segment 0 with 3 bytes in the file but 2 in memory"),
        ([Phdr(data=b"a", filesz=0xFFFF_FFFF, memsz=0xFFFF_FFFF)], "truncated: segment 0 ends at byte"),
        ([Phdr(data=b"a", offset=2**64 - 1)], "truncated: segment 0"),
        ([Phdr(data=b"a", filesz=2**64 - 1, memsz=2**64 - 1)], "truncated: segment 0"),
        ([Phdr(data=b"", memsz=0)], "no loadable segment"),
        ([Phdr(kind=PT_NOTE, data=pvh_note())], "no loadable segment"),
        ([Phdr(kind=PT_INTERP, data=b"/lib/ld.so\0"), Phdr(data=b"a", paddr=0)], "user-space program"),
    ],
)
def test_segments_that_cannot_be(memory: GuestMemory, kernel: KernelFile, phdrs: list[Phdr], found: str) -> None:
    assert found in refused(memory, kernel(elf(phdrs)))


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"ident": b"\x7fELF\x03\x01\x01" + bytes(9)}, "class 3"),
        ({"ident": b"\x7fELF\x02\x02\x01" + bytes(9)}, "big-endian"),
        ({"ident": b"\x7fELF\x02\x01\x00" + bytes(9)}, "version 0/1"),
        ({"version": 7}, "version 1/7"),
        ({"machine": 183}, "built for arm64, not x86-64"),
        ({"machine": 243}, "built for RISC-V"),
        ({"machine": 9999}, "ELF machine 9999"),
        ({"kind": 1}, "a relocatable object"),
        ({"kind": 4}, "a core dump"),
        ({"kind": 0}, "type 0"),
        ({"phentsize": 32}, "program headers of 32 bytes each, 56 expected"),
        ({"phnum": 0}, "no program headers"),
        ({"phnum": 0xFFFF}, "65535 program headers, at most 512"),
        ({"phnum": 3}, "truncated: the program header table"),
        ({"phoff": 2**64 - 1}, "truncated: the program header table"),
        ({"entry": 0}, "entry point at 0x0, which is outside its segments"),
        ({"entry": MIB + 1}, "entry point at 0x100001"),
    ],
)
def test_headers_that_cannot_be(memory: GuestMemory, kernel: KernelFile, options: dict[str, Any], found: str) -> None:
    assert found in refused(memory, kernel(elf([Phdr(data=b"\xf4")], **options)))


def test_truncated_at_every_byte(memory: GuestMemory, kernel: KernelFile) -> None:
    """Cutting the file anywhere is refused; where a whole structure is left, its name is in the message."""
    image = vmlinux()
    for size in range(1, len(image)):
        text = refused(memory, kernel(image[:size]))
        if size >= 64:
            assert "truncated" in text


def test_a_pvh_entry_out_of_reach(memory: GuestMemory, kernel: KernelFile) -> None:
    for entry in (0, MIB + 1, 0xFFFF_FFFF):
        text = refused(memory, kernel(pvh_elf(notes=pvh_note(entry))))
        assert f"PVH entry at {entry:#x}" in text
    wide = pvh_note(MIB | 1 << 32, size=8)
    assert "below 4 GiB" in refused(memory, kernel(pvh_elf(notes=wide)))


def test_pvh_without_its_note(memory: GuestMemory, kernel: KernelFile) -> None:
    assert "no PVH note" in refused(memory, kernel(elf([Phdr(data=b"\xf4")])), protocol="pvh")


@pytest.mark.parametrize("size", [4, 8])
@pytest.mark.parametrize("align", [0, 1, 4, 8, 16, 4096])
def test_the_pvh_note_behind_others(memory: GuestMemory, kernel: KernelFile, align: int, size: int) -> None:
    """Only an alignment of 8 means notes packed to 8."""
    packing = 8 if align == 8 else 4
    first = note(b"GNU", 3, b"build-id12345", packing)
    data = first + pvh_note(size=size, align=packing)
    image = elf([Phdr(data=b"\xf4"), Phdr(kind=PT_NOTE, data=data, align=align)])
    assert load(memory, kernel(image)).protocol == "pvh"


def test_notes_packed_to_4_in_a_segment_aligned_to_8(memory: GuestMemory, kernel: KernelFile) -> None:
    data = note(b"GNU", 3, b"12345678901") + pvh_note()
    image = elf([Phdr(data=b"\xf4"), Phdr(kind=PT_NOTE, data=data, align=8)])
    assert load(memory, kernel(image)).protocol == "pvh"


@pytest.mark.parametrize("name", [b"xen", b"Xe", b"XenX", b"GNU", b""])
def test_a_note_of_somebody_else_is_not_taken_for_pvh(memory: GuestMemory, kernel: KernelFile, name: bytes) -> None:
    assert load(memory, kernel(pvh_elf(notes=note(name, 18, struct.pack("<I", MIB))))).protocol == "linux64"


@pytest.mark.parametrize(
    "notes",
    [
        struct.pack("<III", 0xFFFF_FFFF, 4, 18) + b"Xen\0",
        struct.pack("<III", 4, 0xFFFF_FFFF, 18) + b"Xen\0",
        pvh_note()[:-1],
        note(b"GNU", 3, b"1234") + pvh_note()[:14],
    ],
)
def test_a_note_that_runs_past_its_segment(memory: GuestMemory, kernel: KernelFile, notes: bytes) -> None:
    assert "broken ELF note segment" in refused(memory, kernel(pvh_elf(notes=notes)))


def test_a_pvh_note_of_an_odd_size(memory: GuestMemory, kernel: KernelFile) -> None:
    assert "PVH entry note of 3 bytes" in refused(memory, kernel(pvh_elf(notes=note(b"Xen", 18, b"\0\0\x10"))))


def test_zeros_behind_the_last_note_are_padding(memory: GuestMemory, kernel: KernelFile) -> None:
    assert load(memory, kernel(pvh_elf(notes=pvh_note() + bytes(8)))).protocol == "pvh"


def test_too_many_notes(memory: GuestMemory, kernel: KernelFile) -> None:
    notes = Phdr(kind=PT_NOTE, data=note(b"GNU", 3, bytes(1 << 20)))
    text = refused(memory, kernel(elf([Phdr(data=b"\xf4"), notes])))
    assert "bytes of ELF notes, at most 1048576" in text


def test_a_linux_needs_ring_0_unless_its_note_says_otherwise(kernel: KernelFile) -> None:
    linux = note(b"Linux", 0x101, b"6.1\0") + pvh_note()
    for more, needs in ((b"", True), (note(b"pyvmm", 1, b"\1\0\0\0"), False), (note(b"pyvmm", 2, b"\1\0\0\0"), True)):
        assert probe(kernel(pvh_elf(notes=linux + more))).needs_ring0 is needs
    assert not probe(kernel(pvh_elf())).needs_ring0


def test_linux_is_told_by_its_notes_or_its_banner(kernel: KernelFile) -> None:
    assert probe(kernel(pvh_elf(notes=note(b"Linux", 0x101, b"6.1\0")))).needs_ring0
    assert probe(kernel(pvh_elf(notes=note(b"Xen", 6, b"linux\0")))).needs_ring0
    assert not probe(kernel(pvh_elf(notes=note(b"Xen", 6, b"NetBSD\0")))).needs_ring0
    across = bytes((1 << 20) - 300) + b"Linux version 6.1"
    for cut in range(0, 20):
        text = across[cut:] + bytes(300 << 10)
        assert probe(kernel(elf([Phdr(data=text)]))).needs_ring0
    assert not probe(kernel(elf([Phdr(data=bytes(2 << 20))]))).needs_ring0
    assert not probe(kernel(elf([Phdr(data=b"Linux version")]))).needs_ring0, "too small to be searched"
