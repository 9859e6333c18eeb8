# SPDX-License-Identifier: Apache-2.0
"""Micro-benchmarks of the split virtqueue and of guest memory: ``pytest benches/test_queue.py``.

Each round is a full queue of chains, offered outside the clock; divide by CHAINS for the cost of one.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import pytest

from tests.virtio import queue_twin
from virtio.testing import Allocator, SplitDriver
from vmm import _fastpath
from vmm.memory import GuestMemory

CHAINS = 256


@pytest.fixture
def ram() -> Iterator[GuestMemory]:
    with GuestMemory(64 << 20) as memory:
        yield memory


@pytest.mark.parametrize("queue_class", [_fastpath.VirtQueue, queue_twin.VirtQueue], ids=["c", "py"])
@pytest.mark.parametrize("shape", ["one buffer", "indirect of three"])
def test_pop_add_used_flush(benchmark: Any, ram: GuestMemory, queue_class: Any, shape: str) -> None:
    driver = SplitDriver(ram, Allocator(0x1000, 60 << 20), CHAINS, event_idx=True)
    queue = driver.attach(queue_class(ram, CHAINS))
    header = driver.buffer(16)
    data, status = driver.buffer(4096, device_writes=True), driver.buffer(1, device_writes=True)
    for _ in range(CHAINS):
        if shape == "one buffer":
            driver.add([data])
        else:
            driver.add_indirect([header, data, status])
    heads = [struct.unpack("<H", ram.read(driver.avail + 4 + 2 * i, 2))[0] for i in range(CHAINS)]

    def refill() -> None:
        """Offer the same heads again, without the driver's bookkeeping."""
        for head in heads:
            driver.chains.pop(head, None)
        driver.avail_idx = queue.last_avail + CHAINS & 0xFFFF
        ram.write(driver.avail + 2, struct.pack("<H", driver.avail_idx))

    def serve() -> None:
        while (chain := queue.pop()) is not None:
            queue.add_used(chain, 1)
            queue.flush()

    driver.avail_idx = queue.last_avail
    before = queue.next_used
    refill()
    serve()
    assert queue.next_used == before + CHAINS
    benchmark.extra_info["chains"] = CHAINS
    benchmark.pedantic(serve, setup=refill, rounds=200)


@pytest.mark.parametrize("queue_class", [_fastpath.VirtQueue, queue_twin.VirtQueue], ids=["c", "py"])
def test_chain_views(benchmark: Any, ram: GuestMemory, queue_class: Any) -> None:
    """The cost for a device in Python of reading the three buffers of one chain."""
    driver = SplitDriver(ram, Allocator(0x1000, 60 << 20), 8)
    queue = driver.attach(queue_class(ram, 8))
    driver.add([driver.buffer(16), driver.buffer(4096, device_writes=True), driver.buffer(1, device_writes=True)])
    chain = queue.pop()
    assert chain is not None
    benchmark(lambda: (chain.readable, chain.writable))


@pytest.mark.parametrize("size", [8, 4096, 1 << 20])
def test_memory_read(benchmark: Any, ram: GuestMemory, size: int) -> None:
    benchmark(ram.read, 0x1000, size)


@pytest.mark.parametrize("size", [8, 4096, 1 << 20])
def test_memory_write(benchmark: Any, ram: GuestMemory, size: int) -> None:
    data = bytes(size)
    benchmark(ram.write, 0x1000, data)


def test_memory_slice(benchmark: Any, ram: GuestMemory) -> None:
    benchmark(ram.slice, 0x1000, 4096)
