# SPDX-License-Identifier: Apache-2.0
"""What a hostile or broken guest does to its network device: a counter, or NEEDS_RESET, and the device lives on."""

from __future__ import annotations

import fcntl
import socket
import struct
import subprocess
from typing import Any

import pytest

from tests.virtio.net_driver import GUEST, NET_HEADER, RX, TX, Vm, arp_request, is_arp_reply
from tests.waiting import until
from virtio import spec
from virtio.net.host import SIOCSIFFLAGS
from virtio.testing import Buffer

LARGE = spec.NET_F_GUEST_TSO4 | spec.NET_F_GUEST_TSO6 | spec.NET_F_GUEST_UFO
OUTSIDE = 1 << 40
LONGEST = 65535 + 18  # a frame


def returned(vm: Vm, index: int, count: int) -> list[tuple[int, int]]:
    """The next `count` chains that come back on a queue."""
    done: list[tuple[int, int]] = []

    def all_came() -> bool:
        done.extend(vm.driver.queues[index].reap())
        return len(done) >= count

    until(all_came, lambda: (done, vm.device.stats, vm.log))
    return done


def broken(vm: Vm) -> bool:
    return bool(vm.driver.get(spec.MMIO_STATUS) & spec.DEVICE_NEEDS_RESET)


def assert_alive(vm: Vm) -> None:
    """The host answers still."""
    vm.offer()
    vm.send(arp_request())
    vm.receive(is_arp_reply)
    assert not broken(vm)


def assert_broken_and_revived(vm: Vm, without: int = 0) -> None:
    until(lambda: broken(vm), lambda: vm.device.stats)
    assert vm.device.stats["needs_reset"] == 1
    assert len(vm.log) == 1
    vm.bring_up(without=without)
    assert_alive(vm)


def chain(vm: Vm, index: int, *buffers: Buffer) -> int:
    head = vm.driver.queues[index].add(buffers)
    vm.driver.set(spec.MMIO_QUEUE_NOTIFY, index)
    return head


# Receive


@pytest.mark.parametrize("without", [0, spec.NET_F_MRG_RXBUF | LARGE])
@pytest.mark.parametrize(
    "sizes",
    [[(1536, False)], [(11, True)], [(1, True)], [(12, False), (1536, True)], [(0, True)], [(5, True), (6, True)]],
    ids=["read-only", "short", "one byte", "mixed", "empty", "short in two"],
)
def test_rx_buffer_of_no_use(namespace: None, stack: Any, without: int, sizes: list[tuple[int, bool]]) -> None:
    vm = Vm(stack, without=without)
    ring = vm.driver.queues[RX]
    heads = [chain(vm, RX, *(ring.buffer(size, device_writes=way) for size, way in sizes)) for _ in range(3)]
    assert returned(vm, RX, 3) == [(head, 0) for head in heads]
    assert vm.device.stats["rx_bad_buffers"] == 3
    assert_alive(vm)


@pytest.mark.parametrize("without", [0, spec.NET_F_MRG_RXBUF | LARGE])
@pytest.mark.parametrize("bad", [Buffer(OUTSIDE, 1536, True), Buffer((16 << 20) - 100, 1536, True)])
def test_rx_buffer_outside_of_ram(namespace: None, stack: Any, without: int, bad: Buffer) -> None:
    vm = Vm(stack, without=without)
    chain(vm, RX, bad)
    assert_broken_and_revived(vm, without)


def test_rx_buffer_outside_of_ram_in_the_middle_of_a_merge(namespace: None, stack: Any) -> None:
    vm = Vm(stack)
    ring = vm.driver.queues[RX]
    for size in (100, 200):
        ring.add([ring.buffer(size, device_writes=True)])
    ring.add([Buffer(OUTSIDE, 1536, True)])
    vm.driver.set(spec.MMIO_QUEUE_NOTIFY, RX)
    vm.send(arp_request())
    until(lambda: broken(vm))
    assert ring.reap() == []  # what was held never was filled
    assert_broken_and_revived(vm)


def test_rx_buffers_too_short_for_a_frame_lose_it_and_no_more(namespace: None, stack: Any) -> None:
    vm = Vm(stack, without=spec.NET_F_MRG_RXBUF | LARGE)
    vm.offer(8, 12 + 60)
    vm.send(arp_request())
    vm.receive(is_arp_reply)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.sendto(b"x" * 1000, (GUEST, 9))
    until(lambda: vm.device.stats["rx_too_long"] >= 1)
    vm.send(arp_request())
    vm.receive(is_arp_reply)


def test_a_frame_merged_from_the_smallest_buffers(namespace: None, stack: Any) -> None:
    vm = Vm(stack)
    ring = vm.driver.queues[RX]
    for number in range(200):
        ring.add([ring.buffer(size, device_writes=True) for size in ((12,), (1, 1, 10))[number & 1]])
    vm.driver.set(spec.MMIO_QUEUE_NOTIFY, RX)
    vm.send(arp_request())
    until(lambda: vm.device.stats["rx_packets"] >= 1)
    heads = returned(vm, RX, 4)
    assert [size for _, size in heads[:4]] == [12, 12, 12, 12]
    assert not broken(vm)


def test_a_storm_without_any_buffer(namespace: None, stack: Any) -> None:
    vm = Vm(stack)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        for _ in range(5000):
            udp.sendto(b"y" * 100, ("10.9.8.255", 9))
    assert vm.device.stats["rx_packets"] == 0
    vm.send(arp_request())
    until(lambda: vm.device.stats["tx_packets"] == 1)  # the other way is open
    vm.offer(256)
    vm.receive(lambda frame: frame.endswith(b"y" * 100))
    vm.offer(200)
    until(lambda: vm.device.stats["rx_packets"] > 300)
    assert not broken(vm)


# Send


@pytest.mark.parametrize(
    "sizes",
    [[(42 + 12, True)], [(11, False)], [(12, False)], [(12 + 13, False)], [(0, False)], [(12, False), (60, True)],
     [(12, False), (LONGEST + 1, False)], [(1 << 20, False)]],
    ids=["writable", "short", "a header alone", "half a header", "empty", "mixed", "a byte too long", "1 MiB"],
)  # fmt: skip
def test_tx_chain_of_no_use(namespace: None, stack: Any, sizes: list[tuple[int, bool]]) -> None:
    vm = Vm(stack)
    ring = vm.driver.queues[TX]
    head = chain(vm, TX, *(ring.buffer(size, device_writes=way) for size, way in sizes))
    assert returned(vm, TX, 1) == [(head, 0)]
    assert vm.device.stats["tx_bad"] == 1
    assert vm.device.stats["tx_packets"] == 0
    assert_alive(vm)


def test_tx_of_the_largest_frame_reaches_the_tap(namespace: None, stack: Any) -> None:
    vm = Vm(stack)
    vm.send(arp_request().ljust(LONGEST, b"\0"))
    returned(vm, TX, 1)
    assert vm.device.stats["tx_bad"] == 0
    assert vm.device.stats["tx_packets"] + vm.device.stats["tx_errors"] == 1
    assert_alive(vm)


def test_tx_bad_memory_then_a_valid_frame(namespace: None, stack: Any) -> None:
    vm = Vm(stack)
    ring = vm.driver.queues[TX]
    ring.add([ring.buffer(12), Buffer(OUTSIDE, 60)])
    vm.send(arp_request())
    until(lambda: broken(vm))
    assert vm.device.stats["tx_packets"] == 0
    assert_broken_and_revived(vm)


HEADERS = {
    "csum_start beyond the frame": (1, 0, 0, 0, 60000, 16),
    "csum_offset beyond the frame": (1, 0, 0, 0, 34, 60000),
    "csum sum overflows": (1, 0, 0, 0, 65535, 65535),
    "gso without a size": (1, 1, 54, 0, 34, 16),
    "gso of no type": (1, 7, 54, 1460, 34, 16),
    "ecn alone": (1, 0x80, 54, 1460, 34, 16),
    "hdr_len beyond the frame": (0, 1, 65535, 1460, 0, 0),
}


@pytest.mark.parametrize("name", HEADERS)
def test_tx_header_that_makes_no_sense(namespace: None, stack: Any, name: str) -> None:
    """The kernel judges it."""
    vm = Vm(stack)
    for _ in range(3):
        vm.send(arp_request(), NET_HEADER.pack(*HEADERS[name], 0))
    returned(vm, TX, 3)
    assert vm.device.stats["tx_errors"] == 3
    assert vm.device.stats["tx_packets"] == 0
    assert_alive(vm)
    assert vm.log == []


# The host's side


def set_flags(name: str, flags: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sH22x", name.encode(), flags))


def test_tap_goes_down_and_comes_back(namespace: None, stack: Any) -> None:
    vm = Vm(stack)
    assert_alive(vm)
    set_flags(vm.tap.name, 0)
    for _ in range(100):
        vm.send(arp_request())
    returned(vm, TX, 101)
    assert vm.device.stats["tx_errors"] == 100
    assert vm.device.link_up
    set_flags(vm.tap.name, 1)
    assert_alive(vm)
    assert vm.log == []


@pytest.mark.parametrize(("queues", "threads"), [(1, 1), (2, 1), (2, 2)])
def test_tap_is_deleted(namespace: None, stack: Any, queues: int, threads: int) -> None:
    """The cable is out, with one line, whatever the guest goes on to send."""
    vm = Vm(stack, queues=queues, threads=threads)
    assert_alive(vm)
    subprocess.run(["ip", "link", "del", vm.tap.name], check=True)
    for _ in range(50):
        vm.send(arp_request())
    returned(vm, TX, 51)
    until(lambda: vm.driver.config(6, 2) == b"\0\0")
    assert vm.device.stats["tx_errors"] == 50
    assert not broken(vm)
    assert len(vm.log) == 1
    assert "is gone; the link is down" in vm.log[0]
    vm.bring_up()  # fails as it should: there is nothing to set up
    until(lambda: broken(vm))
    assert vm.driver.config(6, 2) == b"\0\0"


def test_control_queue_requests_of_no_use(namespace: None, stack: Any) -> None:
    vm = Vm(stack)
    ring = vm.driver.queues[2]
    answer = ring.buffer(1, device_writes=True)
    good = bytes((spec.NET_CTRL_RX, 0))
    for buffers in (
        [ring.buffer(good)], [answer], [ring.buffer(b"\0"), answer], [ring.buffer(good), answer],
        [ring.buffer(good + bytes(1 << 20)), answer], [ring.buffer(b"\1\0\xff\xff\xff\xff" * 10), answer],
    ):  # fmt: skip
        head = chain(vm, 2, *buffers)
        assert returned(vm, 2, 1)[0][0] == head
        assert not any(buffer.device_writes for buffer in buffers) or vm.ram.read(answer.addr, 1) == b"\1"
    assert vm.device.stats["bad_control"] == 6
    assert_alive(vm)


@pytest.mark.parametrize("without", [0, spec.NET_F_MRG_RXBUF | LARGE])
def test_reset_under_traffic_and_a_new_driver(namespace: None, stack: Any, without: int) -> None:
    vm = Vm(stack, without=without)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        for _ in range(20):
            vm.offer(20)
            for _ in range(50):
                udp.sendto(b"y" * 1000, ("10.9.8.255", 9))
            vm.send(arp_request())
            vm.driver.allocator.next = 1 << 20
            vm.bring_up(without=without)
    assert_alive(vm)
