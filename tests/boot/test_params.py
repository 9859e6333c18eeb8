# SPDX-License-Identifier: Apache-2.0
"""The zero page, the memory map and PVH's start info, compared with the headers that kernels use."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from boot import bzimage as bz
from boot import layout, params
from boot.load import load
from tests.boot.kernel_images import MIB, bzimage, compress, pvh_elf, vmlinux
from vmm.memory import GuestMemory

GIB = 1 << 30
RAM, RESERVED = 1, 2

# Our name for a field, and the kernel's.
FIELDS = {
    "ACPI_RSDP_ADDR": "acpi_rsdp_addr",
    "EXT_RAMDISK_IMAGE": "ext_ramdisk_image",
    "EXT_RAMDISK_SIZE": "ext_ramdisk_size",
    "E820_ENTRIES": "e820_entries",
    "HDR": "hdr",
    "BOOT_FLAG": "hdr.boot_flag",
    "HEADER": "hdr.header",
    "VERSION": "hdr.version",
    "TYPE_OF_LOADER": "hdr.type_of_loader",
    "LOADFLAGS": "hdr.loadflags",
    "CODE32_START": "hdr.code32_start",
    "RAMDISK_IMAGE": "hdr.ramdisk_image",
    "RAMDISK_SIZE": "hdr.ramdisk_size",
    "CMD_LINE_PTR": "hdr.cmd_line_ptr",
    "KERNEL_ALIGNMENT": "hdr.kernel_alignment",
    "CMDLINE_SIZE": "hdr.cmdline_size",
    "E820_TABLE": "e820_table",
}
# What boot/bzimage.py reads at fixed places of the file, and where its two formats say that is.
READ = {
    "setup_sects": 0x1F1,
    "syssize": 0x1F4,
    "boot_flag": 0x1FE,
    "header": 0x202,
    "version": 0x206,
    "loadflags": 0x211,
    "initrd_addr_max": 0x22C,
    "kernel_alignment": 0x230,
    "relocatable_kernel": 0x234,
    "min_alignment": 0x235,
    "xloadflags": 0x236,
    "cmdline_size": 0x238,
    "payload_offset": 0x248,
    "payload_length": 0x24C,
    "pref_address": 0x258,
    "init_size": 0x260,
}


@pytest.fixture(scope="module")
def uapi(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """What the system's <asm/bootparam.h> says, as the C compiler has it."""
    import cffi

    ffi = cffi.FFI()
    offsets = {**{name: field for name, field in FIELDS.items()}, **{name: f"hdr.{name}" for name in READ}}
    wanted = {f"at_{name}": f"offsetof(struct boot_params, {field})" for name, field in offsets.items()}
    wanted |= {
        "size": "sizeof(struct boot_params)",
        "entry": "sizeof(struct boot_e820_entry)",
        "header_end": "offsetof(struct boot_params, edd_mbr_sig_buffer)",
        "loaded_high": "LOADED_HIGH",
        "kaslr_flag": "KASLR_FLAG",
        "kernel_64": "XLF_KERNEL_64",
        "e820_max": "E820_MAX_ENTRIES_ZEROPAGE",
    }
    ffi.cdef("".join(f"long long get_{name}(void);" for name in wanted))
    ffi.set_source(
        "bootparam_oracle",
        "#include <stddef.h>\n#include <asm/bootparam.h>\n"
        + "\n".join(f"long long get_{name}(void) {{ return {value}; }}" for name, value in wanted.items()),
    )
    path = ffi.compile(tmpdir=str(tmp_path_factory.mktemp("oracle")))
    import importlib.util

    spec = importlib.util.spec_from_file_location("bootparam_oracle", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {name: getattr(module.lib, f"get_{name}")() for name in wanted}


def test_the_offsets_are_those_of_the_kernels_header(uapi: dict[str, int]) -> None:
    for name in FIELDS:
        assert getattr(params, name) == uapi[f"at_{name}"], name
    for name, offset in READ.items():
        assert offset == uapi[f"at_{name}"], name
    assert uapi["size"] == params.SIZE
    assert uapi["entry"] == params._E820.size
    assert uapi["header_end"] == bz.HEADER_ROOM
    assert uapi["loaded_high"] == params.LOADED_HIGH
    assert uapi["kaslr_flag"] == params.KASLR_FLAG
    assert uapi["kernel_64"] == bz.XLF_KERNEL_64
    assert uapi["e820_max"] >= 4


def test_what_is_read_from_a_bzimage_is_what_stands_at_those_offsets(tmp_path: Path) -> None:
    """Each field holds another number, so a format string that is off by a byte cannot pass."""
    path = tmp_path / "bzImage"
    image = bytearray(bzimage(bytes(3 * MIB), payload_offset=0x111))
    values = {
        "initrd_addr_max": ("<I", 0x7654_3210),
        "kernel_alignment": ("<I", 0x40_0000),
        "cmdline_size": ("<I", 1999),
        "payload_offset": ("<I", 0x1234),
        "payload_length": ("<I", 0x23_4567),
        "pref_address": ("<Q", 0x140_0000),
        "init_size": ("<I", 0x345_6000),
    }
    for name, (form, value) in values.items():
        struct.pack_into(form, image, READ[name], value)
    path.write_bytes(image)
    from boot.source import Source

    with Source("kernel", path) as source:
        setup = bz.parse(source)
    assert setup.payload == setup.kernel + 0x1234
    for name in values.keys() - {"payload_offset"}:
        assert getattr(setup, name) == values[name][1], name


def page_of(memory: GuestMemory) -> bytes:
    return memory.read(layout.ZERO_PAGE, 4096)


def number(page: bytes, offset: int, form: str = "<I") -> int:
    value: int = struct.unpack_from(form, page, offset)[0]
    return value


def test_the_zero_page_of_a_bzimage(tmp_path: Path) -> None:
    path, initrd = tmp_path / "bzImage", tmp_path / "initrd"
    image = bytearray(bzimage(loadflags=3))
    image[0x240:0x248] = b"hardware"  # hardware_subarch_data: the kernel's own, to be handed back
    image[0x1EF] = 0xFF  # the sentinel just before the header, which a loader must not copy
    assert 0x202 + image[0x201] == 0x26C
    image[0x268:0x270] = b"lastcode"  # the jump over the header says where it ends: after these four
    path.write_bytes(image)
    initrd.write_bytes(b"i" * 5000)
    with GuestMemory(64 * MIB) as memory:
        loaded = load(memory, path, initrd_path=initrd, cmdline="quiet", unpack="never")
        page = page_of(memory)
        assert memory.read(layout.CMDLINE, 6) == b"quiet\0"
    assert page[0x240:0x248] == b"hardware"
    assert page[0x268:0x2D0] == b"last" + bytes(100)
    assert page[: params.ACPI_RSDP_ADDR] == bytes(params.ACPI_RSDP_ADDR)
    assert page[0x1E9:0x1F1] == bytes(8)
    assert number(page, params.ACPI_RSDP_ADDR, "<Q") == 0xE0000
    assert page[params.TYPE_OF_LOADER] == 0xFF
    assert page[params.LOADFLAGS] == 1, "KASLR_FLAG is the unpacker's to set"
    assert number(page, params.CODE32_START) == 16 * MIB
    assert number(page, params.CMD_LINE_PTR) == layout.CMDLINE
    assert (number(page, params.RAMDISK_IMAGE), number(page, params.RAMDISK_SIZE)) == loaded.initrd
    assert (number(page, params.EXT_RAMDISK_IMAGE), number(page, params.EXT_RAMDISK_SIZE)) == (0, 0)
    assert page[params.EXT_RAMDISK_SIZE + 4 : params.E820_ENTRIES] == bytes(0x120)


def test_the_zero_page_of_an_elf_kernel_says_what_a_header_would(tmp_path: Path) -> None:
    path = tmp_path / "vmlinux"
    path.write_bytes(vmlinux())
    with GuestMemory(64 * MIB) as memory:
        load(memory, path, protocol="linux64")
        page = page_of(memory)
    assert number(page, params.BOOT_FLAG, "<H") == 0xAA55
    assert page[params.HEADER : params.HEADER + 4] == b"HdrS"
    assert number(page, params.VERSION, "<H") == 0x20F
    assert page[params.TYPE_OF_LOADER] == 0xFF
    assert page[params.LOADFLAGS] == 1
    assert number(page, params.RAMDISK_SIZE) == 0
    assert number(page, params.ACPI_RSDP_ADDR, "<Q") == layout.RSDP


def test_an_unpacked_kernel_gets_the_header_of_its_bzimage(tmp_path: Path) -> None:
    path = tmp_path / "bzImage"
    image = bytearray(bzimage(compress("lz4", vmlinux())))
    image[0x240:0x248] = b"hardware"
    path.write_bytes(image)
    with GuestMemory(64 * MIB) as memory:
        assert load(memory, path).unpacked == "lz4"
        assert page_of(memory)[0x240:0x248] == b"hardware"


@pytest.mark.parametrize(
    ("size", "high"),
    [
        (MIB, []),
        (2 * MIB, [(MIB, MIB, RAM)]),
        (512 * MIB, [(MIB, 511 * MIB, RAM)]),
        (3 * GIB, [(MIB, 3 * GIB - MIB, RAM)]),
        (3 * GIB + 4096, [(MIB, 3 * GIB - MIB, RAM), (4 * GIB, 4096, RAM)]),
        (64 * GIB, [(MIB, 3 * GIB - MIB, RAM), (4 * GIB, 61 * GIB, RAM)]),
    ],
)
def test_the_memory_map(size: int, high: list[tuple[int, int, int]]) -> None:
    with GuestMemory(size) as memory:
        entries = params.e820(memory)
        assert entries == [(0, 0x9FC00, RAM), (0x9FC00, 0x60400, RESERVED), *high]
        page = params.zero_page(memory, params.elf_setup_header(), load_address=0)
    assert page[params.E820_ENTRIES] == len(entries)
    for index, entry in enumerate(entries):
        assert struct.unpack_from("<QQI", page, params.E820_TABLE + 20 * index) == entry


def test_pvh_start_info(tmp_path: Path) -> None:
    """hvm_start_info, version 1, field by field as xen/include/public/arch-x86/hvm/start_info.h draws it."""
    path, initrd = tmp_path / "guest", tmp_path / "initrd"
    path.write_bytes(pvh_elf())
    initrd.write_bytes(b"i" * 5000)
    with GuestMemory(4 * GIB) as memory:
        loaded = load(memory, path, initrd_path=initrd, cmdline="a=b")
        start = memory.read(layout.PVH_START_INFO, 56)
        assert start[0:4] == b"xEn3".replace(b"E", bytes((0x80 | ord("E"),)))
        assert start[4:8] == b"\1\0\0\0"
        assert start[8:12] == bytes(4)
        modules = number(start, 12)
        modlist, cmdline, rsdp, memmap = struct.unpack_from("<4Q", start, 16)
        entries = number(start, 48)
        assert start[52:56] == bytes(4)
        assert (modules, rsdp, entries) == (1, 0xE0000, 4)
        assert memory.read(cmdline, 4) == b"a=b\0"
        assert struct.unpack("<4Q", memory.read(modlist, 32)) == (*loaded.initrd, 0, 0)
        table = list(struct.iter_unpack("<QQII", memory.read(memmap, 24 * entries)))
        assert table == [(*entry, 0) for entry in params.e820(memory)]
        assert layout.PVH_START_INFO + 56 <= modlist and modlist + 32 <= memmap
        assert memmap + 24 * entries <= layout.PVH_END


def test_pvh_start_info_without_initrd(tmp_path: Path) -> None:
    path = tmp_path / "guest"
    path.write_bytes(pvh_elf())
    with GuestMemory(2 * MIB) as memory:
        load(memory, path)
        start = memory.read(layout.PVH_START_INFO, 56)
    assert number(start, 12) == 0
    assert struct.unpack_from("<4Q", start, 16) == (0, layout.CMDLINE, layout.RSDP, layout.PVH_MEMMAP)


def test_the_boot_areas_do_not_overlap_and_lie_in_low_memory() -> None:
    ends = [0]
    for name, start, end in sorted(layout.BOOT_AREAS, key=lambda area: area[1]):
        assert ends[-1] <= start < end <= layout.HIMEM, name
        ends.append(end)


def test_what_the_cpu_is_set_up_with_lies_in_the_boot_areas() -> None:
    from boot import cpu
    from tests.boot.loader_input import Watched
    from vmm.kvm.abi import kvm_regs, kvm_sregs

    with Watched(2 * MIB) as memory:
        cpu.enter_linux64(memory, kvm_sregs(), kvm_regs(), entry=MIB)
        cpu.enter_pvh(memory, kvm_sregs(), kvm_regs(), entry=MIB)
        assert memory.writes
        for start, end in memory.writes:
            names = [name for name, low, high in layout.BOOT_AREAS if low <= start and end <= high]
            assert names in (["descriptor tables"], ["page tables"])
    assert layout.ZERO_PAGE_END < layout.BOOT_STACK <= layout.BOOT_STACK_END
