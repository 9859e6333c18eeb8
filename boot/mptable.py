# SPDX-License-Identifier: Apache-2.0
"""The MP table, for kernels without ACPI (``acpi=off``).

Source: Intel MultiProcessor Specification 1.4, chapter 4; Linux arch/x86/kernel/mpparse.c.
"""

from __future__ import annotations

import struct

from boot import layout
from boot.board import GSIS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.memory import GuestMemory

ISA_BUS = 0

_LAPIC_VERSION = 0x14
_IOAPIC_VERSION = 0x11
_CPU_ENABLED, _CPU_BOOT = 1, 2
_CPU_SIGNATURE = 0x600  # family 6; Linux takes both of these from CPUID
_CPU_FEATURES = 0x201  # FPU and APIC
_ALL_LAPICS = 0xFF
_INT, _NMI, _EXTINT = 0, 1, 3

_FLOATING = struct.Struct("<4sIBBB5s")
_CONFIG = struct.Struct("<4sHBB8s12sIHHIHBx")
_PROCESSOR = struct.Struct("<BBBBII8x")
_BUS = struct.Struct("<BB6s")
_IOAPIC = struct.Struct("<BBBBI")
_INTERRUPT = struct.Struct("<BBHBBBB")


def write(memory: GuestMemory, *, cpus: int) -> None:
    """Write floating pointer and table to guest memory, from ``layout.MPTABLE`` on.

    IOAPIC pin i is ISA interrupt i, as KVM wires it, so that an interrupt's number in Linux is its GSI.

    :param cpus: processors, at most ``vmm.config.vm.MAX_VCPUS``; processor i has local APIC id i, and 0 boots
    :raises GuestMemoryError: the guest has less than 1 MiB
    """
    entries = [
        _PROCESSOR.pack(0, cpu, _LAPIC_VERSION, _CPU_ENABLED | (0 if cpu else _CPU_BOOT), _CPU_SIGNATURE, _CPU_FEATURES)
        for cpu in range(cpus)
    ]
    entries.append(_BUS.pack(1, ISA_BUS, b"ISA   "))
    ioapic_id = cpus  # the first that no CPU has; Linux writes it to the chip
    entries.append(_IOAPIC.pack(2, ioapic_id, _IOAPIC_VERSION, 1, layout.IOAPIC))
    entries += [_INTERRUPT.pack(3, _INT, 0, ISA_BUS, pin, ioapic_id, pin) for pin in range(GSIS)]
    entries.append(_INTERRUPT.pack(4, _EXTINT, 0, ISA_BUS, 0, _ALL_LAPICS, 0))
    entries.append(_INTERRUPT.pack(4, _NMI, 0, ISA_BUS, 0, _ALL_LAPICS, 1))
    body = b"".join(entries)
    config = _CONFIG.pack(
        b"PCMP", _CONFIG.size + len(body), 4, 0, b"PYVMM   ", b"PYVMM       ", 0, 0, len(entries), layout.LAPIC, 0, 0
    )
    table = bytearray(config + body)
    table[7] = -sum(table) & 0xFF
    at = layout.MPTABLE + _FLOATING.size
    pointer = bytearray(_FLOATING.pack(b"_MP_", at, 1, 4, 0, bytes(5)))
    pointer[10] = -sum(pointer) & 0xFF
    memory.write(at, table)
    memory.write(layout.MPTABLE, pointer)
