# SPDX-License-Identifier: Apache-2.0
"""The socket device (§5.10) between a driver and real unix sockets: connections, streams, credit, ends."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import select
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.virtio.vsock_driver import (
    BUF_ALLOC,
    CID,
    CREDIT_REQUEST,
    CREDIT_UPDATE,
    EVENT,
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
    Packet,
    Vm,
    read_exactly,
    read_line,
)  # fmt: skip
from tests.waiting import PATIENCE
from virtio import spec
from virtio.testing import Buffer
from virtio.vsock._worker import MAX_CONNECTIONS
from virtio.vsock.device import Listener
from vmm import unix_socket
from vmm.budget import raise_descriptor_limit
from vmm.config.devices import VsockConfig
from vmm.errors import ConfigError
from vmm.memory import GuestMemory

Make = Callable[..., Vm]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Makes guests, each with memory and a socket path of its own."""
    made: list[Vm] = []

    def make_one(**how: int) -> Vm:
        made.append(Vm(tmp_path / f"v{len(made)}.sock", GuestMemory(256 << 20), **how))
        return made[-1]

    yield make_one
    for vm in made:
        vm.close()
        vm.ram.close()


@pytest.fixture
def vm(make: Make) -> Vm:
    return make()


def ended(client: socket.socket) -> bool:
    """Whether the device has closed its end; waits for it."""
    try:
        return client.recv(1) == b""
    except ConnectionResetError:
        return True


def pattern(size: int, seed: int = 1) -> bytes:
    return hashlib.shake_128(seed.to_bytes(4, "little")).digest(size)


class Stream:
    """What a guest's kernel keeps of a connection: sends within credit, counts what it takes."""

    def __init__(self, vm: Vm, guest_port: int, host_port: int) -> None:
        self.vm, self.ports = vm, (guest_port, host_port)
        self.sent = self.taken = self.confirmed = 0
        self.data = b""
        self.others: list[Packet] = []

    def take(self, packet: Packet) -> None:
        assert (packet.dst_port, packet.src_port) == self.ports
        self.confirmed = packet.fwd_cnt
        if packet.op == RW:
            self.data += packet.data
            self.taken += packet.len
        else:
            self.others.append(packet)

    def room(self) -> int:
        return BUF_ALLOC - (self.sent - self.confirmed & 0xFFFF_FFFF)

    def send(self, data: bytes) -> None:
        while data:
            while not self.room():
                self.take(self.vm.receive())
            part = data[: min(self.room(), 65536)]
            self.vm.send(RW, *self.ports, part, fwd_cnt=self.taken)
            self.sent += len(part)
            data = data[len(part) :]

    def read(self, size: int) -> bytes:
        told = self.taken
        while len(self.data) < size:
            self.take(self.vm.receive())
            if self.taken - told >= BUF_ALLOC // 4:
                told = self.taken
                self.vm.send(CREDIT_UPDATE, *self.ports, fwd_cnt=self.taken)
        data, self.data = self.data[:size], self.data[size:]
        return data


def test_configuration_space(vm: Vm) -> None:
    assert vm.driver.get(spec.MMIO_DEVICE_ID) == 19
    assert vm.driver.config(0, 8) == CID.to_bytes(8, "little")


# Connections


@pytest.mark.parametrize("verb", ["CONNECT", "connect", "Connect", "cOnNeCt"])
def test_connect_in_any_letter_case(vm: Vm, verb: str) -> None:
    client, request = vm.host_connect(5000, verb)
    assert request[:8] == (HOST_CID, CID, request.src_port, 5000, 0, 1, REQUEST, 0)
    assert request.src_port >= 1 << 30
    assert (request.buf_alloc, request.fwd_cnt) == (BUF_ALLOC, 0)
    vm.send(RESPONSE, 5000, request.src_port)
    assert read_line(client) == b"OK %d\n" % request.src_port


def test_connect_line_in_pieces_and_data_right_behind_it(vm: Vm) -> None:
    with vm.host_socket() as host:
        for part in (b"CON", b"NECT 12", b"34"):
            host.sendall(part)
            vm.silence()
        host.sendall(b"\nearly")
        request = vm.receive(REQUEST)
        assert request.dst_port == 1234
        vm.send(RESPONSE, 1234, request.src_port)
        assert vm.receive(RW).data == b"early"
        assert read_line(host) == b"OK %d\n" % request.src_port


def test_host_ports_differ(vm: Vm) -> None:
    ports = [vm.host_connect(5000)[1].src_port for _ in range(3)]
    assert len(set(ports)) == 3


def test_a_guest_that_refuses(vm: Vm) -> None:
    client, request = vm.host_connect()
    vm.send(RST, 5000, request.src_port)
    assert ended(client)
    assert vm.device.stats["refused"] == 1
    vm.wait_for_connections(0)


def test_a_guest_that_never_answers(make: Make) -> None:
    vm = make()
    vm.device.guest_wait = 0.1
    vm.up()
    client, request = vm.host_connect()
    assert ended(client)
    packet = vm.receive(RST)
    assert (packet.src_port, packet.dst_port) == (request.src_port, 5000)
    assert vm.device.stats["timeouts"] == 1


def test_a_host_program_that_never_speaks(make: Make) -> None:
    vm = make()
    vm.device.line_wait = 0.1
    vm.up()
    assert ended(vm.host_socket())
    assert vm.device.stats["timeouts"] == 1


def test_guest_connects(vm: Vm) -> None:
    server = vm.host_listen(1234)
    vm.send(REQUEST, 777, 1234)
    packet = vm.receive(RESPONSE)
    assert packet[:5] == (HOST_CID, CID, 1234, 777, 0)
    client, _ = server.accept()
    vm.send(RW, 777, 1234, b"from the guest")
    assert client.recv(100) == b"from the guest"
    client.sendall(b"from the host")
    assert vm.receive(RW).data == b"from the host"


def test_guest_connects_where_nobody_listens(vm: Vm) -> None:
    vm.send(REQUEST, 777, 1234)
    assert vm.receive(RST).dst_port == 777
    vm.host_listen(1234).close()  # leaves its file behind
    vm.send(REQUEST, 777, 1234)
    vm.receive(RST)
    assert vm.device.stats["refused"] == 2
    vm.wait_for_connections(0)


def test_guest_connects_to_a_full_backlog(vm: Vm) -> None:
    vm.host_listen(1234, backlog=0)
    vm.send(REQUEST, 777, 1234)
    vm.receive(RESPONSE)
    vm.send(REQUEST, 778, 1234)
    assert vm.receive(RST).dst_port == 778


def test_path_too_long_for_the_port(tmp_path: Path) -> None:
    name = "s" * (106 - len(str(tmp_path)))
    with GuestMemory(1 << 20) as ram:
        vm = Vm(tmp_path / name, ram, posted=4)
        vm.send(REQUEST, 777, 1234567890)
        vm.receive(RST)
        vm.close()


def test_both_directions_with_checksums(vm: Vm) -> None:
    size = 3 << 20
    client, port = vm.host_open()
    stream = Stream(vm, 5000, port)
    upward, downward = pattern(size, 1), pattern(size, 2)
    received = bytearray()

    def host() -> None:
        for start in range(0, size, 1 << 16):
            client.sendall(downward[start : start + (1 << 16)])
            received.extend(read_exactly(client, 1 << 16))

    program = threading.Thread(target=host)
    program.start()
    for start in range(0, size, 1 << 16):
        stream.send(upward[start : start + (1 << 16)])
        part = stream.read(1 << 16)
        assert part == downward[start : start + (1 << 16)]
    program.join(PATIENCE)
    assert bytes(received) == upward
    assert vm.device.stats["bytes_tx"] == vm.device.stats["bytes_rx"] == size


@pytest.mark.parametrize("without", [0, spec.F_EVENT_IDX, spec.F_INDIRECT_DESC])
def test_with_and_without_ring_features(make: Make, without: int) -> None:
    vm = make(features_without=without)
    client, port = vm.host_open()
    vm.send(RW, 5000, port, b"a" * 65536)
    assert read_exactly(client, 65536) == b"a" * 65536


def test_large_receive_buffers_are_filled(make: Make) -> None:
    vm = make(posted=4, size=65536 + VSOCK_HEADER.size)
    client, port = vm.host_open()
    data = pattern(60000)
    client.sendall(data)
    assert Stream(vm, 5000, port).read(60000) == data


def test_any_framing_of_a_sent_packet(vm: Vm) -> None:
    """§2.7.4: a device must not make assumptions about how a message is cut into buffers."""
    client, port = vm.host_open()
    raw = vm.packet(RW, 5000, port, pattern(300)).pack()
    cuts = [0, 1, 20, 43, 45, 100, 344]
    vm.raw([vm.queue(TX).buffer(raw[a:b]) for a, b in itertools.pairwise(cuts)])
    assert read_exactly(client, 300) == pattern(300)
    vm.raw([vm.queue(TX).buffer(vm.packet(RW, 5000, port, b"abc").pack() + b"behind the end")])
    assert client.recv(100) == b"abc"


def test_any_framing_of_a_received_packet(make: Make) -> None:
    vm = make(posted=2)
    client, _ = vm.host_open()
    queue = vm.queue(RX)
    for start in (0, 1):
        vm.collect(repost=False)
        while vm.rx:  # use up the plain buffers
            client.sendall(b"x")
            vm._wait(lambda: vm.inbox, lambda: vm.collect(repost=False))
            vm.inbox.clear()
        pieces = [1, 20, 22, 1 + start, 3, 1, 100]
        base = vm.allocator.alloc(sum(pieces))
        buffers, at = [], base
        for piece in pieces:
            buffers.append(Buffer(at, piece, True))
            at += piece
        vm.post(buffers)
        data = pattern(sum(pieces) - 44)
        client.sendall(data)
        vm._wait(lambda: queue.used_idx != queue._u16(queue.used + 2), lambda: None)
        ((head, written),) = queue.reap()
        vm.rx.pop(head)
        packet = Packet.unpack(vm.ram.read(base, written))
        assert packet.data == data[: packet.len]
        assert packet.len == len(data)


# Ends


def test_host_half_closes(vm: Vm) -> None:
    client, port = vm.host_open()
    client.sendall(b"the last words")
    client.shutdown(socket.SHUT_WR)
    assert vm.receive(RW).data == b"the last words"
    assert vm.receive(SHUTDOWN).flags == SEND
    vm.send(RW, 5000, port, b"the answer")
    assert read_exactly(client, 10) == b"the answer"
    vm.send(SHUTDOWN, 5000, port, flags=RCV | SEND)
    vm.receive(RST)
    assert ended(client)
    vm.wait_for_connections(0)


def test_guest_half_closes(vm: Vm) -> None:
    client, port = vm.host_open()
    vm.send(RW, 5000, port, b"the last words")
    vm.send(SHUTDOWN, 5000, port, flags=SEND)
    assert read_exactly(client, 14) == b"the last words"
    assert ended(client)
    client.sendall(b"the answer")
    assert vm.receive(RW).data == b"the answer"
    client.close()
    assert vm.receive(SHUTDOWN).flags == RCV | SEND
    vm.send(RST, 5000, port)
    vm.silence()
    vm.wait_for_connections(0)


def test_guest_stops_receiving(vm: Vm) -> None:
    client, port = vm.host_open()
    vm.send(SHUTDOWN, 5000, port, flags=RCV)
    with pytest.raises(BrokenPipeError):
        client.send(b"x")
    vm.send(RW, 5000, port, b"still talking")
    assert read_exactly(client, 13) == b"still talking"
    client.close()
    assert vm.receive(SHUTDOWN).flags == RCV | SEND


def test_shutdown_flags_add_up(vm: Vm) -> None:
    """§5.10.6.5: the hints are permanent once sent."""
    client, port = vm.host_open()
    vm.send(SHUTDOWN, 5000, port, flags=SEND)
    assert ended(client)
    vm.send(SHUTDOWN, 5000, port, flags=0)
    vm.silence()
    vm.send(SHUTDOWN, 5000, port, flags=RCV)
    vm.receive(RST)
    vm.wait_for_connections(0)


def test_host_closes_and_all_it_sent_arrives_first(make: Make) -> None:
    vm = make(posted=1)
    client, port = vm.host_open()
    data = pattern(30000)
    client.sendall(data)
    client.close()
    stream = Stream(vm, 5000, port)
    assert stream.read(30000) == data
    assert vm.receive(SHUTDOWN).flags == RCV | SEND
    vm.send(RST, 5000, port)
    vm.silence()
    vm.wait_for_connections(0)


def test_host_closes_and_the_guest_does_not_answer(make: Make) -> None:
    vm = make()
    vm.device.guest_wait = 0.1
    vm.up()
    client, port = vm.host_open()
    client.close()
    assert vm.receive(SHUTDOWN).flags == RCV | SEND
    vm.send(RW, 5000, port, b"into the void")  # it has not seen it yet
    assert vm.receive(RST).src_port == port
    vm.wait_for_connections(0)
    assert vm.device.stats["timeouts"] == 1


def test_host_closes_without_reading(vm: Vm) -> None:
    """What it sent is for the guest still, though nothing can be sent to it."""
    client, port = vm.host_open(buf_alloc=4)
    client.sendall(b"12345678")
    vm.send(RW, 5000, port, b"never read", buf_alloc=4)
    client.close()
    stream = Stream(vm, 5000, port)
    stream.take(vm.receive(RW))
    vm.receive(CREDIT_REQUEST)
    vm.send(RW, 5000, port, b"broken pipe", buf_alloc=4)
    assert vm.receive(SHUTDOWN).flags == RCV
    vm.send(CREDIT_UPDATE, 5000, port, fwd_cnt=4, buf_alloc=4)
    assert vm.receive(RW).data == b"5678"
    vm.receive(CREDIT_REQUEST)
    vm.send(CREDIT_UPDATE, 5000, port, fwd_cnt=8, buf_alloc=4)
    assert vm.receive(SHUTDOWN).flags == RCV | SEND


def test_guest_closes_and_all_it_sent_arrives(vm: Vm) -> None:
    """What waits for a slow host program outlives the guest's socket, whose port is free at once."""
    client, port = vm.host_open()
    stream = Stream(vm, 5000, port)
    data = pattern(BUF_ALLOC + 100_000)
    stream.send(data[:BUF_ALLOC])
    while stream.confirmed == 0:  # the socket took a part, the device has the rest
        stream.take(vm.receive(CREDIT_UPDATE))
    stream.send(data[BUF_ALLOC:])
    vm.send(SHUTDOWN, 5000, port, flags=RCV | SEND)
    assert vm.receive(RST).src_port == port
    vm.send(RW, 5000, port, b"it is not known any more")
    vm.receive(RST)
    assert read_exactly(client, len(data)) == data
    assert ended(client)
    vm.silence()
    vm.wait_for_connections(0)


def closed_with_bytes_left(vm: Vm, size: int) -> socket.socket:
    """A host program to which the guest has sent ``size`` bytes, more than its socket takes, and closed."""
    client, port = vm.host_open()
    stream = Stream(vm, 5000, port)
    stream.send(bytes(BUF_ALLOC))
    while stream.confirmed == 0:
        stream.take(vm.receive(CREDIT_UPDATE))
    stream.send(bytes(size - BUF_ALLOC))
    vm.send(SHUTDOWN, 5000, port, flags=RCV | SEND)
    vm.receive(RST)
    return client


def test_a_host_program_that_never_reads_the_rest(make: Make) -> None:
    vm = make()
    vm.device.host_wait = 0.1
    vm.up()
    client = closed_with_bytes_left(vm, BUF_ALLOC + 100_000)
    poll = select.poll()
    poll.register(client, select.POLLRDHUP)
    assert poll.poll(PATIENCE * 1000)
    vm.silence()
    vm.wait_for_connections(0)
    assert vm.device.stats["timeouts"] == 1


def test_a_guest_that_ends_is_heard_to_its_last_byte(vm: Vm) -> None:
    size = BUF_ALLOC + 100_000
    client = closed_with_bytes_left(vm, size)
    ending = threading.Thread(target=vm.driver.set, args=(spec.MMIO_STATUS, 0))
    ending.start()
    ending.join(0.1)  # it waits for a program that is slow
    assert read_exactly(client, size) == bytes(size)
    assert ended(client)
    ending.join(PATIENCE)
    vm.wait_for_connections(0)


def test_what_a_guest_sends_right_before_its_end_is_heard(vm: Vm) -> None:
    # The thread has not looked yet, as where the host has much to do.
    client, port = vm.host_open()
    queue = vm.queue(TX)
    for number in range(200):
        queue.reap()
        queue.add([queue.buffer(vm.packet(RW, 5000, port, b"%03d" % number).pack())])
    vm.driver.set(spec.MMIO_STATUS, 0)
    assert read_exactly(client, 600) == b"".join(b"%03d" % number for number in range(200))
    assert ended(client)


def test_a_guest_that_ends_waits_for_no_host_program_for_ever(make: Make) -> None:
    vm = make()
    vm.device.end_wait = 0.05
    vm.up()
    size = BUF_ALLOC + 100_000
    client = closed_with_bytes_left(vm, size)
    vm.driver.set(spec.MMIO_STATUS, 0)
    vm.wait_for_connections(0)
    part = b"".join(iter(lambda: client.recv(65536), b""))
    assert 0 < len(part) < size


def test_guest_resets(vm: Vm) -> None:
    client, port = vm.host_open()
    vm.send(RST, 5000, port)
    assert ended(client)
    vm.wait_for_connections(0)


# Credit


def test_no_more_than_the_guest_has_room_for(vm: Vm) -> None:
    client, port = vm.host_open(buf_alloc=3000)
    client.sendall(pattern(15000))
    got = vm.receive(RW).data
    assert len(got) == 3000
    assert vm.receive(CREDIT_REQUEST).src_port == port
    vm.silence()
    vm.send(CREDIT_UPDATE, 5000, port, fwd_cnt=900, buf_alloc=3000)
    got += vm.receive(RW).data
    assert len(got) == 3900
    vm.receive(CREDIT_REQUEST)
    vm.send(CREDIT_UPDATE, 5000, port, fwd_cnt=3900, buf_alloc=1500)  # room taken away
    got += vm.receive(RW).data
    assert len(got) == 5400
    vm.receive(CREDIT_REQUEST)
    vm.send(CREDIT_UPDATE, 5000, port, fwd_cnt=3900, buf_alloc=300)  # more away than there is
    vm.silence()
    vm.send(CREDIT_UPDATE, 5000, port, fwd_cnt=5400, buf_alloc=1 << 32 - 1)
    while len(got) < 15000:
        got += vm.receive(RW).data
    assert got == pattern(15000)


def test_the_guest_hears_of_room_when_it_needs_it(vm: Vm) -> None:
    client, port = vm.host_open()
    for _ in range(3):
        vm.send(RW, 5000, port, bytes(40000))
        read_exactly(client, 40000)
    vm.silence()  # 120,000 of 262,144: no need yet
    vm.send(RW, 5000, port, bytes(20000))
    packet = vm.receive(CREDIT_UPDATE)
    assert (packet.fwd_cnt, packet.buf_alloc) == (140000, BUF_ALLOC)


def test_credit_request_is_answered(vm: Vm) -> None:
    client, port = vm.host_open()
    vm.send(RW, 5000, port, b"12345")
    assert client.recv(5) == b"12345"
    vm.send(CREDIT_REQUEST, 5000, port)
    packet = vm.receive(CREDIT_UPDATE)
    assert (packet.fwd_cnt, packet.buf_alloc, packet.src_port) == (5, BUF_ALLOC, port)


def test_the_end_right_behind_the_last_bytes_is_heard_of(vm: Vm) -> None:
    """Both there before the device reads: a read that was not filled is not taken for all that will ever come."""
    client, port = vm.host_open(buf_alloc=0)
    client.sendall(b"last words")
    client.close()
    vm.receive(CREDIT_REQUEST)
    vm.send(CREDIT_UPDATE, 5000, port, buf_alloc=10000)
    assert vm.receive(RW).data == b"last words"
    assert vm.receive(SHUTDOWN).src_port == port


def test_descriptors_that_come_along_hold_up_nothing(vm: Vm) -> None:
    """The kernel ends a read behind them, however much there is."""
    client, port = vm.host_open(buf_alloc=0)
    socket.send_fds(client, [b"one"], [client.fileno()])
    client.sendall(b"two")
    vm.receive(CREDIT_REQUEST)
    vm.send(CREDIT_UPDATE, 5000, port, buf_alloc=10000)
    got = b""
    while len(got) < 6:
        got += vm.receive(RW).data
    assert got == b"onetwo"


def test_bytes_one_by_one(vm: Vm) -> None:
    client, _ = vm.host_open()
    for byte in range(200):
        client.sendall(bytes([byte]))
        assert vm.receive(RW).data == bytes([byte])


# Fairness


def test_a_peer_that_never_reads_stalls_nobody_else(vm: Vm) -> None:
    deaf, deaf_port = vm.host_open(5000)
    stream = Stream(vm, 5000, deaf_port)
    stream.send(bytes(BUF_ALLOC))
    while stream.confirmed == 0:
        stream.take(vm.receive(CREDIT_UPDATE))
    stream.send(bytes(stream.room()))  # now the device's buffer is as full as it can be
    client, port = vm.host_open(5001)
    for round_ in range(20):
        vm.send(RW, 5001, port, pattern(1000, round_))
        assert read_exactly(client, 1000) == pattern(1000, round_)
        client.sendall(pattern(1000, round_))
        assert vm.receive(RW).data == pattern(1000, round_)
    assert len(read_exactly(deaf, stream.sent)) == stream.sent


def test_a_guest_program_that_never_reads_stalls_nobody_else(vm: Vm) -> None:
    deaf, _ = vm.host_open(5000, buf_alloc=0)
    deaf.sendall(bytes(1000))
    vm.receive(CREDIT_REQUEST)
    client, port = vm.host_open(5001)
    client.sendall(b"through")
    packet = vm.receive(RW)
    assert (packet.src_port, packet.data) == (port, b"through")


def test_connections_take_turns(make: Make) -> None:
    vm = make(posted=8, size=1044)
    clients = [vm.host_open(5000 + i)[0] for i in range(4)]
    vm.collect()
    while vm.rx:  # no buffer left: everybody waits
        clients[0].sendall(bytes(1000))
        vm._wait(lambda: vm.inbox, lambda: vm.collect(repost=False))
        vm.inbox.clear()
    for client in clients:
        client.sendall(bytes(100_000))
    vm.silence_without_buffers()
    queue = vm.queue(RX)
    seen: dict[int, int] = {}
    for _ in range(200):
        vm.post([queue.buffer(1044, device_writes=True)])
        vm._wait(lambda: vm.inbox, lambda: vm.collect(repost=False))
        for packet in vm.inbox:
            seen[packet.dst_port] = seen.get(packet.dst_port, 0) + 1
        vm.inbox.clear()
        if max(seen.values()) > 20:
            break
    assert len(seen) == 4
    assert min(seen.values()) >= 15, seen


def test_no_receive_buffers_and_then_some(make: Make) -> None:
    vm = make(posted=0)
    host = vm.host_socket()
    host.sendall(b"CONNECT 5000\n")
    vm.silence_without_buffers()
    vm.post([vm.queue(RX).buffer(4096, device_writes=True)])
    request = vm.receive(REQUEST)
    vm.send(RESPONSE, 5000, request.src_port)
    assert read_line(host).startswith(b"OK ")


def test_1500_connections_at_once_both_ways(make: Make) -> None:
    raise_descriptor_limit()
    vm = make(posted=200)
    count = 1500
    server = vm.host_listen(1234, backlog=64)
    ends = []
    for i in range(count):
        if i % 2:
            ends.append((*vm.host_open(5000 + i), 5000 + i))
        else:
            ends.append((vm.guest_open(server, 5000 + i, 1234), 1234, 5000 + i))
    vm.wait_for_connections(count)
    for i, (client, _, _) in enumerate(ends):
        client.sendall(pattern(100, i))
    got: dict[int, bytes] = {}
    while len(got) < count:
        packet = vm.receive(RW)
        got[packet.dst_port] = packet.data
    assert all(got[5000 + i] == pattern(100, i) for i in range(count))
    for i, (_, host_port, guest_port) in enumerate(ends):
        vm.send(RW, guest_port, host_port, pattern(200, i))
    for i, (client, _, _) in enumerate(ends):
        assert read_exactly(client, 200) == pattern(200, i)
        client.close()
    for _ in ends:
        packet = vm.receive(SHUTDOWN)
        vm.send(RST, packet.dst_port, packet.src_port)
    vm.silence()
    vm.wait_for_connections(0)


def test_beyond_the_limit_others_stay_alive(make: Make) -> None:
    raise_descriptor_limit()
    vm = make()
    clients = [vm.host_open(5000)]
    for _ in range(MAX_CONNECTIONS - 1):
        clients.append(vm.host_open(5000))
    assert ended(vm.host_socket())
    vm.host_listen(1234)
    vm.send(REQUEST, 777, 1234)
    vm.receive(RST)
    assert vm.device.stats["full"] == 2
    client, port = clients[0]
    vm.send(RW, 5000, port, b"alive")
    assert client.recv(10) == b"alive"
    clients.pop()[0].close()
    packet = vm.receive(SHUTDOWN)
    vm.send(RST, packet.dst_port, packet.src_port)
    vm.host_open(5000)
    for client, _ in clients:
        client.close()


# Life and death of the device


def test_reset_closes_every_connection_and_the_next_driver_gets_new_ones(vm: Vm) -> None:
    before = len(os.listdir("/proc/self/fd"))
    server = vm.host_listen(1234)
    clients = [vm.host_open(5000 + i)[0] for i in range(10)]
    clients += [vm.guest_open(server, 6000 + i, 1234) for i in range(10)]
    half = vm.host_socket()
    half.sendall(b"CONN")
    vm.driver.set(spec.MMIO_STATUS, 0)
    assert all(ended(client) for client in [*clients, half])
    waiting = vm.host_socket()  # between two drivers: waits
    waiting.sendall(b"CONNECT 9\n")
    vm.wait_for_connections(0)
    vm.up()
    request = vm.receive(REQUEST)
    assert request.dst_port == 9
    vm.send(RESPONSE, 9, request.src_port)
    assert read_line(waiting).startswith(b"OK")
    vm.driver.set(spec.MMIO_STATUS, 0)
    for end in (*clients, half, waiting, server):
        end.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_client_killed_at_any_moment_leaves_nothing(vm: Vm) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for line in (b"", b"CONN", b"CONNECT 5000\n"):
        with vm.host_socket() as host:
            host.sendall(line)
            if line.endswith(b"\n"):
                request = vm.receive(REQUEST)
    assert vm.receive(RST).src_port == request.src_port
    client, port = vm.host_open()
    client.sendall(b"x")
    client.close()
    assert vm.receive(RW).data == b"x"
    assert vm.receive(SHUTDOWN).flags == RCV | SEND
    vm.send(RST, 5000, port)
    vm.silence()
    vm.wait_for_connections(0)
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_answer_is_one_interrupt(make: Make) -> None:
    """The driver hears of the packet it sent when it hears of the answer."""
    vm = make()
    vm.device.tx_delay = 1000
    vm.up()
    client, port = vm.host_open()
    vm.receive_nothing_more()
    for queue in (TX, RX):
        vm.queue(queue).want_interrupt()
    vm.irq.take()
    vm.offer(vm.packet(RW, 5000, port, b"question").pack())
    assert client.recv(100) == b"question"
    client.sendall(b"answer")
    assert select.select([vm.irq.fd], [], [], PATIENCE)[0]
    assert vm.irq.take() == 1
    assert len(vm.queue(TX).reap()) == 1
    assert vm.receive(RW).data == b"answer"


def test_the_answer_of_a_polled_guest_is_found_without_a_notification(make: Make) -> None:
    """After a packet for the guest its answer is looked for (``poll_us``), and no longer than until it is there."""
    vm = make()
    vm.device.poll_us = 1e9
    vm.up()
    client, port = vm.host_open()
    before = vm.transport.notifications[TX]
    for number in range(3):
        question, answer = b"question %d" % number, b"answer %d" % number
        client.sendall(question)
        assert vm.receive(RW).data == question
        vm.queue(TX).reap()
        vm.queue(TX).add([vm.queue(TX).buffer(vm.packet(RW, 5000, port, answer).pack())])
        assert client.recv(100) == answer
    assert vm.transport.notifications[TX] == before


def test_a_packet_without_an_answer_is_heard_of(vm: Vm) -> None:
    _client, port = vm.host_open()
    vm.receive_nothing_more()
    for queue in (TX, RX):
        vm.queue(queue).want_interrupt()
    vm.irq.take()
    vm.offer(vm.packet(RW, 5000, port, b"statement").pack())
    assert select.select([vm.irq.fd], [], [], PATIENCE)[0]
    assert len(vm.queue(TX).reap()) == 1


def test_many_packets_are_heard_of_before_the_ring_is_full(make: Make) -> None:
    vm = make()
    vm.device.tx_delay = 1000
    vm.up()
    _, port = vm.host_open()
    vm.receive_nothing_more()
    for queue in (TX, RX):
        vm.queue(queue).want_interrupt()
    vm.irq.take()
    for _ in range(32):
        vm.queue(TX).add([vm.queue(TX).buffer(vm.packet(RW, 5000, port, b"x").pack())])
    vm.driver.kick(TX)
    assert select.select([vm.irq.fd], [], [], PATIENCE)[0]


def test_event_buffers_are_kept(vm: Vm) -> None:
    queue = vm.queue(EVENT)
    queue.add([queue.buffer(4, device_writes=True)])
    vm.driver.set(spec.MMIO_QUEUE_NOTIFY, EVENT)
    vm.silence()
    assert queue.reap() == []


def test_the_thread_sleeps_when_nothing_happens(vm: Vm) -> None:
    """No direction that cannot go on makes it spin: a deaf host program, a guest without room, an ended half."""
    deaf, deaf_port = vm.host_open(5000)
    stream = Stream(vm, 5000, deaf_port)
    stream.send(bytes(BUF_ALLOC))
    while stream.confirmed == 0:
        stream.take(vm.receive(CREDIT_UPDATE))
    stream.send(bytes(stream.room()))
    mute, _ = vm.host_open(5001, buf_alloc=0)
    mute.sendall(bytes(1000))
    vm.receive(CREDIT_REQUEST)
    half, _ = vm.host_open(5002)
    half.shutdown(socket.SHUT_WR)
    vm.receive(SHUTDOWN)
    (thread,) = [t for t in threading.enumerate() if t.name == vm.device.name]

    def switches() -> int:
        with open(f"/proc/self/task/{thread.native_id}/status") as status:
            return sum(int(line.split()[1]) for line in status if "ctxt_switches" in line)

    def busy() -> int:
        with open(f"/proc/self/task/{thread.native_id}/stat") as stat:
            return sum(map(int, stat.read().rsplit(")", 1)[1].split()[11:13]))

    vm.silence()
    before = switches(), busy()
    threading.Event().wait(0.5)
    after = switches(), busy()
    assert after[0] - before[0] < 20
    assert after[1] - before[1] < 10  # of 50 ticks
    deaf.close()


# The socket's file


def test_stale_file_is_replaced_and_ours_removed(tmp_path: Path) -> None:
    path = tmp_path / "v.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
        stale.listen()
    with Listener(str(path)), socket.socket(socket.AF_UNIX) as host:
        host.connect(str(path))
    assert not path.exists()


def test_live_socket_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "v.sock"
    with Listener(str(path)):
        with pytest.raises(ConfigError, match="in use by another program"):
            Listener(str(path))
        assert path.exists()


def test_of_two_at_once_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have found the path free: the second took the first one's place, whose clients then reached the wrong VM."""
    path = str(tmp_path / "v.sock")
    monkeypatch.setattr(unix_socket, "_clear", lambda field, path: None)
    with Listener(path), pytest.raises(ConfigError, match="is in use by another program; give an unused path"):
        Listener(path)
    assert list(tmp_path.iterdir()) == []


def test_where_a_file_has_one_name_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(source: str, target: str) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refused)
    with Listener(str(tmp_path / "v.sock")):
        assert [each.name for each in tmp_path.iterdir()] == ["v.sock"]


def test_another_file_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "v.sock"
    path.write_text("precious")
    with pytest.raises(ConfigError, match="not a socket"):
        Listener(str(path))
    assert path.read_text() == "precious"


def test_a_file_that_took_its_place_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "v.sock"
    listener = Listener(str(path))
    path.rename(tmp_path / "old")
    path.write_text("another's")
    listener.close()
    listener.close()
    assert path.exists()


@pytest.mark.parametrize("name", ["missing/v.sock", "x" * 200])
def test_a_path_that_cannot_be(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be made"):
        Listener(str(tmp_path / name))


# Configuration


def test_config_from_words() -> None:
    config = VsockConfig.parse("cid=3,uds=/run/a,,b.sock")
    assert (config.cid, config.path) == (3, "/run/a,b.sock")


@pytest.mark.parametrize(
    "text",
    ["", "cid=3", "uds=x", "cid=2,uds=x", "cid=4294967296,uds=x", "cid=x,uds=x", "cid=3,uds=", "cid=3,uds=x,ro",
     "cid=3,cid=4,uds=x", "cid=3,uds=" + "x" * 108],
)  # fmt: skip
def test_config_mistakes(text: str) -> None:
    with pytest.raises(ConfigError):
        VsockConfig.parse(text)


@pytest.mark.parametrize("cid", [0, 1, 2, 1 << 32, -1])
def test_reserved_cids(cid: int) -> None:
    """§5.10.4"""
    with pytest.raises(ConfigError, match="vsock cid"):
        VsockConfig(cid, "x")
