# SPDX-License-Identifier: Apache-2.0
"""The network device between a driver and the host's stack, over a tap in a namespace: ``pytest benches/test_net.py``.

The driver offers the chains that were used again by its index alone, so that what is measured is the device's thread
and the kernel. ``extra_info`` has the frames of a round.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.conftest import namespace
from tests.virtio.net_driver import GUEST, GUEST_MAC, HOST, RX, TX, Stream, Vm, arp_request, checksum, is_arp_reply, tcp
from tests.virtio.test_net_policy import mine, policy
from virtio import spec
from virtio.net._policy import Policy
from virtio.testing import SplitDriver

assert namespace  # the fixture
FRAMES = 256
STREAMED = 80  # what a socket holds


@pytest.fixture
def vm(namespace: None) -> Iterator[Vm]:
    with contextlib.ExitStack() as stack:
        yield Vm(stack)


def recycle(vm: Vm, index: int, least: int) -> None:
    """Wait until at least `least` chains are returned, and offer all returned chains again."""
    queue = vm.driver.queues[index]
    while (chains := returned(vm, queue)) < least:
        time.sleep(0)
    queue.used_idx = queue.used_idx + chains & 0xFFFF
    queue.avail_idx = queue.avail_idx + chains & 0xFFFF
    vm.ram.write(queue.avail + 2, struct.pack("<H", queue.avail_idx))
    if queue.needs_kick():
        vm.driver.set(spec.MMIO_QUEUE_NOTIFY, index)


def returned(vm: Vm, queue: SplitDriver) -> int:
    return int(struct.unpack("<H", vm.ram.read(queue.used + 2, 2))[0]) - queue.used_idx & 0xFFFF


@pytest.mark.parametrize("size", [60, 1514, 61454])
def test_guest_to_host(benchmark: Any, vm: Vm, size: int) -> None:
    """Frames that the host's bridge accepts and drops: their Ethernet type belongs to no protocol."""
    queue = vm.driver.queues[TX]
    queue.want_interrupt(False)
    frame = (b"\x02\0\0\0\0\x01" + GUEST_MAC + b"\x88\xb5").ljust(size, b"\0")
    header, body = queue.buffer(bytes(12)), queue.buffer(frame)
    for _ in range(FRAMES):
        queue.add([header, body])
    vm.driver.set(spec.MMIO_QUEUE_NOTIFY, TX)
    benchmark.extra_info["frames"] = FRAMES
    benchmark.pedantic(recycle, (vm, TX, FRAMES), rounds=100, warmup_rounds=2)
    assert vm.device.stats["tx_errors"] == 0


@pytest.mark.parametrize("size", [60, 1514])
def test_host_to_guest(benchmark: Any, vm: Vm, size: int) -> None:
    """Datagrams from a busy thread, to buffers of 1536 bytes in any order."""
    vm.offer()
    vm.send(arp_request())
    vm.receive(is_arp_reply)
    vm.offer(400)
    queue = vm.driver.queues[RX]
    queue.want_interrupt(False)
    stop = threading.Event()
    data = bytes(size - 42)

    def send() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            udp.connect((GUEST, 9))
            while not stop.is_set():
                with contextlib.suppress(OSError):
                    udp.send(data)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        benchmark.extra_info["frames"] = FRAMES
        benchmark.pedantic(recycle, (vm, RX, FRAMES), rounds=50, warmup_rounds=2)
    finally:
        stop.set()
        sender.join()


def test_datagrams_to_a_socket(benchmark: Any, vm: Vm) -> None:
    """Datagrams through the host's whole network stack, to a socket."""
    vm.offer()
    vm.send(arp_request())
    _, reply = vm.receive(is_arp_reply)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.setsockopt(socket.SOL_SOCKET, 33, 32 << 20)  # SO_RCVBUFFORCE
        udp.bind((HOST, 9))
        payload = struct.pack(">HHHH", 9, 9, 8 + 1400, 0) + bytes(1400)
        ip = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(payload), 0, 0, 64, 17, 0)
        addresses = socket.inet_aton(GUEST) + socket.inet_aton(HOST)
        ip = ip[:10] + struct.pack(">H", checksum(ip + addresses)) + addresses
        queue = vm.driver.queues[TX]
        queue.reap()
        queue.want_interrupt(False)
        header, body = queue.buffer(bytes(12)), queue.buffer(reply[6:12] + GUEST_MAC + b"\x08\0" + ip + payload)
        for _ in range(FRAMES):
            queue.add([header, body])
        vm.driver.set(spec.MMIO_QUEUE_NOTIFY, TX)

        def work() -> None:
            for _ in range(FRAMES):
                udp.recv(2000)
            recycle(vm, TX, FRAMES)

        benchmark.extra_info["frames"] = FRAMES
        benchmark.pedantic(work, rounds=50, warmup_rounds=2)


@pytest.mark.parametrize("kind", ["all", "no loopback", "100 rules", "4000 addresses"])
def test_guest_to_a_stream(benchmark: Any, kind: str) -> None:
    """Frames of 1500 bytes for passt, with the checks of a policy."""
    address = bytes(10) + b"\xff\xff\x09\x09\x09\x09"
    policies: dict[str, Callable[[], Policy | None]] = {
        "all": lambda: None,
        "no loopback": lambda: Policy(only_special=True),
        "100 rules": lambda: policy(*((f"11.0.{number}.0/24",) for number in range(99)), ("9.9.9.9/32", 80)),
        "4000 addresses": policy,
    }
    with contextlib.ExitStack() as stack:
        backend = Stream(stack)
        backend._ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        backend.other.setblocking(False)
        made = policies[kind]()
        if kind == "4000 addresses":
            assert made is not None
            made.learn([(address[:13] + number.to_bytes(3, "big"), 0, 0, 600) for number in range(3999)])
            made.learn([(address, 80, 80, 600)])
        vm = Vm(stack, tap=backend, policy=made)
        ring = vm.driver.queues[TX]
        header, frame = ring.buffer(bytes(12)), ring.buffer(mine(tcp, "9.9.9.9", 80) + bytes(1446))
        for _ in range(STREAMED):
            ring.add([header, frame])
        sent = 0

        def work() -> None:
            nonlocal sent
            vm.driver.set(spec.MMIO_QUEUE_NOTIFY, TX)
            sent += STREAMED
            while vm.device.stats["tx_packets"] < sent:
                time.sleep(0)
            with contextlib.suppress(BlockingIOError):
                while backend.other.recv(1 << 20):
                    pass

        def setup() -> None:
            if sent:
                while returned(vm, ring) < STREAMED:  # they were counted before they came back
                    time.sleep(0)
                assert len(ring.reap()) == STREAMED
                for _ in range(STREAMED):
                    ring.add([header, frame])

        benchmark.extra_info["frames"] = STREAMED
        benchmark.pedantic(work, setup=setup, rounds=200, warmup_rounds=5)
