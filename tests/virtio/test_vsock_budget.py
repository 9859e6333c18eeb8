# SPDX-License-Identifier: Apache-2.0
"""What a guest's sockets may cost: the host's memory and descriptors, and the guest's own packets."""

from __future__ import annotations

import gc
import hashlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.virtio.vsock_driver import BUF_ALLOC, CREDIT_REQUEST, CREDIT_UPDATE, REQUEST, RESPONSE, RST, RW, Packet, Vm
from vmm.budget import memory, raise_descriptor_limit, set_descriptor_limit
from vmm.memory import GuestMemory

POOL = 32 << 20
SKB = 576  # SKB_TRUESIZE(0) of x86-64


@pytest.fixture
def vm(tmp_path: Path) -> Iterator[Vm]:
    raise_descriptor_limit()
    gc.collect()  # other tests' shares
    assert memory.used == 0
    with GuestMemory(256 << 20) as ram:
        vm = Vm(tmp_path / "v.sock", ram, posted=200)
        yield vm
        vm.close()
    assert memory.used == 0


def pattern(size: int, seed: int) -> bytes:
    return hashlib.shake_128(seed.to_bytes(4, "little")).digest(size)


class Guest:
    """A connection as Linux from 6.12.92 has it: each packet costs a buffer, and too many of them end it.

    Source: libkrun's issue 795; Linux virtio_transport_inc_rx_pkt().
    """

    def __init__(self, vm: Vm, port: int, host_port: int) -> None:
        self.vm, self.port, self.host_port = vm, port, host_port
        self.queue: list[bytes] = []
        self.forwarded = 0
        self.asked = 0
        self.largest = 0

    def take(self, packet: Packet) -> None:
        if packet.op == CREDIT_REQUEST:
            self.asked += 1
            return
        assert packet.op == RW, packet
        assert (len(self.queue) + 1) * SKB <= BUF_ALLOC, "the kernel resets the connection"
        assert sum(map(len, self.queue)) + packet.len <= BUF_ALLOC
        self.queue.append(packet.data)
        self.largest = max(self.largest, packet.len)

    def read(self) -> bytes:
        """What a program reads: all that is queued."""
        data = b"".join(self.queue)
        self.forwarded += len(data)
        self.queue.clear()
        return data

    def tell(self) -> None:
        self.vm.send(CREDIT_UPDATE, self.port, self.host_port, fwd_cnt=self.forwarded)


def test_many_small_messages_that_nobody_reads(vm: Vm) -> None:
    client, host_port = vm.host_open()
    guest = Guest(vm, 5000, host_port)
    messages = [pattern(200, i) for i in range(1500)]
    rest = iter(messages)
    for message in rest:
        client.sendall(message)
        while not guest.asked and not guest.queue[-1:] == [message]:
            guest.take(vm.receive())
        if guest.asked:
            break  # it waits now
    sender = threading.Thread(target=client.sendall, args=(b"".join(rest),))
    sender.start()
    assert 200 < len(guest.queue) < BUF_ALLOC // SKB
    got = b""
    while True:
        got += guest.read()
        if len(got) == 200 * len(messages):
            break
        guest.tell()
        while not guest.queue:
            guest.take(vm.receive())
    sender.join()
    assert got == b"".join(messages)
    assert guest.largest > 1000, "what waited goes in larger packets"


def test_a_guest_that_does_not_tell_what_it_has_read_is_asked_again(vm: Vm) -> None:
    """Linux before 6.7 tells of room by itself only when three quarters of it were used."""
    client, host_port = vm.host_open()
    guest = Guest(vm, 5000, host_port)
    sent = b""
    while not guest.asked:
        client.sendall(pattern(50, len(sent)))
        sent += pattern(50, len(sent))
        while not guest.asked and not sent.endswith(guest.queue[-1] if guest.queue else b"?"):
            guest.take(vm.receive())
    guest.tell()  # nothing was read when it was asked
    asked, got = guest.asked, guest.read()
    deadline = time.monotonic() + 30
    while len(got) < len(sent):
        assert time.monotonic() < deadline
        guest.take(vm.receive())
        if guest.asked > asked:
            asked = guest.asked
            guest.tell()
        got += guest.read()
    assert got == sent


def test_connections_that_come_and_go_do_not_keep_it_from_asking_again(vm: Vm) -> None:
    """Each sets a deadline, and is gone before the device looks at it."""
    client, host_port = vm.host_open()
    guest = Guest(vm, 5000, host_port)
    while not guest.asked:
        client.sendall(b"x")
        guest.take(vm.receive())
    full = vm.device.stats["packets_rx"]
    ended = time.monotonic() + 1
    asked = []
    while time.monotonic() < ended:
        vm.host_socket().close()
        vm.wait_for_connections(1)
        time.sleep(0.02)
        vm.collect()
        asked.append(vm.device.stats["packets_rx"] - full)
    assert asked[-1] - asked[len(asked) // 2] > 5, asked


def test_a_small_buffer_holds_one_packet(vm: Vm) -> None:
    client, _ = vm.host_open(buf_alloc=1000)
    client.sendall(b"one")
    assert vm.receive(RW).data == b"one"
    client.sendall(b"two")
    vm.receive(CREDIT_REQUEST)  # which asks for the room, too: 2 * 576 is more than 1000


# The host's memory


def test_many_connections_share_one_pool(vm: Vm) -> None:
    """Each may send less the more there are, and what nobody reads is bounded; nothing of it is lost."""
    count = 400
    server = vm.host_listen(1234, backlog=64)
    ends: list[tuple[socket.socket, int]] = []
    room: dict[int, int] = {}
    for i in range(count):
        vm.send(REQUEST, 5000 + i, 1234)
        response = vm.receive(RESPONSE)
        room[5000 + i] = response.buf_alloc
        client, _ = server.accept()
        client.settimeout(30)
        vm.sockets.append(client)
        ends.append((client, 5000 + i))
    assert room[5000] == BUF_ALLOC
    assert room[5000 + count - 1] == POOL // count
    sent: dict[int, bytes] = {}
    for _, port in ends:
        data = pattern(room[port], port)
        for at in range(0, len(data), 65536):
            vm.send(RW, port, 1234, data[at : at + 65536])
        sent[port] = data
        while vm.collect():
            vm.inbox.clear()
    assert 0 < memory.used <= sum(room.values())
    assert sum(room.values()) < 3 * POOL
    for client, port in ends:
        got = b""
        while len(got) < len(sent[port]):
            part = client.recv(1 << 18)
            assert part, "reset"
            got += part
        assert got == sent[port]
    deadline = time.monotonic() + 30
    while memory.used and time.monotonic() < deadline:
        time.sleep(0.01)
    assert memory.used == 0, "given back as it is read"


def test_more_than_was_granted_ends_the_connection(vm: Vm) -> None:
    clients = [vm.host_open(5000 + i) for i in range(200)]
    vm.send(CREDIT_REQUEST, 5199, clients[199][1])
    assert vm.receive(CREDIT_UPDATE).buf_alloc == POOL // 200  # what it was told at first, which is not taken back
    while not vm.device.stats["bad_credit"]:  # more than the socket and the device's own buffer hold
        vm.send(RW, 5199, clients[199][1], bytes(65536))
    while vm.receive().op != RST:
        pass
    assert vm.device.stats["bad_credit"] == 1


def test_a_connection_for_which_there_is_no_memory_is_reset_and_the_others_go_on(vm: Vm) -> None:
    deaf, deaf_port = vm.host_open(5000)
    client, port = vm.host_open(5001)
    left = memory.limit - memory.used
    assert memory.ask(left)
    try:
        for _ in range(4):
            vm.send(RW, 5000, deaf_port, bytes(65536))  # more than the socket takes
        while vm.receive().op != RST:
            pass
        assert vm.device.stats["full"] == 1
        vm.send(RW, 5001, port, b"alive")
        assert client.recv(10) == b"alive"
    finally:
        memory.put_back(left)
    assert deaf.recv(1) == b"\0"


# Descriptors


def test_the_last_descriptors_are_not_the_guests(vm: Vm) -> None:
    server = vm.host_listen(1234)
    clients = [vm.host_open(5000) for _ in range(3)]
    lowest = socket.socket()
    try:
        set_descriptor_limit(lowest.fileno() + 512)  # the next number is kept
        vm.send(REQUEST, 777, 1234)
        vm.receive(RST)
        assert vm.host_socket().recv(1) == b""
        vm.counted("full", 2)
        vm.send(RW, 5000, clients[0][1], b"alive")
        assert clients[0][0].recv(10) == b"alive"
    finally:
        lowest.close()
        raise_descriptor_limit()
    vm.guest_open(server, 778, 1234)
