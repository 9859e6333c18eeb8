# SPDX-License-Identifier: Apache-2.0
"""Writers of small kernels, right by default and wrong in one place when asked."""

from __future__ import annotations

import bz2
import gzip
import lzma
import struct
from typing import NamedTuple

PT_LOAD, PT_INTERP, PT_NOTE = 1, 3, 4
PVH_NOTE = 18
MIB = 1 << 20


class Phdr(NamedTuple):
    """One program header; ``offset`` and ``filesz`` of None are filled in from ``data``."""

    kind: int = PT_LOAD
    paddr: int = MIB
    data: bytes = b""
    memsz: int | None = None
    vaddr: int | None = None
    align: int = 4
    offset: int | None = None
    filesz: int | None = None


def note(name: bytes, kind: int, desc: bytes, align: int = 4) -> bytes:
    """One ELF note, its parts padded to ``align``."""

    def pad(data: bytes) -> bytes:
        return data + bytes(-len(data) % align)

    header = struct.pack("<III", len(name) + 1, len(desc), kind)
    # The name starts at 12; what is padded is its end.
    return pad(header + name + b"\0") + pad(desc)


def pvh_note(entry: int = MIB, size: int = 4, align: int = 4) -> bytes:
    """The note that says where a PVH boot starts."""
    return note(b"Xen", PVH_NOTE, entry.to_bytes(size, "little"), align)


def elf(
    phdrs: list[Phdr],
    *,
    entry: int = MIB,
    bits: int = 64,
    kind: int = 2,
    machine: int | None = None,
    ident: bytes = b"",
    phentsize: int | None = None,
    phnum: int | None = None,
    phoff: int | None = None,
    version: int = 1,
) -> bytes:
    """An ELF file with these program headers, their data behind the table."""
    wide = bits == 64
    ehsize, phsize = (64, 56) if wide else (52, 32)
    at = ehsize + phsize * len(phdrs)
    table, body = b"", b""
    for p in phdrs:
        offset = at + len(body) if p.offset is None else p.offset
        filesz = len(p.data) if p.filesz is None else p.filesz
        memsz = filesz if p.memsz is None else p.memsz
        vaddr = p.paddr if p.vaddr is None else p.vaddr
        if wide:
            table += struct.pack("<IIQQQQQQ", p.kind, 7, offset, vaddr, p.paddr, filesz, memsz, p.align)
        else:
            table += struct.pack("<8I", p.kind, offset, vaddr, p.paddr, filesz, memsz, 7, p.align)
        body += p.data
    start = ident or b"\x7fELF" + bytes((2 if wide else 1, 1, 1)) + bytes(9)
    header = start + struct.pack(
        "<HHIQQQIHHHHHH" if wide else "<HHIIIIIHHHHHH",
        kind,
        (62 if wide else 3) if machine is None else machine,
        version,
        entry,
        ehsize if phoff is None else phoff,
        0,
        0,
        ehsize,
        phsize if phentsize is None else phentsize,
        len(phdrs) if phnum is None else phnum,
        0,
        0,
        0,
    )
    return header + table + body


def pvh_elf(code: bytes = b"\xf4", *, bits: int = 64, notes: bytes | None = None) -> bytes:
    """The smallest guest: code at 1 MiB and the note."""
    return elf(
        [Phdr(data=code, paddr=MIB), Phdr(kind=PT_NOTE, data=pvh_note() if notes is None else notes)],
        bits=bits,
    )


def vmlinux(text: bytes = b"\x90" * 64, *, paddr: int = 16 * MIB, gap: int = 2 * MIB, bss: int = 8192) -> bytes:
    """What Linux looks like: linked high, loaded at 16 MiB, notes inside the text, .bss at the end."""
    notes = note(b"Xen", 6, b"linux\0") + pvh_note(paddr + 0x10)
    high = 0xFFFFFFFF80000000
    image = elf(
        [
            Phdr(data=text + notes, paddr=paddr, vaddr=high + paddr, align=0x200000),
            Phdr(data=b"data" * 64, paddr=paddr + gap, vaddr=high + paddr + gap, memsz=256 + bss),
            Phdr(kind=PT_NOTE, data=b"", offset=64 + 3 * 56 + len(text), filesz=len(notes), paddr=0, memsz=0),
        ],
        entry=paddr,
    )
    return image


def compress(method: str, data: bytes) -> bytes:
    """Compress as the kernel's build does: the method's format, then the size in four bytes (gzip has it)."""
    size = struct.pack("<I", len(data))
    match method:
        case "gzip":
            return gzip.compress(data, mtime=0)
        case "xz":
            return lzma.compress(data, lzma.FORMAT_XZ, lzma.CHECK_CRC32) + size
        case "lzma":
            return lzma.compress(data, lzma.FORMAT_ALONE) + size
        case "bzip2":
            return bz2.compress(data) + size
        case "zstd":
            import zstandard

            return zstandard.ZstdCompressor(write_content_size=False).compress(data) + size
        case "lz4":
            from lz4 import block

            out = b"\x02\x21\x4c\x18"
            for at in range(0, len(data), 8 << 20):
                packed = block.compress(data[at : at + (8 << 20)], store_size=False)
                out += struct.pack("<I", len(packed)) + packed
            return out + size
    raise ValueError(method)


def bzimage(
    payload: bytes = b"\xcc" * 512,
    *,
    setup_sects: int = 1,
    boot_flag: int = 0xAA55,
    magic: bytes = b"HdrS",
    version: int = 0x20F,
    loadflags: int = 1,
    initrd_addr_max: int = 0x7FFF_FFFF,
    kernel_alignment: int = 0x20_0000,
    relocatable: int = 1,
    xloadflags: int = 1,
    cmdline_size: int = 2047,
    payload_offset: int = 0x240,
    payload_length: int | None = None,
    pref_address: int = 16 * MIB,
    init_size: int = 8 * MIB,
    syssize: int | None = None,
    release: bytes = b"6.1.0-test (someone@here) #1",
    start: bytes = b"MZ",
) -> bytes:
    """A bzImage: boot sector, setup, and a kernel of a stub and ``payload``."""
    setup = bytearray(((setup_sects or 4) + 1) * 512)
    kernel = bytes(payload_offset) + payload
    kernel += bytes(-len(kernel) % 16)
    setup[: len(start)] = start
    setup[0x1F1] = setup_sects
    struct.pack_into("<I", setup, 0x1F4, len(kernel) // 16 if syssize is None else syssize)
    struct.pack_into("<H", setup, 0x1FE, boot_flag)
    setup[0x200:0x202] = b"\xeb\x6a"  # the header ends at 0x202 + 0x6a
    setup[0x202:0x206] = magic
    struct.pack_into("<H", setup, 0x206, version)
    setup[0x211] = loadflags
    struct.pack_into("<I", setup, 0x214, 0x10_0000)
    struct.pack_into(
        "<IIBBHI", setup, 0x22C, initrd_addr_max, kernel_alignment, relocatable, 21, xloadflags, cmdline_size
    )
    struct.pack_into("<II", setup, 0x248, payload_offset, len(payload) if payload_length is None else payload_length)
    struct.pack_into("<QI", setup, 0x258, pref_address, init_size)
    if release:
        struct.pack_into("<H", setup, 0x20E, 0x300 - 0x200)
        setup[0x300 : 0x300 + len(release)] = release
    return bytes(setup) + kernel
