# SPDX-License-Identifier: Apache-2.0
"""The base class of virtio devices, and what one gets when its driver is ready."""

from __future__ import annotations

import os
import threading
from _collections import defaultdict  # type: ignore[import-not-found]  # `collections` takes long to import

from virtio._worker import Worker
from vmm import logger
from vmm.errors import ConfigError, GuestError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from virtio._interrupt import Interrupt
    from virtio._limiter import Bucket, RateLimiter
    from virtio._worker import QueueWorker
    from vmm._fastpath import Chain, GuestRam, VirtQueue


class Warner:
    """Passes on the 1st, 2nd, 4th, 8th, ... message of each kind, so that no guest can flood the log.

    :param sink: takes one line without a newline
    """

    def __init__(self, sink: Callable[[str], None] = logger.warn) -> None:
        self._sink = sink
        self._seen: dict[str, int] = {}

    def __call__(self, kind: str, message: str) -> None:
        count = self._seen[kind] = self._seen.get(kind, 0) + 1
        if count & (count - 1) == 0:
            self._sink(message if count == 1 else f"{message} (seen {count} times)")


def threads_for(queues: int, threads: int) -> int:
    """How many threads serve `queues` queues, or pairs of them.

    :param threads: as many as asked for; 0: one for each queue, but no more than half of this process's CPUs
    """
    # The guest's vCPUs have the other half. With more threads than that, each waits for its turn (measured).
    return min(queues, threads or max(1, len(os.sched_getaffinity(0)) // 2))


class ActivateContext:
    """The parts of the VM that a device may use while a driver is active.

    :ivar memory: guest RAM
    :ivar queues: its queues, ready or not; for the worker thread only
    :ivar features: the feature bits that the driver accepted
    :ivar interrupt: ``interrupt(queue)`` tells the driver to check the used ring of that number; from any thread
    :ivar warn: ``warn(kind, message)`` logs a message, with a limit for each kind
    :ivar stopping: True when the threads are to stop; a loop over a queue must then return. The driver has reset the
        device, or taken a queue back, or its machine is copied. In the last two cases the device goes on after that
    """

    __slots__ = ("features", "interrupt", "memory", "queues", "stopping", "warn")

    def __init__(
        self,
        memory: GuestRam,
        queues: Sequence[VirtQueue],
        features: int,
        interrupt: Interrupt,
        warn: Callable[[str, str], None],
    ) -> None:
        self.memory = memory
        self.queues = queues
        self.features = features
        self.interrupt = interrupt
        self.warn = warn
        self.stopping = False


class VirtioDevice:
    """Base class of devices. A device defines ``device_type``, ``queue_sizes``, and ``process`` or ``make_workers``.

    :ivar device_type: its number in §5
    :ivar queue_sizes: the largest size of each queue, powers of two
    :ivar features: the feature bits that it offers; the transport adds VERSION_1, INDIRECT_DESC and EVENT_IDX
    :ivar tolerated: feature bits with which it can go on for a driver of a saved machine, though it does not offer them
    :ivar config: the configuration space as the driver reads it, little endian
    :ivar shm_regions: (guest address, bytes) of each shared memory region by its id (§2.10)
    :ivar thread_kind: the system call filter of its threads, one of ``vmm.jail.seccomp.KINDS``. None: its threads have
        no filter. If it is in the machine at the start, neither have the vCPUs' threads, which call its methods, too
    :ivar below: the only directory below which its threads may open files: a descriptor of it, and whether they may
        write there. None: as ``thread_kind`` says
    :ivar poll_us: microseconds that a native worker checks its queues before it sleeps; 0: it sleeps at once
    :ivar unsavable: one clause: why it cannot be saved now; empty: it can
    :ivar counters: the counters of Python code, under any names; read all counters by ``stats``
    """

    name: str = "virtio"
    thread_kind: str | None = None
    below: tuple[int, bool] | None = None
    device_type: int
    queue_sizes: tuple[int, ...]
    features: int = 0
    tolerated: int = 0
    config: bytes = b""
    poll_us: float = 0
    unsavable: str = ""
    context: ActivateContext

    def __init__(self) -> None:
        self.counters: dict[str, int] = defaultdict(int, requests=0, bad_requests=0, needs_reset=0)
        self.shm_regions: dict[int, tuple[int, int]] = {}
        self._workers: list[Any] = []  # threads in Cython that have ``stats`` and ``wake``
        # Of the transport, while there is one: an eventfd for each queue. It empties the list under the lock.
        self.notify_fds: list[int] = []
        self.waking = threading.Lock()

    @property
    def stats(self) -> dict[str, int]:
        """Counters by name, of the device and of its threads in C."""
        total = dict(self.counters)
        for worker in self._workers:
            for name, value in worker.stats.items():
                total[name] = total.get(name, 0) + value
        return total

    def _limit(self, limiter: RateLimiter, bandwidth: Bucket | None, ops: Bucket | None) -> None:
        # Also for what waits for it.
        limiter.update(bandwidth, ops)
        for worker in self._workers:
            worker.wake()

    def make_workers(self, notify_fds: Sequence[int], on_failure: Callable[[Exception], None]) -> Sequence[QueueWorker]:
        """Make the threads that serve the queues. Each transport calls this once, and owns them.

        Those of a transport before have ended: the device forgets them.

        :param notify_fds: an eventfd for each queue, which is signalled when the driver notifies
        :param on_failure: a thread that ends before it was stopped must call this
        """
        return [Worker(self, range(len(notify_fds)), notify_fds, on_failure)]

    def publish_config(self, config: bytes, *, tell: bool = True) -> None:
        """Change ``config`` and, if `tell`, interrupt the driver. Any thread.

        In ``__init__``, ``write_config`` and ``restore``, assign to ``config`` instead; the guest does not see an
        assignment anywhere else.
        """
        self.config = config  # until a transport puts its own in the place of this

    def process(self, queue_index: int) -> None:
        """Serve a queue, usually by ``drain``. Called on the worker's thread after a notification, and when it starts.

        :raises GuestError: a ring is invalid; the transport sets DEVICE_NEEDS_RESET
        """
        raise NotImplementedError(f"{type(self).__name__} has no method process")

    def write_config(self, offset: int, data: bytes) -> None:
        """Called when the driver writes `data` to the configuration space. The default ignores it."""

    def activate(self, context: ActivateContext) -> None:
        """Called when the driver is ready. ``self.context`` is already set."""

    def release(self) -> None:
        """Called when the workers have stopped: return every chain that is held. They may be started again."""

    def reset(self) -> None:
        """Called when the driver has reset the device and the workers have stopped: forget what was negotiated."""

    def save(self) -> dict[str, Any]:
        """The state that its driver can see, beside queues and features. The workers have stopped.

        What the driver has written to ``config`` is state: a copy begins with a ``config`` of its own.
        Resources of the host (paths, taps, sockets, limits) are configuration, not state.

        :returns: integers, strings and bytes, and lists and dictionaries of them
        :raises SnapshotError: the device cannot be saved, or not in its present use
        """
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the result of ``save`` of another such device. Called after ``activate``, before the workers start.

        The values are of the right types but not trusted. Raise KeyError, TypeError, ValueError or SnapshotError to
        refuse them.
        """

    def drain(
        self, queue: VirtQueue, serve: Callable[[Chain], int], waiting: Callable[[], object] | None = None
    ) -> None:
        """Call `serve` with each chain until the queue is empty. `serve` returns the number of bytes that it wrote.

        :param waiting: a function that tells whether the device has something for the driver, for a queue of buffers
            that the device fills. While it returns a false value, the chains stay in the queue. When there is
            something, call ``wake``
        """
        context = self.context
        while True:
            queue.disable_notify()
            while not context.stopping and (waiting is None or waiting()) and (chain := queue.pop()) is not None:
                queue.add_used(chain, serve(chain))
                if queue.flush():
                    context.interrupt(queue.index)
            if not queue.enable_notify() or context.stopping or not (waiting is None or waiting()):
                return

    def wake(self, queue_index: int) -> None:
        """Have ``process`` called for a queue, as if the driver had notified. Any thread; without a driver, nothing."""
        with self.waking:
            if self.notify_fds:
                os.eventfd_write(self.notify_fds[queue_index], 1)


def describe(failure: Exception) -> str:
    """One clause for the log: a guest's fault by itself, anything else with its type and where it was raised."""
    if isinstance(failure, GuestError | OSError):
        return str(failure)
    trace = failure.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = f" ({os.path.basename(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno})" if trace else ""
    return f"{type(failure).__name__}: {failure}{where}"


def _is_queue(size: object) -> bool:
    return type(size) is int and 0 < size <= 32768 and not size & (size - 1)


# Source: virtio 1.2 §2.2; the bits between are the transport's.
_OWN_FEATURES = (1 << 24) - 1 | ((1 << 64) - (1 << 50))
# What a device declares: whether a value is good, and what is allowed.
_DECLARED: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("name", lambda name: isinstance(name, str) and name != "", "must be a string, the name of the device's thread"),
    ("device_type", lambda n: type(n) is int and 0 < n < 1 << 32, "must be a number, such as those of §5"),
    ("queue_sizes", lambda all: isinstance(all, tuple) and 0 < len(all) <= 64 and min(map(_is_queue, all)),
     "must be a tuple of powers of two up to 32768, one for each of 1 to 64 queues"),
    ("features", lambda bits: type(bits) is int and bits >= 0 and not bits & ~_OWN_FEATURES,
     "must have no bits but 0 to 23 and 50 to 63; the others are the transport's"),
    ("config", lambda config: isinstance(config, bytes) and len(config) <= 3840, "must be bytes, 3840 at most"),
)  # fmt: skip


def check(device: VirtioDevice) -> None:
    """Refuse a device that cannot work, when it is added and not when a guest meets it.

    :raises ConfigError: which of its attributes is wrong, and what is allowed
    """
    kind = type(device)
    if not isinstance(device, VirtioDevice):
        what = f"class {device.__name__}" if isinstance(device, type) else kind.__name__
        raise ConfigError("device", what, "must be an object of a class that is derived from VirtioDevice")
    if not hasattr(device, "waking"):
        raise ConfigError("device", kind.__name__, "its __init__ must call super().__init__() first")
    if device.notify_fds:
        raise ConfigError("device", device.name, "is in a machine; make another for each machine and place")
    for field, good, allowed in _DECLARED:
        if not hasattr(device, field):
            raise ConfigError(f"{kind.__name__}.{field}", "", f"is missing: {allowed}")
        if not good(value := getattr(device, field)):
            raise ConfigError(f"{kind.__name__}.{field}", repr(value)[:60], allowed)
