# SPDX-License-Identifier: Apache-2.0
"""bzImage: check the setup header, and choose a load address.

Source: Documentation/arch/x86/boot.rst. Offsets are those in the file; the zero page shares them from 0x1f1
on.
"""

from __future__ import annotations

import struct

from boot import layout
from boot.params import HDR, LOADED_HIGH, LOADFLAGS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from boot.source import Source
    from vmm.memory import GuestMemory

HEADER_ROOM = 0x290  # what follows the setup header in the zero page begins here
BOOT_FLAG = 0xAA55
MAGIC = b"HdrS"
XLF_KERNEL_64 = 1 << 0
ENTRY_64 = 0x200  # from the load address
# xloadflags, which says whether there is a 64-bit entry, came with protocol 2.12 (Linux 3.8).
MIN_VERSION = 0x20C
SECTOR = 512
_FIELDS = struct.Struct("<B2xI6xH2x4sH")  # 0x1f1 setup_sects, syssize, boot_flag, header, version
_TAIL = struct.Struct("<IIBBHI12xII8xQI")  # 0x22c initrd_addr_max ... 0x260 init_size


class Setup:
    """The setup header of a bzImage that passed :func:`parse`; field names are the protocol's.

    :ivar header: the bytes from 0x1f1 on that belong in the zero page
    :ivar kernel: file offset of the protected-mode kernel; ``size`` its bytes
    :ivar payload: file offset of the compressed kernel; ``payload_length`` its bytes, 0 if the image has no payload
    """

    header: bytes
    kernel: int
    size: int
    payload: int
    payload_length: int
    initrd_addr_max: int
    kernel_alignment: int
    relocatable: bool
    cmdline_size: int
    pref_address: int
    init_size: int

    @property
    def needs(self) -> int:
        """Bytes that must be free from the load address on."""
        return max(self.init_size, self.size)


def parse(source: Source) -> Setup:
    """Read and check the setup header.

    :raises ConfigError: the file is not an x86-64 bzImage, or is truncated
    """
    head = source.read(0, 0x268, "the setup header")
    setup_sects, syssize, boot_flag, magic, version = _FIELDS.unpack_from(head, HDR)
    if boot_flag != BOOT_FLAG or magic != MAGIC:
        raise source.fail("is not a Linux kernel image: it lacks the setup header of boot protocol 2.00")
    number = f"{version >> 8}.{version & 0xFF:02}"
    if not head[LOADFLAGS] & LOADED_HIGH:
        raise source.fail(f"is a zImage (boot protocol {number}), only a bzImage can be loaded")
    if version < MIN_VERSION:
        raise source.fail(f"has boot protocol {number}; the 64-bit entry needs 2.12 (Linux 3.8) or later")
    setup = Setup()
    (
        setup.initrd_addr_max, setup.kernel_alignment, relocatable, _, xloadflags, setup.cmdline_size,
        payload_offset, setup.payload_length, setup.pref_address, setup.init_size,
    ) = _TAIL.unpack_from(head, 0x22C)  # fmt: skip
    setup.relocatable = relocatable != 0
    if not xloadflags & XLF_KERNEL_64:
        raise source.fail("is a 32-bit kernel; only x86-64 kernels can be loaded")
    align = setup.kernel_alignment
    if align == 0 or align & (align - 1):
        raise source.fail(f"has kernel_alignment {align:#x}, which is not a power of two")
    # 0 means 4 for the sake of very old kernels; the boot sector itself is not counted.
    setup.kernel = ((setup_sects or 4) + 1) * SECTOR
    if source.size <= setup.kernel:
        raise source.fail(f"is truncated: its setup ends at byte {setup.kernel}, the file at {source.size}")
    setup.size = source.size - setup.kernel
    # syssize rounds up to 16. A signature may follow the kernel; it is loaded too, as every boot loader does.
    if setup.size + 15 < syssize * 16:
        need = setup.kernel + syssize * 16
        raise source.fail(f"is truncated: the kernel ends at byte {need}, the file at {source.size}")
    if payload_offset + setup.payload_length > setup.size:
        raise source.fail(
            f"is truncated: the payload ends at byte {setup.kernel + payload_offset + setup.payload_length},"
            f" the file at {source.size}"
        )
    setup.payload = setup.kernel + payload_offset
    end = min(0x202 + head[0x201], HEADER_ROOM)
    setup.header = source.read(HDR, max(end, 0x268) - HDR, "the setup header")
    return setup


def choose_address(setup: Setup, memory: GuestMemory, source: Source) -> int:
    """Return where the kernel is to be loaded: pref_address wherever that is above the first MiB.

    A lower address than pref_address does not save memory: the kernel's own unpacker moves up to it.

    :raises ConfigError: when the kernel does not fit in guest memory
    """
    address = setup.pref_address
    if address < layout.HIMEM:
        if not setup.relocatable:
            raise source.fail(f"has to be loaded at {address:#x}, below 1 MiB, and is not relocatable")
        align = setup.kernel_alignment
        address = (layout.HIMEM + align - 1) // align * align
    end = address + setup.needs
    if end > layout.MMIO_HOLE:
        raise source.fail(f"needs {setup.needs >> 10} KiB at {address:#x}, not all of it below 3 GiB")
    if end > memory.regions[0].size:
        raise source.fail(
            f"needs {setup.needs >> 10} KiB at {address:#x}, so {-(-end >> 20)} MiB of guest memory or more;"
            f" there are {memory.size >> 20} MiB"
        )
    return address
