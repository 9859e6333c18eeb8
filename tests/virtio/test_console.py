# SPDX-License-Identifier: Apache-2.0
"""The console device against virtio 1.2 §5.3, a host that does not listen and a driver that lies."""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from virtio import console, spec
from virtio.console import Console
from virtio.testing import Allocator, Buffer, DeviceHost
from vmm.errors import ConfigError
from vmm.machine.console import Console as HostConsole
from vmm.memory import GuestMemory

Host = DeviceHost[Console]
Boot = Callable[..., Host]
RECEIVE, TRANSMIT, CONTROL_IN, CONTROL_OUT = range(4)


@pytest.fixture
def boot(ram: GuestMemory, allocator: Allocator) -> Iterator[Boot]:
    hosts: list[Host] = []

    def boot(*ports: str, without: int = 0, **how: Any) -> Host:
        hosts.append(DeviceHost(Console(ports, **how), ram, allocator))
        hosts[-1].driver.bring_up(without=without if ports else without | spec.CONSOLE_F_MULTIPORT)
        return hosts[-1]

    yield boot
    for host in hosts:
        for port in host.device.ports:
            port.close()
        host.close()


def write(host: Host, text: bytes, queue: int = TRANSMIT) -> None:
    assert host.submit(queue, [host.data(text)]) == 0


def read(host: Host, size: int = 64, queue: int = RECEIVE) -> bytes:
    room = host.room(size)
    return host.ram.read(room.addr, host.submit(queue, [room]))


def alive(host: Host, number: int = 0) -> None:
    port = host.device.ports[number]
    while port._output:
        port.wait_output()
    write(host, b"out", 2 * number + 1 + 2 * bool(number))
    assert port.wait_output() == b"out"
    port.feed(b"in")
    assert read(host, queue=2 * number + 2 * bool(number)) == b"in"
    assert not host.broken()


# One port, and a driver without MULTIPORT


def test_5_3_4_configuration(boot: Boot) -> None:
    host = boot(cols=132, rows=43)
    assert host.driver.get(spec.MMIO_DEVICE_ID) == 3
    assert len(host.driver.queues) == 4
    assert host.driver.offered() & 0xFF == 0b111
    assert struct.unpack("<HHII", host.driver.config(0, 12)) == (132, 43, 1, 0)


@pytest.mark.parametrize("without", [0, spec.F_EVENT_IDX, spec.F_EVENT_IDX | spec.F_INDIRECT_DESC])
def test_5_3_6_bytes_both_ways(boot: Boot, without: int) -> None:
    host = boot(without=without)
    (port,) = host.device.ports
    host.submit(TRANSMIT, [host.data(b"login"), host.data(b": ")], indirect=not without)
    assert port.wait_output() == b"login: "
    port.feed(b"root\n")
    assert read(host) == b"root\n"
    alive(host)


def test_input_waits_for_buffers_and_buffers_wait_for_input(boot: Boot) -> None:
    host = boot()
    (port,) = host.device.ports
    ring = host.driver.queues[RECEIVE]
    rooms = [host.room(4) for _ in range(3)]
    ring.want_interrupt(after=1)
    heads = [ring.add([room]) for room in rooms]
    host.driver.kick(RECEIVE)
    port.feed(b"abcdef")
    done: list[tuple[int, int]] = []

    def both_done() -> bool:
        done.extend(ring.reap())
        return len(done) == 2

    host.until(both_done)
    assert sum(written for _, written in done) == 6
    assert host.ram.read(rooms[0].addr, 4) + host.ram.read(rooms[1].addr, 2) == b"abcdef"
    port.feed(b"gh")
    assert host.reap(RECEIVE, heads[2]) == 2
    port.feed(b"ij")  # no buffer: it stays
    assert read(host) == b"ij"


def test_input_is_taken_4_kib_ahead_of_the_guest_and_close_ends_the_wait(boot: Boot) -> None:
    host = boot()
    (port,) = host.device.ports
    text = os.urandom(console.INPUT_MAX + 100)
    feeder = threading.Thread(target=port.feed, args=(text,))
    feeder.start()
    got = b""
    while len(got) < len(text):
        got += read(host, 1000)
    feeder.join(30)
    assert not feeder.is_alive() and got == text
    feeder = threading.Thread(target=port.feed, args=(text,))
    feeder.start()
    port.close()
    feeder.join(30)
    assert not feeder.is_alive()


def test_input_from_before_the_driver_reaches_it(ram: GuestMemory, allocator: Allocator) -> None:
    host = DeviceHost(Console(), ram, allocator)
    host.device.ports[0].feed(b"typed early")
    host.driver.bring_up(without=spec.CONSOLE_F_MULTIPORT)
    assert read(host) == b"typed early"
    host.device.ports[0].feed(b"and while ")
    host.driver.set(spec.MMIO_STATUS, 0)
    host.device.ports[0].feed(b"there is none")
    host.driver.bring_up(without=spec.CONSOLE_F_MULTIPORT)
    assert read(host) == b"and while there is none"
    host.close()
    host.device.ports[0].feed(b"too late")  # wakes nobody, and no descriptor that is somebody else's by now


def test_a_guest_whose_output_nobody_takes_waits_and_loses_nothing(boot: Boot) -> None:
    host = boot()
    (port,) = host.device.ports
    size = 3 * console.OUTPUT_MAX
    host.ram.write(1 << 20, bytes(range(256)) * (size // 256))
    ring = host.driver.queues[TRANSMIT]
    ring.want_interrupt()
    head = ring.add([Buffer(1 << 20, size)])
    host.driver.kick(TRANSMIT)
    while len(port._output) < console.OUTPUT_MAX:
        os.sched_yield()
    port.feed(b"meanwhile")
    assert read(host) == b"meanwhile"  # input does not wait for output
    assert ring.reap() == []
    got = bytearray()
    while len(got) < size:
        part = port.wait_output()
        assert 0 < len(part) <= console.TAKE_MAX
        got += part
    assert bytes(got) == host.ram.read(1 << 20, size)
    host.reap(TRANSMIT, head)
    assert port.lost == 0


def test_a_reset_does_not_wait_for_whoever_takes_the_output(boot: Boot) -> None:
    host = boot()
    ring = host.driver.queues[TRANSMIT]
    ring.add([Buffer(1 << 20, 2 * console.OUTPUT_MAX)])
    host.driver.kick(TRANSMIT)
    while len(host.device.ports[0]._output) < console.OUTPUT_MAX:
        os.sched_yield()
    host.driver.bring_up(without=spec.CONSOLE_F_MULTIPORT)
    alive(host)


def test_after_close_the_rest_is_taken_and_what_comes_later_is_dropped(boot: Boot) -> None:
    host = boot()
    (port,) = host.device.ports
    write(host, b"last words")
    port.close()
    write(host, b"nobody hears")
    assert port.wait_output() == b"last words"
    assert port.wait_output() == b""
    assert port.lost == 12


def test_5_3_5_1_emergency_write_needs_no_driver(ram: GuestMemory, allocator: Allocator) -> None:
    host = DeviceHost(Console(), ram, allocator)
    for character in b"oops":
        host.transport.write(spec.MMIO_CONFIG + 8, memoryview(bytearray(struct.pack("<I", 0xABCDEF00 | character))))
    host.transport.write(spec.MMIO_CONFIG + 6, memoryview(bytearray(b"..!.")))
    host.transport.write(spec.MMIO_CONFIG, memoryview(bytearray(b"\xff" * 4)))  # the size is not the driver's
    assert host.device.ports[0].wait_output() == b"oops!"
    assert host.driver.config(0, 12) == struct.pack("<HHII", 0, 0, 1, 0)
    for _ in range(console.OUTPUT_MAX + 3):
        host.device.write_config(8, b"x")  # a vCPU does not wait
    assert host.device.ports[0].lost == 3
    host.close()


def test_5_3_6_the_size_changes_while_the_guest_runs(boot: Boot) -> None:
    host = boot(cols=80, rows=25)
    host.device.resize(100, 30)
    assert host.driver.take_interrupt() == spec.INTERRUPT_CONFIG
    assert host.driver.config(0, 4) == struct.pack("<HH", 100, 30)
    with pytest.raises(ConfigError, match="rows"):
        host.device.resize(100, 65536)


def test_the_hosts_console_joins_a_port_as_it_joins_the_serial_port(boot: Boot) -> None:
    host = boot()
    heard = bytearray()
    came = threading.Event()

    def hear(data: bytes) -> None:
        heard.extend(data)
        came.set()

    joined = HostConsole(host.device.ports[0], mode="none")
    joined.listen(hear)
    joined.start()
    write(host, b"Kernel panic - not syncing: really\n")
    assert came.wait(30)
    joined.close()
    assert bytes(heard) == b"Kernel panic - not syncing: really\n" and joined.panic_seen


# Several ports


def say(host: Host, number: int, event: int, value: int) -> None:
    assert host.submit(CONTROL_OUT, [host.data(spec.CONSOLE_CONTROL.pack(number, event, value))]) == 0


def told(host: Host) -> tuple[int | bytes, ...]:
    """The next control message: id, event, value, and what follows."""
    message = read(host, queue=CONTROL_IN)
    head: tuple[int, int, int] = spec.CONSOLE_CONTROL.unpack(message[:8])
    return (*head, message[8:]) if message[8:] else head


def bring_up_ports(host: Host) -> None:
    say(host, 0, spec.CONSOLE_DEVICE_READY, 1)
    for number in range(len(host.device.ports)):
        assert told(host) == (number, spec.CONSOLE_DEVICE_ADD, 0)
    say(host, 0, spec.CONSOLE_PORT_READY, 1)
    assert told(host) == (0, spec.CONSOLE_CONSOLE_PORT, 1)
    assert told(host)[:3] == (0, spec.CONSOLE_RESIZE, 0)
    assert told(host) == (0, spec.CONSOLE_PORT_OPEN, 1)
    for number, port in enumerate(host.device.ports[1:], 1):
        say(host, number, spec.CONSOLE_PORT_READY, 1)
        assert told(host) == (number, spec.CONSOLE_PORT_NAME, 1, port.name.encode())
        assert told(host) == (number, spec.CONSOLE_PORT_OPEN, 1)
    for number in range(len(host.device.ports)):
        say(host, number, spec.CONSOLE_PORT_OPEN, 1)


def test_5_3_6_2_ports_are_announced_named_and_opened(boot: Boot) -> None:
    host = boot("org.example.agent", "log", cols=80, rows=25)
    assert host.driver.offered() & spec.CONSOLE_F_MULTIPORT
    assert host.driver.config(4, 4) == struct.pack("<I", 3)
    assert len(host.driver.queues) == 8
    bring_up_ports(host)
    assert all(port.guest_open for port in host.device.ports)
    for number in range(3):
        alive(host, number)
    say(host, 2, spec.CONSOLE_PORT_OPEN, 0)
    assert not host.device.ports[2].guest_open
    assert host.device.stats["bad_requests"] == 0


def test_a_single_port_gets_what_was_typed_early_once_its_driver_has_set_it_up(
    ram: GuestMemory, allocator: Allocator
) -> None:
    host = DeviceHost(Console(), ram, allocator)
    host.device.ports[0].feed(b"typed early")
    host.driver.bring_up()
    ring = host.driver.queues[RECEIVE]
    ring.want_interrupt()
    room = host.room(64)
    head = ring.add([room])
    host.driver.kick(RECEIVE)
    bring_up_ports(host)
    assert host.reap(RECEIVE, head) == 11
    assert host.ram.read(room.addr, 11) == b"typed early"
    host.close()


def test_input_waits_until_somebody_in_the_guest_opens_the_port(boot: Boot) -> None:
    host = boot("agent")
    bring_up_ports(host)
    say(host, 1, spec.CONSOLE_PORT_OPEN, 0)
    ring = host.driver.queues[4]
    room = host.room(16)
    ring.want_interrupt()
    head = ring.add([room])
    host.driver.kick(4)
    host.device.ports[1].feed(b"orders")
    alive(host)  # the thread that serves both has been there
    assert ring.reap() == []
    say(host, 1, spec.CONSOLE_PORT_OPEN, 1)
    assert host.reap(4, head) == 6
    assert host.ram.read(room.addr, 6) == b"orders"


def test_a_resize_is_told_once_with_the_last_size(boot: Boot) -> None:
    host = boot("agent")
    host.device.resize(1, 1)  # nobody to tell yet
    bring_up_ports(host)
    for cols in range(80, 100):
        host.device.resize(cols, 40)
    size = b""
    while not size.startswith(struct.pack("<HH", 99, 40)):
        *message, told_size = told(host)
        assert isinstance(told_size, bytes)
        size = told_size
        assert message == [0, spec.CONSOLE_RESIZE, 0]
    assert host.device._messages == []


def test_one_port_that_nobody_reads_does_not_hold_up_another(boot: Boot) -> None:
    host = boot("stuck", "free")
    bring_up_ports(host)
    ring = host.driver.queues[5]
    ring.add([Buffer(1 << 20, 2 * console.OUTPUT_MAX)])
    host.driver.kick(5)
    while len(host.device.ports[1]._output) < console.OUTPUT_MAX:
        os.sched_yield()
    alive(host, 0)
    alive(host, 2)


def test_a_driver_without_multiport_has_a_console_and_no_control_queue(boot: Boot) -> None:
    host = boot("agent", without=spec.CONSOLE_F_MULTIPORT)
    ring = host.driver.queues[CONTROL_OUT]
    ring.add([host.data(spec.CONSOLE_CONTROL.pack(0, spec.CONSOLE_DEVICE_READY, 1))])
    host.driver.set(spec.MMIO_QUEUE_NOTIFY, CONTROL_OUT)
    alive(host)
    assert ring.reap() == [] and host.device._messages == []


def test_a_reset_begins_again(boot: Boot) -> None:
    host = boot("agent")
    bring_up_ports(host)
    host.device.resize(5, 5)
    host.driver.bring_up()
    assert not host.device.ports[1].guest_open
    bring_up_ports(host)
    alive(host, 1)


@pytest.mark.parametrize("names", [("",), ("a", "a"), ("x" * 256,), tuple(map(str, range(16)))])
def test_ports_that_cannot_be_are_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="console port"):
        Console(names)


# A driver that lies


def test_a_readable_buffer_in_a_receive_queue_and_a_writable_one_in_a_transmit_queue(boot: Boot) -> None:
    host = boot()
    room = host.room(8)
    assert host.submit(TRANSMIT, [host.data(b"not this"), room]) == 0
    host.device.ports[0].feed(b"x")
    assert host.submit(RECEIVE, [host.data(b"seed"), room]) == 0
    assert host.submit(RECEIVE, [host.room(0)]) == 0
    assert host.device.stats["bad_requests"] == 3
    assert host.ram.read(room.addr, 8) == bytes(8)
    assert read(host) == b"x"  # nothing of the input was lost
    alive(host)


@pytest.mark.parametrize(
    "message",
    [
        b"", b"1234567", spec.CONSOLE_CONTROL.pack(2, spec.CONSOLE_PORT_READY, 1),
        spec.CONSOLE_CONTROL.pack(0xFFFF_FFFF, spec.CONSOLE_PORT_OPEN, 1),
        spec.CONSOLE_CONTROL.pack(0, spec.CONSOLE_DEVICE_READY, 1), spec.CONSOLE_CONTROL.pack(1, 0xFFFF, 1),
        spec.CONSOLE_CONTROL.pack(1, spec.CONSOLE_DEVICE_ADD, 1),
        spec.CONSOLE_CONTROL.pack(0, spec.CONSOLE_PORT_READY, 1),
    ],
)  # fmt: skip
def test_a_control_message_that_is_none_is_counted_and_answered_with_nothing(boot: Boot, message: bytes) -> None:
    host = boot("agent")
    bring_up_ports(host)
    for _ in range(100):
        assert host.submit(CONTROL_OUT, [host.data(message)]) == 0
    assert host.device.stats["bad_requests"] == 100
    assert host.device._messages == []
    alive(host, 1)


def test_a_driver_that_takes_no_control_message_is_owed_no_more_than_one_of_each(boot: Boot) -> None:
    host = boot("agent")
    for _ in range(50):
        for event in range(8):
            for number in range(4):
                say(host, number, event, 1)
        host.device.resize(7, 7)
    assert len(host.device._messages) == 2 + 3 + 2
    assert read(host, 7, queue=CONTROL_IN) == b""  # too small for any
    assert told(host) == (0, spec.CONSOLE_DEVICE_ADD, 0)


def test_ports_before_the_device_and_failures_are_taken_as_they_are(boot: Boot) -> None:
    host = boot("agent")
    say(host, 1, spec.CONSOLE_PORT_READY, 1)
    say(host, 1, spec.CONSOLE_PORT_OPEN, 1)
    assert host.device.stats["bad_requests"] == 2
    say(host, 0, spec.CONSOLE_DEVICE_READY, 0)  # it could not set itself up
    assert host.device._messages == [] and host.device.stats["bad_requests"] == 2
    bring_up_ports(host)


def test_a_broken_chain_stops_this_device_until_its_driver_resets_it(boot: Boot, ram: GuestMemory) -> None:
    host = boot("agent")
    for queue in range(6):
        host.device.ports[0].feed(b"x")
        host.device.ports[1].feed(b"x")
        ring = host.driver.queues[queue]
        ring.write_desc(0, ram.size - 8, 16, 0)
        if queue & 1 == 0:
            for event in (spec.CONSOLE_DEVICE_READY, spec.CONSOLE_PORT_READY, spec.CONSOLE_PORT_OPEN):
                say(host, queue // 4, event, 1)
        ring.offer(0, [0])
        host.driver.set(spec.MMIO_QUEUE_NOTIFY, queue)
        host.until(host.broken)
        host.driver.bring_up()
    bring_up_ports(host)
    assert len(read(host)) == 6
    alive(host)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
@given(
    pieces=st.lists(st.binary(min_size=1, max_size=300), max_size=12),
    sizes=st.lists(st.integers(1, 700), min_size=1, max_size=5),
)
def test_whatever_the_framing_the_bytes_are_the_same(pieces: list[bytes], sizes: list[int]) -> None:
    with GuestMemory(4 << 20) as ram:
        host = DeviceHost(Console(), ram, Allocator(0x1000, (4 << 20) - 0x1000))
        host.driver.bring_up(without=spec.CONSOLE_F_MULTIPORT)
        (port,) = host.device.ports
        for piece in pieces:
            write(host, piece)
        sent = b"".join(pieces)
        got = b""
        while len(got) < len(sent):
            got += port.wait_output()
        assert got == sent
        feeder = threading.Thread(target=port.feed, args=(sent,))
        feeder.start()
        got = b""
        while len(got) < len(sent):
            got += read(host, sizes[len(got) % len(sizes)])
        feeder.join(30)
        assert got == sent
        host.close()
