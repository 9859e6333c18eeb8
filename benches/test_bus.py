# SPDX-License-Identifier: Apache-2.0
"""Bus dispatch: one access through an address space, to devices in Cython and in Python, and to none.

``Bus.access`` is how a test or a tool does it: a Python call. A vCPU has the same lookup without one; what
that costs is in ``python -m benches.peers exits``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from devices._serial import Serial
from vmm.bus import Bus
from vmm.irq import IrqLine

SCRATCH = 7  # the serial port's register that does nothing but keep a byte


class Device:
    """The smallest possible device in Python."""

    def read(self, offset: int, data: memoryview) -> None:
        pass

    def write(self, offset: int, data: memoryview) -> None:
        pass


@pytest.fixture(params=[1, 64], ids=["1 pair", "64 pairs"])
def bus(request: pytest.FixtureRequest) -> Iterator[Bus]:
    """An address space with `param` pairs of devices from 0x1000: one in Cython, and one in Python."""
    space = Bus("mmio", 1 << 52)
    line = IrqLine(4)
    ports = []
    for index in range(request.param):
        ports.append(Serial(line))
        space.add(0x1000 + 32 * index, 8, ports[-1], "native")
        space.add(0x1010 + 32 * index, 8, Device(), "python")
    yield space
    for port in ports:
        port.close()
    line.close()


@pytest.mark.parametrize("is_write", [False, True], ids=["read", "write"])
@pytest.mark.parametrize(
    ("address", "claimed"),
    [(0x1000 + SCRATCH, True), (0x1010, True), (0x100, False)],
    ids=["native", "python", "unclaimed"],
)
def test_access(benchmark: Any, bus: Bus, address: int, claimed: bool, is_write: bool) -> None:
    assert benchmark(bus.access, address, bytearray(1), is_write) is claimed


def test_add_and_remove(benchmark: Any, bus: Bus) -> None:
    """The cost of hotplug: building a new table twice."""
    device = Device()

    def once() -> None:
        bus.add(0x8000, 16, device, "new")
        bus.remove(device)

    benchmark.pedantic(once, rounds=200)
