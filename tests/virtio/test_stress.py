# SPDX-License-Identifier: Apache-2.0
"""A driver in another process, at the same time as the device: no notification and no interrupt is lost.

Two processes on one memory, so that no GIL keeps them apart. What is counted is requests; a lost notification
leaves both asleep, which ends the test at the time limit of ``select``.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable

import pytest

from tests.forked import fork
from virtio import spec
from virtio.device import VirtioDevice
from virtio.mmio import VirtioMmio
from virtio.testing import Allocator, MmioDriver, SplitDriver
from vmm._fastpath import Chain
from vmm.irq import IrqLine
from vmm.memory import GuestMemory

REQUESTS = 50_000
PATIENCE = 30  # seconds without a sign of the other side: something was lost


class Counter(VirtioDevice):
    """Answers each request with the number of it."""

    name = "virtio-count"
    device_type = 0x42
    queue_sizes = (64,)

    def process(self, queue_index: int) -> None:
        self.drain(self.context.queues[queue_index], self.serve)

    def serve(self, chain: Chain) -> int:
        self.counters["requests"] += 1
        chain.writable[0][:8] = self.counters["requests"].to_bytes(8, "little")
        return 8


_barrier = threading.Lock()


def full_barrier() -> None:
    """Python has no fence; taking and leaving a lock is a locked instruction on x86, which is one."""
    _barrier.acquire()
    _barrier.release()


def drive(ring: SplitDriver, kick: Callable[[], int | None], irq: int, burst: int) -> None:
    """Send REQUESTS, at most `burst` under way; sleep only for an interrupt that the ring asked for."""
    targets = [ring.buffer(8, device_writes=True) for _ in range(burst)]
    free, under_way, sent, answered = list(targets), {}, 0, 0
    while answered < REQUESTS:
        while free and sent < REQUESTS:
            target = free.pop()
            under_way[ring.add([target])] = target
            sent += 1
        full_barrier()  # §2.7.13.4.1: avail.idx before avail_event
        if ring.needs_kick():
            kick()
        done = ring.reap()
        if not done:
            ring.want_interrupt()
            full_barrier()  # used_event before used.idx
            done = ring.reap()
            if not done:
                if not select.select([irq], [], [], PATIENCE)[0]:
                    raise TimeoutError(f"asleep with {sent - answered} requests under way, {answered} answered")
                os.eventfd_read(irq)
        for head, written in done:
            answered += 1
            target = under_way.pop(head)
            number = int.from_bytes(ring.ram.read(target.addr, 8), "little")
            if (written, number) != (8, answered):
                raise ValueError(f"answer {answered} says {number}, {written} bytes")
            free.append(target)


@pytest.mark.large
@pytest.mark.parametrize("burst", [1, 2, 7, 64])
@pytest.mark.parametrize("without", [0, spec.F_EVENT_IDX], ids=["event_idx", "flags"])
def test_no_notification_and_no_interrupt_is_lost(burst: int, without: int) -> None:
    irq = IrqLine(5)
    with GuestMemory(4 << 20) as ram:
        device = Counter()
        transport = VirtioMmio(device, ram, irq)
        driver = MmioDriver(transport, Allocator(0x1000, 0x100000))
        notify = transport.notify_fds[0]  # as KVM's ioeventfd would
        report, child_report = os.pipe()
        (ring,) = prepare(driver, without)
        pid = fork()  # before the worker starts
        if pid == 0:
            try:
                drive(ring, lambda: os.eventfd_write(notify, 1), irq.fd, burst)
            except BaseException as failure:
                os.write(child_report, repr(failure).encode())
            os._exit(0)
        os.close(child_report)
        driver.add_status(spec.DRIVER_OK)
        problem = os.read(report, 4096).decode()
        os.close(report)
        os.waitpid(pid, 0)
        transport.close()
        irq.close()
    assert problem == ""
    assert device.stats == {"requests": REQUESTS, "bad_requests": 0, "needs_reset": 0}


def prepare(driver: MmioDriver, without: int) -> list[SplitDriver]:
    """All of bringing the device up but DRIVER_OK."""
    features = driver.negotiate(without=without)
    ring = SplitDriver(
        driver.transport.memory, driver.allocator, 64, event_idx=bool(features & spec.F_EVENT_IDX), start=0
    )
    driver.place_queue(0, ring)
    driver.set(spec.MMIO_QUEUE_READY, 1)
    return [ring]
