# SPDX-License-Identifier: Apache-2.0
"""What a kernel is told of its machine: Linux's zero page (struct boot_params) or PVH's hvm_start_info, version 1.

Source: arch/x86/include/uapi/asm/bootparam.h, Documentation/arch/x86/zero-page.rst;
xen/include/public/arch-x86/hvm/start_info.h, docs/misc/pvh.pandoc.
"""

from __future__ import annotations

import struct

from boot import layout
from vmm.cmdline import DEFAULT_LIMIT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.memory import GuestMemory

SIZE = 4096
ACPI_RSDP_ADDR = 0x070
EXT_RAMDISK_IMAGE = 0x0C0
EXT_RAMDISK_SIZE = 0x0C4
E820_ENTRIES = 0x1E8
HDR = 0x1F1
BOOT_FLAG = 0x1FE
HEADER = 0x202
VERSION = 0x206
TYPE_OF_LOADER = 0x210
LOADFLAGS = 0x211
CODE32_START = 0x214
RAMDISK_IMAGE = 0x218
RAMDISK_SIZE = 0x21C
CMD_LINE_PTR = 0x228
KERNEL_ALIGNMENT = 0x230
CMDLINE_SIZE = 0x238
E820_TABLE = 0x2D0

E820_RAM, E820_RESERVED = 1, 2
LOADER_UNDEFINED = 0xFF  # no id is assigned to this loader
LOADED_HIGH = 1 << 0
KASLR_FLAG = 1 << 1

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_E820 = struct.Struct("<QQI")

PVH_MAGIC = 0x336E_C578
PVH_VERSION = 1
_START_INFO = struct.Struct("<IIIIQQQQII")
_MODULE = struct.Struct("<QQQQ")
_MEMMAP = struct.Struct("<QQII")


def e820(memory: GuestMemory) -> list[tuple[int, int, int]]:
    """Return the memory map as (address, size, type) by rising address."""
    entries = [(0, layout.EBDA, E820_RAM), (layout.EBDA, layout.HIMEM - layout.EBDA, E820_RESERVED)]
    for region in memory.regions:
        start = max(region.gpa, layout.HIMEM)
        if region.gpa + region.size > start:
            entries.append((start, region.gpa + region.size - start, E820_RAM))
    return entries


def elf_setup_header() -> bytes:
    """Return a setup header, from 0x1f1 on, for a kernel that came without one: what Linux reads."""
    page = bytearray(0x268)
    page[BOOT_FLAG : BOOT_FLAG + 2] = b"\x55\xaa"
    page[HEADER : HEADER + 4] = b"HdrS"
    page[VERSION : VERSION + 2] = b"\x0f\x02"
    _U32.pack_into(page, KERNEL_ALIGNMENT, 0x20_0000)
    _U32.pack_into(page, CMDLINE_SIZE, DEFAULT_LIMIT)
    return bytes(page[HDR:])


def zero_page(memory: GuestMemory, header: bytes, *, load_address: int, initrd: tuple[int, int] = (0, 0)) -> bytes:
    """Return the 4096 bytes of the zero page.

    :param header: the kernel's setup header, from 0x1f1 on; all else starts as zero, as the protocol demands
    :param load_address: load address of the kernel
    :param initrd: guest physical address and bytes
    """
    page = bytearray(SIZE)
    page[HDR : HDR + len(header)] = header
    page[TYPE_OF_LOADER] = LOADER_UNDEFINED
    # KASLR_FLAG is a message of the kernel's unpacker to the kernel, which no loader may forge.
    page[LOADFLAGS] = page[LOADFLAGS] & ~KASLR_FLAG | LOADED_HIGH
    _U32.pack_into(page, CODE32_START, load_address & 0xFFFF_FFFF)
    _U32.pack_into(page, CMD_LINE_PTR, layout.CMDLINE)
    address, size = initrd
    _U32.pack_into(page, RAMDISK_IMAGE, address & 0xFFFF_FFFF)
    _U32.pack_into(page, RAMDISK_SIZE, size & 0xFFFF_FFFF)
    _U32.pack_into(page, EXT_RAMDISK_IMAGE, address >> 32)
    _U32.pack_into(page, EXT_RAMDISK_SIZE, size >> 32)
    _U64.pack_into(page, ACPI_RSDP_ADDR, layout.RSDP)
    entries = e820(memory)
    page[E820_ENTRIES] = len(entries)
    for index, entry in enumerate(entries):
        _E820.pack_into(page, E820_TABLE + index * _E820.size, *entry)
    return bytes(page)


def write_start_info(memory: GuestMemory, *, initrd: tuple[int, int] = (0, 0)) -> None:
    """Write PVH's start info, its memory map and module list to guest memory.

    The command line is the caller's to write, at ``layout.CMDLINE``.

    :param initrd: guest physical address and bytes of the one module, size 0 for none
    """
    entries = e820(memory)  # Xen took the types of e820
    memory.write(layout.PVH_MEMMAP, b"".join(_MEMMAP.pack(*entry, 0) for entry in entries))
    modules = 0
    if initrd[1]:
        modules = 1
        memory.write(layout.PVH_MODLIST, _MODULE.pack(*initrd, 0, 0))
    memory.write(
        layout.PVH_START_INFO,
        _START_INFO.pack(
            PVH_MAGIC, PVH_VERSION, 0, modules, layout.PVH_MODLIST if modules else 0, layout.CMDLINE, layout.RSDP,
            layout.PVH_MEMMAP, len(entries), 0,
        ),
    )  # fmt: skip
