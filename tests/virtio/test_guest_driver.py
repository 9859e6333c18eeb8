# SPDX-License-Identifier: Apache-2.0
"""The driver that the other tests trust does what a driver must."""

from __future__ import annotations

import itertools
import random
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtio import spec
from virtio.device import VirtioDevice
from virtio.testing import Allocator, Buffer, DeviceHost, SplitDriver
from vmm.memory import GuestMemory


@given(seed=st.integers(0, 1 << 32), size=st.sampled_from([1, 2, 8, 256]), buffers=st.integers(0, 20))
def test_rings_and_buffers_never_overlap(seed: int, size: int, buffers: int) -> None:
    with GuestMemory(1 << 20) as ram:
        gaps = random.Random(seed)
        allocator = Allocator(0x1000, 0xFF000, gaps=gaps)
        driver = SplitDriver(ram, allocator, size)
        for _ in range(buffers):
            driver.buffer(gaps.randrange(1, 600))
    taken = sorted(allocator.taken)
    assert len(taken) == 3 + buffers
    for (start, length), (following, _) in itertools.pairwise(taken):
        assert start + length <= following


def test_rings_are_aligned_as_2_7_asks(ram: GuestMemory) -> None:
    driver = SplitDriver(ram, Allocator(0x1001, 1 << 20, gaps=random.Random(1)), 8)
    assert (driver.desc % 16, driver.avail % 2, driver.used % 4) == (0, 0, 0)


def test_allocator_refuses_what_does_not_fit() -> None:
    with pytest.raises(MemoryError):
        Allocator(0, 16).alloc(17)


def test_chain_in_memory_reads_as_it_was_added(ram: GuestMemory, allocator: Allocator) -> None:
    driver = SplitDriver(ram, allocator, 4)
    head = driver.add([Buffer(0x9000, 16), Buffer(0xA000, 512, True)])
    addr, size, flags, following = spec.DESC.unpack(ram.read(driver.desc + 16 * head, 16))
    assert (addr, size, flags) == (0x9000, 16, spec.DESC_F_NEXT)
    second = spec.DESC.unpack(ram.read(driver.desc + 16 * following, 16))
    assert second == (0xA000, 512, spec.DESC_F_WRITE, 0)
    assert struct.unpack("<HHH", ram.read(driver.avail, 6)) == (0, 1, head)


def test_indirect_chain_in_memory_reads_as_it_was_added(ram: GuestMemory, allocator: Allocator) -> None:
    driver = SplitDriver(ram, allocator, 4)
    buffers = [Buffer(0x9000, 16), Buffer(0xA000, 512, True), Buffer(0xB000, 1, True)]
    head = driver.add_indirect(buffers, direct=1)
    _, _, flags, following = spec.DESC.unpack(ram.read(driver.desc + 16 * head, 16))
    assert flags == spec.DESC_F_NEXT
    table, size, flags, _ = spec.DESC.unpack(ram.read(driver.desc + 16 * following, 16))
    assert (size, flags) == (32, spec.DESC_F_INDIRECT)
    assert spec.DESC.unpack(ram.read(table, 16)) == (0xA000, 512, spec.DESC_F_NEXT | spec.DESC_F_WRITE, 1)
    assert spec.DESC.unpack(ram.read(table + 16, 16)) == (0xB000, 1, spec.DESC_F_WRITE, 0)


def test_reap_frees_descriptors_across_the_wrap_at_65536(ram: GuestMemory, allocator: Allocator) -> None:
    driver = SplitDriver(ram, allocator, 2, start=65535)
    for turn in range(3):
        head = driver.add([Buffer(0x9000, 16), Buffer(0xA000, 16, True)])
        assert driver.free == []
        index = (65535 + turn) % 65536
        ram.write(driver.used + 4 + 8 * (index % 2), struct.pack("<II", head, 7))
        ram.write(driver.used + 2, struct.pack("<H", (index + 1) % 65536))
        assert driver.reap() == [(head, 7)]
        assert sorted(driver.free) == [0, 1]
    assert driver.reap() == []


@pytest.mark.parametrize(
    ("event", "added", "kick"), [(0, 1, True), (1, 1, False), (1, 2, True), (65535, 1, False), (2, 2, False)]
)
def test_needs_kick_follows_avail_event(
    ram: GuestMemory, allocator: Allocator, event: int, added: int, kick: bool
) -> None:
    driver = SplitDriver(ram, allocator, 4, event_idx=True)
    ram.write(driver.used + 4 + 8 * 4, struct.pack("<H", event))
    for _ in range(added):
        driver.add([Buffer(0x9000, 16)])
    assert driver.needs_kick() is kick


def test_needs_kick_follows_no_notify(ram: GuestMemory, allocator: Allocator) -> None:
    driver = SplitDriver(ram, allocator, 4)
    driver.add([Buffer(0x9000, 16)])
    assert driver.needs_kick()
    ram.write(driver.used, struct.pack("<H", spec.USED_F_NO_NOTIFY))
    assert not driver.needs_kick()


def test_a_configuration_that_a_guest_would_not_see_is_found() -> None:
    class Odd(VirtioDevice):
        device_type = 63
        queue_sizes = (8,)
        config = bytes(4)

    memory = GuestMemory(1 << 20)
    host = DeviceHost(Odd(), memory, Allocator(0x1000, 0x10000))
    host.device.config = b"next"
    with pytest.raises(AssertionError, match="without publish_config"):
        host.driver.config(0, 4)
    host.device.publish_config(b"next")
    assert host.driver.config(0, 4) == b"next"
    host.device.counters["of my own"] += 1
    host.close()
    memory.close()
