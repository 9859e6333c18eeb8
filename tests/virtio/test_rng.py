# SPDX-License-Identifier: Apache-2.0
"""The entropy device against virtio 1.2 §5.4 and a driver that lies."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from virtio import rng, spec
from virtio._limiter import RateLimiter
from virtio.rng import Entropy
from virtio.testing import Allocator, Buffer, DeviceHost
from vmm.memory import GuestMemory

Boot = Callable[..., DeviceHost[Entropy]]


@pytest.fixture
def boot(ram: GuestMemory, allocator: Allocator) -> Iterator[Boot]:
    hosts: list[DeviceHost[Entropy]] = []

    def boot(*, without: int = 0, **how: Any) -> DeviceHost[Entropy]:
        hosts.append(DeviceHost(Entropy(**how), ram, allocator))
        hosts[-1].driver.bring_up(without=without)
        return hosts[-1]

    yield boot
    for host in hosts:
        host.close()


def alive(host: DeviceHost[Entropy]) -> None:
    room = host.room(32)
    assert host.submit(0, [room]) == 32
    assert host.ram.read(room.addr, 32) != bytes(32)
    assert not host.broken()


def test_5_4_it_is_an_entropy_device_with_one_queue_and_no_configuration(boot: Boot) -> None:
    host = boot()
    assert host.driver.get(spec.MMIO_DEVICE_ID) == 4
    assert len(host.driver.queues) == 1
    assert host.driver.config(0, 4) == bytes(4)


@pytest.mark.parametrize("without", [0, spec.F_EVENT_IDX, spec.F_EVENT_IDX | spec.F_INDIRECT_DESC])
def test_5_4_6_every_buffer_is_filled(boot: Boot, without: int) -> None:
    host = boot(without=without)
    rooms = [host.room(size) for size in (1, 4000, 7, 512)]
    edge = host.data(b"\xa5" * 16)  # what lies behind the last one
    assert host.submit(0, rooms, indirect=not without) == 4520
    drawn = [host.ram.read(room.addr, room.size) for room in rooms]
    assert all(any(part) for part in drawn[1:])
    # 4000 random bytes hold nearly every value there is: what is still zero, or a copy, is not random
    assert len(set(drawn[1])) > 200
    assert drawn[3] not in drawn[1]
    assert host.ram.read(edge.addr, 16) == b"\xa5" * 16
    assert host.device.stats == {"requests": 1, "bad_requests": 0, "needs_reset": 0, "bytes": 4520}


def test_no_two_requests_get_the_same(boot: Boot) -> None:
    host = boot()
    first, second = host.room(64), host.room(64)
    assert host.submit(0, [first]) == host.submit(0, [second]) == 64
    assert host.ram.read(first.addr, 64) != host.ram.read(second.addr, 64)


def test_a_request_gets_64_kib_at_most(boot: Boot) -> None:
    host = boot()
    room = Buffer(1 << 20, 2 << 20, True)
    assert host.submit(0, [host.room(100), room]) == rng.REQUEST_MAX
    assert any(host.ram.read(room.addr + rng.REQUEST_MAX - 200, 100))
    assert not any(host.ram.read(room.addr + rng.REQUEST_MAX - 100, 4096))


def test_a_readable_buffer_is_refused_and_not_read(boot: Boot) -> None:
    host = boot()
    room = host.room(16)
    assert host.submit(0, [host.data(b"seed"), room]) == 0
    assert host.submit(0, [host.data(b"seed")]) == 0
    assert host.ram.read(room.addr, 16) == bytes(16)
    assert host.device.stats["bad_requests"] == 2
    alive(host)


def test_an_empty_buffer_is_answered(boot: Boot) -> None:
    host = boot()
    assert host.submit(0, [host.room(0)]) == 0
    assert host.device.stats["bad_requests"] == 1
    alive(host)


def test_a_broken_chain_stops_this_device_until_its_driver_resets_it(boot: Boot, ram: GuestMemory) -> None:
    host = boot()
    ring = host.driver.queues[0]
    ring.write_desc(0, ram.size - 8, 16, spec.DESC_F_WRITE)  # crosses the end of RAM
    ring.offer(0, [0])
    host.driver.kick()
    host.until(host.broken)
    assert host.device.stats["needs_reset"] == 1 and len(host.log) == 1
    host.driver.bring_up()
    alive(host)


def test_5_4_6_2_a_request_gets_a_byte_though_its_machine_is_copied(boot: Boot) -> None:
    """Linux's driver takes 0 bytes for its own end, and asks for no more."""
    host = boot(limiter=RateLimiter(bandwidth=(1024, 0, 3_600_000)))
    assert host.submit(0, [host.room(1024)]) == 1024
    ring = host.driver.queues[0]
    ring.want_interrupt()
    head = ring.add([host.room(512)])
    host.driver.kick()
    while host.device.stats["requests"] < 2:
        time.sleep(0.001)
    host.transport.stop()
    assert ring.reap() == [(head, 1)]
    host.transport.go_on()


def test_a_limited_device_gives_what_the_limiter_grants_and_stops_in_the_middle_of_a_wait(boot: Boot) -> None:
    host = boot(limiter=RateLimiter(bandwidth=(1024, 0, 3_600_000)))
    assert host.submit(0, [host.room(1024)]) == 1024
    ring = host.driver.queues[0]
    ring.add([host.room(512)])
    host.driver.kick()
    host.driver.bring_up()  # would take half an hour if the worker slept on
    host.device.limiter.update(bandwidth=(0, 0, 0))  # type: ignore[union-attr]
    alive(host)
