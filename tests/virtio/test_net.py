# SPDX-License-Identifier: Apache-2.0
"""The network device over a real tap, in a network namespace of the test's own."""

from __future__ import annotations

import itertools
import select
import socket
import struct
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.virtio.net_driver import GUEST, GUEST_MAC, HOST, NET_HEADER, RX, TX, Vm, arp_request, checksum, is_arp_reply
from tests.waiting import until
from virtio import spec
from virtio._limiter import RateLimiter

LARGE = spec.NET_F_GUEST_TSO4 | spec.NET_F_GUEST_TSO6 | spec.NET_F_GUEST_UFO


def read_pcap(dump: bytes) -> list[bytes]:
    """The frames of a capture, each with a time that is right."""
    assert struct.unpack_from("<IHHiIII", dump) == (0xA1B23C4D, 2, 4, 0, 0, 0x40000, 1)
    records, at = [], 24
    while at < len(dump):
        seconds, nanoseconds, size, whole = struct.unpack_from("<IIII", dump, at)
        assert abs(seconds - time.time()) < 600
        assert nanoseconds < 1_000_000_000
        assert size == whole <= len(dump) - at - 16
        records.append(dump[at + 16 : at + 16 + size])
        at += 16 + size
    return records


def is_udp(frame: bytes) -> bool:
    return frame[12:14] == b"\x08\0" and frame[23] == 17


class Tcp:
    """The guest's end of one connection to the host's stack, which is at HOST, port 7000."""

    PORT = 40000

    def __init__(self, vm: Vm, host_mac: bytes) -> None:
        self.vm = vm
        self.host_mac = host_mac
        self.server = socket.create_server((HOST, 7000))
        self.seq, self.ack = 1000, 0
        self.send(b"", 2, b"\2\4\5\xb4\1\3\3\7")  # SYN: MSS 1460, window scale 7
        _, reply = vm.receive(self.mine)
        assert reply[47] & 0x12 == 0x12
        self.seq += 1
        self.ack = struct.unpack_from(">I", reply, 38)[0] + 1
        self.send(b"", 0x10)
        self.host, _ = self.server.accept()
        self.host.settimeout(10)

    def __enter__(self) -> Tcp:
        return self

    def __exit__(self, *_: object) -> None:
        self.host.close()
        self.server.close()

    def mine(self, frame: bytes) -> bool:
        return frame[12:14] == b"\x08\0" and frame[23] == 6 and frame[36:38] == struct.pack(">H", self.PORT)

    def send(self, data: bytes, flags: int, options: bytes = b"", gso_size: int = 0) -> None:
        """A segment; with `gso_size` the host has to cut it, and to put the checksums in."""
        size = 20 + len(options) + len(data)
        addresses = socket.inet_aton(GUEST) + socket.inet_aton(HOST)
        pseudo = addresses + struct.pack(">HH", 6, size)
        tcp = struct.pack(
            ">HHIIBBHHH", self.PORT, 7000, self.seq, self.ack, (5 + len(options) // 4) << 4, flags, 0xFFFF, 0, 0
        )
        tcp += options
        total = checksum(pseudo) ^ 0xFFFF if gso_size else checksum(pseudo + tcp + data)
        tcp = tcp[:16] + struct.pack(">H", total) + tcp[18:]
        ip = struct.pack(">BBHHHBBH", 0x45, 0, 20 + size, 0, 0, 64, 6, 0) + addresses
        ip = ip[:10] + struct.pack(">H", checksum(ip)) + ip[12:]
        header = NET_HEADER.pack(1, 1, 54, gso_size, 34, 16, 0) if gso_size else bytes(12)
        self.vm.send(self.host_mac + GUEST_MAC + b"\x08\0" + ip + tcp + data, header)


@pytest.mark.parametrize("without", [0, spec.NET_F_MRG_RXBUF, spec.NET_F_CTRL_VQ, spec.F_EVENT_IDX])
def test_the_host_answers_arp(namespace: None, stack: Any, without: int) -> None:
    vm = Vm(stack, without=without | spec.NET_F_GUEST_TSO4 | spec.NET_F_GUEST_TSO6 | spec.NET_F_GUEST_UFO)
    vm.offer()
    vm.send(arp_request())
    header, frame = vm.receive(is_arp_reply)
    assert header == bytes(10) + b"\1\0"
    assert frame[:6] == GUEST_MAC
    assert frame[28:32] == socket.inet_aton(HOST)
    assert vm.device.stats["tx_packets"] == 1
    assert vm.device.stats["rx_packets"] >= 1


def test_a_datagram_comes_with_its_checksum_left_to_the_guest_and_both_ways_are_recorded(
    namespace: None, stack: Any, tmp_path: Path
) -> None:
    vm = Vm(stack, pcap=str(tmp_path / "pcap"))
    vm.offer(200)
    vm.send(arp_request())
    vm.receive(is_arp_reply)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.sendto(b"x" * 1400, (GUEST, 9))
    header, frame = vm.receive(lambda frame: frame[12:14] == b"\x08\0" and frame[23] == 17)
    flags, gso_type, _, _, csum_start, csum_offset, _ = NET_HEADER.unpack(header)
    assert (flags & 1, gso_type, csum_start, csum_offset) == (1, 0, 34, 6)
    assert frame.endswith(b"x" * 1400)

    def recorded() -> list[bytes]:
        return read_pcap((tmp_path / "pcap").read_bytes())

    assert arp_request() in recorded()
    assert frame in recorded()
    # The host's kernel sends frames of its own at any moment: one may come between the two looks.
    until(lambda: len(recorded()) == vm.device.stats["rx_packets"] + vm.device.stats["tx_packets"])


@pytest.mark.parametrize("without", [0, spec.NET_F_MRG_RXBUF])
def test_a_stream_from_the_host_comes_in_frames_of_many_segments(namespace: None, stack: Any, without: int) -> None:
    vm = Vm(stack, without=without)
    sent = bytes(range(256)) * 1600
    sizes = []
    size = 12 + 65550 if without else 1536
    vm.offer(8 if without else 128, size)
    vm.send(arp_request())
    _, reply = vm.receive(is_arp_reply)
    got = b""
    with Tcp(vm, reply[6:12]) as tcp:
        writer = threading.Thread(target=tcp.host.sendall, args=(sent,))
        writer.start()
        while len(got) < len(sent):
            header, frame = vm.receive(tcp.mine)
            start = 34 + 4 * (frame[46] >> 4)
            data = frame[start : 14 + struct.unpack_from(">H", frame, 16)[0]]
            if not data or struct.unpack_from(">I", frame, 38)[0] != tcp.ack:
                continue
            flags, gso_type, _, gso_size, _, _, _ = NET_HEADER.unpack(header)
            assert flags & 1
            if len(data) > 1460:
                assert gso_type == 1
                assert gso_size <= 1460
            sizes.append(len(data))
            got += data
            tcp.ack = tcp.ack + len(data) & 0xFFFF_FFFF
            tcp.send(b"", 0x10)
        writer.join()
    assert got == sent
    assert max(sizes) > 3 * 1460


def test_a_driver_without_segmentation_gets_none(namespace: None, stack: Any) -> None:
    vm = Vm(stack, without=LARGE | spec.NET_F_GUEST_CSUM | spec.NET_F_GUEST_ECN)
    vm.offer(64)
    vm.send(arp_request())
    _, reply = vm.receive(is_arp_reply)
    sent = b"segment " * 1000
    got = b""
    with Tcp(vm, reply[6:12]) as tcp:
        tcp.host.sendall(sent)
        while len(got) < len(sent):
            header, frame = vm.receive(tcp.mine)
            assert header[:10] == bytes(10)
            assert len(frame) <= 1514
            data = frame[34 + 4 * (frame[46] >> 4) : 14 + struct.unpack_from(">H", frame, 16)[0]]
            if data and struct.unpack_from(">I", frame, 38)[0] == tcp.ack:
                got += data
                tcp.ack += len(data)
                tcp.send(b"", 0x10)
    assert got == sent


def test_the_host_cuts_what_the_guest_sends_in_one_frame(namespace: None, stack: Any) -> None:
    vm = Vm(stack)
    vm.offer(64)
    vm.send(arp_request())
    _, reply = vm.receive(is_arp_reply)
    sent = bytes(range(256)) * 100
    with Tcp(vm, reply[6:12]) as tcp:
        before = vm.driver.queues[1].avail_idx  # frames so far: the thread may not have counted the last of them yet
        tcp.send(sent, 0x18, gso_size=1460)
        got = b""
        while len(got) < len(sent):
            piece = tcp.host.recv(65536)
            assert piece
            got += piece
    assert got == sent
    vm.driver.set(spec.MMIO_STATUS, 0)  # what the thread counts it has counted
    assert vm.device.stats["tx_packets"] == before + 1


# Several pairs, and the control queue


def command(vm: Vm, kind: int, number: int, data: bytes, queue: int = 4) -> int:
    control = vm.driver.queues[queue]
    answer = control.buffer(1, device_writes=True)
    control.want_interrupt()
    control.add([control.buffer(bytes((kind, number))), control.buffer(data), answer])
    vm.driver.kick(queue)
    for _ in range(1000):
        if control.reap():
            status: int = vm.ram.read(answer.addr, 1)[0]
            return status
        select.select([vm.irq.fd], [], [], 0.01)
        vm.irq.take()
    pytest.fail("no answer")


def test_the_control_queue(namespace: None, stack: Any) -> None:
    vm = Vm(stack, queues=2)
    assert command(vm, spec.NET_CTRL_MQ, 0, b"\2\0") == spec.NET_OK
    for bad in (b"\0\0", b"\3\0", b"\1", b"\xff\xff"):
        assert command(vm, spec.NET_CTRL_MQ, 0, bad) == spec.NET_ERR
    assert command(vm, spec.NET_CTRL_MQ, 0, b"\1\0") == spec.NET_OK
    assert command(vm, spec.NET_CTRL_GUEST_OFFLOADS, 0, struct.pack("<Q", spec.NET_F_GUEST_CSUM)) == spec.NET_OK
    assert command(vm, spec.NET_CTRL_GUEST_OFFLOADS, 0, struct.pack("<Q", spec.NET_F_CSUM)) == spec.NET_ERR
    assert command(vm, spec.NET_CTRL_MAC, spec.NET_CTRL_MAC_ADDR_SET, b"\2\0\0\0\0\5") == spec.NET_OK
    assert vm.driver.config(0, 6) == b"\2\0\0\0\0\5"
    assert command(vm, 99, 0, b"") == spec.NET_ERR
    vm.offer()
    vm.send(arp_request())
    vm.receive(is_arp_reply)


@pytest.mark.parametrize("threads", [1, 2])
def test_without_mq_the_control_queue_is_the_third(namespace: None, stack: Any, threads: int) -> None:
    """It is notified as often as it asks for it, though another driver's second pair has a thread on it."""
    vm = Vm(stack, queues=2, threads=threads, without=spec.NET_F_MQ)
    for last in range(20):
        assert command(vm, spec.NET_CTRL_MAC, spec.NET_CTRL_MAC_ADDR_SET, bytes((2, 0, 0, 0, 0, last)), 2) == 0
        assert vm.driver.config(5, 1) == bytes((last,))
    assert command(vm, spec.NET_CTRL_MQ, 0, b"\1\0", 2) == spec.NET_ERR
    vm.offer()
    vm.send(arp_request())
    vm.receive(is_arp_reply)
    vm.bring_up()
    assert command(vm, spec.NET_CTRL_MQ, 0, b"\2\0") == spec.NET_OK


def offer(vm: Vm, index: int, count: int) -> None:
    ring = vm.driver.queues[index]
    for _ in range(count):
        ring.add([ring.buffer(1536, device_writes=True)])
    vm.driver.kick(index)


def send(vm: Vm, index: int) -> None:
    ring = vm.driver.queues[index]
    ring.add([ring.buffer(bytes(12)), ring.buffer(arp_request())])
    vm.driver.kick(index)


@pytest.mark.parametrize("threads", [1, 2])
def test_both_pairs_carry_traffic_both_ways(namespace: None, stack: Any, threads: int) -> None:
    vm = Vm(stack, queues=2, threads=threads)
    assert [worker.indices for worker in vm.device._workers] == [[(0, 1, 2, 3, 4)], [(0, 1, 4), (2, 3)]][threads - 1]
    assert command(vm, spec.NET_CTRL_MQ, 0, b"\2\0") == spec.NET_OK
    done: dict[int, list[tuple[int, int]]] = {index: [] for index in range(4)}
    offer(vm, 0, 128)
    offer(vm, 2, 128)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:

        def all_four_went() -> bool:
            for index in (1, 3):
                send(vm, index)
            for port in range(1000, 1010):
                udp.sendto(b"to one of the queues", (GUEST, port))
            for index, ring in enumerate(vm.driver.queues[:4]):
                done[index] += ring.reap()
            return all(done.values())

        until(all_four_went, lambda: (done, vm.device.stats))
    counts = vm.driver.transport.notifications
    assert counts[2] and counts[3], "the control queue of a driver without MQ is the third one, too"


def test_a_pair_that_waits_holds_no_other_of_its_thread(namespace: None, stack: Any) -> None:
    """One for tokens of a limit, one for buffers: a third receives. All go on once they may."""
    limiter = RateLimiter(ops=(3, 0, 1 << 40))  # three frames in 35 years
    vm = Vm(stack, queues=3, threads=1, tx_limiter=limiter)
    assert command(vm, spec.NET_CTRL_MQ, 0, b"\3\0", 6) == spec.NET_OK
    for _ in range(8):
        send(vm, 3)
    until(lambda: vm.device.stats["tx_rate_limiter_throttled"])
    offer(vm, 4, 128)
    first, last = vm.driver.queues[0], vm.driver.queues[4]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:

        def came() -> bool:
            for port in range(1000, 1020):
                udp.sendto(b"to one of the queues", (GUEST, port))
            return bool(last.reap())

        until(came, lambda: vm.device.stats)
    offer(vm, 0, 128)  # whose frames have waited in the tap
    until(first.reap, lambda: vm.device.stats)
    assert len(vm.driver.queues[3].reap()) == 3
    vm.device.set_rate_limit(limiter, ops=(0, 0, 0))
    send(vm, 5)
    went = {3: 0, 5: 0}

    def all_went() -> bool:
        for index in went:
            went[index] += len(vm.driver.queues[index].reap())
        return went == {3: 5, 5: 1}

    until(all_went, lambda: (went, vm.device.stats))


def answered(vm: Vm) -> bool:
    """Whether the host's reply to a request comes within a thousand frames."""
    vm.send(arp_request())
    return any(is_arp_reply(vm.receive(lambda frame: True)[1]) for _ in range(1000))


def test_a_flood_comes_in_order_and_the_guest_is_answered_meanwhile(namespace: None, stack: Any) -> None:
    # The device then looks at the tap from time to time in place of being woken by each frame.
    vm = Vm(stack)
    vm.offer(200)
    vm.send(arp_request())
    vm.receive(is_arp_reply)
    done = threading.Event()

    def flood() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            for number in itertools.count():
                udp.sendto(number.to_bytes(8, "big"), (GUEST, 1000))
                if done.is_set():
                    break

    sender = threading.Thread(target=flood)
    sender.start()
    try:
        last = -1
        for turn in range(20):
            for _ in range(200):
                number = int.from_bytes(vm.receive(is_udp)[1][-8:], "big")
                assert number > last, turn
                last = number
            while not answered(vm):  # a reply that finds the tap full of datagrams is lost
                pass
    finally:
        done.set()
        sender.join()
    vm.transport.close()  # in the flood's wake: the thread ends
    assert vm.device.stats["rx_packets"] > 4000


def test_link_status(namespace: None, stack: Any) -> None:
    vm = Vm(stack)
    assert vm.driver.config(6, 2) == b"\1\0"
    vm.device.drop_link()
    assert vm.driver.config(6, 2) == b"\0\0"
    assert vm.driver.take_interrupt() & spec.INTERRUPT_CONFIG


# Rate limits

BUCKET = 100  # frames


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        pytest.param({"ops": (BUCKET, 0, 100)}, 1000, id="1000 frames a second"),
        pytest.param({"bandwidth": (BUCKET * 1000, 0, 100)}, 1000, id="1 MB a second"),
    ],
)
@pytest.mark.parametrize("way", [RX, TX])
def test_rate_limit_within_a_tenth(
    namespace: None, stack: Any, limit: dict[str, tuple[int, int, int]], expected: int, way: int
) -> None:
    """What is counted is frames of 1000 bytes, and the clock is that of the limiter."""
    limiter = RateLimiter(**limit)
    vm = Vm(stack, rx_limiter=limiter if way == RX else None, tx_limiter=limiter if way == TX else None)
    vm.offer()
    vm.send(arp_request())
    vm.receive(is_arp_reply)
    ring = vm.driver.queues[way]
    key = ("rx_packets", "tx_packets")[way]
    if way == TX:
        for _ in range(100):
            ring.add([ring.buffer(bytes(12)), ring.buffer(arp_request().ljust(1000, b"\0"))])
    udp = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    udp.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    while not limiter.ask(1000):  # the bucket starts full
        pass

    def measure() -> float:
        start, first = time.monotonic(), vm.device.stats[key]
        while time.monotonic() < start + 0.7:
            if way == RX:
                for _ in range(20):
                    udp.sendto(b"x" * 958, (GUEST, 9))
            chains = dict(ring.chains)
            for head, _ in ring.reap():
                del ring.free[-len(chains[head]) :]
                ring.offer(head, chains[head])
            vm.driver.set(spec.MMIO_QUEUE_NOTIFY, way)
            time.sleep(0.002)
        count, due = vm.device.stats[key] - first, (time.monotonic() - start) * expected
        assert count <= due + BUCKET, "more than the bucket had and got"
        return count / due

    rates: list[float] = []
    # A busy machine may keep this driver from asking.
    while not rates or (max(rates) < 0.9 and len(rates) < 8):
        rates.append(measure())
    assert max(rates) >= 0.9, rates
    assert vm.device.stats[key.replace("packets", "rate_limiter_throttled")] > 0


@pytest.mark.parametrize("way", [RX, TX])
def test_a_limit_is_changed_while_a_frame_waits_for_it(namespace: None, stack: Any, way: int) -> None:
    limiter = RateLimiter(ops=(3, 0, 1 << 40))  # three frames in 35 years
    vm = Vm(stack, rx_limiter=limiter if way == RX else None, tx_limiter=limiter if way == TX else None)
    vm.offer()
    for _ in range(10):
        vm.send(arp_request())
    key = ("rx", "tx")[way]
    end = time.monotonic() + 10
    while not vm.device.stats[f"{key}_rate_limiter_throttled"]:
        assert time.monotonic() < end
    assert vm.device.stats[f"{key}_packets"] == 3
    vm.device.set_rate_limit(limiter, ops=(0, 0, 0))
    while vm.device.stats[f"{key}_packets"] < 10:
        assert time.monotonic() < end, vm.device.stats


def test_reset_while_frames_wait_for_the_limit(namespace: None, stack: Any) -> None:
    limiter = RateLimiter(ops=(1, 0, 1 << 40))
    vm = Vm(stack, rx_limiter=limiter, tx_limiter=limiter)
    vm.offer()
    for _ in range(10):
        vm.send(arp_request())
    vm.bring_up()
    vm.device.set_rate_limit(limiter, ops=(0, 0, 0))
    vm.offer()
    vm.send(arp_request())
    vm.receive(is_arp_reply)
