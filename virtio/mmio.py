# SPDX-License-Identifier: Apache-2.0
"""The virtio-mmio transport, version 2 (§4.2): registers, feature negotiation, the status machine."""

from __future__ import annotations

import os
import threading

from virtio import spec
from virtio._mmio import MmioRegisters
from virtio.device import RING_FEATURES, ActivateContext, VirtioDevice, Warner, describe
from vmm import logger
from vmm._fastpath import VirtQueue
from vmm.errors import BadChain

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm._fastpath import GuestRam
    from vmm.irq import IrqLine

_VENDOR = 0x4D4D5650  # "PVMM"
_LOW = 0xFFFF_FFFF
# Each status bit with the one that must be set before it, in the order of §3.1.1.
_STATUS_ORDER = (
    (spec.ACKNOWLEDGE, 0),
    (spec.DRIVER, spec.ACKNOWLEDGE),
    (spec.FEATURES_OK, spec.DRIVER),
    (spec.DRIVER_OK, spec.FEATURES_OK),
)
# Registers of the selected queue: the attribute of VirtQueue and the shift of the 32 bits in it.
_QUEUE_ADDRESS = {
    spec.MMIO_QUEUE_DESC_LOW: ("desc", 0),
    spec.MMIO_QUEUE_DESC_HIGH: ("desc", 32),
    spec.MMIO_QUEUE_DRIVER_LOW: ("avail", 0),
    spec.MMIO_QUEUE_DRIVER_HIGH: ("avail", 32),
    spec.MMIO_QUEUE_DEVICE_LOW: ("used", 0),
    spec.MMIO_QUEUE_DEVICE_HIGH: ("used", 32),
}
# Registers of the selected shared memory region: which of (address, bytes), and the shift of the 32 bits in it.
_SHM = {
    spec.MMIO_SHM_BASE_LOW: (0, 0),
    spec.MMIO_SHM_BASE_HIGH: (0, 32),
    spec.MMIO_SHM_LEN_LOW: (1, 0),
    spec.MMIO_SHM_LEN_HIGH: (1, 32),
}
_NO_REGION = (-1, -1)  # §4.2.2
# What a driver reads that only its own writes change.
_READABLE = (
    spec.MMIO_MAGIC_VALUE, spec.MMIO_VERSION, spec.MMIO_DEVICE_ID, spec.MMIO_VENDOR_ID, spec.MMIO_DEVICE_FEATURES,
    spec.MMIO_QUEUE_NUM_MAX, spec.MMIO_QUEUE_READY, *_SHM,
)  # fmt: skip


class VirtioMmio(MmioRegisters):
    """A virtio device behind 4 KiB of registers; a bus device. Registers take 4-byte accesses (§4.2.2.2).

    :param device: the device; this transport is its only owner
    :param memory: guest RAM, where the queues are
    :param irq: edge-triggered line; not owned
    :param warn: takes a line for the log, rate limited here
    :raises OSError: no file descriptor left for a queue's notification

    ``interrupt.page_address`` is a page with all that a read would find, kept up to date, so that a VM may show it to
    the guest read-only and reads cost no exit; writes have to come here.
    ``notify_fds[i]`` is an eventfd, signalled by an ioeventfd of KVM or a write to QueueNotify: it wakes the
    worker for queue ``i``. ``stats`` counts what the driver did wrong at registers; the device has its own.
    """

    def __init__(
        self, device: VirtioDevice, memory: GuestRam, irq: IrqLine, warn: Callable[[str], None] = logger.warn
    ) -> None:
        super().__init__(irq)
        self.device = device
        self.memory = memory
        self.queues = tuple(VirtQueue(memory, size, i) for i, size in enumerate(device.queue_sizes))
        self.notify_fds = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in self.queues]
        # For KVM to take acknowledgements of used rings by; nobody reads it.
        self.ack_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.stats = {"bad_access": 0, "bad_status": 0, "bad_features": 0, "bad_queue": 0, "bad_notify": 0}
        self._warn = Warner(warn)
        self._offered = device.features | RING_FEATURES
        self._lock = threading.Lock()  # registers: several vCPUs at once
        self._config_lock = threading.Lock()  # the configuration space and its generation; inside _lock, never around
        self._generation = 0
        self._needs_reset = False
        self._closed = False
        self._workers = device.make_workers(self.notify_fds, self._fail)
        self._forget()
        device.publish_config = self.publish_config
        self._show()

    def _forget(self) -> None:
        self._status = 0
        self._driver_features = 0
        self._device_features_sel = 0
        self._driver_features_sel = 0
        self._queue_sel = 0
        self._shm_sel = 0
        for queue in self.queues:
            queue.reset()
            self.interrupt.set_notify(queue.index, -1)
        self.interrupt.acknowledge(_LOW)
        self._needs_reset = False

    @property
    def notifications(self) -> tuple[int, ...]:
        """How often the driver's notifications woke the device, by queue."""
        counts = {index: count for worker in self._workers for index, count in worker.notified.items()}
        return tuple(counts.get(index, 0) for index in range(len(self.queues)))

    # Towards the driver

    def publish_config(self, config: bytes, *, tell: bool = True) -> None:
        """Show the driver another configuration space and tell it; any thread.

        :param config: as long as the one before
        :param tell: False: the driver made the change itself
        """
        with self._config_lock:  # with the generation, or a driver could put two halves together (§2.5.1)
            # Before and after: in the page a driver may meet any moment between.
            self._next_generation()
            self.device.config = config
            self.interrupt.show_config(config)
            self._next_generation()
        if tell and self._status & spec.DRIVER_OK:
            self.interrupt.config()

    def _next_generation(self) -> None:
        self._generation = self._generation + 1 & _LOW
        self.interrupt.show(spec.MMIO_CONFIG_GENERATION, self._generation)

    def _show(self) -> None:
        # The page follows what a write changed.
        for offset in _READABLE:
            self.interrupt.show(offset, self._read_register(offset) & _LOW)
        self._show_status()
        self._show_config()

    def _show_status(self) -> None:
        while True:  # until no other thread has set DEVICE_NEEDS_RESET meanwhile
            status = self.status
            self.interrupt.show(spec.MMIO_STATUS, status)
            if status == self.status:
                return

    def _show_config(self) -> None:
        with self._config_lock:  # or what another thread publishes meanwhile would be shown and taken back
            self.interrupt.show_config(self.device.config)
            self.interrupt.show(spec.MMIO_CONFIG_GENERATION, self._generation)

    def _fail(self, failure: Exception) -> None:
        """Set DEVICE_NEEDS_RESET: this device stops until its driver resets it, the VM lives (§2.1.2)."""
        self.device.counters["needs_reset"] += 1
        name = self.device.name
        self._warn("needs reset", f"{name} stopped until its driver resets it: {describe(failure)}")
        self._needs_reset = True
        self._show_status()
        if self._status & spec.DRIVER_OK:
            self.interrupt.config()

    @property
    def status(self) -> int:
        """The device status field as the driver reads it (§2.1)."""
        return self._status | (spec.DEVICE_NEEDS_RESET if self._needs_reset else 0)

    # From the driver

    def read(self, offset: int, data: memoryview) -> None:
        """Answer a vCPU's read; an access that §4.2.2.2 forbids reads as all ones."""
        size = len(data)
        if offset >= spec.MMIO_CONFIG:
            start = offset - spec.MMIO_CONFIG
            with self._config_lock:
                data[:] = self.device.config[start : start + size].ljust(size, b"\0")
            return
        if size != 4 or offset & 3:
            self.stats["bad_access"] += 1
            data[:] = b"\xff" * size
            return
        with self._lock:
            data[:] = (self._read_register(offset) & _LOW).to_bytes(4, "little")

    def _read_register(self, offset: int) -> int:
        match offset:
            case spec.MMIO_INTERRUPT_STATUS:
                return self.interrupt.status
            case spec.MMIO_STATUS:
                return self.status
            case spec.MMIO_CONFIG_GENERATION:
                return self._generation
            case spec.MMIO_MAGIC_VALUE:
                return spec.MMIO_MAGIC
            case spec.MMIO_VERSION:
                return 2
            case spec.MMIO_DEVICE_ID:
                return self.device.device_type
            case spec.MMIO_VENDOR_ID:
                return _VENDOR
            case spec.MMIO_DEVICE_FEATURES:
                return self._offered >> 32 * self._device_features_sel if self._device_features_sel < 2 else 0
            case spec.MMIO_QUEUE_NUM_MAX:
                return queue.max_size if (queue := self._queue()) else 0
            case spec.MMIO_QUEUE_READY:
                return int(queue.ready) if (queue := self._queue()) else 0
            case offset if offset in _SHM:
                which, shift = _SHM[offset]
                return self.device.shm_regions.get(self._shm_sel, _NO_REGION)[which] >> shift
            case _:
                return 0

    def _queue(self) -> VirtQueue | None:
        return self.queues[self._queue_sel] if self._queue_sel < len(self.queues) else None

    def write(self, offset: int, data: memoryview) -> None:
        """Take a vCPU's write; one that §4.2.2.2 forbids is counted and changes nothing."""
        if offset >= spec.MMIO_CONFIG:
            start = offset - spec.MMIO_CONFIG
            if start + len(data) <= len(self.device.config):
                self.device.write_config(start, bytes(data))
                self._show_config()
            else:
                self.stats["bad_access"] += 1
            return
        if len(data) != 4 or offset & 3:
            self.stats["bad_access"] += 1
            return
        value = int.from_bytes(data, "little")
        if offset == spec.MMIO_QUEUE_NOTIFY:
            self._notify(value)
            return
        with self._lock:
            self._write_register(offset, value)
            self._show()

    def _notify(self, index: int) -> None:
        if index < len(self.notify_fds) and self.queues[index].ready:
            os.eventfd_write(self.notify_fds[index], 1)
        else:
            self.stats["bad_notify"] += 1

    def _write_register(self, offset: int, value: int) -> None:
        match offset:
            case spec.MMIO_INTERRUPT_ACK:
                self.interrupt.acknowledge(value)
            case spec.MMIO_STATUS:
                self._write_status(value)
            case spec.MMIO_DEVICE_FEATURES_SEL:
                self._device_features_sel = value
            case spec.MMIO_DRIVER_FEATURES_SEL:
                self._driver_features_sel = value
            case spec.MMIO_DRIVER_FEATURES:
                self._write_features(value)
            case spec.MMIO_QUEUE_SEL:
                self._queue_sel = value
            case spec.MMIO_QUEUE_NUM | spec.MMIO_QUEUE_READY:
                self._write_queue(offset, value)
            case offset if offset in _QUEUE_ADDRESS:
                self._write_queue(offset, value)
            case spec.MMIO_SHM_SEL:
                self._shm_sel = value
            case _:
                self.stats["bad_access"] += 1

    def _write_features(self, value: int) -> None:
        may = self._status & (spec.DRIVER | spec.FEATURES_OK) == spec.DRIVER  # §3.1.1, steps 4 and 5
        if not may or self._driver_features_sel > 1:
            self.stats["bad_features"] += 1
            return
        shift = 32 * self._driver_features_sel
        self._driver_features = self._driver_features & ~(_LOW << shift) | value << shift

    def _write_status(self, value: int) -> None:
        if value == 0:
            self._reset()
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
            if bit == spec.FEATURES_OK and not self._features_fit():
                self.stats["bad_features"] += 1
                return  # §2.2.2, §6.2: FEATURES_OK stays clear and the driver sees it
            self._status |= bit
            if bit == spec.DRIVER_OK:
                self._activate()

    def _features_fit(self) -> bool:
        return not self._driver_features & ~self._offered and bool(self._driver_features & spec.F_VERSION_1)

    def _write_queue(self, offset: int, value: int) -> None:
        queue = self._queue()
        stage = self._status & (spec.FEATURES_OK | spec.DRIVER_OK)
        if queue is not None and offset == spec.MMIO_QUEUE_READY and value == 0:
            self._stop_queue(queue)  # at every stage (§4.2.2.2)
        elif queue is None or stage != spec.FEATURES_OK or self._needs_reset:
            self.stats["bad_queue"] += 1
        elif offset == spec.MMIO_QUEUE_READY:
            self._start_queue(queue)
        elif queue.ready:
            self.stats["bad_queue"] += 1  # §4.2.2.2: not while QueueReady is not 0
        elif offset == spec.MMIO_QUEUE_NUM:
            queue.size = value
        else:
            name, shift = _QUEUE_ADDRESS[offset]
            setattr(queue, name, getattr(queue, name) & ~(_LOW << shift) | value << shift)

    def _start_queue(self, queue: VirtQueue) -> None:
        if queue.ready:
            return
        try:
            queue.enable(
                event_idx=bool(self._driver_features & spec.F_EVENT_IDX),
                indirect=bool(self._driver_features & spec.F_INDIRECT_DESC),
            )
        except BadChain as bad:
            self.stats["bad_queue"] += 1
            self._fail(bad)
        else:
            self.interrupt.set_notify(queue.index, self.notify_fds[queue.index])

    def _stop_queue(self, queue: VirtQueue) -> None:
        if not queue.ready:
            return
        self._stop_workers()  # the driver may take its memory back once QueueReady reads 0
        queue.reset()
        self.interrupt.set_notify(queue.index, -1)
        if self._status & spec.DRIVER_OK and not self._needs_reset:
            self._start_workers()
            for other in self.queues:  # a worker may have taken a notification, and stopped before the chain
                if other.ready:
                    os.eventfd_write(self.notify_fds[other.index], 1)

    def _activate(self) -> None:
        if self._needs_reset:
            self.interrupt.config()
            return
        device = self.device
        device.context = ActivateContext(self.memory, self.queues, self._driver_features, self.interrupt, self._warn)
        try:
            device.activate(device.context)
        except OSError as failure:
            self._fail(failure)
            return
        self._start_workers()

    def _start_workers(self) -> None:
        try:
            for worker in self._workers:
                worker.start(self.device.context)
        except (RuntimeError, OSError) as failure:  # no thread or no descriptor to be had
            self._fail(failure)

    def _stop_workers(self) -> None:
        for worker in self._workers:
            worker.stop()

    def _reset(self) -> None:
        self._stop_workers()
        if self._status & spec.DRIVER_OK:
            self.device.reset()
        self._forget()

    def close(self) -> None:
        """Stop the worker and give the eventfds back; idempotent. Device and line are others' to close."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._reset()
            for worker in self._workers:
                worker.close()
            for fd in self.notify_fds:
                os.close(fd)
            self.notify_fds.clear()
            os.close(self.ack_fd)
