# SPDX-License-Identifier: Apache-2.0
"""Where everything lies in guest physical memory when the first instruction runs.

All of it is below 1 MiB or in the hole between 3 and 4 GiB, so that kernels, initrds and bare guests linked
at 1 MiB find their place free. Ends are exclusive. No protocol fixes these addresses; most are those that
other micro-VM monitors use too, which kernels are tested with. Source: Documentation/arch/x86/boot.rst,
memory layout.
"""

from __future__ import annotations

PAGE = 0x1000

# Nothing lies below 0x500: Linux reads the BIOS data area there (the EBDA's segment at 0x40e).
GDT = 0x500
IDT = 0x540
DESCRIPTOR_TABLES_END = 0x600
PVH_START_INFO = 0x6000
PVH_MODLIST = 0x6040
PVH_MEMMAP = 0x6100
PVH_END = 0x7000
ZERO_PAGE = 0x7000
ZERO_PAGE_END = 0x8000
BOOT_STACK = 0x8FF0  # no protocol promises one, but a guest that pushes early must not hit a table
BOOT_STACK_END = 0x9000
PAGE_TABLES = 0x9000  # one PML4, one PDPT and four page directories: the identity map of 4 GiB in 2 MiB pages
PAGE_TABLES_END = 0xF000
CMDLINE = 0x20000
CMDLINE_END = 0x30000

# The last KiB of base memory is where Linux looks for the MP floating pointer; the table for 64 CPUs is
# longer, so everything from here to 1 MiB is firmware's and the memory map says so.
EBDA = 0x9FC00
MPTABLE = EBDA
VM_GENERATION = 0xDF000  # 16 random bytes, another value in every copy of the VM
RSDP = 0xE0000  # Linux scans 0xe0000..0xfffff on 16-byte steps where no protocol field names the RSDP
HIMEM = 0x100000

# The hole: RAM ends at 3 GiB at most and goes on at 4 GiB.
MMIO_HOLE = 0xC000_0000
MMIO_HOLE_END = 0x1_0000_0000
VIRTIO_MMIO = 0xD000_0000
VIRTIO_MMIO_STRIDE = 0x1000
IOAPIC = 0xFEC0_0000
LAPIC = 0xFEE0_0000


def dax_windows(memory: int) -> int:
    """Where shared memory regions that are not RAM begin: the first GiB boundary above `memory` bytes of it."""
    end = max(MMIO_HOLE_END, MMIO_HOLE_END - MMIO_HOLE + memory)
    return -(-end >> 30) << 30


#: ``(name, start, end)`` of what the VMM writes, which no segment of a kernel may overlap.
BOOT_AREAS: tuple[tuple[str, int, int], ...] = (
    ("descriptor tables", GDT, DESCRIPTOR_TABLES_END),
    ("PVH start info", PVH_START_INFO, PVH_END),
    ("zero page", ZERO_PAGE, ZERO_PAGE_END),
    ("boot stack", ZERO_PAGE_END, BOOT_STACK_END),
    ("page tables", PAGE_TABLES, PAGE_TABLES_END),
    ("command line", CMDLINE, CMDLINE_END),
    ("firmware tables", EBDA, HIMEM),
)
