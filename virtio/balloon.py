# SPDX-License-Identifier: Apache-2.0
"""The memory balloon (§5.5): the guest hands pages back, and the host really gets them.

A page that is given back is a hole in the memfd behind guest memory: it reads as zeros, and it costs the host
something again only when the guest next touches it. So deflating needs no work here, and no page of the balloon
can harm a guest that uses it too early.
"""

from __future__ import annotations

import bisect  # noqa: F401  # what memory.discard() needs, as below
import struct
import threading

from virtio import spec
from virtio.device import VirtioDevice
from vmm import budget  # noqa: F401  # what memory.discard() needs: the device's thread may not import
from vmm.errors import ConfigError, GuestMemoryError
from vmm.memory import joined
from vmm.threads import spawn

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from virtio.device import ActivateContext
    from vmm._fastpath import Chain, VirtQueue

_PAGES_PER_MIB = (1 << 20) // spec.BALLOON_PAGE
AMOUNT_MAX_MIB = 0xFFFF_FFFF // _PAGES_PER_MIB
INTERVAL_MAX_S = 0xFFFF
# Linux and FreeBSD name 256 pages in a request, Windows 1024. What names more than this is not looked at.
REQUEST_PAGES_MAX = 1 << 14
# Linux has 16 statistics.
_STATS_MAX = 256
# By tag (§5.5.6.4; the last six are Linux's), under Firecracker's names.
STATISTICS = (
    "swap_in", "swap_out", "major_faults", "minor_faults", "free_memory", "total_memory", "available_memory",
    "disk_caches", "hugetlb_allocations", "hugetlb_failures", "oom_kill", "alloc_stall", "async_scan", "direct_scan",
    "async_reclaim", "direct_reclaim",
)  # fmt: skip
_STATS_QUEUE = 2
_WRITABLE = frozenset((*range(4, 8), *range(12, 16)))  # by the driver, of the configuration space: actual, poison_val


class Balloon(VirtioDevice):
    """A virtio memory balloon.

    :param amount_mib: memory in MiB that the guest is asked to give back; ``set_amount`` changes it
    :param deflate_on_oom: the guest may take pages back when it runs out of memory
    :param stats_polling_interval_s: seconds from one reading of the guest's statistics to the next; 0: none, ever
    :param free_page_reporting: the guest hands back what it does not use, by itself
    :param name: name of the worker's thread
    :raises ConfigError: an amount or an interval out of range

    ``stats``: ``inflated``, ``deflated`` and ``reported`` pages of 4 KiB; ``bytes_discarded`` given back to the host;
    ``bad_pages`` that are not in the guest's RAM, which are ignored; ``io_errors`` of the host.
    """

    thread_kind = "device"
    device_type = spec.TYPE_BALLOON

    def __init__(
        self,
        amount_mib: int = 0,
        *,
        deflate_on_oom: bool = False,
        stats_polling_interval_s: int = 0,
        free_page_reporting: bool = False,
        name: str = "virtio-balloon",
    ) -> None:
        super().__init__()
        self.name = name
        self.counters |= {
            "inflated": 0, "deflated": 0, "reported": 0, "bytes_discarded": 0, "bad_pages": 0, "io_errors": 0,
            "stats_updates": 0, "bad_stats": 0,
        }  # fmt: skip
        # With PAGE_POISON a guest that fills its free pages tells with what, and may report them all the same.
        for wanted, bits in (
            (stats_polling_interval_s, spec.BALLOON_F_STATS_VQ),
            (deflate_on_oom, spec.BALLOON_F_DEFLATE_ON_OOM),
            (free_page_reporting, spec.BALLOON_F_PAGE_REPORTING | spec.BALLOON_F_PAGE_POISON),
        ):
            self.features |= bits if wanted else 0
        self.queue_sizes = (128,) * (2 + bool(stats_polling_interval_s) + free_page_reporting)
        self._lock = threading.Lock()  # the configuration space: the vCPUs and who sets the amount
        self._serves: list[Callable[[Chain], int] | None] = []  # by queue; None: statistics
        self._poison = 0
        # Statistics: the chain that asks for the next ones, and the thread that says when.
        self._held: Chain | None = None
        self._due = False
        self._ticker: threading.Thread | None = None
        self._ticking = False
        self._changed = threading.Condition()
        self._latest: dict[str, int] = {}
        self.stats_polling_interval_s = self._interval(stats_polling_interval_s)
        self.config = spec.BALLOON_CONFIG.pack(self._pages(amount_mib), 0, 0, 0)

    # For whoever runs the VM

    @property
    def amount_mib(self) -> int:
        """What the guest is asked to hand back, in MiB."""
        target, _, _, _ = spec.BALLOON_CONFIG.unpack(self.config)
        return int(target) // _PAGES_PER_MIB

    def set_amount(self, amount_mib: int) -> None:
        """Ask the guest for so many MiB in all, more or less than before; it takes its time. Any thread.

        :raises ConfigError: out of range
        """
        pages = self._pages(amount_mib)
        with self._lock:
            self.publish_config(struct.pack("<I", pages) + self.config[4:])

    def set_polling_interval(self, seconds: int) -> None:
        """Read the guest's statistics every so many seconds from now on. Any thread.

        :raises ConfigError: `seconds` is out of range, or would turn statistics on or off, which a driver learns only
            when it starts
        """
        if bool(self._interval(seconds)) != bool(self.stats_polling_interval_s):
            raise ConfigError("stats_polling_interval_s", seconds, "statistics are turned on and off before the start")
        with self._changed:
            self.stats_polling_interval_s = seconds
            self._changed.notify_all()

    def statistics(self) -> dict[str, int]:
        """The amounts, and the latest of each statistic that the guest gave, under Firecracker's names. Any thread.

        Sizes are in bytes unless the name says otherwise. All but the target is what the guest claims.
        """
        target, actual, _, _ = spec.BALLOON_CONFIG.unpack(self.config)
        return {
            "target_pages": target,
            "actual_pages": actual,
            "target_mib": target // _PAGES_PER_MIB,
            "actual_mib": actual // _PAGES_PER_MIB,
            **self._latest,
        }

    @staticmethod
    def _pages(amount_mib: int) -> int:
        if not 0 <= amount_mib <= AMOUNT_MAX_MIB:
            raise ConfigError("amount_mib", amount_mib, f"must be 0 to {AMOUNT_MAX_MIB} MiB")
        return amount_mib * _PAGES_PER_MIB

    @staticmethod
    def _interval(seconds: int) -> int:
        if not 0 <= seconds <= INTERVAL_MAX_S:
            raise ConfigError("stats_polling_interval_s", seconds, f"must be 0 to {INTERVAL_MAX_S} seconds")
        return seconds

    # The driver

    def activate(self, context: ActivateContext) -> None:
        # §5.5.2 numbers the queues; Linux, and devices after it, count only those that were negotiated.
        self._serves = [self._inflate, self._deflate]
        if context.features & spec.BALLOON_F_STATS_VQ:
            self._ticking = True
            self._ticker = spawn(self.thread_kind, "balloon stats", self._tick)
            self._serves.append(None)
        if context.features & spec.BALLOON_F_PAGE_REPORTING:
            self._serves.append(self._report)
        # §5.5.6.5.1: it is not changed after this
        _, _, _, poison = spec.BALLOON_CONFIG.unpack(self.config)
        self._poison = poison if context.features & spec.BALLOON_F_PAGE_POISON else 0

    def release(self) -> None:
        """Give the statistics' buffer back: the driver answers with another."""
        if self._held is not None and self.context.queues[_STATS_QUEUE].ready:
            self._hold(self.context.queues[_STATS_QUEUE], None)

    def restore(self, state: dict[str, Any]) -> None:
        actual, poison = state["actual"], state["poison"]
        with self._lock:
            self.config = self.config[:4] + struct.pack("<III", actual, 0, poison)
        self._poison = poison if self.context.features & spec.BALLOON_F_PAGE_POISON else 0

    def save(self) -> dict[str, Any]:
        _, actual, _, poison = spec.BALLOON_CONFIG.unpack(self.config)
        return {"actual": actual, "poison": poison}

    def reset(self) -> None:
        """Forget the driver: what was in its balloon is its guest's again."""
        if self._ticker is not None:
            with self._changed:
                self._ticking = False
                self._changed.notify_all()
            self._ticker.join()
        self._ticker = self._held = None
        self._due = False
        self._latest = {}
        with self._lock:
            self.config = self.config[:4] + bytes(12)

    def write_config(self, offset: int, data: bytes) -> None:
        """Take what the driver writes to ``actual`` and ``poison_val``; nothing else is its to write."""
        with self._lock:
            config = bytearray(self.config)
            for at, byte in enumerate(data, offset):
                if at in _WRITABLE:
                    config[at] = byte
            self.config = bytes(config)

    def process(self, queue_index: int) -> None:
        if queue_index >= len(self._serves):
            return
        queue, serve = self.context.queues[queue_index], self._serves[queue_index]
        if serve is None:
            self._statistics(queue)
        else:
            self.drain(queue, serve)

    def _inflate(self, chain: Chain) -> int:
        pages = self._named(chain)
        self.counters["inflated"] += len(pages)
        for first, count in joined((page, 1) for page in sorted(set(pages))):
            self._discard(first * spec.BALLOON_PAGE, count)
        return 0

    def _deflate(self, chain: Chain) -> int:
        self.counters["deflated"] += len(self._named(chain))
        return 0

    def _named(self, chain: Chain) -> tuple[int, ...]:
        """The page numbers of a request; none where it is not as §5.5.6 has it."""
        self.counters["requests"] += 1
        size = chain.readable_bytes
        if chain.writable_bytes or size % 4 or not 0 < size <= 4 * REQUEST_PAGES_MAX:
            self.counters["bad_requests"] += 1
            return ()
        return struct.unpack(f"<{size // 4}I", chain.gather(4 * REQUEST_PAGES_MAX))

    def _discard(self, gpa: int, count: int) -> None:
        memory = self.context.memory
        try:
            self._give_back(memory.slice(gpa, count * spec.BALLOON_PAGE))
        except GuestMemoryError:
            if count == 1:
                self.counters["bad_pages"] += 1
                return
            # A run that leaves RAM somewhere: what lies inside is still given back.
            for page in range(count):
                self._discard(gpa + page * spec.BALLOON_PAGE, 1)

    def _give_back(self, part: memoryview) -> None:
        try:
            self.counters["bytes_discarded"] += self.context.memory.discard(part)
        except OSError as error:
            self.counters["io_errors"] += 1
            self.context.warn(f"discard: {error.errno}", f"{self.name}: discard guest memory: {error.strerror}")

    def _report(self, chain: Chain) -> int:
        """Free pages: the buffers are the pages themselves (§5.5.6.7)."""
        self.counters["requests"] += 1
        if chain.readable_bytes or not chain.writable_bytes:
            self.counters["bad_requests"] += 1
            return 0
        self.counters["reported"] += chain.writable_bytes // spec.BALLOON_PAGE
        if not self._poison:  # §5.5.6.7.2: a page that is to hold something else must not become zeros
            for part in chain.writable:
                self._give_back(part)
        return 0

    # Statistics: the driver's buffer is kept, and given back to ask for the next (§5.5.6.3).

    def _statistics(self, queue: VirtQueue) -> None:
        context = self.context
        while True:
            queue.disable_notify()
            if self._due and self._held is not None:
                self._due = False
                self._hold(queue, None)
            while not context.stopping and (chain := queue.pop()) is not None:
                self.counters["bad_requests"] += self._held is not None  # §5.5.6.3.1: at most one at a time
                self._hold(queue, chain)
                self._learn(chain)
            if not queue.enable_notify() or context.stopping:
                return

    def _hold(self, queue: VirtQueue, chain: Chain | None) -> None:
        before, self._held = self._held, chain
        if before is not None:
            queue.add_used(before, 0)
            if queue.flush():
                self.context.interrupt(queue.index)

    def _learn(self, chain: Chain) -> None:
        self.counters["requests"] += 1
        size = chain.readable_bytes
        if chain.writable_bytes or size % spec.BALLOON_STAT.size or size > _STATS_MAX * spec.BALLOON_STAT.size:
            self.counters["bad_requests"] += 1
            self.counters["bad_stats"] += 1
            return
        self.counters["stats_updates"] += 1
        given = spec.BALLOON_STAT.iter_unpack(chain.gather(_STATS_MAX * spec.BALLOON_STAT.size))
        # A new dictionary: another thread may read the one before.
        self._latest = self._latest | {STATISTICS[tag]: value for tag, value in given if tag < len(STATISTICS)}

    def _tick(self) -> None:
        with self._changed:
            while self._ticking:
                if not self._changed.wait(self.stats_polling_interval_s):  # else: another interval, or the end
                    self._due = True
                    self.wake(_STATS_QUEUE)
