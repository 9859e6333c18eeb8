# SPDX-License-Identifier: Apache-2.0
"""The guest's driver, played by a test. It drives a split virtqueue, virtio-mmio, or a whole device. No VM is needed.

``SplitDriver`` is a correct driver. A test of an incorrect one overwrites its rings: see ``write_desc`` and the
addresses ``desc``, ``avail`` and ``used``. ``DeviceHost`` puts a device behind its transport and waits for its answers.
A check that fails raises ``AssertionError``.
"""

from __future__ import annotations

import random
import select
import struct
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from virtio import spec
from virtio.device import VirtioDevice
from virtio.mmio import VirtioMmio
from vmm.irq import IrqLine

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vmm._fastpath import GuestRam, VirtQueue

U16 = struct.Struct("<H")


class Buffer(NamedTuple):
    """The buffer of one descriptor: its guest address, its size in bytes, and whether the device writes it."""

    addr: int
    size: int
    device_writes: bool = False


class Allocator:
    """Allocates disjoint ranges of guest memory from [base, base+size), in bytes.

    :param gaps: leave gaps of random sizes between the ranges
    """

    def __init__(self, base: int, size: int, *, gaps: random.Random | None = None) -> None:
        self.next = base
        self.end = base + size
        self.gaps = gaps
        self.taken: list[tuple[int, int]] = []

    def alloc(self, size: int, align: int = 1) -> int:
        """The guest address of `size` free bytes.

        :raises MemoryError: the range is used up
        """
        gap = self.gaps.randrange(64) if self.gaps else 0
        start = -(-(self.next + gap) // align) * align
        if start + size > self.end:
            raise MemoryError("the test gave its driver too little memory")
        self.next = start + size
        self.taken.append((start, size))
        return start


class SplitDriver:
    """A driver with one queue of `size` entries, whose rings and buffers come from `allocator`.

    :param event_idx: use used_event and avail_event (VIRTIO_F_EVENT_IDX)
    :param start: first value of avail.idx and used.idx; a high one soon reaches the wrap at 65536
    """

    def __init__(
        self, ram: GuestRam, allocator: Allocator, size: int, *, event_idx: bool = False, start: int = 0
    ) -> None:
        self.ram = ram
        self.allocator = allocator
        self.size = size
        self.event_idx = event_idx
        self.desc = allocator.alloc(16 * size, 16)
        self.avail = allocator.alloc(6 + 2 * size, 2)
        self.used = allocator.alloc(6 + 8 * size, 4)
        self.start = start
        self.avail_idx = start  # next entry of the available ring, mod 65536
        self.used_idx = start  # next entry of the used ring to reap, mod 65536
        self.kicked_idx = start  # avail_idx at the last kick
        self.free = list(range(size))[::-1]
        self.chains: dict[int, list[int]] = {}  # head: descriptors of the main table
        for ring in (self.avail, self.used):
            ram.write(ring + 2, U16.pack(start))
        self.want_interrupt()

    def attach(self, queue: VirtQueue, *, indirect: bool = True) -> VirtQueue:
        """Set the addresses of the rings in the device's `queue`, without a transport."""
        queue.size, queue.desc, queue.avail, queue.used = self.size, self.desc, self.avail, self.used
        queue.enable(event_idx=self.event_idx, indirect=indirect, last_avail=self.start, next_used=self.start)
        return queue

    def buffer(self, data: bytes | int, *, device_writes: bool = False) -> Buffer:
        """A buffer that contains `data`, or that many zero bytes."""
        content = bytes(data) if isinstance(data, int) else data
        addr = self.allocator.alloc(len(content))
        self.ram.write(addr, content)
        return Buffer(addr, len(content), device_writes)

    def write_desc(self, index: int, addr: int, size: int, flags: int, following: int = 0) -> None:
        """Write descriptor `index` of the main table; the values may be invalid."""
        self.ram.write(self.desc + 16 * index, spec.DESC.pack(addr, size, flags, following))

    def write_chain(self, buffers: Sequence[Buffer], indices: Sequence[int], *, table: int | None = None) -> None:
        """Write `buffers` as a chain over `indices` of the main table, or of the one at guest address `table`."""
        for at, (index, buffer) in enumerate(zip(indices, buffers, strict=True)):
            more = at + 1 < len(buffers)
            flags = spec.DESC_F_NEXT * more | spec.DESC_F_WRITE * buffer.device_writes
            descriptor = spec.DESC.pack(buffer.addr, buffer.size, flags, indices[at + 1] if more else 0)
            self.ram.write((self.desc if table is None else table) + 16 * index, descriptor)

    def add(self, buffers: Sequence[Buffer]) -> int:
        """Make `buffers` available as one chain; the index of its head."""
        indices = [self.free.pop() for _ in buffers]
        self.write_chain(buffers, indices)
        return self.offer(indices[0], indices)

    def add_indirect(self, buffers: Sequence[Buffer], *, direct: int = 0) -> int:
        """Make `buffers` available, all but the first `direct` by an indirect table; the index of the head."""
        indices = [self.free.pop() for _ in range(direct + 1)]
        rest = buffers[direct:]
        table = self.allocator.alloc(16 * len(rest), 16)
        self.write_chain(rest, range(len(rest)), table=table)
        self.write_chain([*buffers[:direct], Buffer(table, 16 * len(rest))], indices)
        self.write_desc(indices[-1], table, 16 * len(rest), spec.DESC_F_INDIRECT)
        return self.offer(indices[0], indices)

    def offer(self, head: int, indices: Sequence[int] = ()) -> int:
        """Add `head` to the available ring, and publish it to the device."""
        self.chains[head] = list(indices)
        self.ram.write(self.avail + 4 + 2 * (self.avail_idx % self.size), U16.pack(head))
        self.avail_idx = self.avail_idx + 1 & 0xFFFF
        self.ram.write(self.avail + 2, U16.pack(self.avail_idx))
        return head

    def needs_kick(self) -> bool:
        """Whether the device wants a notification for the chains added since the last call (§2.7.10)."""
        old, self.kicked_idx = self.kicked_idx, self.avail_idx
        if self.event_idx:
            event = self._u16(self.used + 4 + 8 * self.size)
            return (self.avail_idx - event - 1) % 65536 < (self.avail_idx - old) % 65536
        return not self._u16(self.used) & spec.USED_F_NO_NOTIFY

    def want_interrupt(self, wanted: bool = True, *, after: int = 0) -> None:
        """Ask for an interrupt when the next chain and `after` more have come back, or for none."""
        event = self.used_idx + after if wanted else self.used_idx - 1
        if self.event_idx:
            self.ram.write(self.avail + 4 + 2 * self.size, U16.pack(event & 0xFFFF))
        else:
            self.ram.write(self.avail, U16.pack(0 if wanted else spec.AVAIL_F_NO_INTERRUPT))

    def reap(self) -> list[tuple[int, int]]:
        """The chains returned since the last call, as (head, bytes written). Frees their descriptors."""
        done = []
        while self.used_idx != self._u16(self.used + 2):
            at = self.used + 4 + 8 * (self.used_idx % self.size)
            head, written = struct.unpack("<II", self.ram.read(at, 8))
            self.free.extend(reversed(self.chains.pop(head)))
            self.used_idx = self.used_idx + 1 & 0xFFFF
            done.append((head, written))
        return done

    def _u16(self, gpa: int) -> int:
        return int(U16.unpack(self.ram.read(gpa, 2))[0])


class MmioDriver:
    """Drives a ``VirtioMmio`` through its registers as Linux does (§3.1.1, §4.2.3)."""

    def __init__(self, transport: VirtioMmio, allocator: Allocator) -> None:
        self.transport = transport
        self.allocator = allocator
        self.queues: list[SplitDriver] = []

    def get(self, offset: int) -> int:
        """Read the 32-bit register at `offset`."""
        data = bytearray(4)
        self.transport.read(offset, memoryview(data))
        return int.from_bytes(data, "little")

    def set(self, offset: int, value: int) -> None:
        """Write the 32-bit register at `offset`."""
        self.transport.write(offset, memoryview(bytearray(value.to_bytes(4, "little"))))

    def config(self, offset: int, size: int) -> bytes:
        """Read `size` bytes of the device's configuration space.

        :raises AssertionError: the device has changed ``config`` without ``publish_config``, so no guest sees it
        """
        data = bytearray(size)
        generation = -1
        while generation != (generation := self.get(spec.MMIO_CONFIG_GENERATION)):  # §2.5.3: it changed meanwhile
            self.transport.read(spec.MMIO_CONFIG + offset, memoryview(data))
            config = self.transport.device.config[offset : offset + size].ljust(size, b"\0")
        assert data == config, "config was changed without publish_config: a guest still reads the old one"
        return bytes(data)

    def add_status(self, bit: int) -> int:
        """Set a bit of the device status; the status that the device then shows."""
        self.set(spec.MMIO_STATUS, self.get(spec.MMIO_STATUS) | bit)
        return self.get(spec.MMIO_STATUS)

    def offered(self) -> int:
        """The 64 feature bits that the device offers."""
        features = 0
        for page in (0, 1):
            self.set(spec.MMIO_DEVICE_FEATURES_SEL, page)
            features |= self.get(spec.MMIO_DEVICE_FEATURES) << 32 * page
        return features

    def accept(self, features: int) -> None:
        """Write the 64 feature bits that the driver accepts."""
        for page in (0, 1):
            self.set(spec.MMIO_DRIVER_FEATURES_SEL, page)
            self.set(spec.MMIO_DRIVER_FEATURES, features >> 32 * page & 0xFFFF_FFFF)

    def negotiate(self, *, without: int = 0) -> int:
        """Reset the device and negotiate up to FEATURES_OK; the features accepted."""
        self.set(spec.MMIO_STATUS, 0)
        self.add_status(spec.ACKNOWLEDGE)
        self.add_status(spec.DRIVER)
        features = self.offered() & ~without
        self.accept(features)
        assert self.add_status(spec.FEATURES_OK) & spec.FEATURES_OK
        return features

    def place_queue(self, index: int, driver: SplitDriver) -> None:
        """Write all registers of queue `index` but QueueReady: its size and the addresses of the rings of `driver`."""
        self.set(spec.MMIO_QUEUE_SEL, index)
        self.set(spec.MMIO_QUEUE_NUM, driver.size)
        for low, addr in (
            (spec.MMIO_QUEUE_DESC_LOW, driver.desc),
            (spec.MMIO_QUEUE_DRIVER_LOW, driver.avail),
            (spec.MMIO_QUEUE_DEVICE_LOW, driver.used),
        ):
            self.set(low, addr & 0xFFFF_FFFF)
            self.set(low + 4, addr >> 32)

    def bring_up(self, *, without: int = 0, size: int | None = None) -> list[SplitDriver]:
        """Bring the device from reset to DRIVER_OK with all queues set up; the queues.

        :param without: feature bits that are not accepted
        :param size: entries of each queue; by default the most that the device allows
        """
        features = self.negotiate(without=without)
        self.queues = []
        for index in range(len(self.transport.queues)):
            self.set(spec.MMIO_QUEUE_SEL, index)
            largest = self.get(spec.MMIO_QUEUE_NUM_MAX)
            event_idx = bool(features & spec.F_EVENT_IDX)
            driver = SplitDriver(self.transport.memory, self.allocator, size or largest, event_idx=event_idx)
            self.place_queue(index, driver)
            self.set(spec.MMIO_QUEUE_READY, 1)
            assert self.get(spec.MMIO_QUEUE_READY) == 1
            self.queues.append(driver)
        assert self.add_status(spec.DRIVER_OK) & spec.DRIVER_OK
        return self.queues

    def kick(self, index: int = 0) -> None:
        """Notify the device of queue `index`, unless it has asked for no notification."""
        if self.queues[index].needs_kick():
            self.set(spec.MMIO_QUEUE_NOTIFY, index)

    def take_interrupt(self) -> int:
        """Read and acknowledge InterruptStatus; its value."""
        status = self.get(spec.MMIO_INTERRUPT_STATUS)
        self.set(spec.MMIO_INTERRUPT_ACK, status)
        return status


Device = TypeVar("Device", bound=VirtioDevice)


class DeviceHost(Generic[Device]):
    """A guest with one device. The test calls ``driver.bring_up()``, and ``close()`` at its end.

    :param ram: guest memory; the caller keeps it
    :param allocator: where in `ram` the driver puts its rings and buffers
    """

    def __init__(self, device: Device, ram: GuestRam, allocator: Allocator) -> None:
        self.device = device
        self.ram = ram
        self.log: list[str] = []
        self.irq = IrqLine(5)
        self.transport = VirtioMmio(device, ram, self.irq, warn=self.log.append)
        self.driver = MmioDriver(self.transport, allocator)

    def close(self) -> None:
        """Stop the device's threads and close its descriptors."""
        self.transport.close()
        self.irq.close()

    def until(self, done: Callable[[], bool]) -> None:
        """Wait for interrupts until `done()` is true, at most 30 s for each.

        :raises AssertionError: no interrupt comes, or the device has stopped with an exception
        """
        while True:
            stopped = self.broken()  # before done, which may wait for that
            if done():
                return
            assert not stopped, self.log[-1]
            assert select.select([self.irq.fd], [], [], 30)[0], "no interrupt came"
            self.irq.take()

    def submit(self, queue: int, buffers: Sequence[Buffer], *, indirect: bool = False) -> int:
        """Submit one chain to `queue` and wait for it; the number of bytes that the device says it wrote."""
        ring = self.driver.queues[queue]
        ring.want_interrupt()
        head = ring.add_indirect(buffers) if indirect else ring.add(buffers)
        self.driver.kick(queue)
        return self.reap(queue, head)

    def reap(self, queue: int, head: int) -> int:
        """Wait for the chain at `head`, which must be the only one to come back; the number of bytes written."""
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
        """A buffer of `size` bytes for the device to write."""
        return self.driver.queues[0].buffer(size, device_writes=True)

    def data(self, content: bytes) -> Buffer:
        """A buffer of `content` for the device to read."""
        return self.driver.queues[0].buffer(content)

    def broken(self) -> bool:
        """Whether the device has set DEVICE_NEEDS_RESET."""
        return bool(self.driver.get(spec.MMIO_STATUS) & spec.DEVICE_NEEDS_RESET)
