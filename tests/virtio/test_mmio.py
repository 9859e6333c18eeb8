# SPDX-License-Identifier: Apache-2.0
"""The virtio-mmio transport against virtio 1.2 §4.2 and against a driver that lies at its registers."""

from __future__ import annotations

import ctypes
import errno
import os
import select
import threading
from collections.abc import Callable, Iterator

import pytest

from tests.virtio.conftest import RAM
from virtio import spec
from virtio.device import VirtioDevice, Warner
from virtio.mmio import VirtioMmio
from virtio.testing import Allocator, MmioDriver, SplitDriver
from vmm._bus import Bus
from vmm._fastpath import Chain
from vmm.irq import IrqLine
from vmm.memory import HOLE_START, GuestMemory

OTHER_FEATURE = 1 << 50


class Echo(VirtioDevice):
    """Two queues: copies what it reads to what it may write, in upper case."""

    name = "virtio-echo"
    device_type = 0x42
    queue_sizes = (16, 8)
    features = OTHER_FEATURE | 1

    def __init__(self) -> None:
        super().__init__()
        self.config = bytes(range(20))
        self.calls: list[str] = []
        self.fault: Exception | None = None

    def process(self, queue_index: int) -> None:
        self.drain(self.context.queues[queue_index], self.serve)

    def serve(self, chain: Chain) -> int:
        if self.fault is not None:
            raise self.fault
        self.counters["requests"] += 1
        data = b"".join(bytes(b) for b in chain.readable).upper()
        if not chain.writable:
            return 0
        (target,) = chain.writable
        target[: len(data)] = data
        return len(data)

    def write_config(self, offset: int, data: bytes) -> None:
        self.calls.append(f"config {offset} {data.hex()}")

    def activate(self, context: object) -> None:
        self.calls.append("activate")

    def reset(self) -> None:
        self.calls.append("reset")


class Host:
    """A device behind its transport, the driver in front of it, and what went to the log."""

    def __init__(self, ram: GuestMemory, irq: IrqLine, allocator: Allocator) -> None:
        self.device = Echo()
        self.log: list[str] = []
        self.irq = irq
        self.transport = VirtioMmio(self.device, ram, irq, warn=self.log.append)
        self.driver = MmioDriver(self.transport, allocator)

    def ask(self, text: bytes, queue: int = 0) -> bytes:
        """One request through the queue and its answer."""
        ring = self.driver.queues[queue]
        answer = ring.buffer(len(text), device_writes=True)
        head = ring.add([ring.buffer(text), answer])
        self.driver.kick(queue)
        while not (done := ring.reap()):
            ring.want_interrupt()
            if not (done := ring.reap()):
                self.wait_interrupt()
                continue
            break
        assert done == [(head, len(text))]
        return self.transport.memory.read(answer.addr, answer.size)

    def wait_interrupt(self) -> int:
        """Sleep until the device interrupts; what InterruptStatus had."""
        assert select.select([self.irq.fd], [], [], 30)[0], "no interrupt came"
        self.irq.take()
        return self.driver.take_interrupt()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Sleep through interrupts until `condition` holds."""
        while not condition():
            self.wait_interrupt()


@pytest.fixture
def host(ram: GuestMemory, irq: IrqLine, allocator: Allocator) -> Iterator[Host]:
    host = Host(ram, irq, allocator)
    yield host
    host.transport.close()


def test_4_2_2_identity(host: Host) -> None:
    get = host.driver.get
    assert [get(spec.MMIO_MAGIC_VALUE), get(spec.MMIO_VERSION), get(spec.MMIO_DEVICE_ID)] == [
        0x74726976,
        2,
        0x42,
    ]
    assert get(spec.MMIO_VENDOR_ID)


def test_4_2_2_features_come_in_two_pages_and_no_more(host: Host) -> None:
    ring = spec.F_VERSION_1 | spec.F_EVENT_IDX | spec.F_INDIRECT_DESC
    assert host.driver.offered() == OTHER_FEATURE | 1 | ring
    for page in (2, 3, 0x8000_0000, 0xFFFF_FFFF):
        host.driver.set(spec.MMIO_DEVICE_FEATURES_SEL, page)
        assert host.driver.get(spec.MMIO_DEVICE_FEATURES) == 0


@pytest.mark.parametrize("without", [0, spec.F_EVENT_IDX, spec.F_INDIRECT_DESC])
def test_requests_go_through_both_queues(host: Host, without: int) -> None:
    host.driver.bring_up(without=without)
    for turn in range(40):
        text = b"turn %d" % turn
        assert host.ask(text, turn % 2) == text.upper()
    assert host.device.stats["requests"] == 40
    assert host.transport.stats == dict.fromkeys(host.transport.stats, 0)


def test_the_worker_has_the_devices_name(host: Host) -> None:
    host.driver.bring_up()
    (worker,) = [t for t in threading.enumerate() if t.name == "virtio-echo"]
    with open(f"/proc/self/task/{worker.native_id}/comm") as comm:
        host.ask(b"x")  # it has got as far as its name
        assert comm.read() == "virtio-echo\n"


def test_an_ioeventfd_is_as_good_as_a_write_to_queue_notify(host: Host) -> None:
    host.driver.bring_up()
    ring = host.driver.queues[1]
    head = ring.add([ring.buffer(b"abc"), ring.buffer(3, device_writes=True)])
    ring.want_interrupt()
    os.eventfd_write(host.transport.notify_fds[1], 1)
    host.wait_interrupt()
    assert ring.reap() == [(head, 3)]


def test_4_2_3_4_interrupt_status_is_acknowledged_bit_by_bit(host: Host) -> None:
    host.driver.bring_up()
    host.transport.interrupt()
    host.device.publish_config(bytes(20))
    assert host.irq.take() == 2
    assert host.driver.get(spec.MMIO_INTERRUPT_STATUS) == spec.INTERRUPT_USED | spec.INTERRUPT_CONFIG
    host.driver.set(spec.MMIO_INTERRUPT_ACK, spec.INTERRUPT_USED)
    assert host.driver.get(spec.MMIO_INTERRUPT_STATUS) == spec.INTERRUPT_CONFIG
    host.driver.set(spec.MMIO_INTERRUPT_ACK, 0xFFFF_FFFF)
    assert host.driver.get(spec.MMIO_INTERRUPT_STATUS) == 0


def test_interrupts_from_many_threads_lose_no_bit(host: Host) -> None:
    host.driver.bring_up()
    stop = threading.Event()

    def acknowledge() -> None:
        while not stop.is_set():
            host.driver.set(spec.MMIO_INTERRUPT_ACK, spec.INTERRUPT_USED)

    other = threading.Thread(target=acknowledge)
    other.start()
    try:
        for _ in range(2000):
            host.transport.interrupt.config()
            assert host.driver.get(spec.MMIO_INTERRUPT_STATUS) & spec.INTERRUPT_CONFIG
            host.driver.set(spec.MMIO_INTERRUPT_ACK, spec.INTERRUPT_CONFIG)
    finally:
        stop.set()
        other.join()


def test_shared_memory_regions_do_not_exist(host: Host) -> None:
    host.driver.set(spec.MMIO_SHM_SEL, 0)
    for register in range(spec.MMIO_SHM_LEN_LOW, spec.MMIO_SHM_BASE_HIGH + 4, 4):
        assert host.driver.get(register) == 0xFFFF_FFFF


# §3.1.1 and §2.1: status


def test_status_follows_the_order_of_3_1_1(host: Host) -> None:
    driver = host.driver
    assert driver.get(spec.MMIO_STATUS) == 0
    driver.negotiate()
    assert host.device.calls == []
    assert driver.add_status(spec.DRIVER_OK) == 0xF
    assert host.device.calls == ["activate"]


@pytest.mark.parametrize(
    "writes",
    [
        [spec.DRIVER],
        [spec.FEATURES_OK],
        [spec.DRIVER_OK],
        [spec.ACKNOWLEDGE, spec.ACKNOWLEDGE | spec.DRIVER_OK],
        [spec.ACKNOWLEDGE, spec.ACKNOWLEDGE | spec.FEATURES_OK],
        [spec.ACKNOWLEDGE, spec.ACKNOWLEDGE | spec.DRIVER, spec.ACKNOWLEDGE | spec.DRIVER | spec.DRIVER_OK],
    ],
)
def test_a_status_bit_out_of_order_is_not_taken(host: Host, writes: list[int]) -> None:
    for write in writes:
        host.driver.set(spec.MMIO_STATUS, write)
    expected = writes[-2] if len(writes) > 1 else 0
    assert host.driver.get(spec.MMIO_STATUS) == expected
    assert host.transport.stats["bad_status"] == 1
    assert host.device.calls == []


def test_2_1_1_status_going_backwards_is_ignored(host: Host) -> None:
    host.driver.bring_up()
    for value in (spec.ACKNOWLEDGE, 7, 0xF & ~spec.FEATURES_OK, spec.DEVICE_NEEDS_RESET):
        host.driver.set(spec.MMIO_STATUS, value)
        assert host.driver.get(spec.MMIO_STATUS) == 0xF
    assert host.transport.stats["bad_status"] == 4
    assert host.ask(b"alive") == b"ALIVE"


def test_2_1_failed_is_taken_at_any_time(host: Host) -> None:
    host.driver.set(spec.MMIO_STATUS, spec.FAILED)
    assert host.driver.get(spec.MMIO_STATUS) == spec.FAILED


def test_2_1_2_driver_cannot_set_needs_reset(host: Host) -> None:
    host.driver.bring_up()
    host.driver.set(spec.MMIO_STATUS, 0xF | spec.DEVICE_NEEDS_RESET)
    assert host.driver.get(spec.MMIO_STATUS) == 0xF


@pytest.mark.parametrize("features", [0, spec.F_EVENT_IDX, OTHER_FEATURE])
def test_6_1_version_1_not_accepted(host: Host, features: int) -> None:
    host.driver.add_status(spec.ACKNOWLEDGE)
    host.driver.add_status(spec.DRIVER)
    host.driver.accept(features)
    assert not host.driver.add_status(spec.FEATURES_OK) & spec.FEATURES_OK
    assert not host.driver.add_status(spec.DRIVER_OK) & spec.DRIVER_OK
    assert host.transport.stats["bad_features"] == 1


@pytest.mark.parametrize("feature", [2, 33, 41, 63])
def test_features_never_offered(host: Host, feature: int) -> None:
    host.driver.add_status(spec.ACKNOWLEDGE)
    host.driver.add_status(spec.DRIVER)
    host.driver.accept(spec.F_VERSION_1 | 1 << feature)
    assert not host.driver.add_status(spec.FEATURES_OK) & spec.FEATURES_OK
    host.driver.accept(spec.F_VERSION_1)  # and it may think again
    assert host.driver.add_status(spec.FEATURES_OK) & spec.FEATURES_OK


def test_features_acknowledged_in_the_wrong_state(host: Host) -> None:
    host.driver.accept(spec.F_VERSION_1)  # before DRIVER
    host.driver.add_status(spec.ACKNOWLEDGE)
    host.driver.add_status(spec.DRIVER)
    assert not host.driver.add_status(spec.FEATURES_OK) & spec.FEATURES_OK
    host.driver.accept(spec.F_VERSION_1)
    host.driver.add_status(spec.FEATURES_OK)
    before = host.transport.stats["bad_features"]
    host.driver.accept(spec.F_VERSION_1 | OTHER_FEATURE)  # after FEATURES_OK
    assert host.transport.stats["bad_features"] == before + 2
    host.driver.add_status(spec.DRIVER_OK)
    assert host.device.context.features == spec.F_VERSION_1


def test_feature_pages_beyond_the_second_are_refused(host: Host) -> None:
    host.driver.add_status(spec.ACKNOWLEDGE)
    host.driver.add_status(spec.DRIVER)
    host.driver.set(spec.MMIO_DRIVER_FEATURES_SEL, 0xFFFF_FFFF)
    host.driver.set(spec.MMIO_DRIVER_FEATURES, 0xFFFF_FFFF)
    assert host.transport.stats["bad_features"] == 1


# Reset


def test_reset_and_bring_up_again_and_again(host: Host) -> None:
    """What rmmod and modprobe do."""
    for turn in range(5):
        host.driver.bring_up(without=spec.F_EVENT_IDX if turn % 2 else 0)
        assert host.ask(b"abc") == b"ABC"
        host.driver.set(spec.MMIO_STATUS, 0)
        assert host.driver.get(spec.MMIO_STATUS) == 0
        assert host.driver.get(spec.MMIO_INTERRUPT_STATUS) == 0
        host.irq.take()
    assert host.device.calls == ["activate", "reset"] * 5
    assert not [t for t in threading.enumerate() if t.name == "virtio-echo"]


def test_reset_forgets_queues_and_selectors(host: Host) -> None:
    host.driver.bring_up()
    host.driver.set(spec.MMIO_QUEUE_SEL, 7)
    host.driver.set(spec.MMIO_STATUS, 0)
    assert host.driver.get(spec.MMIO_QUEUE_NUM_MAX) == 16
    assert host.driver.get(spec.MMIO_QUEUE_READY) == 0


def test_a_guest_that_never_stops_cannot_hold_up_its_reset(host: Host) -> None:
    """The device answers each request with another one; the reset still comes through."""
    host.driver.bring_up()
    ring = host.driver.queues[0]
    serving = threading.Event()
    serve = host.device.serve

    def endless(chain: Chain) -> int:
        written = serve(chain)
        ring.offer(chain.head)
        serving.set()
        return written

    host.device.serve = endless  # type: ignore[method-assign]
    ring.add([ring.buffer(1)])
    host.driver.kick()
    assert serving.wait(30)
    host.driver.set(spec.MMIO_STATUS, 0)
    assert host.driver.get(spec.MMIO_STATUS) == 0


def test_close_is_idempotent_and_gives_descriptors_back(ram: GuestMemory, irq: IrqLine, allocator: Allocator) -> None:
    before = len(os.listdir("/proc/self/fd"))
    host = Host(ram, irq, allocator)
    host.driver.bring_up()
    host.transport.close()
    host.transport.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_one_that_gets_no_descriptor_gives_those_back_that_it_has(
    ram: GuestMemory, irq: IrqLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is made again once there are some."""
    real, device = os.eventfd, Echo()
    before = len(os.listdir("/proc/self/fd"))
    for least in range(3):
        left = iter(range(least))

        def few(*how: int, left: Iterator[int] = left) -> int:
            if next(left, None) is None:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            return real(*how)

        with monkeypatch.context() as patch:
            patch.setattr(os, "eventfd", few)
            with pytest.raises(OSError, match="Too many open files"):
                VirtioMmio(device, ram, irq)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="Too many open files"):
        patch.setattr(device, "make_workers", few)
        VirtioMmio(device, ram, irq)
    assert len(os.listdir("/proc/self/fd")) == before
    VirtioMmio(device, ram, irq).close()


# Broken rings


def test_2_1_2_needs_reset_after_a_broken_ring(host: Host) -> None:
    host.driver.bring_up()
    host.driver.queues[0].offer(999)
    host.driver.set(spec.MMIO_QUEUE_NOTIFY, 0)
    host.wait_for(lambda: bool(host.driver.get(spec.MMIO_STATUS) & spec.DEVICE_NEEDS_RESET))
    assert host.driver.get(spec.MMIO_STATUS) == 0xF | spec.DEVICE_NEEDS_RESET
    assert host.device.stats["needs_reset"] == 1
    assert host.log == [
        "virtio-echo stopped until its driver resets it: "
        "queue 0, head 999, descriptor 999: the head is not below the queue size (§2.7.6)"
    ]
    host.driver.bring_up()
    assert host.ask(b"again") == b"AGAIN"


def test_2_1_2_needs_reset_comes_with_a_config_interrupt(host: Host) -> None:
    host.driver.bring_up()
    host.driver.queues[1].offer(999)
    host.driver.set(spec.MMIO_QUEUE_NOTIFY, 1)
    assert host.wait_interrupt() == spec.INTERRUPT_CONFIG


def test_a_broken_device_leaves_the_others_alive(ram: GuestMemory, host: Host) -> None:
    line = IrqLine(6)
    other = Host(ram, line, Allocator(0x200000, 0x100000))
    other.driver.bring_up()
    host.driver.bring_up()
    host.driver.queues[0].offer(999)
    host.driver.set(spec.MMIO_QUEUE_NOTIFY, 0)
    host.wait_for(lambda: host.device.stats["needs_reset"] == 1)
    assert other.ask(b"fine") == b"FINE"
    assert other.driver.get(spec.MMIO_STATUS) == 0xF
    other.transport.close()
    line.close()


@pytest.mark.parametrize("fault", [OSError(5, "no such luck"), ValueError("a bug"), RuntimeError("another")])
def test_nothing_raises_out_of_the_worker(host: Host, fault: Exception) -> None:
    """pytest turns an exception that leaves a thread into a failure."""
    host.driver.bring_up()
    host.device.fault = fault
    ring = host.driver.queues[0]
    ring.add([ring.buffer(b"x")])
    host.driver.kick()
    host.wait_for(lambda: host.device.stats["needs_reset"] == 1)
    assert str(fault) in host.log[0]
    host.device.fault = None
    host.driver.bring_up()
    assert host.ask(b"x") == b"X"


def test_a_guest_cannot_flood_the_log() -> None:
    lines: list[str] = []
    warn = Warner(lines.append)
    for _ in range(1000):
        warn("a", "same")
    warn("b", "other")
    assert lines[:3] == ["same", "same (seen 2 times)", "same (seen 4 times)"]
    assert lines[-1] == "other"
    assert len(lines) == 11


# hostile-guest: queue setup


def test_queue_sel_beyond_the_last_queue(host: Host) -> None:
    host.driver.negotiate()
    for selected in (2, 3, 0xFFFF, 0xFFFF_FFFF):
        host.driver.set(spec.MMIO_QUEUE_SEL, selected)
        assert host.driver.get(spec.MMIO_QUEUE_NUM_MAX) == 0
        assert host.driver.get(spec.MMIO_QUEUE_READY) == 0
        host.driver.set(spec.MMIO_QUEUE_NUM, 8)
        host.driver.set(spec.MMIO_QUEUE_READY, 1)
        assert host.driver.get(spec.MMIO_QUEUE_READY) == 0
    assert host.transport.stats["bad_queue"] == 8


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("size", 0), ("size", 3), ("size", 32), ("size", 65536 + 8),
        ("desc", 8), ("avail", 1), ("used", 2),
        ("desc", RAM), ("avail", HOLE_START), ("used", HOLE_START + 0x1000_0000), ("desc", 1 << 63),
    ],
)  # fmt: skip
def test_a_queue_set_up_wrong_is_not_ready_and_needs_reset(host: Host, part: str, value: int) -> None:
    host.driver.negotiate()
    ring = SplitDriver(host.transport.memory, host.driver.allocator, 8)
    setattr(ring, part, value if part == "size" or value >= RAM else getattr(ring, part) + value)
    host.driver.place_queue(0, ring)
    host.driver.set(spec.MMIO_QUEUE_READY, 1)
    assert host.driver.get(spec.MMIO_QUEUE_READY) == 0
    assert host.driver.get(spec.MMIO_STATUS) & spec.DEVICE_NEEDS_RESET
    assert host.transport.stats["bad_queue"] == 1
    assert len(host.log) == 1
    host.driver.add_status(spec.DRIVER_OK)
    assert host.device.calls == []
    host.driver.bring_up()
    assert host.ask(b"after a reset") == b"AFTER A RESET"


def test_any_queue_register_written_after_driver_ok(host: Host) -> None:
    host.driver.bring_up()
    registers = [spec.MMIO_QUEUE_NUM, spec.MMIO_QUEUE_READY]
    registers += range(spec.MMIO_QUEUE_DESC_LOW, spec.MMIO_QUEUE_DESC_LOW + 8, 4)
    registers += range(spec.MMIO_QUEUE_DRIVER_LOW, spec.MMIO_QUEUE_DRIVER_LOW + 8, 4)
    registers += range(spec.MMIO_QUEUE_DEVICE_LOW, spec.MMIO_QUEUE_DEVICE_LOW + 8, 4)
    host.driver.set(spec.MMIO_QUEUE_SEL, 0)
    for register in registers:
        host.driver.set(register, 0xFFFF_FFFF)
    assert host.transport.stats["bad_queue"] == len(registers)
    assert host.ask(b"unmoved") == b"UNMOVED"


def test_4_2_2_2_queue_registers_hold_while_the_queue_is_ready(host: Host) -> None:
    host.driver.negotiate()
    host.driver.set(spec.MMIO_QUEUE_SEL, 0)
    ring = SplitDriver(host.transport.memory, host.driver.allocator, 8)
    host.driver.place_queue(0, ring)
    host.driver.set(spec.MMIO_QUEUE_READY, 1)
    host.driver.set(spec.MMIO_QUEUE_NUM, 4)
    assert host.transport.stats["bad_queue"] == 1
    assert host.transport.queues[0].size == 8


def test_4_2_2_2_queue_ready_0_stops_one_queue(host: Host) -> None:
    host.driver.bring_up()
    host.driver.set(spec.MMIO_QUEUE_SEL, 0)
    host.driver.set(spec.MMIO_QUEUE_READY, 0)
    assert host.driver.get(spec.MMIO_QUEUE_READY) == 0
    os.eventfd_write(host.transport.notify_fds[0], 1)  # KVM signals whatever the state of the queue
    assert host.ask(b"the other", 1) == b"THE OTHER"
    assert host.driver.get(spec.MMIO_STATUS) == 0xF


def test_stopping_one_queue_loses_no_notification_of_another(host: Host) -> None:
    host.driver.bring_up()
    process, taken = host.device.process, threading.Event()

    def too_late(queue_index: int) -> None:
        taken.set()
        while not host.device.context.stopping:
            os.sched_yield()
        process(queue_index)

    host.device.process = too_late  # type: ignore[method-assign]
    ring = host.driver.queues[1]
    answer = ring.buffer(4, device_writes=True)
    ring.add([ring.buffer(b"kept"), answer])
    host.driver.kick(1)
    assert taken.wait(30)
    host.device.process = process  # type: ignore[method-assign]
    host.driver.set(spec.MMIO_QUEUE_SEL, 0)
    host.driver.set(spec.MMIO_QUEUE_READY, 0)
    host.wait_for(lambda: bool(ring.reap()))
    assert host.transport.memory.read(answer.addr, 4) == b"KEPT"


def test_queue_registers_before_features_ok(host: Host) -> None:
    ring = SplitDriver(host.transport.memory, host.driver.allocator, 8)
    host.driver.place_queue(0, ring)
    host.driver.set(spec.MMIO_QUEUE_READY, 1)
    assert host.driver.get(spec.MMIO_QUEUE_READY) == 0
    assert host.transport.stats["bad_queue"] == 8


def test_notify_for_a_queue_that_is_not_ready_or_not_there(host: Host) -> None:
    for index in (0, 1, 2, 0xFFFF_FFFF):
        host.driver.set(spec.MMIO_QUEUE_NOTIFY, index)
    assert host.transport.stats["bad_notify"] == 4
    host.driver.bring_up()
    for index in (2, 0x10000, 0xFFFF_FFFF):
        host.driver.set(spec.MMIO_QUEUE_NOTIFY, index)
    assert host.transport.stats["bad_notify"] == 7
    assert host.ask(b"x") == b"X"


def test_what_is_published_while_a_register_is_written_stays_published(host: Host) -> None:
    host.driver.bring_up()
    new = bytes(range(100, 120))
    publisher = threading.Thread(target=host.transport.publish_config, args=(new,))

    class Interrupted(Echo):
        @property
        def config(self) -> bytes:
            config = bytes(self.__dict__["config"])
            if publisher.ident is None:
                publisher.start()
                publisher.join(0.2)  # with a lock around the two it only begins here
            return config

        @config.setter
        def config(self, config: bytes) -> None:
            self.__dict__["config"] = config

    host.device.__class__ = Interrupted
    host.driver.set(spec.MMIO_QUEUE_SEL, 1)
    publisher.join(30)
    host.device.__class__ = Echo
    assert ctypes.string_at(host.transport.page_address + spec.MMIO_CONFIG, 20) == new


def test_a_notification_without_a_request(host: Host) -> None:
    host.driver.bring_up()
    for _ in range(100):
        host.driver.set(spec.MMIO_QUEUE_NOTIFY, 0)
    assert host.ask(b"x") == b"X"


@pytest.mark.parametrize(("offset", "size"), [(0, 1), (0, 2), (0, 8), (1, 4), (2, 4), (0x70, 1), (0xFC, 8), (0x71, 2)])
def test_4_2_2_2_wrong_access_width(host: Host, offset: int, size: int) -> None:
    host.driver.bring_up()
    data = bytearray(size)
    host.transport.read(offset, memoryview(data))
    assert data == b"\xff" * size
    host.transport.write(offset, memoryview(bytearray(size)))
    assert host.transport.stats["bad_access"] == 2
    assert host.driver.get(spec.MMIO_STATUS) == 0xF


def test_registers_that_do_not_exist(host: Host) -> None:
    host.driver.bring_up()
    known = {getattr(spec, name) for name in dir(spec) if name.startswith("MMIO_")}
    for offset in range(0, 0x100, 4):
        if offset not in known:
            assert host.driver.get(offset) == 0
            host.driver.set(offset, 0xFFFF_FFFF)
    for read_only in (spec.MMIO_MAGIC_VALUE, spec.MMIO_QUEUE_NUM_MAX, spec.MMIO_CONFIG_GENERATION):
        host.driver.set(read_only, 5)
    assert host.driver.get(spec.MMIO_MAGIC_VALUE) == 0x74726976
    assert host.ask(b"x") == b"X"


# Configuration space


def test_2_5_config_is_read_by_any_width(host: Host) -> None:
    for size in (1, 2, 4, 8):
        for offset in range(21 - size):
            assert host.driver.config(offset, size) == bytes(range(offset, offset + size))


@pytest.mark.parametrize(("offset", "size"), [(17, 4), (20, 1), (19, 8), (0xEFC, 4), (0xEFF, 8)])
def test_config_read_past_the_end(host: Host, offset: int, size: int) -> None:
    assert host.driver.config(offset, size) == bytes(range(20))[offset:].ljust(size, b"\0")


@pytest.mark.parametrize("offset", [17, 20, 0xEFF, (1 << 64) - 0x200, (1 << 64) - 1])
def test_config_write_past_the_end_or_with_an_offset_that_overflows(host: Host, offset: int) -> None:
    host.transport.write(spec.MMIO_CONFIG + offset, memoryview(bytearray(4)))
    assert host.device.calls == []
    assert host.transport.stats["bad_access"] == 1


def test_config_write_reaches_the_device(host: Host) -> None:
    host.transport.write(spec.MMIO_CONFIG + 16, memoryview(bytearray(b"abcd")))
    assert host.device.calls == ["config 16 61626364"]


def test_2_5_1_config_generation_changes_with_the_config(host: Host) -> None:
    host.driver.bring_up()
    before = host.driver.get(spec.MMIO_CONFIG_GENERATION)
    host.device.publish_config(b"\xee" * 20)
    assert host.driver.get(spec.MMIO_CONFIG_GENERATION) != before
    assert host.driver.config(0, 20) == b"\xee" * 20
    assert host.driver.take_interrupt() == spec.INTERRUPT_CONFIG


def test_2_5_1_no_two_halves_of_a_config(host: Host) -> None:
    """A driver that reads as §2.5.1 says never sees a mixture."""
    host.device.publish_config(b"\0" * 20)
    stop = threading.Event()

    def change() -> None:
        value = 0
        while not stop.is_set():
            value = value + 1 & 0xFF
            host.device.publish_config(bytes([value]) * 20)

    other = threading.Thread(target=change)
    other.start()
    try:
        whole = 0
        while whole < 300:
            before = host.driver.get(spec.MMIO_CONFIG_GENERATION)
            halves = host.driver.config(0, 8), host.driver.config(8, 8)
            if host.driver.get(spec.MMIO_CONFIG_GENERATION) == before:
                assert halves[0] == halves[1]
                whole += 1
    finally:
        stop.set()
        other.join()


def test_config_interrupt_waits_for_driver_ok(host: Host) -> None:
    host.device.publish_config(b"\1" * 20)
    assert host.irq.take() == 0
    assert host.driver.get(spec.MMIO_INTERRUPT_STATUS) == 0


def test_a_vcpu_s_way_to_the_interrupt_and_notify_registers(host: Host) -> None:
    """InterruptStatus, InterruptACK and QueueNotify through the bus, which serves them without Python."""
    bus = Bus("mmio", 1 << 40)
    bus.add(1 << 20, 0x1000, host.transport, "echo")

    def access(offset: int, value: int | None = None, size: int = 4) -> int:
        data = bytearray((value or 0).to_bytes(size, "little"))
        assert bus.access((1 << 20) + offset, data, value is not None)
        return int.from_bytes(data, "little")

    access(spec.MMIO_QUEUE_NOTIFY, 0)
    assert (host.transport.notified, host.transport.stats["bad_notify"]) == (0, 1), "the queue is not ready"
    ring, _ = host.driver.bring_up()
    answer = ring.buffer(5, device_writes=True)
    head = ring.add([ring.buffer(b"hello"), answer])
    ring.want_interrupt()
    access(spec.MMIO_QUEUE_NOTIFY, 0)
    assert select.select([host.irq.fd], [], [], 30)[0], "no interrupt came"
    assert ring.reap() == [(head, 5)] and host.transport.memory.read(answer.addr, 5) == b"HELLO"
    assert (host.transport.notified, host.transport.stats["bad_notify"]) == (1, 1)

    used, config = spec.INTERRUPT_USED, spec.INTERRUPT_CONFIG
    host.transport.interrupt.config()
    assert access(spec.MMIO_INTERRUPT_STATUS) == host.driver.get(spec.MMIO_INTERRUPT_STATUS) == used | config
    access(spec.MMIO_INTERRUPT_ACK, used)
    assert access(spec.MMIO_INTERRUPT_STATUS) == host.driver.get(spec.MMIO_INTERRUPT_STATUS) == config
    access(spec.MMIO_INTERRUPT_ACK, 0xFFFF_FFFF)
    assert access(spec.MMIO_INTERRUPT_STATUS) == 0

    # Python's part: every other register, other sizes, queues that are not there.
    assert access(spec.MMIO_MAGIC_VALUE) == spec.MMIO_MAGIC
    assert access(spec.MMIO_INTERRUPT_STATUS, size=2) == 0xFFFF
    access(spec.MMIO_QUEUE_NOTIFY, 2)
    access(spec.MMIO_QUEUE_NOTIFY, 0xFFFF_FFFF)
    access(spec.MMIO_QUEUE_NOTIFY, 0, size=2)
    assert host.transport.stats["bad_notify"] == 3 and host.transport.stats["bad_access"] == 2
    assert host.transport.notified == 1
