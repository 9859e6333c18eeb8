# SPDX-License-Identifier: Apache-2.0
"""ELF kernels: read the headers, check every number in them, copy the segments into guest memory.

Source: System V ABI, chapters 4 and 5 (ELF header, program headers, notes); xen/include/public/elfnote.h.
"""

from __future__ import annotations

import struct
from itertools import pairwise

from boot import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from boot.source import Source
    from vmm.errors import ConfigError
    from vmm.memory import GuestMemory

    Read = Callable[[int, int, str], bytes]
    Fail = Callable[[str], ConfigError]

MAGIC = b"\x7fELF"
ET_EXEC, ET_DYN = 2, 3
EM_386, EM_X86_64 = 3, 62
PT_LOAD, PT_INTERP, PT_NOTE = 1, 3, 4
XEN_ELFNOTE_GUEST_OS = 6
XEN_ELFNOTE_PHYS32_ENTRY = 18
LINUX_BANNER = b"Linux version "
# Owner b"pyvmm": the kernel's own code runs in ring 3 (docs/software-kvm.md).
PYVMM_ELFNOTE_CPL3 = 1

# Real kernels have 2 to 20 program headers and under 2 KiB of notes.
MAX_PROGRAM_HEADERS = 512
MAX_NOTES = 1 << 20
# Nothing that has a Linux kernel in it is smaller than this.
_MIN_LINUX = 256 << 10

_EHDR = {1: struct.Struct("<HHIIIIIHHH"), 2: struct.Struct("<HHIQQQIHHH")}
_PHDR = {1: struct.Struct("<8I"), 2: struct.Struct("<IIQQQQQQ")}
_NOTE = struct.Struct("<III")
_MACHINES = {
    2: "SPARC", 8: "MIPS", 20: "PowerPC", 21: "64-bit PowerPC", 22: "s390", 40: "32-bit Arm", 183: "arm64",
    243: "RISC-V", 258: "LoongArch",
}  # fmt: skip
_TYPES = {1: "a relocatable object (a module?)", 4: "a core dump"}


class Segment:
    """One PT_LOAD: ``filesz`` bytes at ``offset`` of the file go to ``start``, zeros up to ``end``."""

    __slots__ = ("end", "filesz", "index", "offset", "start", "vaddr")

    def __init__(self, index: int, offset: int, vaddr: int, paddr: int, filesz: int, memsz: int) -> None:
        self.index = index
        self.offset = offset
        self.vaddr = vaddr
        self.start = paddr
        self.end = paddr + memsz
        self.filesz = filesz

    def __str__(self) -> str:
        return f"segment {self.index} ({self.start:#x} to {self.end:#x})"


class Elf:
    """The headers of an ELF file that passed :func:`parse`.

    :ivar bits: 32 or 64
    :ivar entry: ``e_entry`` as it stands; :meth:`linux64_entry` checks it
    :ivar segments: non-empty PT_LOADs, by rising address
    :ivar pvh_entry: where a PVH boot starts, None without the note
    :ivar ring0: what its notes say of that: a Linux needs it, unless one of ours says no; None: nothing
    """

    __slots__ = ("bits", "entry", "note_spans", "pvh_entry", "ring0", "segments")

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.entry = 0
        self.segments: list[Segment] = []
        self.note_spans: list[tuple[int, int, int]] = []
        self.pvh_entry: int | None = None
        self.ring0: bool | None = None

    def add_notes(self, data: bytes, align: int, fail: Fail) -> None:
        """Take what matters from the notes ``data`` of one PT_NOTE.

        :raises ConfigError: when a note runs past the end
        """
        # p_align of 8 is meant by some linkers and only said by others, whose notes are packed to 4.
        notes = _split_notes(data, 8) if align == 8 else None
        if notes is None:
            notes = _split_notes(data, 4)
        if notes is None:
            raise fail(f"has a broken ELF note segment: a note runs past its {len(data)} bytes")
        for name, kind, desc in notes:
            is_system = name == b"Xen" and kind == XEN_ELFNOTE_GUEST_OS
            if name == b"pyvmm" and kind == PYVMM_ELFNOTE_CPL3:
                self.ring0 = False
            elif name == b"Linux" or (is_system and desc.rstrip(b"\0").lower() == b"linux"):
                self.ring0 = self.ring0 is not False
            elif name == b"Xen" and kind == XEN_ELFNOTE_PHYS32_ENTRY:
                if len(desc) not in (4, 8):
                    raise fail(f"has a PVH entry note of {len(desc)} bytes; 4 or 8 are allowed")
                self.pvh_entry = int.from_bytes(desc, "little")

    def linux64_entry(self, fail: Fail) -> int:
        """Return the physical address of ``e_entry``.

        :raises ConfigError: when it is in no segment or above 4 GiB (not mapped), or the code is 32-bit
        """
        if self.bits != 64:
            raise fail("is a 32-bit ELF file without a PVH note; only that or a 64-bit entry can be booted")
        # A physical address, as Linux means it; or a virtual one, of a kernel linked high and loaded low.
        for virtual in (False, True):
            for segment in self.segments:
                offset = self.entry - (segment.vaddr if virtual else segment.start)
                if 0 <= offset < segment.end - segment.start:
                    if segment.start + offset >= layout.MMIO_HOLE_END:
                        raise fail(f"has its entry point at {segment.start + offset:#x}, above 4 GiB")
                    return segment.start + offset
        raise fail(f"has its entry point at {self.entry:#x}, which is outside its segments")

    def checked_pvh_entry(self, fail: Fail) -> int:
        """Return the physical address of the PVH entry.

        :raises ConfigError: without the note, or when its address is in no segment or above 4 GiB
        """
        entry = self.pvh_entry
        if entry is None:
            raise fail("has no PVH note (owner Xen, type 18); boot it by the linux64 protocol")
        if entry >> 32 or not any(segment.start <= entry < segment.end for segment in self.segments):
            raise fail(f"has its PVH entry at {entry:#x}, which is outside its segments below 4 GiB")
        return entry


def parse(read: Read, size: int, fail: Fail) -> Elf:
    """Read and check the ELF and program headers; notes are read by the caller (``note_spans``).

    :param read: returns bytes at (offset, size), or raises what ``fail`` makes, naming the third argument
    :param size: bytes in the whole file
    :raises ConfigError: when anything in them cannot be a kernel for this machine
    """
    ident = read(0, 16, "the ELF identification")
    wide = ident[4]
    if ident[:4] != MAGIC or wide not in _EHDR:
        raise fail(f"is not a valid ELF file: class {wide}, 1 (32-bit) or 2 (64-bit) is allowed")
    if ident[5] != 1:
        raise fail("is a big-endian ELF file, not x86-64")
    ehdr = _EHDR[wide]
    kind, machine, version, entry, phoff, _, _, _, phentsize, phnum = ehdr.unpack(read(16, ehdr.size, "the ELF header"))
    if machine not in (EM_386, EM_X86_64):
        raise fail(f"is built for {_MACHINES.get(machine, f'ELF machine {machine}')}, not x86-64")
    if kind not in (ET_EXEC, ET_DYN):
        raise fail(f"is {_TYPES.get(kind, f'an ELF file of type {kind}')}, not an executable kernel")
    if ident[6] != 1 or version != 1:
        raise fail(f"is an ELF file of version {ident[6]}/{version}, only 1 exists")
    phdr = _PHDR[wide]
    if phnum == 0:
        raise fail("has no program headers, so nothing to load")
    if phentsize != phdr.size:
        raise fail(f"has program headers of {phentsize} bytes each, {phdr.size} expected")
    if phnum > MAX_PROGRAM_HEADERS:
        raise fail(f"has {phnum} program headers, at most {MAX_PROGRAM_HEADERS} are allowed")
    elf = Elf(64 if wide == 2 else 32)
    table = read(phoff, phnum * phdr.size, "the program header table")
    interpreted = _program_headers(elf, table, size, fail)
    if not elf.segments:
        raise fail("has no loadable segment")
    elf.segments.sort(key=lambda segment: segment.start)
    for low, high in pairwise(elf.segments):
        if high.start < low.end:
            raise fail(f"has overlapping segments: {low} and {high}")
    if interpreted and elf.segments[0].start < layout.GDT:
        raise fail("is a user-space program (it asks for a dynamic linker), not a kernel")
    elf.entry = entry
    return elf


def _program_headers(elf: Elf, table: bytes, size: int, fail: Fail) -> bool:
    """Fill ``elf`` from ``table``; tell whether there is a PT_INTERP."""
    interpreted = False
    notes = 0
    top = 1 << elf.bits
    for index, fields in enumerate(_PHDR[elf.bits // 32].iter_unpack(table)):
        if elf.bits == 64:
            kind, _, offset, vaddr, paddr, filesz, memsz, align = fields
        else:
            kind, offset, vaddr, paddr, filesz, memsz, _, align = fields
        interpreted |= kind == PT_INTERP
        if kind not in (PT_LOAD, PT_NOTE):
            continue
        if filesz and offset + filesz > size:
            raise fail(f"is truncated: segment {index} ends at byte {offset + filesz}, the file at {size}")
        if kind == PT_NOTE:
            notes += filesz
            if notes > MAX_NOTES:
                raise fail(f"has {notes} bytes of ELF notes, at most {MAX_NOTES} are allowed")
            elf.note_spans.append((offset, filesz, align))
        else:
            if filesz > memsz:
                raise fail(f"has segment {index} with {filesz} bytes in the file but {memsz} in memory")
            if paddr + memsz > top or vaddr + memsz > top:
                raise fail(f"has segment {index} wrap around: {memsz:#x} bytes at {paddr:#x} ({vaddr:#x})")
            if memsz:
                elf.segments.append(Segment(index, offset, vaddr, paddr, filesz, memsz))
    return interpreted


def _split_notes(data: bytes, align: int) -> list[tuple[bytes, int, bytes]] | None:
    """Return (name, type, descriptor) of each note, or None where they do not fit ``data``.

    Fewer bytes than a note's header at the end are padding.
    """
    notes = []
    at = 0
    while at + _NOTE.size <= len(data):
        name_size, desc_size, kind = _NOTE.unpack_from(data, at)
        name = at + _NOTE.size
        desc = (name + name_size + align - 1) // align * align
        if name + name_size > len(data) or desc + desc_size > len(data):
            return None
        notes.append((data[name : name + name_size].rstrip(b"\0"), kind, data[desc : desc + desc_size]))
        at = (desc + desc_size + align - 1) // align * align
    return notes


def check_room(elf: Elf, memory: GuestMemory, fail: Fail) -> None:
    """Check that every segment lies in guest RAM and off what the VMM puts there itself.

    :raises ConfigError: naming the segment, and what is in its way
    """
    for segment in elf.segments:
        for name, start, end in layout.BOOT_AREAS:
            if segment.start < end and start < segment.end:
                raise fail(f"has {segment} on the {name} ({start:#x} to {end:#x}); link it at 1 MiB or above")
        if not any(r.gpa <= segment.start and segment.end <= r.gpa + r.size for r in memory.regions):
            ram = " and ".join(f"{r.gpa:#x} to {r.gpa + r.size:#x}" for r in memory.regions)
            raise fail(f"has {segment} outside guest memory ({ram}); give it more, or link it elsewhere")


def read_file(source: Source) -> Elf:
    """Return the checked headers and notes of the ELF file ``source``.

    :raises ConfigError: see :func:`parse`
    """
    elf = parse(source.read, source.size, source.fail)
    for offset, size, align in elf.note_spans:
        elf.add_notes(source.read(offset, size, "an ELF note segment"), align, source.fail)
    return elf


def load_file(elf: Elf, source: Source, memory: GuestMemory) -> None:
    """Read the segments of ``source`` straight into guest memory.

    What a segment has beyond its bytes in the file (.bss) is not written: fresh RAM is zero and :func:`parse`
    refused segments that overlap. So ``memory`` must be fresh, and :func:`check_room` must have passed.

    :raises ConfigError: when the file shrank
    """
    for segment in elf.segments:
        if segment.filesz:
            view = memory.slice(segment.start, segment.filesz)
            source.read_into(segment.offset, view, str(segment))


def has_linux_banner(source: Source) -> bool:
    """Search the whole file for the text that every Linux kernel greets with; slow (the file is read)."""
    step, more = 1 << 20, len(LINUX_BANNER)
    return source.size >= _MIN_LINUX and any(
        LINUX_BANNER in source.read(offset, min(step + more, source.size - offset), "the file")
        for offset in range(0, source.size, step)
    )
