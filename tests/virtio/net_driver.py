# SPDX-License-Identifier: Apache-2.0
"""The driver's side of a network device over a tap, for its tests and benches."""

from __future__ import annotations

import ctypes
import select
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

from virtio import spec
from virtio.mmio import VirtioMmio
from virtio.net._policy import REASONS, Policy
from virtio.net.device import Net
from virtio.net.host import Tap
from virtio.testing import Allocator, Buffer, MmioDriver
from vmm.irq import IrqLine
from vmm.memory import GuestMemory

NET_HEADER = struct.Struct("<BBHHHHH")  # flags, gso_type, hdr_len, gso_size, csum_start, csum_offset, num_buffers
GUEST_MAC = bytes.fromhex("025600000002")
HOST, GUEST = "10.9.8.1", "10.9.8.2"
RX, TX = 0, 1


def checksum(data: bytes) -> int:
    total = sum(struct.unpack(f">{len(data) // 2}H", data)) if len(data) % 2 == 0 else checksum(data + b"\0") ^ 0xFFFF
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


class _Calls(ctypes.Structure):
    """``PolicyCalls`` of ``virtio/net/_policy.pxd``."""

    _fields_ = (
        ("policy", ctypes.c_void_p),
        ("check", ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint64)),
        ("count", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint64)),
    )


def verdict_on(policy: Policy, frame: bytes | bytearray) -> str:
    """What the device's thread does with a frame of the guest's: ``allowed``, ``resolver`` or one of `REASONS`."""
    calls = _Calls.from_address(policy.pointer)
    verdict = calls.check(calls.policy, bytes(frame[:74]).ljust(74, b"\0"), len(frame))
    calls.count(calls.policy, verdict, len(frame))
    return str(("allowed", "resolver", *REASONS)[verdict])


def seconds_left(policy: Policy) -> list[int]:
    """How long new connections to each learned address are allowed."""
    now = int(time.clock_gettime(6))  # CLOCK_MONOTONIC_COARSE, as there
    return [max(0, until - now) for _, _, _, until, _ in policy.learned()]


class Stream:
    """What passt is to the device: one end of a stream of frames; the other is the test's."""

    stream = True

    def __init__(self, stack: Any) -> None:
        ours, self.other = socket.socketpair()
        stack.callback(ours.close)
        stack.callback(self.other.close)
        ours.setblocking(False)
        self._ours = ours
        self.fds = [ours.fileno()]
        self.other.settimeout(10)

    def gone(self) -> str:
        return "the test is gone"

    def set_offloads(self, features: int) -> None:
        pass

    def set_pairs(self, count: int) -> None:
        pass


class Vm:
    """A guest's driver for one interface over a tap."""

    def __init__(self, stack: Any, *, queues: int = 1, without: int = 0, tap: Any = None, **options: Any) -> None:
        self.log: list[str] = []
        self.ram = stack.enter_context(GuestMemory(16 << 20))
        self.irq = IrqLine(5)
        stack.callback(self.irq.close)
        if tap is None:
            tap = Tap("t%d", queues, make=True)
            stack.callback(tap.close)
            tap.configure(address=f"{HOST}/24")
        self.tap = tap
        self.device = Net(tap, GUEST_MAC, **options)
        stack.callback(self.device.close)
        self.transport = VirtioMmio(self.device, self.ram, self.irq, warn=self.log.append)
        stack.callback(self.transport.close)
        self.driver = MmioDriver(self.transport, Allocator(1 << 20, 15 << 20))
        self.buffers: dict[int, Buffer] = {}
        self.frames: list[tuple[bytes, bytes]] = []
        self._parts: list[bytes] = []
        self.bring_up(without=without)

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
        """The header and the first frame that is wanted; those before it are dropped, and all buffers offered again."""
        ring = self.driver.queues[RX]
        while True:
            while self.frames:
                header, frame = self.frames.pop(0)
                if wanted(frame):
                    return header, frame
            ring.want_interrupt()
            if done := ring.reap():
                self._collect(done)
                continue
            assert select.select([self.irq.fd], [], [], 10)[0], f"no frame came; {self.device.stats} {self.log}"
            self.irq.take()

    def _collect(self, done: list[tuple[int, int]]) -> None:
        ring = self.driver.queues[RX]
        buffers = [self.buffers.pop(head) for head, _ in done]
        for buffer, (_, size) in zip(buffers, done, strict=True):
            self._parts.append(self.ram.read(buffer.addr, size))
            if len(self._parts) == NET_HEADER.unpack(self._parts[0][:12])[6]:
                whole = b"".join(self._parts)
                self._parts.clear()
                self.frames.append((whole[:12], whole[12:]))
            self.buffers[ring.add([buffer])] = buffer
        self.driver.kick(RX)

    def bring_up(self, *, without: int = 0) -> None:
        """Reset the device and drive it anew."""
        self.buffers.clear()
        self.frames.clear()
        self._parts.clear()
        self.driver.bring_up(without=without)


def arp_request() -> bytes:
    body = struct.pack(">HHBBH", 1, 0x0800, 6, 4, 1) + GUEST_MAC + socket.inet_aton(GUEST)
    return b"\xff" * 6 + GUEST_MAC + b"\x08\x06" + body + bytes(6) + socket.inet_aton(HOST)


def is_arp_reply(frame: bytes) -> bool:
    return frame[12:14] == b"\x08\x06" and frame[20:22] == b"\0\2"


def ipv4(
    target: str, segment: bytes, protocol: int = 6, *, source: str = GUEST, fragment: int = 0x4000, options: bytes = b""
) -> bytes:
    """A frame of the guest's with an IPv4 packet."""
    ip = struct.pack(
        ">BBHHHBBH4s4s", 0x45 + len(options) // 4, 0, 20 + len(options) + len(segment), 1, fragment, 64, protocol, 0,
        socket.inet_aton(source), socket.inet_aton(target),
    ) + options  # fmt: skip
    ip = ip[:10] + struct.pack(">H", checksum(ip)) + ip[12:]
    return b"\x02" * 6 + GUEST_MAC + b"\x08\0" + ip + segment


def tcp(
    target: str, port: int, *, source: str = GUEST, source_port: int = 4000, flags: int = 2, number: int = 1000,
    acknowledged: int = 0, data: bytes = b"", **options: Any,
) -> bytes:  # fmt: skip
    """A frame of the guest's with a segment of TCP over IPv4; a SYN, if nothing else is said."""
    segment = struct.pack(">HHIIBBHHH", source_port, port, number, acknowledged, 0x50, flags, 65000, 0, 0) + data
    pseudo = socket.inet_aton(source) + socket.inet_aton(target) + struct.pack(">HH", 6, len(segment))
    segment = segment[:16] + struct.pack(">H", checksum(pseudo + segment)) + segment[18:]
    return ipv4(target, segment, source=source, **options)


def udp(target: str, port: int, data: bytes = b"data", *, source_port: int = 4000, **options: Any) -> bytes:
    """A frame of the guest's with a datagram over IPv4, without a checksum."""
    return ipv4(target, struct.pack(">HHHH", source_port, port, 8 + len(data), 0) + data, 17, **options)
