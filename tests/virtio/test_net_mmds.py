# SPDX-License-Identifier: Apache-2.0
"""The metadata service through the network device: what a driver sends to it never reaches the tap."""

from __future__ import annotations

import socket
import struct
import time
from pathlib import Path
from typing import Any

import pytest

from tests.virtio.net_driver import HOST, NET_HEADER, RX, TX, Stream, Vm, arp_request, is_arp_reply
from tests.virtio.test_mmds_net import ADDRESS, MASK, SERVICE, Peer, Segment, packet, store
from tests.virtio.test_net import command, read_pcap
from tests.virtio.test_net_hostile import OUTSIDE, assert_alive, assert_broken_and_revived, returned
from tests.waiting import until
from virtio import spec
from virtio._limiter import RateLimiter
from virtio.net.mmds import ACK, MAC, PSH, SYN, Endpoint

DOCUMENT = {"name": "value", "large": "x" * 50_000}
PARTIAL = NET_HEADER.pack(1, 0, 0, 0, 34, 16, 0)
ETH_P_ALL = 3


def vm_with(stack: Any, **options: Any) -> Vm:
    return Vm(stack, mmds=Endpoint(store(DOCUMENT).serve, SERVICE), **options)


def to_service() -> bytes:
    """Who has the service's address?"""
    frame = bytearray(arp_request())
    frame[38:42] = SERVICE
    return bytes(frame)


def from_service(frame: bytes) -> bool:
    return frame[6:12] == MAC and frame[12:14] == b"\x08\0"


class Guest(Peer):
    """A connection to the service through the device of `vm`."""

    def __init__(self, vm: Vm, *, queue: int = TX, **options: Any) -> None:
        self.vm = vm
        self.queue = queue
        self.header = bytes(12)
        super().__init__(endpoint=self, **options)

    def receive(self, frame: bytes) -> None:
        ring = self.vm.driver.queues[self.queue]
        ring.add([ring.buffer(self.header), ring.buffer(frame)])
        self.vm.driver.set(spec.MMIO_QUEUE_NOTIFY, self.queue)

    def next(self) -> Segment:
        header, frame = self.vm.receive(from_service)
        assert header[:10] == bytes(10)
        return Segment(frame)

    def open(self) -> Guest:
        self.send(SYN, options=b"\2\4\5\xb4")
        self.ack = self.next().number + 1
        self.send(ACK)
        return self

    def fetch(self, path: str = "/name") -> bytes:
        """The answer's body."""
        self.send(ACK | PSH, f"GET {path} HTTP/1.1\r\n\r\n".encode())
        answer, size = b"", 1
        while len(answer) < size:
            segment = self.next()
            if segment.data and segment.number == self.ack & MASK:
                answer += segment.data
                self.ack += len(segment.data)
                self.send(ACK)
            head, _, _ = answer.partition(b"\r\n\r\n")
            if b"Content-Length: " in head:
                size = len(head) + 4 + int(head.partition(b"Content-Length: ")[2].split()[0])
        return answer[len(head) + 4 :]


@pytest.mark.parametrize("without", [0, spec.NET_F_MRG_RXBUF, spec.F_EVENT_IDX])
def test_the_service_answers_and_the_tap_hears_nothing_of_it(namespace: None, stack: Any, without: int) -> None:
    vm = vm_with(stack, without=without | spec.NET_F_GUEST_TSO4 | spec.NET_F_GUEST_TSO6 | spec.NET_F_GUEST_UFO)
    tap = stack.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, ETH_P_ALL << 8))
    tap.bind((vm.tap.name, ETH_P_ALL))
    vm.offer(64)
    vm.send(to_service())
    header, frame = vm.receive(is_arp_reply)
    assert header == bytes(10) + b"\1\0"
    assert frame[22:32] == MAC + SERVICE
    guest = Guest(vm).open()
    assert guest.fetch() == b"value"
    assert guest.fetch("/large") == b"x" * 50_000
    guest.receive(packet(bytes(8), protocol=17))
    guest.receive(packet(b"", protocol=1))
    vm.send(arp_request())
    _, frame = vm.receive(is_arp_reply)
    assert frame[28:32] == socket.inet_aton(HOST)
    heard = []
    while True:
        try:
            heard.append(tap.recv(65536))
        except BlockingIOError:
            break
    assert arp_request() in heard
    assert not [frame for frame in heard if SERVICE in frame]
    stats = vm.device.stats
    assert stats["mmds_connections_created"] == 1
    assert stats["mmds_rx_accepted_unusual"] == 2
    assert stats["mmds_errors"] == 0
    assert stats["tx_packets"] == 1


def test_other_frames_are_the_taps(namespace: None, stack: Any) -> None:
    """Of a wrong kind, to another address, or cut short: looked at, and left alone."""
    vm = vm_with(stack)
    vm.offer()
    gratuitous = bytearray(to_service())
    gratuitous[21] = 2
    others = [
        arp_request(), bytes(gratuitous), to_service()[:41], packet(b"")[:33],
        packet(bytes(20), target=socket.inet_aton("169.254.169.253")), b"\xff" * 12 + b"\x86\xdd" + bytes(60),
    ]  # fmt: skip
    for frame in others:
        vm.send(frame)
    until(lambda: vm.device.stats["tx_packets"] + vm.device.stats["tx_errors"] == len(others), lambda: vm.device.stats)
    assert vm.device.stats["mmds_rx_accepted"] == 0


def test_without_the_service_its_address_is_like_any_other(namespace: None, stack: Any) -> None:
    vm = Vm(stack)
    vm.offer()
    vm.send(to_service())
    until(lambda: vm.device.stats["tx_packets"] == 1)
    assert "mmds_rx_accepted" not in vm.device.stats


def test_a_checksum_that_is_left_out_is_not_missed(namespace: None, stack: Any) -> None:
    vm = vm_with(stack)
    vm.offer()
    guest = Guest(vm)
    segment = struct.pack(">HHIIBBHHH", guest.port, 80, 5, 0, 0x50, SYN, 9, 0x1234, 0)
    guest.receive(packet(segment))
    until(lambda: vm.device.stats["mmds_rx_accepted_err"] == 1, lambda: vm.device.stats)
    guest.header = PARTIAL
    guest.receive(packet(segment))
    assert guest.next().flags == SYN | ACK


def test_a_frame_to_be_cut_is_taken_whole(namespace: None, stack: Any) -> None:
    vm = vm_with(stack)
    vm.offer()
    guest = Guest(vm).open()
    guest.header = NET_HEADER.pack(1, 1, 54, 1460, 34, 16, 0)  # TCP over IPv4, in segments of 1460
    guest.send(ACK | PSH, b"GET /name HTTP/1.1\r\nX: " + b"x" * 3000 + b"\r\n\r\n")
    assert guest.next().data.endswith(b"\r\n\r\nvalue")


def test_a_frame_in_one_byte_pieces(namespace: None, stack: Any) -> None:
    vm = vm_with(stack)
    vm.offer()
    ring = vm.driver.queues[TX]
    ring.add_indirect([ring.buffer(bytes([byte])) for byte in bytes(12) + to_service()])
    vm.driver.kick(TX)
    vm.receive(is_arp_reply)


def test_an_answer_over_several_small_buffers(namespace: None, stack: Any) -> None:
    vm = vm_with(stack)
    vm.offer(512, 100)
    guest = Guest(vm).open()
    assert guest.fetch() == b"value"
    assert guest.fetch("/large") == b"x" * 50_000


def test_an_answer_waits_for_buffers(namespace: None, stack: Any) -> None:
    vm = vm_with(stack)
    for _ in range(20):
        vm.send(to_service())
    until(lambda: vm.device.stats["mmds_rx_accepted"] >= 1)
    vm.offer(1)
    vm.receive(is_arp_reply)
    vm.offer(16)
    assert Guest(vm).open().fetch("/large") == b"x" * 50_000


def test_an_answer_that_waits_outlives_a_pause(namespace: None, stack: Any) -> None:
    vm = vm_with(stack)
    vm.send(to_service())
    until(lambda: vm.device.stats["mmds_rx_accepted"] == 1)
    vm.transport.stop()
    vm.transport.go_on()
    vm.offer()
    vm.receive(is_arp_reply)
    guest = Guest(vm).open()
    guest.send(ACK | PSH, b"GET /name HTTP/1.1\r\n\r\n")
    first = guest.next()
    vm.transport.stop()
    vm.transport.go_on()
    again = guest.next()  # by the clock
    assert (again.number, again.data) == (first.number, first.data)


def test_an_answer_that_waits_is_not_the_next_drivers(namespace: None, stack: Any) -> None:
    vm = vm_with(stack)
    vm.send(to_service())
    until(lambda: vm.device.stats["mmds_rx_accepted"] == 1)
    vm.bring_up()
    vm.offer()
    vm.send(arp_request())
    _, frame = vm.receive(is_arp_reply)
    assert frame[28:32] == socket.inet_aton(HOST)


def test_buffers_that_are_too_small_for_an_answer(namespace: None, stack: Any) -> None:
    vm = vm_with(stack, without=spec.NET_F_MRG_RXBUF)
    vm.offer(4, 40)
    vm.send(to_service())
    assert returned(vm, TX, 1)
    until(lambda: vm.device.stats["mmds_tx_frames"] and vm.device.stats["rx_too_long"], lambda: vm.device.stats)
    vm.bring_up()
    vm.offer(16, 65562)
    assert Guest(vm).open().fetch() == b"value"


def test_what_is_not_acknowledged_comes_again_by_the_clock(namespace: None, stack: Any) -> None:
    vm = vm_with(stack)
    vm.offer()
    guest = Guest(vm).open()
    start = time.monotonic()
    guest.send(ACK | PSH, b"GET /name HTTP/1.1\r\n\r\n")
    first = guest.next()
    again = guest.next()
    assert (again.number, again.data) == (first.number, first.data)
    assert time.monotonic() - start >= 0.29
    guest.ack += len(first.data)
    guest.send(ACK)
    assert guest.fetch() == b"value"


def test_it_does_not_pay_for_the_rate_limits(namespace: None, stack: Any) -> None:
    # No frame of the host's own comes, behind which the service's would wait.
    Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text("1")
    limits = [RateLimiter(ops=(1, 0, 1 << 40)) for _ in range(2)]
    vm = vm_with(stack, rx_limiter=limits[0], tx_limiter=limits[1])
    vm.offer()
    assert Guest(vm).open().fetch("/large") == b"x" * 50_000
    assert vm.device.stats["tx_rate_limiter_throttled"] == 0
    assert vm.device.stats["rx_packets"] > 35  # of others, one may pass
    vm.send(arp_request())
    vm.send(arp_request())
    until(lambda: vm.device.stats["tx_rate_limiter_throttled"] > 0, lambda: vm.device.stats)
    assert vm.device.stats["tx_packets"] == 1


def test_a_frame_that_waits_for_its_tokens_holds_up_those_behind_it(namespace: None, stack: Any) -> None:
    limiter = RateLimiter(ops=(1, 0, 1 << 40))
    vm = vm_with(stack, tx_limiter=limiter)
    vm.offer()
    for _ in range(3):
        vm.send(arp_request())
    vm.send(to_service())
    until(lambda: vm.device.stats["tx_rate_limiter_throttled"] > 0)
    assert vm.device.stats["mmds_rx_accepted"] == 0
    vm.device.set_rate_limit(limiter, ops=(0, 0, 0))
    vm.receive(lambda frame: frame[6:12] == MAC)
    assert vm.device.stats["tx_packets"] == 3


def test_a_reset_forgets_the_connections(namespace: None, stack: Any) -> None:
    vm = vm_with(stack)
    vm.offer()
    first = Guest(vm).open()
    first.send(ACK, b"GET /large HTTP/1.1\r\n\r\n")
    vm.bring_up()
    assert vm.device.stats["mmds_connections_destroyed"] == 1
    vm.offer()
    assert Guest(vm).open().fetch("/large") == b"x" * 50_000


@pytest.mark.parametrize("threads", [1, 2])
def test_a_connection_may_change_its_queue(namespace: None, stack: Any, threads: int) -> None:
    vm = vm_with(stack, queues=2, threads=threads)
    assert command(vm, spec.NET_CTRL_MQ, 0, b"\2\0") == spec.NET_OK
    vm.offer(64)
    guest = Guest(vm).open()
    second = vm.driver.queues[2]
    buffers = [second.buffer(1536, device_writes=True) for _ in range(16)]
    heads = dict(zip((second.add([buffer]) for buffer in buffers), buffers, strict=True))
    vm.driver.set(spec.MMIO_QUEUE_NOTIFY, 2)
    guest.queue = 3
    guest.send(ACK | PSH, b"GET /name HTTP/1.1\r\n\r\n")
    done: list[tuple[int, int]] = []

    def came() -> bool:
        done.extend(second.reap())
        return any(vm.ram.read(heads[head].addr, size).endswith(b"\r\n\r\nvalue") for head, size in done)

    until(came, lambda: vm.device.stats)
    guest.ack += done[-1][1] - 12 - 54
    guest.queue = TX
    assert guest.fetch() == b"value"


def test_both_ways_are_recorded(namespace: None, stack: Any, tmp_path: Path) -> None:
    vm = vm_with(stack, pcap=str(tmp_path / "pcap"))
    vm.offer()
    vm.send(to_service())
    _, reply = vm.receive(is_arp_reply)
    Guest(vm).open().fetch()
    records = read_pcap((tmp_path / "pcap").read_bytes())
    assert to_service() in records
    assert reply in records
    assert any(record.endswith(b"\r\n\r\nvalue") for record in records)


# Over a stream, where a frame may come in parts


def test_an_answer_waits_until_a_frame_is_whole(stack: Any) -> None:
    backend: Any = Stream(stack)
    vm = vm_with(stack, tap=backend)
    vm.offer()
    frame = b"\x02" * 12 + b"\x08\0" + b"f" * 500
    backend.other.sendall(struct.pack(">I", len(frame)) + frame[:100])
    time.sleep(0.05)
    guest = Guest(vm)
    guest.send(SYN)
    until(lambda: vm.device.stats["mmds_rx_count"] == 1)
    time.sleep(0.05)
    backend.other.sendall(frame[100:])
    assert vm.receive(lambda _: True)[1] == frame
    guest.ack = guest.next().number + 1
    guest.send(ACK)
    assert guest.fetch("/large") == b"x" * 50_000
    vm.send(arp_request())
    assert backend.other.recv(4096) == struct.pack(">I", 42) + arp_request()


# A hostile driver


def test_bad_chains_between_good_ones(namespace: None, stack: Any) -> None:
    vm = vm_with(stack)
    vm.offer()
    ring = vm.driver.queues[TX]
    guest = Guest(vm).open()
    for frame in (b"", SERVICE, packet(b"")[:20], packet(b""), packet(bytes(60_000)), packet(bytes(70_000)[:65_510])):
        ring.add([ring.buffer(bytes(12)), *([ring.buffer(frame)] if frame else [])])
    ring.add([ring.buffer(packet(b""), device_writes=True)])
    vm.driver.set(spec.MMIO_QUEUE_NOTIFY, TX)
    assert guest.fetch() == b"value"
    assert_alive(vm)


def test_a_broken_receive_ring_at_an_answer(namespace: None, stack: Any) -> None:
    vm = vm_with(stack)
    ring = vm.driver.queues[RX]
    ring.write_desc(0, OUTSIDE, 1000, spec.DESC_F_WRITE)
    ring.offer(0)
    vm.send(to_service())
    assert_broken_and_revived(vm)


def test_a_mistake_of_ours_costs_a_frame_and_not_the_device(namespace: None, stack: Any) -> None:
    class Broken(Endpoint):
        def receive(self, frame: bytes, *, partial: bool = False) -> None:
            raise RuntimeError("on purpose")

        def next_frame(self) -> bytes | None:
            raise RuntimeError("on purpose")

    vm = Vm(stack, mmds=Broken(store(1).serve, SERVICE))
    vm.offer()
    for _ in range(100):
        vm.send(to_service())
    until(lambda: vm.device.stats["mmds_errors"] >= 100, lambda: vm.device.stats)
    assert returned(vm, TX, 100)
    assert_alive(vm)
    assert len(vm.log) < 10
    assert "on purpose" in vm.log[0]


def test_an_answer_that_no_frame_holds(namespace: None, stack: Any) -> None:
    class Wordy(Endpoint):
        def next_frame(self) -> bytes | None:
            return bytes(1515)

    vm = Vm(stack, mmds=Wordy(store(1).serve, SERVICE))
    vm.offer()
    vm.send(to_service())
    until(lambda: vm.device.stats["mmds_errors"] >= 2)  # it is asked at the start, too
    assert_alive(vm)


def test_a_flood_does_not_keep_the_tap_from_being_served(namespace: None, stack: Any) -> None:
    vm = vm_with(stack)
    vm.offer()
    ring = vm.driver.queues[TX]
    header = ring.buffer(bytes(12))
    syn = struct.pack(">HHIIBBHHH", 7, 80, 5, 0, 0x50, SYN, 9, 0, 0)
    frames = [ring.buffer(packet(syn)), ring.buffer(to_service()), ring.buffer(arp_request())]
    for at in range(240):
        ring.add([header, frames[at % 3]])
    vm.driver.set(spec.MMIO_QUEUE_NOTIFY, TX)
    _, frame = vm.receive(lambda frame: is_arp_reply(frame) and frame[6:12] != MAC)
    assert frame[28:32] == socket.inet_aton(HOST)
    until(lambda: vm.device.stats["tx_packets"] == 80, lambda: vm.device.stats)


def test_the_address_is_the_configured_one(namespace: None, stack: Any) -> None:
    other = socket.inet_aton("169.254.42.42")
    vm = Vm(stack, mmds=Endpoint(store(DOCUMENT).serve, other))
    vm.offer()
    vm.send(to_service())
    vm.send(to_service().replace(SERVICE, other))
    _, frame = vm.receive(lambda frame: frame[6:12] == MAC)
    assert frame[28:32] == other
    assert socket.inet_ntoa(SERVICE) == ADDRESS
