# SPDX-License-Identifier: Apache-2.0
"""A worker that polls (``poll_us``): no notification is asked for while it looks, and none is lost once it sleeps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.virtio import blk_driver
from virtio import spec
from virtio.blk.device import Block, Disk
from virtio.testing import Allocator, DeviceHost, SplitDriver
from vmm.memory import GuestMemory

Boot = Callable[[float], DeviceHost[Block]]


@pytest.fixture(params=[0, spec.F_EVENT_IDX], ids=["event_idx", "flags"])
def boot(request: pytest.FixtureRequest, tmp_path: Path, ram: GuestMemory, allocator: Allocator) -> Iterator[Boot]:
    path = tmp_path / "disk"
    path.write_bytes(b"sector".ljust(512))
    disk = Disk(str(path))
    hosts: list[DeviceHost[Block]] = []

    def boot(poll_us: float) -> DeviceHost[Block]:
        device = Block(disk)
        device.poll_us = poll_us
        hosts.append(DeviceHost(device, ram, allocator))
        hosts[-1].driver.bring_up(without=request.param)
        return hosts[-1]

    yield boot
    for host in hosts:
        host.close()  # also ends a polling of 1000 s
    disk.close()


def read(host: DeviceHost[Block], *, kick: bool) -> None:
    """Read the sector, and return once the device has."""
    data, status = host.room(512), host.room(1)
    ring = host.driver.queues[0]
    ring.want_interrupt()
    head = ring.add([host.data(blk_driver.HEADER.pack(blk_driver.T_IN, 0, 0)), data, status])
    if kick:
        host.driver.kick()
    assert host.reap(0, head) == 513
    assert host.ram.read(data.addr, 512) == b"sector".ljust(512)


def wants_notification(ring: SplitDriver) -> bool:
    """Whether the device asks for one with the next chain (§2.7.10)."""
    at = ring.used + 4 + 8 * ring.size if ring.event_idx else ring.used
    said = int.from_bytes(ring.ram.read(at, 2), "little")
    return said == ring.avail_idx if ring.event_idx else not said & spec.USED_F_NO_NOTIFY


def until(host: DeviceHost[Block], *, wanted: bool) -> None:
    end = time.monotonic() + 30
    while wants_notification(host.driver.queues[0]) != wanted:
        assert time.monotonic() < end


def test_a_request_is_found_without_a_notification(boot: Boot) -> None:
    host = boot(1e9)
    for _ in range(3):
        until(host, wanted=False)
        read(host, kick=False)
    assert host.transport.notifications == (0,)


def test_a_worker_that_found_nothing_sleeps_and_is_notified(boot: Boot) -> None:
    host = boot(3)
    for _ in range(100):
        read(host, kick=True)
    until(host, wanted=True)
    read(host, kick=True)
    assert host.transport.notifications[0] > 0
