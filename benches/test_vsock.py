# SPDX-License-Identifier: Apache-2.0
"""The socket device between a driver and unix sockets of this process: ``pytest benches/test_vsock.py``.

The driver offers the chains that were used again by its index alone, so that what is measured is the device's thread
and the two copies of a unix socket. ``extra_info`` has the bytes of a round.
"""

from __future__ import annotations

import select
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.virtio.vsock_driver import RESPONSE, RST, RW, RX, TX, VSOCK_HEADER, Vm, read_line
from tests.waiting import PATIENCE
from virtio import spec
from vmm.memory import GuestMemory

CHAINS = 256
PACKET = 65536
PER_CONNECTION = 2  # packets of 64 KiB: what a guest may always send, heard of or not (half of the grant)
PLENTY = 0xFFFF_FFFF  # the guest's credit: more than a bench uses up


@pytest.fixture
def vm(tmp_path: Path) -> Iterator[Vm]:
    with GuestMemory(256 << 20) as ram:
        vm = Vm(tmp_path / "v.sock", ram)
        yield vm
        vm.close()


def recycle(vm: Vm, index: int) -> int:
    """Offer the chains that the device has returned again, in the same order; return their number."""
    queue = vm.queue(index)
    chains = returned(vm, index)
    queue.used_idx = queue.used_idx + chains & 0xFFFF
    queue.avail_idx = queue.avail_idx + chains & 0xFFFF
    vm.ram.write(queue.avail + 2, struct.pack("<H", queue.avail_idx))
    if queue.needs_kick():
        vm.driver.set(spec.MMIO_QUEUE_NOTIFY, index)
    return chains


def returned(vm: Vm, index: int) -> int:
    """Number of chains that the device has returned and that were not offered again."""
    queue = vm.queue(index)
    return int(struct.unpack("<H", vm.ram.read(queue.used + 2, 2))[0]) - queue.used_idx & 0xFFFF


def fill_receive_queue(vm: Vm, size: int) -> None:
    vm.collect(repost=False)
    while len(vm.rx) < CHAINS:
        vm.post([vm.queue(RX).buffer(size, device_writes=True)])


@pytest.mark.parametrize("size", [4096, PACKET])
def test_guest_to_host(benchmark: Any, vm: Vm, size: int) -> None:
    """128 connections; two packets for each in a round."""
    ends = [(5000 + i, *vm.host_open(5000 + i)) for i in range(CHAINS // PER_CONNECTION)]
    for _, client, _ in ends:
        client.settimeout(None)  # or MSG_WAITALL does not wait
    fill_receive_queue(vm, 4096)
    queue = vm.queue(TX)
    queue.reap()
    queue.want_interrupt(False)
    room = memoryview(bytearray(size * PER_CONNECTION))

    def read() -> None:
        for _, client, _ in ends:
            assert client.recv_into(room, len(room), socket.MSG_WAITALL) == len(room)

    for guest_port, _, host_port in ends:
        for _ in range(PER_CONNECTION):
            queue.add([queue.buffer(vm.packet(RW, guest_port, host_port, bytes(size)).pack())])
    vm.driver.kick(TX)
    read()

    def work() -> None:
        while returned(vm, TX) < CHAINS:
            time.sleep(0)
        recycle(vm, RX)  # where the device told of credit
        assert recycle(vm, TX) == CHAINS
        read()

    benchmark.extra_info["bytes"] = size * CHAINS
    benchmark.pedantic(work, rounds=50, warmup_rounds=2)


@pytest.mark.parametrize("size", [4096, PACKET])
def test_host_to_guest(benchmark: Any, vm: Vm, size: int) -> None:
    """One connection; receive buffers as Linux 6.1 has them, and of 64 KiB; a round fills them all."""
    client, _ = vm.host_open(buf_alloc=PLENTY)
    if size > 4096:
        vm.up(posted=0)
        vm.post([vm.queue(RX).buffer(size, device_writes=True)])
        client, _ = vm.host_open(buf_alloc=PLENTY)
    fill_receive_queue(vm, size)
    queue = vm.queue(RX)
    stop = threading.Event()
    data = bytes(1 << 20)

    def send() -> None:
        try:
            while not stop.is_set():
                client.sendall(data)
        except OSError:
            pass

    def work() -> None:
        """Wait until all are full, and offer them again."""
        queue.want_interrupt(after=CHAINS - 1)
        while returned(vm, RX) < CHAINS:
            assert select.select([vm.irq.fd], [], [], PATIENCE)[0]
            vm.irq.take()
        assert recycle(vm, RX) == CHAINS

    sender = threading.Thread(target=send)
    sender.start()
    try:
        benchmark.extra_info["bytes"] = (size - VSOCK_HEADER.size) * CHAINS
        benchmark.pedantic(work, rounds=50, warmup_rounds=2)
    finally:
        stop.set()
        vm.driver.set(spec.MMIO_STATUS, 0)
        sender.join(PATIENCE)


def test_connections(benchmark: Any, vm: Vm) -> None:
    """A host program connects, the guest accepts and resets; the driver and the program are Python, and most of it."""

    def work() -> None:
        client, request = vm.host_connect()
        vm.send(RESPONSE, 5000, request.src_port)
        read_line(client)
        vm.send(RST, 5000, request.src_port)
        client.close()
        vm.sockets.clear()
        vm.allocator.next = start

    start = vm.allocator.next
    benchmark.pedantic(work, rounds=200, warmup_rounds=5)
