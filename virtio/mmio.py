# SPDX-License-Identifier: Apache-2.0
"""The registers of the virtio-mmio transport, version 2 (§4.2)."""

from __future__ import annotations

import os

from virtio import spec
from virtio._mmio import MmioRegisters
from virtio.transport import Transport
from vmm import logger

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from virtio.device import VirtioDevice
    from vmm._fastpath import GuestRam, VirtQueue
    from vmm.irq import IrqLine

_VENDOR = 0x4D4D5650  # "PVMM"
_LOW = 0xFFFF_FFFF
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
# Registers that say which word, queue or region the others are about.
_SELECTORS = {
    spec.MMIO_DEVICE_FEATURES_SEL: "device_features",
    spec.MMIO_DRIVER_FEATURES_SEL: "driver_features",
    spec.MMIO_QUEUE_SEL: "queue",
    spec.MMIO_SHM_SEL: "shm",
}


class VirtioMmio(MmioRegisters, Transport):
    """A virtio device behind 4 KiB of registers; a bus device. Registers take 4-byte accesses (§4.2.2.2).

    :param device: the device; this transport is its only owner
    :param memory: guest RAM, where the queues are
    :param irq: edge-triggered line; not owned
    :param warn: takes a line for the log, rate limited here
    :raises OSError: no file descriptor is left for a queue's notification

    ``page_address`` is a page with all that a read would find, kept up to date, so that a VM may show it to the guest
    read-only and reads cost no exit; writes have to come here. ``notify_fds[i]`` may be an ioeventfd of KVM on
    QueueNotify, ``ack_fd`` one on InterruptACK of used rings.
    """

    def __init__(
        self, device: VirtioDevice, memory: GuestRam, irq: IrqLine, warn: Callable[[str], None] = logger.warn
    ) -> None:
        MmioRegisters.__init__(self, irq)
        self.ack_fd = -1
        self._select = dict.fromkeys(_SELECTORS.values(), 0)
        Transport.__init__(self, device, memory, warn)
        self.show(spec.MMIO_MAGIC_VALUE, spec.MMIO_MAGIC)
        self.show(spec.MMIO_VERSION, 2)
        self.show(spec.MMIO_DEVICE_ID, device.device_type)
        self.show(spec.MMIO_VENDOR_ID, _VENDOR)
        self._show()

    def make_descriptors(self) -> None:
        super().make_descriptors()
        # For KVM to take acknowledgements of used rings by; nobody reads it.
        self.ack_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def close_descriptors(self) -> None:
        super().close_descriptors()
        if self.ack_fd >= 0:
            os.close(self.ack_fd)
            self.ack_fd = -1

    # The page follows what changed.

    def _show(self) -> None:
        queue = self._queue()
        self.show(spec.MMIO_DEVICE_FEATURES, self.offered_word(self._select["device_features"]))
        self.show(spec.MMIO_QUEUE_NUM_MAX, queue.max_size if queue else 0)
        self.show(spec.MMIO_QUEUE_READY, queue.ready if queue else 0)
        region = self.device.shm_regions.get(self._select["shm"], _NO_REGION)
        for offset, (which, shift) in _SHM.items():
            self.show(offset, region[which] >> shift & _LOW)
        self.show_status()
        self.show_whole_config()

    def show_status(self) -> None:
        while True:  # until no other thread has set DEVICE_NEEDS_RESET meanwhile
            status = self.status
            self.show(spec.MMIO_STATUS, status)
            if status == self.status:
                return

    def show_generation(self) -> None:
        self.show(spec.MMIO_CONFIG_GENERATION, self.generation)

    # From the driver

    def read(self, offset: int, data: memoryview) -> None:
        """Answer a vCPU's read; an access that §4.2.2.2 forbids reads as all ones."""
        size = len(data)
        if offset < spec.MMIO_CONFIG and (size != 4 or offset & 3):
            self.stats["bad_access"] += 1
            data[:] = b"\xff" * size
            return
        with self.lock if offset < spec.MMIO_CONFIG else self._config_lock:
            data[:] = self.mapping[offset : offset + size].ljust(size, b"\0")

    def _queue(self) -> VirtQueue | None:
        selected = self._select["queue"]
        return self.queues[selected] if selected < len(self.queues) else None

    def write(self, offset: int, data: memoryview) -> None:
        """Take a vCPU's write; one that §4.2.2.2 forbids is counted and changes nothing."""
        if offset >= spec.MMIO_CONFIG:
            self.write_config(offset - spec.MMIO_CONFIG, bytes(data))
            return
        if len(data) != 4 or offset & 3:
            self.stats["bad_access"] += 1
            return
        value = int.from_bytes(data, "little")
        if offset == spec.MMIO_QUEUE_NOTIFY:
            if value < len(self.notify_fds) and self.queues[value].ready:
                os.eventfd_write(self.notify_fds[value], 1)
            else:
                self.stats["bad_notify"] += 1
            return
        with self.lock:
            self._write_register(offset, value)
            self._show()

    def _write_register(self, offset: int, value: int) -> None:
        match offset:
            case spec.MMIO_INTERRUPT_ACK:
                self.interrupt.acknowledge(value)
            case spec.MMIO_STATUS:
                self.write_status(value)
            case spec.MMIO_DRIVER_FEATURES:
                self.write_features(self._select["driver_features"], value)
            case spec.MMIO_QUEUE_NUM:
                self.set_queue(self._queue(), "size", value)
            case spec.MMIO_QUEUE_READY if value:
                self.start_queue(self._queue())
            case spec.MMIO_QUEUE_READY:
                self.stop_queue(self._queue())
            case offset if offset in _QUEUE_ADDRESS:
                field, shift = _QUEUE_ADDRESS[offset]
                self.set_queue(self._queue(), field, value, shift)
            case offset if offset in _SELECTORS:
                self._select[_SELECTORS[offset]] = value
            case _:
                self.stats["bad_access"] += 1

    def reset(self) -> None:
        super().reset()
        self._select = dict.fromkeys(self._select, 0)

    def save(self) -> dict[str, Any]:
        return {**super().save(), "select": dict(self._select)}

    def _restore(self, state: dict[str, Any]) -> None:
        self._select = {name: int(state["select"][name]) & _LOW for name in self._select}
        super()._restore(state)
        self._show()
