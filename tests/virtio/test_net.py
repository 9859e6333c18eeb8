# SPDX-License-Identifier: Apache-2.0
"""The network device over a real tap, in a network namespace of the test's own."""

from __future__ import annotations

import select
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.guest_driver import Allocator, MmioDriver
from virtio import spec
from virtio.mmio import VirtioMmio
from virtio.net import Net
from virtio.net_host import Tap
from vmm.irq import IrqLine
from vmm.memory import GuestMemory

GUEST_MAC = bytes.fromhex("025600000002")
HOST, GUEST = "10.9.8.1", "10.9.8.2"
RX, TX = 0, 1


class Vm:
    """A guest's driver for one interface over a tap."""

    def __init__(self, stack: Any, *, queues: int = 1, without: int = 0, **options: Any) -> None:
        self.log: list[str] = []
        self.ram = stack.enter_context(GuestMemory(16 << 20))
        self.irq = IrqLine(5)
        stack.callback(self.irq.close)
        self.tap = Tap("t%d", queues)
        stack.callback(self.tap.close)
        self.tap.configure(address=f"{HOST}/24")
        self.device = Net(self.tap, GUEST_MAC, **options)
        stack.callback(self.device.close)
        self.transport = VirtioMmio(self.device, self.ram, self.irq, warn=self.log.append)
        stack.callback(self.transport.close)
        self.driver = MmioDriver(self.transport, Allocator(1 << 20, 15 << 20))
        self.driver.bring_up(without=without)
        self.buffers: dict[int, Any] = {}

    def offer(self, count: int = 64, size: int = 1536) -> None:
        ring = self.driver.queues[RX]
        for _ in range(count):
            buffer = ring.buffer(size, device_writes=True)
            self.buffers[ring.add([buffer])] = buffer
        self.driver.set(spec.MMIO_QUEUE_NOTIFY, RX)

    def send(self, frame: bytes, header: bytes = bytes(12)) -> None:
        ring = self.driver.queues[TX]
        ring.add([ring.buffer(header), ring.buffer(frame)])
        self.driver.set(spec.MMIO_QUEUE_NOTIFY, TX)

    def receive(self, wanted: Callable[[bytes], bool]) -> tuple[bytes, bytes]:
        """The header and the first frame that is wanted; those before it are dropped."""
        ring = self.driver.queues[RX]
        parts: list[bytes] = []
        while True:
            ring.want_interrupt()
            for head, size in ring.reap():
                parts.append(self.ram.read(self.buffers.pop(head).addr, size))
                count = spec.NET_HEADER.unpack(parts[0][:12])[6]
                if len(parts) == count:
                    whole, parts = b"".join(parts), []
                    if wanted(whole[12:]):
                        return whole[:12], whole[12:]
            assert select.select([self.irq.fd], [], [], 10)[0], f"no frame came; {self.device.stats} {self.log}"
            self.irq.take()


@pytest.fixture
def stack() -> Iterator[Any]:
    import contextlib

    with contextlib.ExitStack() as stack:
        yield stack


def arp_request() -> bytes:
    body = struct.pack(">HHBBH", 1, 0x0800, 6, 4, 1) + GUEST_MAC + socket.inet_aton(GUEST)
    return b"\xff" * 6 + GUEST_MAC + b"\x08\x06" + body + bytes(6) + socket.inet_aton(HOST)


def is_arp_reply(frame: bytes) -> bool:
    return frame[12:14] == b"\x08\x06" and frame[20:22] == b"\0\2"


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


def test_a_large_datagram_is_merged_from_many_buffers_with_its_checksum_left_to_the_guest(
    namespace: None, stack: Any, tmp_path: Path
) -> None:
    vm = Vm(stack, pcap=str(tmp_path / "pcap"))
    vm.offer(200)
    vm.send(arp_request())
    vm.receive(is_arp_reply)
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as server:
        server.bind((HOST, 7))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            udp.sendto(b"x" * 1400, (GUEST, 9))
    header, frame = vm.receive(lambda frame: frame[12:14] == b"\x08\0" and frame[23] == 17)
    flags, gso_type, _, _, csum_start, csum_offset, _ = spec.NET_HEADER.unpack(header)
    assert (flags & 1, gso_type, csum_start, csum_offset) == (1, 0, 34, 6)
    assert frame.endswith(b"x" * 1400)
    dump = (tmp_path / "pcap").read_bytes()
    records, at = [], 24
    while at < len(dump):
        size = struct.unpack_from("<I", dump, at + 8)[0]
        records.append(dump[at + 16 : at + 16 + size])
        at += 16 + size
    assert arp_request() in records
    assert frame in records


def test_several_pairs_and_the_control_queue(namespace: None, stack: Any) -> None:
    vm = Vm(stack, queues=2)
    control = vm.driver.queues[4]

    def command(kind: int, number: int, data: bytes) -> int:
        answer = control.buffer(1, device_writes=True)
        control.want_interrupt()
        control.add([control.buffer(bytes((kind, number))), control.buffer(data), answer])
        vm.driver.set(spec.MMIO_QUEUE_NOTIFY, 4)
        for _ in range(1000):
            if control.reap():
                return vm.ram.read(answer.addr, 1)[0]
            select.select([vm.irq.fd], [], [], 0.01)
            vm.irq.take()
        pytest.fail("no answer")

    assert command(spec.NET_CTRL_MQ, 0, b"\2\0") == spec.NET_OK
    for bad in (b"\0\0", b"\3\0", b"\1", b"\xff\xff"):
        assert command(spec.NET_CTRL_MQ, 0, bad) == spec.NET_ERR
    assert command(spec.NET_CTRL_MQ, 0, b"\1\0") == spec.NET_OK
    assert command(spec.NET_CTRL_GUEST_OFFLOADS, 0, struct.pack("<Q", spec.NET_F_GUEST_CSUM)) == spec.NET_OK
    assert command(spec.NET_CTRL_GUEST_OFFLOADS, 0, struct.pack("<Q", spec.NET_F_CSUM)) == spec.NET_ERR
    assert command(spec.NET_CTRL_MAC, spec.NET_CTRL_MAC_ADDR_SET, b"\2\0\0\0\0\5") == spec.NET_OK
    assert vm.driver.config(0, 6) == b"\2\0\0\0\0\5"
    assert command(99, 0, b"") == spec.NET_ERR
    vm.offer()
    vm.send(arp_request())
    vm.receive(is_arp_reply)


def test_link_status(namespace: None, stack: Any) -> None:
    vm = Vm(stack)
    assert vm.driver.config(6, 2) == b"\1\0"
    vm.device.set_link(False)
    assert vm.driver.config(6, 2) == b"\0\0"
    assert vm.driver.take_interrupt() & spec.INTERRUPT_CONFIG


def test_a_storm_without_buffers_is_survived(namespace: None, stack: Any) -> None:
    vm = Vm(stack)
    vm.offer(1)
    vm.send(arp_request())
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        for _ in range(2000):
            udp.sendto(b"y" * 100, ("10.9.8.255", 9))
    vm.offer(256)
    vm.send(arp_request())
    assert threading.active_count() >= 2
    vm.receive(lambda frame: frame.endswith(b"y" * 100))
    assert vm.device.stats["needs_reset"] == 0
