# SPDX-License-Identifier: Apache-2.0
"""What every virtio transport does: feature negotiation, the status machine, queues, workers, state (§2, §3)."""

from __future__ import annotations

import os
import struct
import threading

from virtio import spec
from virtio.device import ActivateContext, VirtioDevice, Warner, check, describe
from vmm import logger
from vmm._fastpath import VirtQueue
from vmm.closing import Closers
from vmm.errors import BadChain, SnapshotError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from virtio._interrupt import Interrupt
    from virtio._worker import QueueWorker
    from vmm._fastpath import GuestRam

_LOW = 0xFFFF_FFFF
_QUEUE_FIELDS = ("size", "desc", "avail", "used")
# Each status bit with the one that must be set before it, in the order of §3.1.1.
_STATUS_ORDER = (
    (spec.ACKNOWLEDGE, 0),
    (spec.DRIVER, spec.ACKNOWLEDGE),
    (spec.FEATURES_OK, spec.DRIVER),
    (spec.DRIVER_OK, spec.FEATURES_OK),
)


class Transport:
    """A virtio device as its driver meets it, whatever the registers; base of ``virtio.mmio.VirtioMmio``.

    :param device: the device; this transport is its only owner
    :param memory: guest RAM, where the queues are
    :param warn: takes a line for the log, rate limited here
    :raises ConfigError: the device cannot work
    :raises OSError: no file descriptor is left for a queue's notification

    ``notify_fds[i]`` is an eventfd: who writes to it wakes the worker of queue ``i``. ``stats`` counts what the driver
    did wrong at registers; the device has its own. ``lock`` is held by every register access; a subclass takes it.
    ``interrupt`` is how the driver is told; a subclass makes it before.
    """

    interrupt: Interrupt

    def __init__(
        self,
        device: VirtioDevice,
        memory: GuestRam,
        warn: Callable[[str], None] = logger.warn,
    ) -> None:
        check(device)
        self.device = device
        self.memory = memory
        self.queues = tuple(VirtQueue(memory, size, i) for i, size in enumerate(device.queue_sizes))
        self.notify_fds: list[int] = []
        self.stats = {"bad_access": 0, "bad_status": 0, "bad_features": 0, "bad_queue": 0, "bad_notify": 0}
        self.offered = device.features | spec.F_VERSION_1 | spec.F_INDIRECT_DESC | spec.F_EVENT_IDX
        self.generation = 0
        self.lock = threading.Lock()  # registers: several vCPUs at once
        self._config_lock = threading.Lock()  # the configuration space and its generation; inside lock, never around
        self._warn = Warner(warn)
        self._status = 0
        self._driver_features = 0
        self._needs_reset = False
        self.serving = False  # the workers have been started, and not stopped since
        self._stopping = False  # they have been told to stop, and not all have
        self._closed = False
        self._workers: Sequence[QueueWorker] = ()
        device.notify_fds = self.notify_fds
        try:
            self.make_descriptors()
            self._workers = device.make_workers(self.notify_fds, self._fail)
        except BaseException:
            self.close()
            raise
        device.publish_config = self.publish_config  # type: ignore[method-assign]

    def make_descriptors(self) -> None:
        """Open those that ``close_descriptors`` closes; a subclass adds its own."""
        for _ in self.queues:
            self.notify_fds.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))

    def close_descriptors(self) -> None:
        with self.device.waking:
            while self.notify_fds:
                os.close(self.notify_fds.pop())

    # What the registers show without being asked; a subclass whose registers are a page follows here.

    def show_status(self) -> None:
        """``status`` has changed; any thread."""

    def show_config(self, config: bytes) -> None:
        """The configuration space has changed; under a lock of its own, any thread."""

    def show_generation(self) -> None:
        """``generation`` has changed; likewise."""

    def queue_is(self, index: int, notify_fd: int) -> None:
        """Queue `index` is ready and wakes its worker by `notify_fd`, or -1: it is not ready."""

    @property
    def notifications(self) -> tuple[int, ...]:
        """How often the driver's notifications woke the device, by queue."""
        counts = [0] * len(self.queues)
        for worker in self._workers:  # two of them may serve a queue, each for other drivers
            for index, count in worker.notified.items():
                counts[index] += count
        return tuple(counts)

    @property
    def is_here(self) -> bool:
        """Whether the calling thread is one of the workers'."""
        return any(worker.is_here() for worker in self._workers)

    # The configuration space

    def publish_config(self, config: bytes, *, tell: bool = True) -> None:
        """Show the driver another configuration space and tell it; any thread.

        :param config: as long as the one before
        :param tell: False: the driver made the change itself
        """
        with self._config_lock:  # with the generation, or a driver could put two halves together (§2.5.1)
            # Before and after: in a page a driver may meet any moment between.
            self._next_generation()
            self.device.config = config
            self.show_config(config)
            self._next_generation()
        if tell and self._status & spec.DRIVER_OK:
            self.interrupt.config()

    def _next_generation(self) -> None:
        self.generation = self.generation + 1 & _LOW
        self.show_generation()

    def show_whole_config(self) -> None:
        """Show the configuration space as it is."""
        with self._config_lock:  # or what another thread publishes meanwhile would be shown and taken back
            self.show_config(self.device.config)
            self.show_generation()

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver writes to the configuration space; past its end that is counted and changes nothing."""
        if offset + len(data) > len(self.device.config):
            self.stats["bad_access"] += 1
            return
        self.device.write_config(offset, data)
        self.show_whole_config()

    # Status and features; with ``lock`` held

    @property
    def status(self) -> int:
        """The device status field as the driver reads it (§2.1)."""
        return self._status | (spec.DEVICE_NEEDS_RESET if self._needs_reset else 0)

    def write_status(self, value: int) -> None:
        """The driver writes the device status field; 0 resets the device."""
        if value == 0:
            self.reset()
            return
        value &= ~spec.DEVICE_NEEDS_RESET  # the device's own
        if self._status & ~value:
            self.stats["bad_status"] += 1  # §2.1.1: the driver must not clear a bit
            return
        self._status |= value & spec.FAILED
        for bit, before in _STATUS_ORDER:
            if not value & bit or self._status & bit:
                continue
            if self._status & before != before:
                self.stats["bad_status"] += 1
                return
            accepted = self._driver_features
            if bit == spec.FEATURES_OK and (accepted & ~self.offered or not accepted & spec.F_VERSION_1):
                self.stats["bad_features"] += 1
                return  # §2.2.2, §6.2: FEATURES_OK stays clear and the driver sees it
            self._status |= bit
            if bit == spec.DRIVER_OK:
                self._activate()

    def offered_word(self, word: int) -> int:
        """32 bits of what the device offers; word 0 is the lowest."""
        return self.offered >> 32 * word & _LOW if word < 2 else 0

    def write_features(self, word: int, value: int) -> None:
        """The driver accepts these of 32 bits of the features."""
        may = self._status & (spec.DRIVER | spec.FEATURES_OK) == spec.DRIVER  # §3.1.1, steps 4 and 5
        if not may or word > 1:
            self.stats["bad_features"] += 1
            return
        self._driver_features = self._driver_features & ~(_LOW << 32 * word) | value << 32 * word

    def _fail(self, failure: Exception) -> None:
        """Set DEVICE_NEEDS_RESET: this device stops until its driver resets it, the VM lives (§2.1.2)."""
        self.device.counters["needs_reset"] += 1
        name = self.device.name
        self._warn("needs reset", f"{name} stopped until its driver resets it: {describe(failure)}")
        self._needs_reset = True
        self.show_status()
        if self._status & spec.DRIVER_OK:
            self.interrupt.config()

    # Queues; with ``lock`` held

    def _may_set_up(self, queue: VirtQueue | None) -> bool:
        stage = self._status & (spec.FEATURES_OK | spec.DRIVER_OK)
        if queue is None or stage != spec.FEATURES_OK or self._needs_reset:
            self.stats["bad_queue"] += 1
            return False
        return True

    def set_queue(self, queue: VirtQueue | None, field: str, value: int, shift: int = 0) -> None:
        """The driver sets ``size``, ``desc``, ``avail`` or ``used`` of a queue.

        :param shift: the lowest of the 32 bits that `value` replaces
        """
        if not self._may_set_up(queue) or queue is None:
            return
        if queue.ready:
            self.stats["bad_queue"] += 1  # §4.2.2.2: not while QueueReady is not 0
        else:
            setattr(queue, field, getattr(queue, field) & ~(_LOW << shift) | value << shift)

    def start_queue(self, queue: VirtQueue | None) -> None:
        """The driver has set the queue up."""
        if not self._may_set_up(queue) or queue is None or queue.ready:
            return
        try:
            self._enable(queue)
        except BadChain as bad:
            self.stats["bad_queue"] += 1
            self._fail(bad)

    def _enable(self, queue: VirtQueue, last_avail: int = 0, next_used: int = 0) -> None:
        queue.enable(
            event_idx=bool(self._driver_features & spec.F_EVENT_IDX),
            indirect=bool(self._driver_features & spec.F_INDIRECT_DESC),
            last_avail=last_avail,
            next_used=next_used,
        )
        self.queue_is(queue.index, self.notify_fds[queue.index])

    def stop_queue(self, queue: VirtQueue | None) -> None:
        """The driver takes the queue back, at whatever stage (§4.2.2.2)."""
        if queue is None:
            self.stats["bad_queue"] += 1
            return
        if not queue.ready:
            return
        self._stop_workers()  # the driver may take its memory back once QueueReady reads 0
        queue.reset()
        self.queue_is(queue.index, -1)
        if self._status & spec.DRIVER_OK and not self._needs_reset:
            self._go_on()

    # Life

    def _activate(self) -> None:
        if self._needs_reset:
            self.interrupt.config()
            return
        try:
            self._make_context()
        except (RuntimeError, OSError) as failure:  # as below
            self._fail(failure)
            return
        self._start_workers()

    def _make_context(self) -> None:
        device = self.device
        device.context = ActivateContext(self.memory, self.queues, self._driver_features, self.interrupt, self._warn)
        device.activate(device.context)

    def _start_workers(self) -> None:
        self.serving = True
        try:
            for worker in self._workers:
                worker.start(self.device.context)
        except (RuntimeError, OSError) as failure:  # no thread or no descriptor to be had
            self._fail(failure)

    def _stop_workers(self, *, leaving: bool = False) -> None:
        self._stopping = True
        for worker in self._workers:
            worker.stop(leaving)  # raises what a signal's handler raises
        self._stopping = self.serving = False
        if self._status & spec.DRIVER_OK and not self._needs_reset:
            self.device.release()

    def _go_on(self) -> None:
        self._start_workers()
        for queue in self.queues:  # a worker may have taken a notification, and stopped before the chain
            if queue.ready:
                os.eventfd_write(self.notify_fds[queue.index], 1)

    def stop(self) -> None:
        """Stop the device's threads: nothing in flight, no chain held, every used ring published.

        The driver notices nothing but the wait, until ``go_on``. For a machine whose vCPUs are held.
        """
        with self.lock:
            self._stop_workers()

    def go_on(self) -> None:
        """After ``stop`` or ``restore``: serve the driver again, and look at each queue once. Idempotent.

        An interrupt that was on its way when the machine was held may be lost in a copy, so a driver gets one again
        for each queue and change that it may not have seen.
        """
        with self.lock:
            if self._stopping:  # a signal ended that
                self._stop_workers()
            if not self._status & spec.DRIVER_OK or self._closed or self.serving:
                return
            if self._needs_reset:
                self.interrupt.config()
                return
            unseen = [queue.index for queue in self.queues if queue.ready and not queue.all_seen]
            self._go_on()
            for index in unseen:
                self.interrupt(index)
            if self.interrupt.status & spec.INTERRUPT_CONFIG:
                self.interrupt.config()

    def reset(self) -> None:
        """The driver is gone, or has not come yet."""
        self._stop_workers(leaving=True)
        for worker in self._workers:
            worker.forget()
        status, self._status = self._status, 0
        self._driver_features = 0
        if status & spec.DRIVER_OK:
            self.device.reset()
        for queue in self.queues:
            queue.reset()
            self.queue_is(queue.index, -1)
        self.interrupt.acknowledge(_LOW)
        self._needs_reset = False

    def close(self) -> None:
        """Stop the workers and give the eventfds back; idempotent. Device and line are others' to close."""
        with self.lock:
            if self._closed:
                return
            self._closed = True
            Closers((self.close_descriptors, *(worker.close for worker in self._workers), self.reset)).close()

    # State: what the driver can see. The host's part (files, taps, sockets) is the device's configuration.

    def save(self) -> dict[str, Any]:
        """Everything that a driver could tell from a new device's. The workers have been stopped (``stop``).

        :raises SnapshotError: the device cannot be saved
        """
        active = bool(self._status & spec.DRIVER_OK) and not self._needs_reset
        return {
            "type": self.device.device_type,
            "features": self._driver_features,
            "status": self._status,
            "needs_reset": self._needs_reset,
            "generation": self.generation,
            "interrupt_status": self.interrupt.status,
            "config": self.device.config,
            "queues": [
                {name: getattr(queue, name) for name in (*_QUEUE_FIELDS, "ready", "last_avail", "next_used")}
                for queue in self.queues
            ],
            "device": self.device.save() if active else {},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Become what ``save`` told of another transport with the same kind of device; new, and never used before.

        The workers start with ``go_on``.

        :raises SnapshotError: the state is that of another device, or invalid
        """
        name = self.device.name
        try:
            if state["type"] != self.device.device_type:
                raise SnapshotError(name, f"the state is that of a device of type {state['type']}")
            if len(state["queues"]) != len(self.queues):
                raise SnapshotError(name, f"has {len(self.queues)} queues, the state {len(state['queues'])}")
            if unknown := state["features"] & ~(self.offered | self.device.tolerated):
                raise SnapshotError(name, f"does not offer feature bits {unknown:#x}, which the driver has accepted")
            with self.lock:
                self._restore(state)
        except BadChain as bad:
            raise SnapshotError(name, str(bad)) from None
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, struct.error) as error:
            raise SnapshotError(name, f"the state is damaged: {describe(error)}") from None
        except OSError as error:
            raise SnapshotError(name, f"cannot go on: {describe(error)}") from None

    def _restore(self, state: dict[str, Any]) -> None:
        self._driver_features = state["features"]
        self._status = state["status"] & spec.STATUS_BITS
        self._needs_reset = bool(state["needs_reset"])
        self.generation = state["generation"] & _LOW
        for queue, saved in zip(self.queues, state["queues"], strict=True):
            for field in _QUEUE_FIELDS:
                setattr(queue, field, saved[field])
            if saved["ready"]:
                self._enable(queue, saved["last_avail"], saved["next_used"])
        self.interrupt.restore(state["interrupt_status"])
        if self._status & spec.DRIVER_OK and not self._needs_reset:
            self._make_context()
            self.device.restore(state["device"])
        if self.device.config != state["config"]:  # another disk, another address: the driver is told as of a change
            self._next_generation()
            if self._status & spec.DRIVER_OK:
                self.interrupt.config()
