# SPDX-License-Identifier: Apache-2.0
"""One device behind its transport, and a driver that asks it for something and waits for the answer."""

from __future__ import annotations

import select
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from tests.guest_driver import Allocator, Buffer, MmioDriver
from virtio import spec
from virtio.device import VirtioDevice
from virtio.mmio import VirtioMmio
from vmm._fastpath import GuestRam
from vmm.irq import IrqLine

Device = TypeVar("Device", bound=VirtioDevice)


class DeviceHost(Generic[Device]):
    """A guest with one device; ``driver.bring_up()`` is the test's to call."""

    def __init__(self, device: Device, ram: GuestRam, allocator: Allocator) -> None:
        self.device = device
        self.ram = ram
        self.log: list[str] = []
        self.irq = IrqLine(5)
        self.transport = VirtioMmio(device, ram, self.irq, warn=self.log.append)
        self.driver = MmioDriver(self.transport, allocator)

    def close(self) -> None:
        self.transport.close()
        self.irq.close()

    def until(self, done: Callable[[], bool]) -> None:
        """Wait for interrupts until `done`."""
        while not done():
            assert select.select([self.irq.fd], [], [], 30)[0], "no interrupt came"
            self.irq.take()

    def submit(self, queue: int, buffers: Sequence[Buffer], *, indirect: bool = False) -> int:
        """One chain through the ring of `queue`; the length in its used entry."""
        ring = self.driver.queues[queue]
        ring.want_interrupt()
        head = ring.add_indirect(buffers) if indirect else ring.add(buffers)
        self.driver.kick(queue)
        return self.reap(queue, head)

    def reap(self, queue: int, head: int) -> int:
        """Wait until `head`, alone, comes back; its length."""
        ring = self.driver.queues[queue]
        done: list[tuple[int, int]] = []

        def came() -> bool:
            ring.want_interrupt()
            done.extend(ring.reap())
            return bool(done)

        self.until(came)
        assert [h for h, _ in done] == [head]
        return done[0][1]

    def room(self, size: int) -> Buffer:
        """A buffer for the device to write."""
        return self.driver.queues[0].buffer(size, device_writes=True)

    def data(self, content: bytes) -> Buffer:
        """A buffer for the device to read."""
        return self.driver.queues[0].buffer(content)

    def broken(self) -> bool:
        return bool(self.driver.get(spec.MMIO_STATUS) & spec.DEVICE_NEEDS_RESET)
