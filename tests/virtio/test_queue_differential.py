# SPDX-License-Identifier: Apache-2.0
"""The C queue and its Python twin, driven with one program: same answers, same guest memory."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.virtio import queue_twin
from virtio import spec
from virtio.testing import Allocator, Buffer, SplitDriver
from vmm import _fastpath
from vmm.errors import BadChain
from vmm.memory import GuestMemory

RAM = 1 << 16
DATA = 0x8000
TABLE = 0x9000
NEXT, WRITE, INDIRECT = spec.DESC_F_NEXT, spec.DESC_F_WRITE, spec.DESC_F_INDIRECT
QUEUES = (_fastpath.VirtQueue, queue_twin.VirtQueue)


def outcome(call: Callable[..., Any], *args: Any) -> Any:
    """What `call` returned, or the broken rule, in a form that compares."""
    try:
        return call(*args)
    except (BadChain, ValueError, KeyError) as error:  # KeyError: a head that the driver has forgotten
        return f"{type(error).__name__}: {error}"


def shape(chain: Any) -> Any:
    """All that a device sees of a chain."""
    if chain is None or isinstance(chain, str):
        return chain
    parts = [[(len(b), bytes(b[:64])) for b in side] for side in (chain.readable, chain.writable)]
    copies = [chain.gather(limit, start) for limit in (0, 1, 64, 4096) for start in (0, 1, 63, 1 << 40)]
    return chain.head, chain.readable_bytes, chain.writable_bytes, parts, copies


class Pair:
    """Two guests with the same memory and the same driver; one has the C queue, the other the Python one."""

    def __init__(self, size: int, *, event_idx: bool, indirect: bool, start: int, seed: int = 0) -> None:
        self.sides = []
        queue_class: Any
        for queue_class in QUEUES:
            ram = GuestMemory(RAM)
            ram.write(DATA, bytes(range(256)) * 16)
            allocator = Allocator(0x1000, 0x6000, gaps=random.Random(seed))
            driver = SplitDriver(ram, allocator, size, event_idx=event_idx, start=start)
            self.sides.append((ram, driver, driver.attach(queue_class(ram, 16), indirect=indirect)))

    def same(self, call: Callable[..., Any]) -> Any:
        """Do `call(ram, driver, queue)` on both sides: one answer."""
        ours, twins = (outcome(call, *side) for side in self.sides)
        assert ours == twins
        return ours

    def pop(self) -> tuple[Any, Any]:
        """Pop both: the two chains, or twice the broken rule."""
        ours, twins = (outcome(queue.pop) for _, _, queue in self.sides)
        assert shape(ours) == shape(twins)
        return ours, twins

    def repair(self) -> None:
        """The driver is good again: nothing pending, all descriptors free."""

        def mend(ram: Any, driver: SplitDriver, queue: Any) -> None:
            driver.avail_idx = queue.last_avail
            ram.write(driver.avail + 2, queue.last_avail.to_bytes(2, "little"))
            driver.chains.clear()
            driver.free = list(range(driver.size))[::-1]

        self.same(mend)

    def check(self) -> None:
        (ram, _, queue), (other, _, twin) = self.sides
        assert ram.slice(0, RAM) == other.slice(0, RAM)
        assert (queue.last_avail, queue.next_used) == (twin.last_avail, twin.next_used)

    def close(self) -> None:
        for ram, _, _ in self.sides:
            ram.close()


# Chains: every way that a table can be wrong, often enough that each rule is met many times


def descriptors(pick: random.Random, count: int, size: int) -> Iterator[tuple[int, int, int, int]]:
    """`count` descriptors that are mostly a chain in order, and now and then not."""
    turn = pick.randrange(count + 1)
    for index in range(count):
        addr = DATA + pick.randrange(0x1000)
        if pick.random() < 0.05:
            addr = pick.choice([0, RAM - 16, RAM - 1, RAM, RAM + 1, (1 << 64) - 16, (1 << 64) - 1])
        length = pick.choice([0, 1, 15, 16, 17, 512, 4096]) if pick.random() < 0.95 else pick.randrange(1 << 32)
        flags = NEXT * (index + 1 < count) | WRITE * (index >= turn)
        if pick.random() < 0.05:
            flags ^= pick.choice([NEXT, WRITE, WRITE, 0xFFF8])
        following = index + 1 if pick.random() < 0.95 else pick.choice([0, size - 1, size, 65535, count])
        yield addr, length, flags, following


@pytest.mark.parametrize("seed", range(8))
def test_twins_accept_the_same_chains(seed: int) -> None:
    pick = random.Random(seed)
    rules: dict[str, int] = {}
    for event_idx in (False, True):
        pair = Pair(8, event_idx=event_idx, indirect=True, start=65500)
        blind = Pair(8, event_idx=event_idx, indirect=False, start=0)
        for _ in range(1500):
            rig = pair if pick.random() < 0.95 else blind
            main = list(descriptors(pick, pick.randrange(1, 9), 8))
            inner = list(descriptors(pick, pick.randrange(1, 9), pick.randrange(1, 9)))
            if pick.random() < 0.1:
                at = pick.randrange(len(inner))
                inner[at] = (TABLE, 16, inner[at][2] | INDIRECT, 0)
            if pick.random() < 0.5:
                length = 16 * len(inner)
                if pick.random() < 0.1:
                    length = pick.choice([0, 1, 15, length + 1, length - 16, length + 16, 16 * 9, 0xFFFF_FFF0])
                flags = INDIRECT | WRITE * pick.randrange(2) | NEXT * (pick.random() < 0.05)
                main[-1] = (TABLE if pick.random() < 0.95 else RAM - 16, length, flags, pick.randrange(8))
            head = 0 if pick.random() < 0.97 else pick.choice([7, 8, 65535])
            ahead = 1 if pick.random() < 0.97 else pick.choice([8, 9, 10, 65535])

            def play(ram: Any, driver: SplitDriver, queue: Any, main: Any = main, inner: Any = inner,
                     head: int = head, ahead: int = ahead) -> None:  # fmt: skip
                for index, descriptor in enumerate(main):
                    driver.write_desc(index, *descriptor)
                ram.write(TABLE, b"".join(spec.DESC.pack(*d) for d in inner))
                driver.offer(head)
                index = driver.avail_idx + ahead - 1 & 0xFFFF
                ram.write(driver.avail + 2, index.to_bytes(2, "little"))

            rig.same(play)
            ours, _ = rig.pop()
            rule = ours.partition(": ")[2].partition(": ")[2] if isinstance(ours, str) else "a chain"
            rules[rule] = rules.get(rule, 0) + 1
            rig.check()
            rig.repair()
        pair.close()
        blind.close()
    # The generator is only worth something while it meets every rule of pop().
    missed = {rule for rule in _fastpath.RULES.values() if rule not in rules}
    assert {rule.partition(" (")[0] for rule in missed} <= {
        "the queue is not ready",
        "the chain holds more than 2^32 bytes",
    }
    assert rules["a chain"] > 500


# The protocol: adding, taking, returning, asking for notifications and for interrupts, in any order


class TwoQueues(RuleBasedStateMachine):
    @initialize(
        size=st.sampled_from([1, 2, 4, 16]),
        event_idx=st.booleans(),
        indirect=st.booleans(),
        start=st.sampled_from([0, 1, 65530]),
        seed=st.integers(0, 1000),
    )
    def build(self, size: int, event_idx: bool, indirect: bool, start: int, seed: int) -> None:
        self.pair = Pair(size, event_idx=event_idx, indirect=indirect, start=start, seed=seed)
        self.indirect = indirect
        self.popped: list[tuple[Any, Any]] = []
        self.tables = 0

    # The driver

    @rule(chains=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 4), st.booleans()), min_size=1, max_size=4))
    def add(self, chains: list[tuple[int, int, bool]]) -> None:
        for count, turn, wide in chains:
            wide = wide and self.indirect and self.tables < 60
            buffers = [Buffer(DATA + 64 * i, 16 * i + 1, i >= turn) for i in range(count)]
            if len(self.pair.sides[0][1].free) < (1 if wide else count):
                return
            self.tables += wide
            self.pair.same(lambda r, d, q, b=buffers, w=wide: d.add_indirect(b) if w else d.add(b))

    @rule()
    def reap(self) -> None:
        self.pair.same(lambda ram, driver, queue: driver.reap())

    @rule(wanted=st.booleans(), after=st.integers(0, 4))
    def want_interrupt(self, wanted: bool, after: int) -> None:
        self.pair.same(lambda ram, driver, queue: driver.want_interrupt(wanted, after=after))

    @rule()
    def needs_kick(self) -> None:
        self.pair.same(lambda ram, driver, queue: driver.needs_kick())

    @rule(ahead=st.sampled_from([1, 17, 32768, 65535]))
    def lie_about_avail_idx(self, ahead: int) -> None:
        """Broken or not, pop it dry; a driver that lied then starts again from where the device is."""

        def lie(ram: Any, driver: SplitDriver, queue: Any) -> None:
            ram.write(driver.avail + 2, (driver.avail_idx + ahead & 0xFFFF).to_bytes(2, "little"))

        self.pair.same(lie)
        for _ in range(17):
            if isinstance(self.pair.pop()[0], str | None):
                break
        self.popped.clear()
        self.pair.repair()

    # The device

    @rule(count=st.integers(1, 4))
    def pop(self, count: int) -> None:
        for _ in range(count):
            pair = self.pair.pop()
            if not isinstance(pair[0], str | None):
                self.popped.append(pair)

    @precondition(lambda self: self.popped)
    @rule(which=st.integers(0, 100), part=st.sampled_from([0, 1, 3, 3, 4]), twice=st.booleans())
    def add_used(self, which: int, part: int, twice: bool) -> None:
        pair = self.popped.pop(which % len(self.popped))
        written = pair[0].writable_bytes * part // 3  # 4: more than there is room for
        for _ in range(1 + twice):
            zipped = zip(self.pair.sides, pair, strict=True)
            answers = [outcome(queue.add_used, chain, written) for (_, _, queue), chain in zipped]
            assert answers[0] == answers[1]
        if written > pair[0].writable_bytes:
            self.popped.append(pair)

    @rule()
    def flush(self) -> None:
        self.pair.same(lambda ram, driver, queue: queue.flush())

    @rule()
    def enable_notify(self) -> None:
        self.pair.same(lambda ram, driver, queue: queue.enable_notify())

    @rule()
    def disable_notify(self) -> None:
        self.pair.same(lambda ram, driver, queue: queue.disable_notify())

    @invariant()
    def memory_and_indices_are_the_same(self) -> None:
        self.pair.check()

    def teardown(self) -> None:
        if hasattr(self, "pair"):
            self.pair.close()


TwoQueues.TestCase.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
TestTwoQueues = TwoQueues.TestCase


def test_twins_accept_the_same_set_ups() -> None:
    """Every size and address that enable() may be given: the same verdict in the same words."""
    pick = random.Random(0)
    values = [0, 1, 2, 4, 8, 16, 0x1000, RAM - 256, RAM - 8, RAM, 1 << 63]
    with GuestMemory(RAM) as ram:
        for _ in range(3000):
            size = pick.choice([0, 1, 2, 3, 8, 16, 32, 65537])
            addresses = [pick.choice(values) for _ in range(3)]
            verdicts = []
            for queue_class in QUEUES:
                queue: Any = queue_class(ram, 16)
                queue.size = size
                queue.desc, queue.avail, queue.used = addresses
                verdict = outcome(lambda q=queue: q.enable(event_idx=True, indirect=True))
                verdicts.append((verdict, queue.ready))
            assert verdicts[0] == verdicts[1]


@pytest.mark.parametrize("max_size", [0, -1, 3, 65536])
@pytest.mark.parametrize("queue_class", QUEUES)
def test_a_maximum_that_no_queue_can_have_is_refused(queue_class: Any, max_size: int) -> None:
    with GuestMemory(RAM) as ram, pytest.raises(ValueError, match="power of two"):
        queue_class(ram, max_size)
