# SPDX-License-Identifier: Apache-2.0
"""Address spaces: who answers, who may claim what."""

from __future__ import annotations

import gc
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.bus import Bus
from vmm.errors import ConfigError


class Device:
    def __init__(self) -> None:
        self.log: list[tuple[str, int, int]] = []

    def read(self, offset: int, data: memoryview) -> None:
        self.log.append(("read", offset, len(data)))
        data[:] = bytes(len(data))

    def write(self, offset: int, data: memoryview) -> None:
        self.log.append(("write", offset, len(data)))


def test_claimed_port_names_both_devices() -> None:
    bus = Bus("pio", 1 << 16)
    bus.add(0x3F8, 8, Device(), "serial")
    with pytest.raises(ConfigError, match="pio range 0x3ff-0x400: wanted by mine, claimed by serial at 0x3f8-0x3ff"):
        bus.add(0x3FF, 2, Device(), "mine")
    bus.add(0x400, 2, Device(), "mine")


@pytest.mark.parametrize(("start", "size"), [(0, 0), (0x10000, 1), (0xFFFF, 2), (0, 0x10001), (0xFFFFFFFF, 0xFFFFFFFF)])
def test_range_must_lie_in_the_space(start: int, size: int) -> None:
    with pytest.raises(ConfigError, match="must lie within 0-0xffff"):
        Bus("pio", 1 << 16).add(start, size, Device(), "mine")


def test_first_and_last_byte_and_straddle() -> None:
    bus, device = Bus("mmio", 1 << 52), Device()
    bus.add(0x1000, 0x100, device, "d")
    data = bytearray(4)
    assert bus.access(0x1000, data, False)
    assert bus.access(0x10FC, data, True)
    assert not bus.access(0x10FD, data, False)
    assert data == b"\xff" * 4
    assert not bus.access(0xFFF, data, False)
    assert device.log == [("read", 0, 4), ("write", 0xFC, 4)]
    assert bus.unclaimed == 2
    assert bus.hits(device) == 2


def test_removed_device_is_asked_no_more() -> None:
    bus, device = Bus("pio", 1 << 16), Device()
    bus.add(0x10, 1, device, "d")
    bus.add(0x20, 1, device, "d")
    bus.remove(device)
    assert not bus.access(0x10, bytearray(1), True)
    assert device.log == [] and bus.claims == ()


def test_tables_of_a_bus_in_a_cycle_are_freed_with_it() -> None:
    def make() -> None:
        bus, device = Bus("pio", 1 << 16), Device()
        device.bus = bus  # type: ignore[attr-defined]  # a cycle, which the class itself does not make
        for port in range(200):  # each makes a table, of 10 KiB in the end
            bus.add(port, 1, device, "d")
        bus.remove(device)

    gc.collect()
    tracemalloc.start(1)
    try:
        make()
        full = tracemalloc.get_traced_memory()[0]
        gc.collect()
        left = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert full > 900_000, "the tables are not seen here"
    assert left < 100_000


def test_reclaim_frees_the_tables_that_were_replaced() -> None:
    bus, device = Bus("pio", 1 << 16), Device()
    gc.collect()
    tracemalloc.start(1)
    try:
        for port in range(200):  # each makes a table, of 10 KiB in the end
            bus.add(port, 1, device, "d")
        full = tracemalloc.get_traced_memory()[0]
        bus.reclaim()
        left = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert full > 900_000, "the tables are not seen here"
    assert left < 100_000
    assert bus.access(0x10, bytearray(1), True)


@given(
    ranges=st.lists(st.tuples(st.integers(0, 300), st.integers(1, 20)), max_size=30),
    probes=st.lists(st.tuples(st.integers(0, 330), st.sampled_from([1, 2, 4, 8])), max_size=50),
)
def test_lookup_agrees_with_a_linear_search(ranges: list[tuple[int, int]], probes: list[tuple[int, int]]) -> None:
    bus = Bus("mmio", 1 << 16)
    taken: list[tuple[int, int, Device]] = []
    for start, size in ranges:
        device = Device()
        meets = any(start < s + n and s < start + size for s, n, _ in taken)
        if meets:
            with pytest.raises(ConfigError):
                bus.add(start, size, device, "d")
        else:
            bus.add(start, size, device, "d")
            taken.append((start, size, device))
    for address, width in probes:
        owner = next((d for s, n, d in taken if s <= address and address + width <= s + n), None)
        assert bus.access(address, bytearray(width), True) is (owner is not None)
        if owner is not None:
            assert owner.log.pop()[2] == width


@pytest.mark.parametrize("device", [object(), None, Bus, "x"])
def test_a_device_must_answer_reads_and_writes(device: Any) -> None:
    with pytest.raises(TypeError, match=r"^pio mine: the device must be an object with read\(offset, data\) and write"):
        Bus("pio", 1 << 16).add(0x600, 4, device, "mine")


def test_the_protocol_of_a_device_can_be_imported() -> None:
    from vmm.bus import BusDevice

    class Mine(BusDevice):
        def read(self, offset: int, data: memoryview) -> None:
            data[:] = b"\1" * len(data)

        def write(self, offset: int, data: memoryview) -> None: ...

    bus = Bus("pio", 1 << 16)
    bus.add(0x600, 4, Mine(), "mine")
    assert len(bus.claims) == 1
