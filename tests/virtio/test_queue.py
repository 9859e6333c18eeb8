# SPDX-License-Identifier: Apache-2.0
"""The split virtqueue, in C and in Python, against virtio 1.2 §2.7 and against a driver that lies."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from tests.virtio.conftest import RAM
from virtio import spec
from virtio.testing import Allocator, SplitDriver
from vmm._fastpath import Chain, GuestRam
from vmm.errors import BadChain
from vmm.memory import HOLE_END, HOLE_START, GuestMemory

SIZE = 8
NEXT, WRITE, INDIRECT = spec.DESC_F_NEXT, spec.DESC_F_WRITE, spec.DESC_F_INDIRECT


class Rig:
    """A driver, a queue of one of the two kinds, and what they share."""

    def __init__(
        self,
        ram: GuestMemory,
        allocator: Allocator,
        queue_class: Any,
        *,
        event_idx: bool = False,
        start: int = 0,
        indirect: bool = True,
    ) -> None:
        self.ram = ram
        self.driver = SplitDriver(ram, allocator, SIZE, event_idx=event_idx, start=start)
        self.queue = self.driver.attach(queue_class(ram, 256, 3), indirect=indirect)

    def broken(self, index: int | None = None, head: int = 0) -> str:
        """The rule that pop finds broken; it is found again and again, and nothing was taken or returned."""
        before = self.ram.read(self.driver.used, 6 + 8 * self.driver.size)
        taken = self.queue.last_avail
        with pytest.raises(BadChain) as first:
            self.queue.pop()
        with pytest.raises(BadChain) as second:
            self.queue.pop()
        error = first.value
        assert str(error) == str(second.value)
        assert (error.queue, error.head) == (3, head)
        assert index is None or error.index == index
        assert self.queue.last_avail == taken
        assert self.ram.read(self.driver.used, 6 + 8 * self.driver.size) == before
        return error.rule

    def take(self) -> Chain:
        """The chain that the device gets next."""
        chain = self.queue.pop()
        assert chain is not None
        return chain

    def chain(self, *descriptors: tuple[int, int, int, int]) -> None:
        """Write descriptors 0, 1, ... as (addr, len, flags, next) and offer head 0."""
        for index, (addr, size, flags, following) in enumerate(descriptors):
            self.driver.write_desc(index, addr, size, flags, following)
        self.driver.offer(0)

    def table(self, *descriptors: tuple[int, int, int, int], at: int = 0x200000) -> int:
        """Write an indirect table; its address."""
        self.ram.write(at, b"".join(spec.DESC.pack(*d) for d in descriptors))
        return at


@pytest.fixture
def rig(ram: GuestMemory, allocator: Allocator, queue_class: Any) -> Rig:
    return Rig(ram, allocator, queue_class)


# What a correct driver gets


def test_chain_is_the_drivers_own_memory(rig: Rig) -> None:
    assert rig.queue.pop() is None
    buffer = rig.driver.buffer
    head = rig.driver.add([buffer(b"abc"), buffer(b"de"), buffer(4, device_writes=True)])
    chain = rig.take()
    assert chain.head == head
    assert [bytes(b) for b in chain.readable] == [b"abc", b"de"]
    assert (chain.readable_bytes, chain.writable_bytes) == (5, 4)
    (target,) = chain.writable
    target[:] = b"WXYZ"
    rig.queue.add_used(chain, 4)
    assert rig.driver.reap() == []
    assert rig.queue.flush()
    assert rig.driver.reap() == [(head, 4)]
    assert rig.ram.read(rig.driver.allocator.taken[-1][0], 4) == b"WXYZ"
    assert rig.queue.pop() is None


def test_gather_and_scatter_go_across_buffers_and_stop_at_their_limit(rig: Rig) -> None:
    buffer = rig.driver.buffer
    room = [buffer(size, device_writes=True) for size in (1, 3, 2)]
    rig.driver.add([buffer(b"abc"), buffer(b"d"), buffer(b"efgh"), *room])
    chain = rig.take()
    assert [chain.gather(limit) for limit in (0, 2, 3, 5, 8, 9, 1 << 40)] == [
        b"", b"ab", b"abc", b"abcde", b"abcdefgh", b"abcdefgh", b"abcdefgh",
    ]  # fmt: skip
    assert [chain.gather(3, start) for start in (0, 2, 3, 4, 7, 8, 1 << 63)] == [
        b"abc", b"cde", b"def", b"efg", b"h", b"", b"",
    ]  # fmt: skip
    assert (chain.scatter(b""), chain.scatter(b"1234"), chain.scatter(memoryview(b"ABCDEFGH"))) == (0, 4, 6)
    assert [rig.ram.read(each.addr, each.size) for each in room] == [b"A", b"BCD", b"EF"]


def test_views_outlive_queue_and_memory(rig: Rig, ram: GuestMemory) -> None:
    rig.driver.add([rig.driver.buffer(b"still here")])
    (view,) = rig.take().readable
    ram.close()
    assert bytes(view) == b"still here"


def test_chains_return_in_any_order(rig: Rig) -> None:
    heads = [rig.driver.add([rig.driver.buffer(1, device_writes=True)]) for _ in range(4)]
    chains = [rig.take() for _ in range(4)]
    for at in (2, 0, 3, 1):
        rig.queue.add_used(chains[at], at % 2)
    rig.queue.flush()
    assert rig.driver.reap() == [(heads[2], 0), (heads[0], 0), (heads[3], 1), (heads[1], 1)]


def test_both_indices_wrap_at_65536(ram: GuestMemory, allocator: Allocator, queue_class: Any) -> None:
    rig = Rig(ram, allocator, queue_class, event_idx=True, start=65530)
    buffer = rig.driver.buffer(1, device_writes=True)
    for _ in range(20):
        head = rig.driver.add([buffer])
        rig.driver.needs_kick()
        rig.queue.add_used(rig.take(), 1)
        rig.driver.want_interrupt()
        assert rig.queue.flush()
        assert rig.driver.reap() == [(head, 1)]
    assert rig.queue.last_avail == rig.queue.next_used == (65530 + 20) % 65536


def test_a_full_queue_of_single_buffers(rig: Rig) -> None:
    for _ in range(SIZE):
        rig.driver.add([rig.driver.buffer(1)])
    assert len([chain for _ in range(SIZE) if (chain := rig.queue.pop())]) == SIZE
    assert rig.queue.pop() is None


def test_a_chain_as_long_as_the_queue(rig: Rig) -> None:
    rig.driver.add([rig.driver.buffer(bytes([i])) for i in range(SIZE)])
    assert b"".join(rig.take().readable) == bytes(range(SIZE))


def test_chain_is_returned_once(rig: Rig) -> None:
    rig.driver.add([rig.driver.buffer(1, device_writes=True)])
    chain = rig.take()
    for written in (2, -1, 1 << 40):
        with pytest.raises(ValueError, match=f"room for 1 bytes cannot have {written} bytes written"):
            rig.queue.add_used(chain, written)
    with pytest.raises(TypeError, match=r"must be a whole number, not None: what serves a chain returns it"):
        rig.queue.add_used(chain, None)  # type: ignore[arg-type]
    rig.queue.add_used(chain, 1)
    with pytest.raises(ValueError, match="before"):
        rig.queue.add_used(chain, 1)


def test_a_chain_of_a_reset_queue_is_not_returned(rig: Rig) -> None:
    rig.driver.add([rig.driver.buffer(1, device_writes=True)])
    chain = rig.take()
    rig.queue.reset()
    with pytest.raises(ValueError, match="ready"):
        rig.queue.add_used(chain, 1)
    assert not rig.queue.flush()
    assert not rig.queue.enable_notify()
    rig.queue.disable_notify()


# §2.7.5.3 indirect descriptors


def test_2_7_5_3_indirect_table(rig: Rig) -> None:
    head = rig.driver.add_indirect([rig.driver.buffer(b"head"), rig.driver.buffer(512, device_writes=True)])
    chain = rig.take()
    assert (chain.head, [bytes(b) for b in chain.readable], chain.writable_bytes) == (head, [b"head"], 512)


def test_2_7_5_3_2_direct_descriptors_then_an_indirect_one(rig: Rig) -> None:
    buffers = [rig.driver.buffer(b"a"), rig.driver.buffer(b"b"), rig.driver.buffer(b"c")]
    rig.driver.add_indirect(buffers, direct=2)
    assert b"".join(rig.take().readable) == b"abc"


def test_2_7_5_3_2_write_flag_of_an_indirect_descriptor_is_ignored(rig: Rig) -> None:
    table = rig.table((0x300000, 5, 0, 0))
    rig.chain((table, 16, INDIRECT | WRITE, 0))
    assert rig.take().readable_bytes == 5


def test_2_7_5_3_1_indirect_table_as_long_as_the_queue_is_legal(rig: Rig) -> None:
    rig.driver.add_indirect([rig.driver.buffer(1) for _ in range(SIZE)])
    assert rig.take().readable_bytes == SIZE


def test_2_7_5_3_indirect_table_at_an_odd_address(rig: Rig) -> None:
    table = rig.table((0x300000, 5, NEXT, 1), (0x300010, 6, 0, 0), at=0x200001)
    rig.chain((table, 32, INDIRECT, 0))
    assert rig.take().readable_bytes == 11


# §2.7.7, §2.7.10 notifications


def test_2_7_7_2_no_interrupt_flag(rig: Rig) -> None:
    for wanted in (True, False, True):
        rig.driver.want_interrupt(wanted)
        rig.driver.add([rig.driver.buffer(1)])
        rig.queue.add_used(rig.take(), 0)
        assert rig.queue.flush() is wanted
        rig.driver.reap()


def test_2_7_7_2_nothing_returned_wants_no_interrupt(rig: Rig) -> None:
    assert rig.queue.flush() is False
    rig.driver.add([rig.driver.buffer(1)])
    rig.queue.add_used(rig.take(), 0)
    assert rig.queue.flush() is True
    assert rig.queue.flush() is False


@pytest.mark.parametrize("start", [0, 65533])
@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("after", range(9))
def test_2_7_7_2_used_event(
    ram: GuestMemory, allocator: Allocator, queue_class: Any, start: int, batch: int, after: int
) -> None:
    rig = Rig(ram, allocator, queue_class, event_idx=True, start=start)
    rig.driver.want_interrupt(after=after)
    for _ in range(batch):
        rig.driver.add([rig.driver.buffer(1)])
        rig.queue.add_used(rig.take(), 0)
    # An entry whose index is used_event was written by this flush, or was not.
    assert rig.queue.flush() is (after < batch)


def test_2_7_7_2_flags_are_ignored_with_event_idx(ram: GuestMemory, allocator: Allocator, queue_class: Any) -> None:
    rig = Rig(ram, allocator, queue_class, event_idx=True)
    ram.write(rig.driver.avail, struct.pack("<H", spec.AVAIL_F_NO_INTERRUPT))
    rig.driver.add([rig.driver.buffer(1)])
    rig.queue.add_used(rig.take(), 0)
    assert rig.queue.flush()


def test_2_7_10_2_no_notify_flag(rig: Rig) -> None:
    rig.queue.disable_notify()
    rig.driver.add([rig.driver.buffer(1)])
    assert not rig.driver.needs_kick()
    assert rig.queue.enable_notify(), "a chain came while nobody was told"
    rig.queue.pop()
    assert not rig.queue.enable_notify()
    rig.driver.add([rig.driver.buffer(1)])
    assert rig.driver.needs_kick()


@pytest.mark.parametrize("start", [0, 65535])
def test_2_7_10_2_avail_event(ram: GuestMemory, allocator: Allocator, queue_class: Any, start: int) -> None:
    rig = Rig(ram, allocator, queue_class, event_idx=True, start=start)
    assert not rig.queue.enable_notify()
    rig.driver.add([rig.driver.buffer(1)])
    assert rig.driver.needs_kick()
    rig.queue.disable_notify()
    rig.driver.add([rig.driver.buffer(1)])
    assert not rig.driver.needs_kick(), "the device is at work and looks anyway"
    assert rig.queue.enable_notify()
    assert rig.queue.pop() and rig.queue.pop()
    assert not rig.queue.enable_notify()
    rig.driver.add([rig.driver.buffer(1)])
    assert rig.driver.needs_kick()
    assert struct.unpack("<H", ram.read(rig.driver.used, 2)) == (0,), "§2.7.10.2: flags stay 0"


# hostile-guest: queue setup


@pytest.fixture
def bare(ram: GuestMemory, allocator: Allocator, queue_class: Any) -> Iterator[tuple[Any, SplitDriver]]:
    driver = SplitDriver(ram, allocator, SIZE)
    queue = queue_class(ram, 256, 3)
    queue.size, queue.desc, queue.avail, queue.used = SIZE, driver.desc, driver.avail, driver.used
    yield queue, driver
    with pytest.raises(BadChain) as error:
        queue.enable(event_idx=True, indirect=True)
    assert (error.value.queue, error.value.head) == (3, -1)
    assert not queue.ready


def test_queue_not_ready(ram: GuestMemory, queue_class: Any) -> None:
    queue = queue_class(ram, 8, 3)
    with pytest.raises(BadChain, match="not ready"):
        queue.pop()


@pytest.mark.parametrize("size", [0, 3, 255, 512, 65536, 0x8000_0000, 0xFFFF_FFFF])
def test_queue_size_zero_not_a_power_of_two_or_above_the_maximum(bare: Any, size: int) -> None:
    bare[0].size = size


@pytest.mark.parametrize(("part", "alignment"), [("desc", 16), ("avail", 2), ("used", 4)])
def test_queue_part_misaligned(bare: Any, part: str, alignment: int) -> None:
    setattr(bare[0], part, getattr(bare[0], part) + alignment // 2)


@pytest.mark.parametrize("part", ["desc", "avail", "used"])
@pytest.mark.parametrize("gpa", [RAM, 1 << 40, 0xFFFF_FFFF_FFFF_FFF0, HOLE_START, RAM - 16])
def test_queue_part_outside_ram_or_in_the_gap(bare: Any, part: str, gpa: int) -> None:
    setattr(bare[0], part, gpa)


def test_queue_parts_may_end_with_ram(ram: GuestMemory, queue_class: Any) -> None:
    queue = queue_class(ram, 256)
    queue.size, queue.desc, queue.avail, queue.used = 2, 0, 0x1000, RAM - 6 - 16 - 2
    queue.enable(event_idx=False, indirect=False)
    assert queue.ready


# hostile-guest: chain


def test_head_not_below_the_queue_size(rig: Rig) -> None:
    rig.driver.offer(SIZE)
    assert "head" in rig.broken(head=SIZE)


def test_head_65535(rig: Rig) -> None:
    rig.driver.offer(65535)
    assert "§2.7.6" in rig.broken(head=65535)


def test_next_not_below_the_queue_size(rig: Rig) -> None:
    rig.chain((0x300000, 16, NEXT, SIZE))
    assert "next" in rig.broken(0)


def test_next_not_below_the_indirect_tables_length(rig: Rig) -> None:
    rig.chain((rig.table((0x300000, 16, NEXT, 1)), 16, INDIRECT, 0))
    assert "next" in rig.broken(0)


def test_loop_of_one(rig: Rig) -> None:
    rig.chain((0x300000, 16, NEXT, 0))
    assert "loops" in rig.broken(0)


def test_loop_of_two(rig: Rig) -> None:
    rig.chain((0x300000, 16, NEXT, 1), (0x300000, 16, NEXT, 0))
    assert "loops" in rig.broken()


def test_loop_of_empty_buffers(rig: Rig) -> None:
    rig.chain((0x300000, 0, NEXT, 0))
    assert "loops" in rig.broken()


def test_loop_in_an_indirect_table(rig: Rig) -> None:
    rig.chain((rig.table((0x300000, 16, NEXT, 1), (0x300000, 16, NEXT, 0)), 32, INDIRECT, 0))
    assert "loops" in rig.broken()


def test_chain_longer_than_the_queue(rig: Rig) -> None:
    """Direct and indirect descriptors together; either part alone would fit."""
    table = rig.table(*[(0x300000, 1, NEXT, i + 1) for i in range(SIZE - 1)], (0x300000, 1, 0, 0))
    rig.chain((0x300000, 1, NEXT, 1), (table, 16 * SIZE, INDIRECT, 0))
    assert "longer than the queue" in rig.broken(SIZE - 1)


@pytest.mark.parametrize("event_idx", [False, True])
@pytest.mark.parametrize("ahead", [SIZE + 1, 32768, 65535])
def test_avail_idx_further_ahead_than_the_queue_size(
    ram: GuestMemory, allocator: Allocator, queue_class: Any, event_idx: bool, ahead: int
) -> None:
    rig = Rig(ram, allocator, queue_class, event_idx=event_idx)
    ram.write(rig.driver.avail + 2, struct.pack("<H", ahead))
    assert "avail.idx" in rig.broken(-1, head=-1)


def test_2_7_6_1_avail_idx_going_backwards(rig: Rig) -> None:
    rig.driver.add([rig.driver.buffer(1)])
    assert rig.queue.pop()
    rig.ram.write(rig.driver.avail + 2, struct.pack("<H", 0))
    assert "avail.idx" in rig.broken(-1, head=-1)


@pytest.mark.parametrize(
    ("addr", "size"),
    [
        (0xFFFF_FFFF_FFFF_FFFF, 1),
        (0xFFFF_FFFF_FFFF_F000, 0x1000),
        (0xFFFF_FFFF_FFFF_F000, 0xFFFF_FFFF),
        (RAM - 1, 0xFFFF_FFFF),
    ],
)
def test_address_plus_length_overflows(rig: Rig, addr: int, size: int) -> None:
    rig.chain((addr, size, 0, 0))
    assert "not inside guest memory" in rig.broken(0)


@pytest.mark.parametrize(("addr", "size"), [(RAM, 1), (RAM - 1, 2), (HOLE_START, 1), (0, RAM + 1)])
def test_buffer_crosses_the_end_of_its_region(rig: Rig, addr: int, size: int) -> None:
    rig.chain((addr, size, 0, 0))
    assert "§2.7.5" in rig.broken(0)


def test_buffer_in_the_gap_or_across_it(queue_class: Any) -> None:
    with GuestMemory(HOLE_START + (1 << 20)) as ram:
        crossing = (HOLE_START - 1, 2), (HOLE_START, 4), (HOLE_END - 1, 2), (HOLE_START - 4, 1 << 31)
        for addr, size in crossing:
            rig = Rig(ram, Allocator(0x1000, 1 << 20), queue_class)
            rig.chain((addr, size, 0, 0))
            assert "§2.7.5" in rig.broken(0)
        for addr in (HOLE_START - 1, HOLE_END, HOLE_END + (1 << 20) - 1):
            rig = Rig(ram, Allocator(0x1000, 1 << 20), queue_class)
            rig.chain((addr, 1, 0, 0))
            assert rig.take().readable_bytes == 1


def test_last_byte_exactly_at_the_end_is_legal(rig: Rig) -> None:
    rig.chain((RAM - 16, 16, WRITE, 0))
    assert rig.take().writable_bytes == 16


def test_zero_length_is_legal_and_seen_by_nobody(rig: Rig) -> None:
    rig.chain((0x300000, 0, NEXT, 1), (0x300000, 3, NEXT, 2), (0x300000, 0, WRITE, 0))
    chain = rig.take()
    assert ([len(b) for b in chain.readable], chain.writable) == ([3], [])


def test_zero_length_outside_ram(rig: Rig) -> None:
    rig.chain((RAM + 1, 0, 0, 0))
    assert "§2.7.5" in rig.broken(0)


def test_valid_prefix_then_a_bad_descriptor(rig: Rig) -> None:
    rig.chain((0x300000, 16, NEXT, 1), (0x300100, 16, NEXT, 2), (RAM, 16, 0, 0))
    assert "§2.7.5" in rig.broken(2)


def test_writable_before_readable(rig: Rig) -> None:
    rig.chain((0x300000, 16, NEXT | WRITE, 1), (0x300100, 16, 0, 0))
    assert "§2.7.4.2" in rig.broken(1)


def test_indirect_without_the_feature(ram: GuestMemory, allocator: Allocator, queue_class: Any) -> None:
    rig = Rig(ram, allocator, queue_class, indirect=False)
    rig.chain((rig.table((0x300000, 16, 0, 0)), 16, INDIRECT, 0))
    assert "VIRTIO_F_INDIRECT_DESC" in rig.broken(0)


def test_indirect_within_indirect(rig: Rig) -> None:
    inner = rig.table((0x300000, 16, 0, 0), at=0x210000)
    rig.chain((rig.table((inner, 16, INDIRECT, 0)), 16, INDIRECT, 0))
    assert "inside an indirect table" in rig.broken(0)


def test_indirect_table_that_is_the_descriptor_table(rig: Rig) -> None:
    rig.chain((rig.driver.desc, 16 * SIZE, INDIRECT, 0))
    assert "inside an indirect table" in rig.broken(0)


def test_indirect_with_next(rig: Rig) -> None:
    table = rig.table((0x300000, 16, 0, 0))
    rig.chain((table, 16, INDIRECT | NEXT, 1), (0x300000, 16, 0, 0))
    assert "NEXT" in rig.broken(0)


@pytest.mark.parametrize("size", [0, 1, 15, 17, 16 * (SIZE + 1), 0xFFFF_FFF0, 0xFFFF_FFFF])
def test_indirect_table_length_zero_not_times_16_or_larger_than_the_queue(rig: Rig, size: int) -> None:
    rig.chain((rig.table((0x300000, 16, 0, 0)), size, INDIRECT, 0))
    assert "indirect table is empty" in rig.broken(0)


@pytest.mark.parametrize("addr", [RAM, RAM - 16, 0xFFFF_FFFF_FFFF_FFF0])
def test_indirect_table_outside_ram(rig: Rig, addr: int) -> None:
    rig.chain((addr, 32, INDIRECT, 0))
    assert "indirect table is not inside" in rig.broken(0)


def test_2_7_5_2_total_length_above_2_32(queue_class: Any) -> None:
    with GuestMemory(3 << 30) as ram:
        gib = 1 << 30
        rig = Rig(ram, Allocator(0x1000, 1 << 20), queue_class)
        rig.chain((0, 2 * gib, NEXT, 1), (0, 2 * gib, 0, 0))
        chain = rig.take()
        assert (chain.readable_bytes, sum(len(part) for part in chain.readable)) == (4 * gib, 4 * gib)  # legal
        rig.chain((0, 2 * gib, NEXT, 1), (0, 2 * gib, NEXT, 2), (0, 1, 0, 0))
        assert "2^32" in rig.broken(2)


def test_descriptor_rewritten_between_two_reads_is_validated_once(rig: Rig) -> None:
    """What was validated is what is used, whatever the driver writes into the table afterwards."""
    rig.chain((0x300000, 16, NEXT, 1), (0x300100, 32, WRITE, 0))
    chain = rig.take()
    for index in (0, 1):
        rig.driver.write_desc(index, 0xFFFF_FFFF_FFFF_0000, 0xFFFF_FFFF, NEXT, 60000)
    rig.ram.write(0x300000, b"R" * 16)
    assert [bytes(b) for b in chain.readable] == [b"R" * 16]
    assert [len(b) for b in chain.writable] == [32]
    chain.writable[0][:] = b"W" * 32
    assert rig.ram.read(0x300100, 32) == b"W" * 32
    rig.queue.add_used(chain, 32)
    assert chain.writable_bytes == 32


def test_no_byte_outside_guest_memory_is_touched(queue_class: Any) -> None:
    """Guest RAM of one page with a canary page on either side; the queue is handed every kind of nonsense."""
    page = mmap.PAGESIZE
    whole = mmap.mmap(-1, 3 * page)
    whole[:] = b"\xa5" * (3 * page)
    ram = GuestRam()
    ram.map_region(0x10000, memoryview(whole)[page : 2 * page])
    ram.write(0x10000, bytes(page))
    driver = SplitDriver(ram, Allocator(0x10000, page), 4)
    queue = driver.attach(queue_class(ram, 4))
    for addr in (0, 0xFFFF, 0x10000 - 8, 0x10000 + page - 8, 0x10000 + page, 1 << 63):
        for flags in (WRITE, INDIRECT, INDIRECT | WRITE):
            driver.write_desc(0, addr, 16, flags)
            driver.offer(0)
            with pytest.raises(BadChain):
                queue.pop()
            driver.avail_idx -= 1
    driver.write_desc(0, 0x10000 + page - 16, 16, WRITE)
    driver.offer(0)
    chain = queue.pop()
    assert chain is not None
    chain.writable[0][:] = b"x" * 16
    queue.add_used(chain, 16)
    assert queue.flush()
    assert whole[:page] == whole[2 * page :] == b"\xa5" * page
    del chain, queue, driver
    ram.unmap_all()
