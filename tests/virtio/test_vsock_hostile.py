# SPDX-License-Identifier: Apache-2.0
"""The socket device against a guest that lies and host programs that misbehave: counted, answered, alive."""

from __future__ import annotations

import os
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.virtio.vsock_driver import (
    BUF_ALLOC,
    CID,
    CREDIT_REQUEST,
    CREDIT_UPDATE,
    HOST_CID,
    RCV,
    REQUEST,
    RESPONSE,
    RST,
    RW,
    RX,
    SEND,
    SHUTDOWN,
    TX,
    VSOCK_HEADER,
    Vm,
    read_exactly,
    read_line,
)  # fmt: skip
from virtio import spec
from virtio.testing import Buffer
from vmm import undertaker
from vmm.memory import GuestMemory

Make = Callable[..., Vm]
HEADER = VSOCK_HEADER.size


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made: list[Vm] = []

    def make_one(**how: int) -> Vm:
        made.append(Vm(tmp_path / f"v{len(made)}.sock", GuestMemory(64 << 20), **how))
        return made[-1]

    yield make_one
    for vm in made:
        vm.close()
        vm.ram.close()


@pytest.fixture
def vm(make: Make) -> Vm:
    return make()


@pytest.fixture
def bystander(vm: Vm) -> Iterator[None]:
    """A connection that works before and after whatever the test does."""
    client, port = vm.host_open(9999)
    check = 0

    def works() -> None:
        nonlocal check
        check += 1
        vm.send(RW, 9999, port, b"%08d" % check)
        assert read_exactly(client, 8) == b"%08d" % check
        client.sendall(b"%08d" % check)
        packet = vm.receive(RW)
        assert (packet.dst_port, packet.data) == (9999, b"%08d" % check)

    works()
    yield
    works()
    assert vm.transport.status & spec.DEVICE_NEEDS_RESET == 0


def ended(client: socket.socket) -> bool:
    try:
        return client.recv(1) == b""
    except ConnectionResetError:
        return True


def bad(vm: Vm) -> int:
    return vm.device.stats["bad_requests"]


# Transmitted packets


def test_header_write_only(vm: Vm, bystander: None) -> None:
    before = bad(vm)
    vm.raw([vm.queue(TX).buffer(HEADER, device_writes=True)])
    assert bad(vm) == before + 1


@pytest.mark.parametrize("size", [1, 43])
def test_header_short(vm: Vm, bystander: None, size: int) -> None:
    before = bad(vm)
    vm.raw([vm.queue(TX).buffer(vm.packet(RST, 1, 1).pack()[:size])])
    assert bad(vm) == before + 1


def test_header_empty(vm: Vm, bystander: None) -> None:
    before = bad(vm)
    vm.raw([Buffer(0x1000, 0)])
    assert bad(vm) == before + 1


@pytest.mark.parametrize("length", [65537, 1 << 20, (1 << 32) - 1, (1 << 32) - 44])
def test_length_above_64_kib(vm: Vm, bystander: None, length: int) -> None:
    client, port = vm.host_open()
    vm.send(RW, 5000, port, b"x" * 65536, length=length)
    packet = vm.receive(RST)
    assert (packet.src_port, packet.dst_port) == (port, 5000)
    assert ended(client)
    assert bad(vm) == 1


def test_length_above_64_kib_with_all_its_bytes(vm: Vm, bystander: None) -> None:
    client, port = vm.host_open()
    vm.send(RW, 5000, port, b"x" * 65537)
    vm.receive(RST)
    assert ended(client)


@pytest.mark.parametrize("data", [b"", b"x" * 99], ids=["missing", "short"])
def test_data_descriptor(vm: Vm, bystander: None, data: bytes) -> None:
    client, port = vm.host_open()
    vm.send(RW, 5000, port, data, length=100)
    vm.receive(RST)
    assert ended(client)
    assert bad(vm) == 1


def test_data_descriptor_that_the_device_may_only_write(vm: Vm, bystander: None) -> None:
    client, port = vm.host_open()
    queue = vm.queue(TX)
    header = vm.packet(RW, 5000, port, length=100).pack()
    vm.raw([queue.buffer(header), queue.buffer(100, device_writes=True)])
    vm.receive(RST)
    assert ended(client)
    assert bad(vm) == 1


@pytest.mark.parametrize("op", [RESPONSE, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST, 0, 8, 65535])
def test_unknown_connection_is_reset(vm: Vm, bystander: None, op: int) -> None:
    vm.send(op, 31, 32)
    packet = vm.receive(RST)
    assert packet[:8] == (HOST_CID, CID, 32, 31, 0, 1, RST, 0)


def test_reset_is_not_answered(vm: Vm, bystander: None) -> None:
    vm.send(RST, 31, 32)
    vm.silence()


def test_foreign_destination(vm: Vm, bystander: None) -> None:
    for cid in (0, 1, CID, CID + 1, 0xFFFF_FFFF, 1 << 32 | HOST_CID, (1 << 64) - 1):
        before = bad(vm)
        vm.send(REQUEST, 31, 32, dst_cid=cid)
        packet = vm.receive(RST)
        assert (packet.src_cid, packet.dst_cid) == (cid, CID)
        assert bad(vm) == before + 1


def test_foreign_source(vm: Vm, bystander: None) -> None:
    client, port = vm.host_open()
    for cid in (0, 2, CID + 1, 1 << 32 | CID):
        vm.send(RW, 5000, port, b"forged", src_cid=cid)
    vm.silence()
    assert bad(vm) == 4
    vm.send(RW, 5000, port, b"genuine")
    assert client.recv(100) == b"genuine"


@pytest.mark.parametrize("kind", [0, 2, 3, 65535])
def test_unknown_type_is_reset(vm: Vm, bystander: None, kind: int) -> None:
    """§5.10.6.4.2"""
    client, port = vm.host_open()
    vm.send(RW, 5000, port, b"odd", kind=kind)
    assert vm.receive(RST).type == kind
    vm.send(RW, 5000, port, b"even")
    assert client.recv(100) == b"even"


@pytest.mark.parametrize("op", [0, REQUEST, RESPONSE, 8, 65535])
def test_wrong_op_resets_an_open_connection(vm: Vm, bystander: None, op: int) -> None:
    client, port = vm.host_open()
    vm.send(op, 5000, port)
    assert vm.receive(RST).src_port == port
    assert ended(client)
    assert bad(vm) == 1


@pytest.mark.parametrize("op", [0, REQUEST, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST, 8])
def test_wrong_answer_to_a_request(vm: Vm, bystander: None, op: int) -> None:
    client, request = vm.host_connect()
    vm.send(op, 5000, request.src_port)
    assert vm.receive(RST).src_port == request.src_port
    assert ended(client)


# Received packets


def test_receive_buffer_read_only(make: Make) -> None:
    vm = make(posted=0)
    vm.post([vm.queue(RX).buffer(4096)])
    vm.post([vm.queue(RX).buffer(4096, device_writes=True)])
    vm.send(RW, 31, 32)
    vm.receive(RST)
    assert bad(vm) == 1


@pytest.mark.parametrize("size", [1, 43])
def test_receive_buffer_too_small_for_a_header(make: Make, size: int) -> None:
    vm = make(posted=0)
    vm.post([vm.queue(RX).buffer(size, device_writes=True)])
    vm.post([vm.queue(RX).buffer(HEADER, device_writes=True)])
    vm.send(RW, 31, 32)
    vm.receive(RST)
    assert bad(vm) == 1


def test_receive_buffer_too_small_for_data(make: Make) -> None:
    vm = make(posted=2)
    client, _port = vm.host_open()
    vm.collect(repost=False)
    client.sendall(bytes(100))
    while vm.rx:
        client.sendall(b"x")
        vm._wait(lambda: vm.inbox, lambda: vm.collect(repost=False))
        vm.inbox.clear()
    client.sendall(b"to be delivered")
    for size in (HEADER, HEADER, 4096, HEADER, HEADER + 3, 4096):
        vm.post([vm.queue(RX).buffer(size, device_writes=True)])
    got = b""
    while b"delivered" not in got:
        got += vm.receive(RW).data
    assert got.endswith(b"to be delivered")
    assert bad(vm) >= 2


def test_small_buffer_between_good_ones(make: Make) -> None:
    """It goes back empty, and what it interrupted is neither lost nor written twice."""
    vm = make(posted=0, size=4096)
    host = vm.host_socket()
    host.sendall(b"CONNECT 5000\n")
    vm.post([vm.queue(RX).buffer(4096, device_writes=True)])
    vm._wait(lambda: vm.inbox, lambda: vm.collect(repost=False))
    request = vm.inbox.pop()
    vm.send(RESPONSE, 5000, request.src_port)
    read_line(host)
    data = bytes(range(256)) * 64
    host.sendall(data)
    vm.silence_without_buffers()
    queue, got = vm.queue(RX), b""
    while len(got) < len(data):
        for size in (300, 300, 300, HEADER, 300, 10, 300, 300):  # all at once, so that one readv would fill several
            buffer = queue.buffer(size, device_writes=True)
            vm.rx[queue.add([buffer])] = buffer
        vm.driver.kick(RX)
        while vm.rx and len(got) < len(data):
            vm._wait(lambda: vm.inbox or not vm.rx, lambda: vm.collect(repost=False))
            got += b"".join(packet.data for packet in vm.inbox)
            vm.inbox.clear()
    assert got == data


# Credit


def test_credit_overrun(vm: Vm, bystander: None) -> None:
    client, port = vm.host_open()
    sent = 0
    while not vm.device.stats["bad_credit"]:  # more than the socket and the device's own buffer hold
        vm.send(RW, 5000, port, bytes(65536))
        sent += 65536
        assert sent < 4 << 20
    while vm.receive().op != RST:
        pass
    left = 0
    while data := client.recv(1 << 20):
        left += len(data)
    assert 0 < left < sent


def test_credit_that_goes_backwards_gives_nothing(vm: Vm, bystander: None) -> None:
    client, port = vm.host_open(buf_alloc=1000)
    client.sendall(bytes(3000))
    vm.receive(RW)
    vm.receive(CREDIT_REQUEST)
    vm.send(CREDIT_UPDATE, 5000, port, fwd_cnt=1000, buf_alloc=1000)
    vm.receive(RW)
    vm.receive(CREDIT_REQUEST)
    vm.send(CREDIT_UPDATE, 5000, port, fwd_cnt=500, buf_alloc=1 << 30)
    vm.silence()
    assert vm.device.stats["bad_credit"] == 1
    vm.send(CREDIT_UPDATE, 5000, port, fwd_cnt=2000, buf_alloc=1000)
    assert len(vm.receive(RW).data) == 1000
    vm.receive(CREDIT_REQUEST)  # it has not looked whether there is more


def test_credit_for_what_was_never_sent(vm: Vm, bystander: None) -> None:
    client, port = vm.host_open()
    vm.send(CREDIT_UPDATE, 5000, port, fwd_cnt=1)
    vm.receive(RST)
    assert ended(client)
    assert vm.device.stats["bad_credit"] == 1


# Floods


def test_connection_flood_from_the_guest(vm: Vm, bystander: None) -> None:
    for i in range(2000):
        vm.send(REQUEST, 10000 + i, 1234)  # nobody listens
        vm.collect()
    while len(vm.inbox) < 2000:
        vm._wait(lambda: vm.inbox, vm.collect)
    assert {packet.op for packet in vm.inbox} == {RST}
    vm.inbox.clear()
    vm.wait_for_connections(1)


def test_questions_without_room_for_answers_wait(make: Make) -> None:
    """§5.10.6.1.2: what the device keeps in mind is bounded; then the guest waits, and nothing is lost."""
    vm = make(posted=0)
    queue = vm.queue(TX)
    buffers = [queue.buffer(vm.packet(RW, i, 99).pack()) for i in range(400)]
    answered: list[int] = []
    returned = 0

    def look() -> None:
        nonlocal returned
        returned += len(queue.reap())

    for buffer in buffers[:256]:
        queue.add([buffer])
    vm.driver.kick(TX)
    vm._wait(lambda: returned == 256, look)
    for buffer in buffers[256:]:
        queue.add([buffer])
    vm.driver.kick(TX)
    vm.driver.set(spec.MMIO_QUEUE_NOTIFY, TX)
    threading.Event().wait(0.05)
    look()
    assert returned == 256
    while len(answered) < 400:
        vm.post([vm.queue(RX).buffer(HEADER, device_writes=True)])

        def collect() -> None:
            vm.collect(repost=False)
            look()

        vm._wait(lambda: vm.inbox, collect)
        answered += [vm.inbox.pop(0).dst_port]
    vm._wait(lambda: returned == 400, look)
    assert answered == list(range(400))


def test_connection_flood_from_the_host(vm: Vm, bystander: None) -> None:
    for _ in range(3):
        hosts = [vm.host_socket() for _ in range(300)]
        for host in hosts:
            host.close()
    vm.silence()
    vm.wait_for_connections(1)


# Races at the end of a connection


def test_everything_after_the_end(vm: Vm, bystander: None) -> None:
    for last in (RST, SHUTDOWN):
        client, port = vm.host_open()
        vm.send(last, 5000, port, flags=RCV | SEND)
        if last == SHUTDOWN:
            vm.receive(RST)
        assert ended(client)
        for op in (RW, SHUTDOWN, CREDIT_UPDATE, CREDIT_REQUEST, RESPONSE):
            vm.send(op, 5000, port, flags=RCV | SEND)
            assert vm.receive(RST).src_port == port
        vm.send(RST, 5000, port)
        vm.silence()


def test_data_after_shutdown(vm: Vm, bystander: None) -> None:
    client, port = vm.host_open()
    vm.send(SHUTDOWN, 5000, port, flags=SEND)
    vm.send(RW, 5000, port, b"one more thing")
    vm.receive(RST)
    assert ended(client)


def test_both_ends_close_at_once(vm: Vm, bystander: None) -> None:
    client, port = vm.host_open()
    client.close()
    vm._wait(lambda: vm.inbox, vm.collect)  # our SHUTDOWN is under way, and so is the guest's
    vm.send(SHUTDOWN, 5000, port, flags=RCV | SEND)
    vm.receive(SHUTDOWN)
    vm.receive(RST)
    vm.send(RST, 5000, port)
    vm.silence()
    vm.wait_for_connections(1)


def test_shutdown_while_connecting(vm: Vm, bystander: None) -> None:
    client, request = vm.host_connect()
    vm.send(SHUTDOWN, 5000, request.src_port, flags=RCV | SEND)
    vm.receive(RST)
    assert ended(client)


def test_ports_are_used_again_at_once(vm: Vm, bystander: None) -> None:
    server = vm.host_listen(1234)
    for _ in range(50):
        client = vm.guest_open(server, 777, 1234)
        vm.send(SHUTDOWN, 777, 1234, flags=RCV | SEND)
        vm.receive(RST)
        assert ended(client)


def test_ports_of_zero(vm: Vm, bystander: None) -> None:
    server = vm.host_listen(0)
    for _ in range(3):
        client = vm.guest_open(server, 0, 0)
        vm.send(RW, 0, 0, b"zero")
        assert client.recv(10) == b"zero"
        vm.send(RST, 0, 0)
        assert ended(client)


# The host's side


def test_host_socket_gone_in_the_middle(vm: Vm, bystander: None) -> None:
    client, port = vm.host_open()
    vm.send(RW, 5000, port, bytes(65536))
    client.close()
    ends = 0
    for _ in range(3):
        vm.send(RW, 5000, port, bytes(65536))
    while not ends & RCV:
        packet = vm.receive()
        if packet.op == SHUTDOWN:
            ends |= packet.flags
    vm.send(RST, 5000, port)
    vm.inbox.clear()
    vm.silence()


@pytest.mark.parametrize(
    "line",
    [
        b"\n", b"CONNECT\n", b"CONNECT \n", b"CONNECT port\n", b"CONNECT 12x\n", b"CONNECT -1\n", b"CONNECT +1\n",
        b"CONNECT 4294967295\n", b"CONNECT 4294967296\n", b"CONNECT 18446744073709551617\n", b"CONNECT 1 2\n",
        b"CONNECT 99999999999999999999999\n", b"CONNECT1\n", b"CONNEC 1\n", b" CONNECT 1\n", b"CONNECT\t1\n",
        b"GET / HTTP/1.1\n", b"CONNECT 0x10\n", b"passfd\n", b"\0" * 31 + b"\n", b"CONNECT 1\0\n",
        b"CONNECT " + b" " * 40 + b"1\n", b"x" * 32, b"x" * 100000, b"CONNECT " + b"1" * 24,
    ],
)  # fmt: skip
def test_connect_line_malformed(vm: Vm, bystander: None, line: bytes) -> None:
    host = vm.host_socket()
    try:
        host.sendall(line)
    except BrokenPipeError:
        pass
    assert ended(host)
    vm.silence()
    assert vm.device.stats["bad_lines"] == 1


@pytest.mark.parametrize(
    ("line", "port"),
    [(b"CONNECT 0\n", 0), (b"CONNECT 4294967294\n", 0xFFFF_FFFE), (b"connect   007\r\n", 7), (b"CONNECT 1\r\n", 1)],
)
def test_connect_line_at_its_limits(vm: Vm, line: bytes, port: int) -> None:
    vm.host_socket().sendall(line)
    assert vm.receive(REQUEST).dst_port == port


def test_connect_line_never_ended(vm: Vm, bystander: None) -> None:
    host = vm.host_socket()
    host.sendall(b"CONNECT 12")
    host.shutdown(socket.SHUT_WR)
    assert ended(host)


# Broken rings


@pytest.mark.parametrize("index", [RX, TX])
def test_broken_ring(vm: Vm, index: int) -> None:
    client, _ = vm.host_open()
    queue = vm.queue(index)
    queue.write_desc(200, 0xFFFF_FFFF_0000, 4096, spec.DESC_F_WRITE if index == RX else 0)
    if index == RX:
        while vm.rx:  # the good ones come first
            client.sendall(b"x")
            vm._wait(lambda: vm.inbox, lambda: vm.collect(repost=False))
            vm.inbox.clear()
    queue.free.remove(200)
    queue.offer(200, [200])
    vm.driver.kick(index)
    if index == RX and not vm.transport.status & spec.DEVICE_NEEDS_RESET:
        try:
            client.sendall(b"x")
        except BrokenPipeError:
            pass  # it has found it by itself
    assert ended(client)
    while not vm.transport.status & spec.DEVICE_NEEDS_RESET:
        threading.Event().wait(0.001)
    assert len(vm.log) == 1
    assert f"queue {index}" in vm.log[0]
    vm.wait_for_connections(0)
    vm.up()
    vm.host_open()


def test_receive_queue_not_ready(make: Make) -> None:
    vm = make(posted=0)
    vm.driver.set(spec.MMIO_QUEUE_SEL, RX)
    vm.driver.set(spec.MMIO_QUEUE_READY, 0)
    host = vm.host_socket()
    host.sendall(b"CONNECT 1\n")
    vm.send(RW, 1, 1)
    assert vm.transport.status & spec.DEVICE_NEEDS_RESET == 0


# Anything at all

ports = st.sampled_from([0, 1, 1234, 1235, 1 << 30, (1 << 30) + 1, (1 << 30) + 2, 0xFFFF_FFFF])
lengths = st.sampled_from([0, 1, 100, 4096, 65536])
packets = st.tuples(
    st.just("packet"),
    st.one_of(st.integers(1, 7), st.integers(0, 65535)),
    ports,
    ports,
    lengths,
    st.one_of(st.none(), st.sampled_from([0, 1, 65536, 65537, 0xFFFF_FFFF])),
    st.sampled_from([0, 1, 2, 3, 0xFFFF_FFFF]),
    st.sampled_from([0, 1, 100, BUF_ALLOC, 0xFFFF_FFFF]),
    st.sampled_from([0, 0, 0, 1, 100, 0x8000_0000, 0xFFFF_FFFF]),
)
chains = st.tuples(
    st.just("chain"),
    st.lists(st.tuples(st.integers(0, 100), st.booleans()), min_size=1, max_size=4),
    st.binary(max_size=64),
)
posts = st.tuples(
    st.just("post"),
    st.lists(st.tuples(st.sampled_from([0, 1, 40, 44, 45, 300, 4096]), st.booleans()), min_size=1, max_size=4),
)
hosts = st.tuples(st.just("host"), st.sampled_from([b"CONNECT 1234\n", b"CONNECT 1\nhello", b"CONN", b"\n", b""]))
moves = st.tuples(
    st.sampled_from(["speak", "listen", "hang up", "half", "collect", "reset"]), st.integers(0, 7), lengths
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(packets, packets, packets, chains, posts, hosts, moves), max_size=40))
def test_no_program_crashes_or_leaks(steps: list[tuple[object, ...]]) -> None:
    with tempfile.TemporaryDirectory() as directory, GuestMemory(32 << 20) as ram:
        vm = Vm(Path(directory) / "v", ram, posted=3)
        try:
            run_program(vm, steps)
        finally:
            vm.close()


def run_program(vm: Vm, steps: list[tuple[object, ...]]) -> None:
    undertaker.wait()  # for the memory of the program before
    start = len(os.listdir("/proc/self/fd"))
    server = vm.host_listen(1234)
    server.setblocking(False)
    programs: list[socket.socket] = []
    for step in steps:
        play(vm, server, programs, step)
        assert not vm.transport.status & spec.DEVICE_NEEDS_RESET, f"no ring was broken: {vm.log}"
    vm.driver.set(spec.MMIO_STATUS, 0)
    vm.wait_for_connections(0)
    for end in [*programs, *vm.sockets]:
        end.close()
    vm.up(posted=8)
    client = vm.host_socket()
    client.sendall(b"CONNECT 4321\n")
    # Programs that came between the two drivers, and went, are asked for first.
    while (packet := vm.receive()).op != REQUEST or packet.dst_port != 4321:
        pass
    vm.send(RESPONSE, 4321, packet.src_port)
    assert read_line(client) == b"OK %d\n" % packet.src_port
    vm.send(RW, 4321, packet.src_port, b"still here")
    assert client.recv(100) == b"still here"
    client.close()
    vm.driver.set(spec.MMIO_STATUS, 0)
    assert len(os.listdir("/proc/self/fd")) == start


def play(vm: Vm, server: socket.socket, programs: list[socket.socket], step: tuple[object, ...]) -> None:
    """One step of a random program; nothing waits for an answer."""
    match step:
        case ("packet", int(op), int(guest), int(host), int(size), length, int(flags), int(alloc), int(fwd)):
            assert length is None or isinstance(length, int)
            send_anyhow(vm, [(vm.packet(op, guest, host, bytes(size), length=length, flags=flags, buf_alloc=alloc,
                                        fwd_cnt=fwd).pack(), False)])  # fmt: skip
        case ("chain", list(parts), bytes(content)):
            data = (content * 101)[:400] or bytes(400)
            readable = [(data[:size], False) for size, writes in parts if not writes]
            send_anyhow(vm, readable + [(bytes(size), True) for size, writes in parts if writes])
        case ("post", list(parts)):
            queue = vm.queue(RX)
            vm.collect(repost=False)
            if len(queue.free) > len(parts):
                asked = [queue.buffer(size) for size, writes in parts if not writes]
                vm.post(asked + [queue.buffer(size, device_writes=True) for size, writes in parts if writes])
        case ("host", bytes(line)):
            program = vm.host_socket()
            program.setblocking(False)
            program.send(line)
            programs.append(program)
        case ("listen", _, _):
            try:
                program, _ = server.accept()
            except BlockingIOError:
                return
            program.setblocking(False)
            programs.append(program)
        case ("collect", _, _):
            vm.collect()
        case ("reset", 0, _):
            vm.driver.set(spec.MMIO_STATUS, 0)
            vm.up(posted=3)
        case (str(move), int(which), int(size)) if programs:
            program = programs[which % len(programs)]
            try:
                if move == "speak":
                    program.send(bytes(size))
                    program.recv(1 << 20)
                elif move == "hang up":
                    program.close()
                elif move == "half":
                    program.shutdown(socket.SHUT_WR)
            except OSError:
                pass


def send_anyhow(vm: Vm, parts: list[tuple[bytes, bool]]) -> None:
    queue = vm.queue(TX)
    queue.reap()
    if len(queue.free) > len(parts):
        queue.add([queue.buffer(len(data) if writes else data, device_writes=writes) for data, writes in parts])
        vm.driver.set(spec.MMIO_QUEUE_NOTIFY, TX)
