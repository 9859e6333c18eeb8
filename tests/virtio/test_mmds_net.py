# SPDX-License-Identifier: Apache-2.0
"""The metadata service's TCP endpoint: with Linux's own TCP as the guest's, a scripted peer, and any bytes."""

from __future__ import annotations

import http.client
import itertools
import os
import select
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.virtio.net_driver import checksum
from virtio import spec
from virtio.net import mmds as mmds_net
from virtio.net.host import Tap
from virtio.net.mmds import ACK, FIN, IDLE, MAC, MAX_CONNECTIONS, MAX_FRAMES, MSS, PSH, RECEIVE, RST, SYN, Endpoint
from vmm.config.devices import MmdsConfig
from vmm.mmds.store import MAX_REQUEST, Mmds

ADDRESS = "169.254.169.254"
SERVICE = socket.inet_aton(ADDRESS)
GUEST, GUEST_MAC = socket.inet_aton("10.9.8.2"), bytes.fromhex("025600000002")
MASK = 0xFFFF_FFFF


def store(document: Any, version: str = "V1", limit: int = 1 << 20) -> Mmds:
    mmds = Mmds(limit=limit)
    mmds.configure(MmdsConfig(["eth0"], version=version))
    mmds.put(document)
    return mmds


# Linux's TCP


class Host:
    """This host's own stack as the guest's: what it sends to a tap goes to an endpoint, and back."""

    def __init__(self, endpoint: Endpoint, offloads: int) -> None:
        self.endpoint = endpoint
        self.tap = Tap("mm%d", make=True)
        self.tap.configure(address="10.9.8.2/24")
        self.tap.set_offloads(offloads)
        subprocess.run(["ip", "route", "add", ADDRESS, "dev", self.tap.name], check=True)
        self.headers: list[bytes] = []
        self._stop, self._told = os.pipe()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        fd = self.tap.fds[0]
        while True:
            while (frame := self.endpoint.next_frame()) is not None:
                os.write(fd, bytes(12) + frame)
            ready, _, _ = select.select([fd, self._stop], [], [], self.endpoint.timeout())
            if self._stop in ready:
                return
            if fd in ready:
                data = os.read(fd, 1 << 17)
                if SERVICE in data[:60]:
                    self.headers.append(data[:12])
                    self.endpoint.receive(data[12:], partial=bool(data[0] & 1))

    def close(self) -> None:
        os.write(self._told, b"x")
        self._thread.join()
        os.close(self._stop)
        os.close(self._told)
        self.tap.close()


@pytest.fixture(params=[0, spec.NET_F_GUEST_CSUM | spec.NET_F_GUEST_TSO4], ids=["plain", "offloads"])
def host(request: pytest.FixtureRequest, namespace: None) -> Iterator[Host]:
    document = {"name": "value", "large": "x" * 200_000}
    made = Host(Endpoint(store(document).serve, SERVICE), request.param)
    yield made
    made.close()
    partial = [header for header in made.headers if header[0] & 1]
    assert bool(partial) == bool(request.param)
    assert not made.endpoint.counters["rx_accepted_err"]


def get(connection: http.client.HTTPConnection, path: str) -> tuple[int, str]:
    connection.request("GET", path)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_linux_keeps_a_connection_for_many_requests(host: Host) -> None:
    connection = http.client.HTTPConnection(ADDRESS, timeout=20)
    for _ in range(50):
        assert get(connection, "/name") == (200, "value")
        assert get(connection, "/nowhere")[0] == 404
    assert host.endpoint.counters["connections_created"] == 1
    connection.close()
    again = http.client.HTTPConnection(ADDRESS, timeout=20)
    assert get(again, "/name") == (200, "value")
    assert host.endpoint.counters["connections_destroyed"] == 1
    again.close()


def test_linux_gets_a_large_answer_whole(host: Host) -> None:
    connection = http.client.HTTPConnection(ADDRESS, timeout=60)
    for _ in range(3):
        assert get(connection, "/large") == (200, "x" * 200_000)
    connection.close()


def test_linux_reads_slowly(host: Host) -> None:
    # Its window closes and opens again.
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(30)
        sock.connect((ADDRESS, 80))
        sock.sendall(b"GET /large HTTP/1.1\r\nConnection: close\r\n\r\n")
        got = b""
        while data := sock.recv(3000):
            got += data
    assert got.endswith(b"\r\n\r\n" + b"x" * 200_000)


def test_linux_sends_a_request_in_pieces_and_several_at_once(host: Host) -> None:
    with socket.create_connection((ADDRESS, 80), timeout=20) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in b"GET /name HTTP/1.1\r\n\r\n":
            sock.send(bytes([byte]))
        sock.sendall(b"GET /name HTTP/1.1\r\n\r\n" * 400)  # more than there is room for
        sock.shutdown(socket.SHUT_WR)
        got = b""
        while data := sock.recv(65536):
            got += data
    assert got.count(b"HTTP/1.1 200 OK") == got.count(b"\r\n\r\nvalue") == 401


def test_linux_is_refused_at_another_port_and_beyond_the_last_connection(host: Host) -> None:
    with socket.socket() as sock:
        sock.settimeout(20)
        assert sock.connect_ex((ADDRESS, 81)) == 111
    socks = [socket.create_connection((ADDRESS, 80), timeout=20) for _ in range(MAX_CONNECTIONS)]
    with socket.socket() as sock:
        sock.settimeout(20)
        assert sock.connect_ex((ADDRESS, 80)) == 111
    for sock in socks:
        sock.send(b"GET /name HTTP/1.1\r\n\r\n")
    for sock in socks:
        assert sock.recv(1000).endswith(b"\r\n\r\nvalue")
        sock.close()
    while len(host.endpoint._connections) == MAX_CONNECTIONS:
        time.sleep(0.001)
    connection = http.client.HTTPConnection(ADDRESS, timeout=20)
    assert get(connection, "/name") == (200, "value")
    connection.close()


def test_linux_asks_on_many_connections_at_once(host: Host) -> None:
    results: list[tuple[int, str]] = []

    def ask() -> None:
        for _ in range(5):
            connection = http.client.HTTPConnection(ADDRESS, timeout=60)
            results.append(get(connection, "/large"))
            connection.close()

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [(200, "x" * 200_000)] * 40


# A scripted peer


class Segment:
    """One that the endpoint sent, its checksums right."""

    def __init__(self, frame: bytes) -> None:
        assert frame[:14] == GUEST_MAC + MAC + b"\x08\0"
        ip = frame[14:]
        assert ip[0] == 0x45
        assert int.from_bytes(ip[2:4], "big") == len(ip)
        assert checksum(ip[:20]) == 0
        assert ip[12:20] == SERVICE + GUEST
        tcp = ip[20:]
        assert checksum(ip[12:20] + struct.pack(">HH", 6, len(tcp)) + tcp) == 0
        self.port, self.peer, self.number, self.ack = struct.unpack_from(">HHII", tcp)
        offset, self.flags, self.window = struct.unpack_from(">BBH", tcp, 12)
        self.options = tcp[20 : offset >> 2]
        self.data = tcp[offset >> 2 :]

    def __repr__(self) -> str:
        return f"<{self.flags:#x} {self.number}+{len(self.data)} ack {self.ack} window {self.window}>"


def packet(segment: bytes, *, target: bytes = SERVICE, protocol: int = 6, fragment: int = 0) -> bytes:
    head = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(segment), 1, fragment, 64, protocol, 0, GUEST, target)
    head = head[:10] + checksum(head).to_bytes(2, "big") + head[12:]
    return MAC + GUEST_MAC + b"\x08\0" + head + segment


class Peer:
    """A guest's end of one connection, which does what it is told and not what TCP says."""

    def __init__(self, document: Any = "value", *, port: int = 40000, number: int = MASK - 5, **options: Any) -> None:
        self.now = 100.0
        self.endpoint: Endpoint = options.pop("endpoint", None) or Endpoint(
            store(document).serve, SERVICE, clock=lambda: self.now
        )
        self.port = port
        self.number = number  # close to where they wrap
        self.ack = 0
        self.window = options.pop("window", 65535)
        assert not options

    def send(
        self, flags: int, data: bytes = b"", *, options: bytes = b"", move: bool = True, **fields: int
    ) -> None:  # fmt: skip
        number, ack = fields.get("number", self.number) & MASK, fields.get("ack", self.ack) & MASK
        head = [self.port, 80, number, ack, (20 + len(options)) << 2, flags, self.window, 0, 0]
        segment = struct.pack(">HHIIBBHHH", *head) + options + data
        head[7] = checksum(GUEST + SERVICE + struct.pack(">HH", 6, len(segment)) + segment)
        if move and "number" not in fields:
            self.number += len(data) + bool(flags & (SYN | FIN))
        self.endpoint.receive(packet(struct.pack(">HHIIBBHHH", *head) + options + data))

    def all(self) -> list[Segment]:
        """What the endpoint sends now."""
        segments = []
        while (frame := self.endpoint.next_frame()) is not None:
            segments.append(Segment(frame))
            assert len(segments) < 1000
        return segments

    def one(self) -> Segment:
        (segment,) = self.all()
        return segment

    def connect(self, options: bytes = struct.pack(">BBH", 2, 4, MSS)) -> Peer:
        self.send(SYN, options=options)
        answer = self.one()
        assert (answer.flags, answer.ack, answer.window) == (SYN | ACK, self.number & MASK, RECEIVE)
        assert answer.options == struct.pack(">BBH", 2, 4, MSS)
        self.first = self.ack = answer.number + 1
        self.send(ACK)
        assert not self.all()
        return self

    def take(self) -> bytes:
        """Acknowledge all that comes, until nothing does."""
        data = b""
        while segments := self.all():
            for segment in segments:
                if segment.data and segment.number == self.ack & MASK:
                    data += segment.data
                    self.ack += len(segment.data)
            self.send(ACK)
        return data

    def get(self, path: str = "/") -> bytes:
        self.send(ACK | PSH, f"GET {path} HTTP/1.1\r\n\r\n".encode())
        return self.take()

    @property
    def alive(self) -> bool:
        return self.get().endswith(b"\r\n\r\nvalue")


def test_a_request_fits() -> None:
    assert MAX_REQUEST <= RECEIVE


def test_one_asks_who_has_the_address() -> None:
    endpoint = Endpoint(store({}).serve, SERVICE)
    head = b"\xff" * 6 + GUEST_MAC + b"\x08\x06"

    def ask(kind: int, target: bytes) -> bytes | None:
        body = struct.pack(">HHBBH", 1, 0x0800, 6, 4, kind) + GUEST_MAC + GUEST + bytes(6) + target
        endpoint.receive(head + body)
        return endpoint.next_frame()

    expected = GUEST_MAC + MAC + b"\x08\x06" + struct.pack(">HHBBH", 1, 0x0800, 6, 4, 2)
    expected += MAC + SERVICE + GUEST_MAC + GUEST
    assert ask(1, SERVICE) == expected
    assert ask(1, GUEST) is None
    assert ask(2, SERVICE) is None
    for _ in range(1000):
        endpoint.receive(head + struct.pack(">HHBBH", 1, 0x0800, 6, 4, 1) + GUEST_MAC + GUEST + bytes(6) + SERVICE)
    assert endpoint.next_frame() == expected
    assert endpoint.next_frame() is None


def test_both_close() -> None:
    peer = Peer().connect()
    assert peer.alive
    peer.send(FIN | ACK)
    answer = peer.one()
    assert (answer.flags, answer.ack) == (FIN | ACK, peer.number & MASK)
    peer.ack += 1
    peer.send(ACK)
    assert not peer.all()
    assert peer.endpoint.counters["connections_destroyed"] == 1
    assert peer.endpoint.timeout() is None


def test_the_service_closes_first_where_it_is_asked_to() -> None:
    peer = Peer().connect()
    peer.send(ACK, b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n")
    answer = peer.one()
    assert answer.flags == FIN | ACK | PSH
    peer.ack += len(answer.data) + 1
    peer.send(ACK, b"GET / HTTP/1.1\r\n\r\n")  # too late; taken, and not answered
    assert [(each.flags, each.ack) for each in peer.all()] == [(ACK, peer.number & MASK)]
    peer.send(FIN | ACK)
    assert [(each.flags, each.ack) for each in peer.all()] == [(ACK, peer.number & MASK)]
    assert peer.endpoint.counters["connections_destroyed"] == 1


def test_a_peer_that_never_closes_is_given_up() -> None:
    peer = Peer().connect()
    peer.send(ACK, b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n")
    peer.ack += len(peer.one().data) + 1
    peer.send(ACK)
    assert not peer.all()
    assert peer.endpoint.timeout() == IDLE
    peer.now += IDLE
    assert peer.one().flags == RST | ACK
    assert peer.endpoint.counters["connections_destroyed"] == 1


@pytest.mark.parametrize(
    ("options", "size"),
    [
        (b"", 536), (b"\1\1\1\2\4\1\0\0", 256), (b"\2\4\xff\xff", MSS), (b"\2\4\0\0", 64), (b"\2\4\0\1", 64),
        (b"\2\2\2\4", 536), (b"\2\0\1\1", 536), (b"\7\xff\1\1", 536), (b"\0\2\4\1", 536), (b"\1\1\1\2", 536),
        (b"\1\1\2\4", 536),
        (b"\3\3\7\2\4\2\0\1", 512), (b"\x08\0\0\0", 536),
    ],
)  # fmt: skip
def test_segments_are_as_large_as_the_peer_takes(options: bytes, size: int) -> None:
    peer = Peer("x" * 5000).connect(options)
    peer.send(ACK, b"GET / HTTP/1.1\r\n\r\n")
    sizes = [len(each.data) for each in peer.all()]
    assert set(sizes[:-1]) == {size}
    assert 0 < sizes[-1] <= size
    assert sum(sizes) > 5000


def test_the_window_bounds_what_is_sent() -> None:
    peer = Peer("x" * 5000, window=1000).connect()
    peer.send(ACK, b"GET / HTTP/1.1\r\n\r\n")
    got = 0
    while segments := peer.all():
        assert sum(len(each.data) for each in segments) <= 1000
        for each in segments:
            got += len(each.data)
            peer.ack += len(each.data)
        peer.send(ACK)
    assert got > 5000


def test_a_closed_window_is_probed_and_in_the_end_given_up() -> None:
    peer = Peer(window=0).connect()
    peer.send(ACK, b"GET / HTTP/1.1\r\n\r\n")
    assert peer.one().data == b""
    probes = 0
    while True:
        wait = peer.endpoint.timeout()
        assert wait is not None
        peer.now += wait
        probe = peer.one()
        if probe.flags & RST:
            break
        assert probe.data == b"H"
        probes += 1
        peer.send(ACK)  # nothing taken, and no window
        peer.all()
    assert probes == mmds_net.MAX_TIMEOUTS
    assert peer.now < 200
    assert peer.endpoint.counters["connections_destroyed"] == 1


def test_a_window_that_opens_again() -> None:
    peer = Peer(window=0).connect()
    peer.send(ACK, b"GET / HTTP/1.1\r\n\r\n")
    peer.all()
    peer.now += 1
    assert peer.one().data == b"H"
    peer.window = 65535
    peer.ack += 1
    peer.send(ACK)
    assert peer.take().endswith(b"\r\n\r\nvalue")
    assert peer.endpoint.timeout() is None


def test_what_is_not_acknowledged_is_sent_again_until_it_is_given_up() -> None:
    peer = Peer("x" * 5000).connect()
    peer.send(ACK, b"GET / HTTP/1.1\r\n\r\n")
    first = b"".join(each.data for each in peer.all())
    times = [peer.now]
    while True:
        assert not peer.all()
        wait = peer.endpoint.timeout()
        assert wait is not None
        peer.now += wait
        again = peer.all()
        if again[0].flags & RST:
            break
        assert b"".join(each.data for each in again) == first
        times.append(peer.now)
    assert len(times) == 1 + mmds_net.MAX_TIMEOUTS
    waits = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert waits[0] == pytest.approx(0.3)
    assert waits[-1] == pytest.approx(3.0)
    assert peer.endpoint.timeout() is None


def test_a_part_acknowledged_late_is_not_sent_again() -> None:
    peer = Peer("x" * 5000).connect()
    peer.send(ACK, b"GET / HTTP/1.1\r\n\r\n")
    segments = peer.all()
    peer.now += 1
    assert [each.number for each in peer.all()] == [each.number for each in segments]
    peer.now += 1
    peer.ack += sum(len(each.data) for each in segments[:-1])
    peer.send(ACK)
    assert not peer.all()  # the last one has its time still
    peer.now += 1
    assert peer.one().number == segments[-1].number


def test_a_lost_answer_to_syn_is_repeated_by_time_and_by_another_syn() -> None:
    peer = Peer()
    peer.send(SYN)
    first = peer.one()
    peer.number -= 1
    peer.send(SYN)
    assert peer.one().number == first.number
    peer.now += 1
    assert peer.one().number == first.number
    for _ in range(mmds_net.MAX_TIMEOUTS + 1):
        peer.now += 5
        peer.all()
    assert peer.endpoint.counters["connections_destroyed"] == 1


@pytest.mark.parametrize("flags", [0, FIN, ACK, SYN | FIN, SYN | ACK, SYN | RST, FIN | SYN | ACK, PSH, ACK | FIN])
def test_what_opens_no_connection(flags: int) -> None:
    peer = Peer()
    peer.ack = 77
    peer.send(flags, b"data")
    answers = peer.all()
    if flags & RST:
        assert not answers
    else:
        (answer,) = answers
        if flags & ACK:
            assert (answer.flags, answer.number) == (RST, 77)
        else:
            assert (answer.flags, answer.number) == (RST | ACK, 0)
            assert answer.ack == (MASK - 5 + 4 + bool(flags & SYN) + bool(flags & FIN)) & MASK
    assert peer.endpoint.counters["connections_created"] == 0


def test_a_wrong_first_acknowledgement() -> None:
    peer = Peer()
    peer.send(SYN)
    answer = peer.one()
    for wrong in (answer.number, answer.number + 2, answer.number - 1000):
        peer.send(ACK, b"GET / HTTP/1.1\r\n\r\n", ack=wrong, move=False)
        refusal = peer.one()
        assert (refusal.flags, refusal.number) == (RST, wrong & MASK)
    peer.ack = answer.number + 1
    peer.send(ACK)
    assert peer.alive


def test_a_reset_must_hit_the_number_exactly() -> None:
    peer = Peer().connect()
    for away in (-1, 1, 1000, RECEIVE, 1 << 31):
        peer.send(RST, number=peer.number + away)
        peer.all()
        assert peer.endpoint.counters["connections_destroyed"] == 0
    assert peer.alive
    peer.send(RST)
    assert peer.endpoint.counters["connections_destroyed"] == 1
    assert not peer.all()


def test_a_syn_in_the_middle_is_only_acknowledged() -> None:
    peer = Peer().connect()
    for number in (peer.number, peer.number + 5000, 7):
        peer.send(SYN, number=number)
        answer = peer.one()
        assert (answer.flags, answer.number, answer.ack) == (ACK, peer.ack & MASK, peer.number & MASK)
    assert peer.alive


def test_overlapping_repeated_and_overtaking_segments() -> None:
    request = b"GET / HTTP/1.1\r\n\r\n"
    peer = Peer().connect()
    start = peer.number
    for at, end in ((5, 9), (0, 4), (2, 8), (0, 8), (9, 12), (4, 4), (7, 18), (0, 18), (17, 18)):
        peer.send(ACK, request[at:end], number=start + at)
    peer.number = start + len(request)
    assert peer.take().endswith(b"\r\n\r\nvalue")
    assert peer.alive


@pytest.mark.parametrize("away", [-(1 << 31), -100_000, -1, 1, RECEIVE, 100_000, (1 << 31) - 1])
def test_numbers_out_of_place_change_nothing(away: int) -> None:
    peer = Peer().connect()
    peer.send(ACK, b"GARBAGE", number=peer.number + (away if away >= 0 else away - 7))
    assert peer.one().ack == peer.number & MASK
    peer.send(FIN | ACK, number=peer.number + (away if away >= 0 else away - 1))
    assert peer.one().ack == peer.number & MASK
    assert peer.alive


def test_an_acknowledgement_of_what_was_never_sent() -> None:
    peer = Peer().connect()
    for ack in (peer.ack + 1, peer.ack + 100_000):
        peer.send(ACK, b"GET / HTTP/1.1\r\n\r\n", ack=ack, move=False)
        assert peer.one().ack == peer.number & MASK
    assert peer.alive


def test_a_peer_that_fills_the_window_and_beyond() -> None:
    peer = Peer().connect()
    peer.send(ACK, b"GET /" + b"x" * (RECEIVE - 6))
    assert peer.one().window == 1
    peer.send(ACK, b"y" * 1000, move=False)
    answer = b"".join(each.data for each in peer.all())
    assert answer.startswith(b"HTTP/1.1 413 ")


def test_requests_are_answered_one_at_a_time() -> None:
    # 200 requests for 5,000 bytes each are held as 18 bytes each, not as their answers.
    peer = Peer("x" * 5000).connect()
    peer.send(ACK, b"GET / HTTP/1.1\r\n\r\n" * 200)
    (connection,) = peer.endpoint._connections.values()
    assert len(connection.out) < 6000
    assert len(connection.received) == 199 * 18
    assert peer.take().count(b"HTTP/1.1 200 OK") == 200
    assert not connection.out
    assert not connection.received


def flood(peer: Peer, count: int) -> None:
    for port in range(count):
        Peer(endpoint=peer.endpoint, port=1000 + port, number=port).send(SYN)


def test_a_flood_of_connections_leaves_those_that_are_used() -> None:
    peer = Peer().connect()
    flood(peer, 1000)
    endpoint = peer.endpoint
    assert len(endpoint._connections) == MAX_CONNECTIONS
    assert len(endpoint._frames) == MAX_FRAMES
    peer.all()
    assert peer.alive
    peer.now += IDLE + 1
    flood(peer, 20_000)
    assert len(endpoint._connections) == MAX_CONNECTIONS
    assert len(endpoint._frames) <= MAX_FRAMES
    counters = endpoint.counters
    assert counters["connections_created"] - counters["connections_destroyed"] == MAX_CONNECTIONS


def test_the_oldest_silent_connection_makes_room() -> None:
    peer = Peer().connect()
    others = [Peer(endpoint=peer.endpoint, port=1000 + at).connect() for at in range(MAX_CONNECTIONS - 1)]
    peer.now += IDLE
    for other in others:
        assert other.alive
    last = Peer(endpoint=peer.endpoint, port=9)
    last.send(SYN)
    answers = {segment.peer: segment.flags for segment in peer.all()}
    assert answers == {9: SYN | ACK, peer.port: RST | ACK}


def test_bad_frames_are_counted_and_dropped() -> None:
    peer = Peer().connect()
    good = packet(struct.pack(">HHIIBBHHH", 1, 80, 1, 1, 0x50, SYN, 9, 0, 0))
    counters = peer.endpoint.counters

    def refused(frame: bytes, counter: str, **options: Any) -> None:
        before = counters[counter]
        peer.endpoint.receive(frame, **options)
        assert counters[counter] == before + 1, frame.hex()
        assert not peer.all()

    refused(good, "rx_accepted_err")  # no checksum, and nobody said that it is left out
    refused(good[:33], "rx_bad_eth")
    refused(good[:12] + b"\x86\xdd" + good[14:], "rx_bad_eth")
    for at in (14, 16, 17, 24, 30):  # version, length, checksum, addresses
        refused(good[:at] + bytes([good[at] ^ 0x41]) + good[at + 1 :], "rx_accepted_err", partial=True)
    refused(good[:-1], "rx_accepted_err", partial=True)
    refused(packet(bytes(20), protocol=17), "rx_accepted_unusual")
    refused(packet(bytes(20), protocol=1), "rx_accepted_unusual")
    refused(packet(bytes(20), fragment=0x2000), "rx_accepted_unusual")
    refused(packet(bytes(20), fragment=7), "rx_accepted_unusual")
    refused(packet(bytes(20), target=GUEST), "rx_accepted_unusual")
    refused(packet(bytes(19)), "rx_accepted_err", partial=True)
    refused(packet(b""), "rx_accepted_err", partial=True)
    for offset in (0x00, 0x40, 0x60, 0xF0):
        refused(packet(struct.pack(">HHIIBBHHH", 1, 80, 1, 1, offset, SYN, 9, 0, 0)), "rx_accepted_err", partial=True)
    peer.endpoint.receive(good + b"padding", partial=True)
    assert peer.one().flags == SYN | ACK
    assert peer.alive


def test_reset_forgets() -> None:
    peer = Peer().connect()
    flood(peer, 100)
    peer.endpoint.reset()
    assert not peer.all()
    assert peer.endpoint.timeout() is None
    peer.send(ACK)
    assert peer.one().flags == RST


steps = st.tuples(
    st.sampled_from([0, FIN, SYN, RST, ACK, ACK, ACK, ACK | PSH, FIN | ACK, SYN | ACK, RST | ACK]),
    st.sampled_from([b"", b"", b"GET / HTTP/1.1\r\n\r\n", b"GET", b" / HTTP/1.1\r\n", b"\r\n", b"x" * 3000]),
    st.integers(-3000, 3000) | st.just(0) | st.just(1 << 31),
    st.integers(-3000, 3000) | st.just(0) | st.just(1 << 31),
    st.sampled_from([0, 1, 100, 65535]),
    st.sampled_from([0.0, 0.0, 0.3, 3.0, 20.0]),
    st.sampled_from([1, 2, 3]),
    st.booleans(),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(steps, max_size=40))
def test_any_segments(program: list[tuple[int, bytes, int, int, int, float, int, bool]]) -> None:
    peer = Peer("value")
    peers = {port: Peer(endpoint=peer.endpoint, port=port) for port in (1, 2, 3)}
    for flags, data, number, ack, window, wait, port, follow in program:
        mine = peers[port]
        peer.now += wait
        mine.window = window
        mine.send(flags, data, number=mine.number + number, ack=mine.ack + ack)
        for segment in peer.all():
            assert len(segment.data) <= MSS
            if follow and segment.peer in peers:
                peers[segment.peer].number = segment.ack
                peers[segment.peer].ack = segment.number + len(segment.data) + bool(segment.flags & (SYN | FIN))
        for connection in peer.endpoint._connections.values():
            assert len(connection.received) <= RECEIVE
            assert len(connection.out) < 1000
    # Whatever that was, the service is there for the next, and ends by itself with those that say no more.
    assert Peer(endpoint=peer.endpoint, port=4).connect().alive
    while (wait_for := peer.endpoint.timeout()) is not None:
        peer.now += wait_for
        peer.all()
        assert peer.now < 10_000


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=120), st.sampled_from([b"", b"\x08\0", b"\x08\x06"]), st.booleans())
def test_any_frame(data: bytes, kind: bytes, partial: bool) -> None:
    peer = Peer()
    peer.endpoint.receive(data[:12].ljust(12, b"\0") + kind + data[12:] if kind else data, partial=partial)
    while peer.endpoint.next_frame() is not None:
        pass
    assert peer.connect().alive
