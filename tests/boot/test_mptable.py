# SPDX-License-Identifier: Apache-2.0
"""The MP table, walked as Linux's mpparse.c walks it."""

from __future__ import annotations

import struct

import pytest

from boot import layout, mptable
from vmm.memory import GuestMemory

LENGTHS = {0: 20, 1: 8, 2: 8, 3: 8, 4: 8}


def written(cpus: int) -> tuple[bytes, list[bytes]]:
    """Write the table; return its header and entries, found from the last KiB of base memory."""
    with GuestMemory(2 << 20) as memory:
        mptable.write(memory, cpus=cpus)
        base = memory.read(0x9FC00, 0x400)
        at = next(at for at in range(0, 0x400, 16) if base[at : at + 4] == b"_MP_")
        pointer = base[at : at + 16]
        assert sum(pointer) & 0xFF == 0
        assert pointer[8:16] == b"\x01\x04" + pointer[10:11] + bytes(5)  # 16 bytes, MP 1.4, no default configuration
        table = struct.unpack_from("<I", pointer, 4)[0]
        header = memory.read(table, 44)
        length = struct.unpack_from("<H", header, 4)[0]
        assert layout.EBDA <= table and table + length <= layout.RSDP
        whole = memory.read(table, length)
        assert sum(whole) & 0xFF == 0
        assert not any(memory.read(table + length, 0x1000))
    entries, at = [], 44
    while at < length:
        entries.append(whole[at : at + LENGTHS[whole[at]]])
        at += LENGTHS[whole[at]]
    assert at == length
    return header, entries


def test_header() -> None:
    header, entries = written(2)
    assert header[:4] == b"PCMP"
    assert header[6] == 4
    assert header[8:28] == b"PYVMM   PYVMM       "
    assert struct.unpack_from("<IHHII", header, 28) == (0, 0, len(entries), 0xFEE00000, 0)


@pytest.mark.parametrize("cpus", [1, 2, 64, 254])
def test_processors(cpus: int) -> None:
    _, entries = written(cpus)
    processors = [entry for entry in entries if entry[0] == 0]
    assert [entry[1] for entry in processors] == list(range(cpus)), "local APIC ids"
    assert [entry[3] for entry in processors] == [3] + [1] * (cpus - 1), "enabled, the first boots"


def test_bus_and_ioapic() -> None:
    _, entries = written(1)
    assert entries[1:3] == [b"\x01\x00ISA   ", b"\x02\x01\x11\x01\x00\x00\xc0\xfe"]


def test_every_pin_is_the_isa_interrupt_of_its_number() -> None:
    _, entries = written(1)
    assert entries[3:27] == [bytes((3, 0, 0, 0, 0, pin, 1, pin)) for pin in range(24)]


def test_local_interrupts() -> None:
    _, entries = written(1)
    assert entries[27:] == [b"\x04\x03\x00\x00\x00\x00\xff\x00", b"\x04\x01\x00\x00\x00\x00\xff\x01"]
