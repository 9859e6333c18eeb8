# SPDX-License-Identifier: Apache-2.0
"""A driver that names gigabytes by a few descriptors: no device in Python copies them before it validates them."""

from __future__ import annotations

import os
import socket
import tracemalloc
from collections.abc import Callable, Iterator

import pytest

from virtio.balloon import Balloon
from virtio.console import Console
from virtio.device import VirtioDevice
from virtio.net.device import Net
from virtio.rng import Entropy
from virtio.testing import Allocator, Buffer, DeviceHost
from vmm.memory import GuestMemory

PIECE = 8 << 20
COUNT = 24  # of the same piece: 192 MiB
LIMIT = 1 << 20


class Wire:
    """A backend that nobody is behind."""

    stream = True

    def __init__(self) -> None:
        self.ends = socket.socketpair()
        self.ends[0].setblocking(False)
        self.fds = [self.ends[0].fileno()]

    def gone(self) -> str:
        return "gone"

    def set_offloads(self, features: int) -> None: ...
    def set_pairs(self, count: int) -> None: ...


@pytest.fixture
def wire() -> Iterator[Wire]:
    wire = Wire()
    yield wire
    for end in wire.ends:
        end.close()


def _console(wire: Wire) -> Console:
    device = Console(["more"])
    for port in device.ports:
        port.close()
    return device


CASES: list[tuple[str, Callable[[Wire], VirtioDevice], int]] = [
    ("control queue", lambda wire: Net(wire, b"\2\0\0\0\0\1"), 2),
    ("inflate", lambda _: Balloon(), 0),
    ("deflate", lambda _: Balloon(), 1),
    ("statistics", lambda _: Balloon(stats_polling_interval_s=1), 2),
    ("report", lambda _: Balloon(free_page_reporting=True), 2),
    ("random numbers", lambda _: Entropy(), 0),
    ("console output", _console, 1),
    ("console control", _console, 3),
]


@pytest.mark.parametrize(("make", "queue"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
@pytest.mark.parametrize("device_writes", [False, True])
def test_a_chain_of_many_mebibytes(
    make: Callable[[Wire], VirtioDevice], queue: int, device_writes: bool, wire: Wire
) -> None:
    with GuestMemory(2 * PIECE) as ram:
        host = DeviceHost(make(wire), ram, Allocator(0x1000, 1 << 20))
        host.driver.bring_up()
        ring = host.driver.queues[queue]
        answer = [Buffer(1 << 20, 1, True)] * (queue == 2 and not device_writes and isinstance(host.device, Net))
        head = ring.add([*[Buffer(PIECE, PIECE, device_writes)] * COUNT, *answer])
        tracemalloc.start()
        try:
            host.driver.kick(queue)
            if isinstance(host.device, Balloon) and host.device.stats_polling_interval_s:
                while not host.device.stats["requests"]:  # this chain is kept
                    os.sched_yield()
            else:
                host.reap(queue, head)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
            host.close()
    assert peak < LIMIT
