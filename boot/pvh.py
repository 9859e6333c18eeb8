# SPDX-License-Identifier: Apache-2.0
"""What a PVH guest finds by ebx: hvm_start_info, version 1.

Source: xen/include/public/arch-x86/hvm/start_info.h; docs/misc/pvh.pandoc for the state of the CPU.
"""

from __future__ import annotations

import struct

from boot import layout, params

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.memory import GuestMemory

MAGIC = 0x336E_C578
VERSION = 1
_START_INFO = struct.Struct("<IIIIQQQQII")
_MODULE = struct.Struct("<QQQQ")
_MEMMAP = struct.Struct("<QQII")


def write_start_info(memory: GuestMemory, *, initrd: tuple[int, int] = (0, 0), rsdp: int = 0) -> int:
    """Write the start info, its memory map and module list to guest memory; return the address for ebx.

    The command line is the caller's to write, at ``layout.CMDLINE``.

    :param initrd: guest physical address and bytes of the one module, size 0 for none
    :param rsdp: guest physical address of the ACPI RSDP, 0 for none
    """
    entries = params.e820(memory)  # Xen took the types of e820
    memory.write(layout.PVH_MEMMAP, b"".join(_MEMMAP.pack(*entry, 0) for entry in entries))
    modules = 0
    if initrd[1]:
        modules = 1
        memory.write(layout.PVH_MODLIST, _MODULE.pack(*initrd, 0, 0))
    memory.write(
        layout.PVH_START_INFO,
        _START_INFO.pack(
            MAGIC, VERSION, 0, modules, layout.PVH_MODLIST if modules else 0, layout.CMDLINE, rsdp,
            layout.PVH_MEMMAP, len(entries), 0,
        ),
    )  # fmt: skip
    return layout.PVH_START_INFO
