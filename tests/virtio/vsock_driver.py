# SPDX-License-Identifier: Apache-2.0
"""Plays a guest's vsock driver, packet by packet, against the real device and real unix sockets."""

from __future__ import annotations

import select
import socket
import struct
import threading
import time
from pathlib import Path
from typing import NamedTuple

from tests.waiting import PATIENCE, until
from virtio.mmio import VirtioMmio
from virtio.testing import Allocator, Buffer, MmioDriver, SplitDriver
from virtio.vsock.device import Listener, Vsock
from vmm.irq import IrqLine
from vmm.memory import GuestMemory

CID = 52
BUF_ALLOC = 1 << 18  # what the driver grants, and what the device does
RX, TX, EVENT = 0, 1, 2

# virtio 1.2 §5.10.6
# src_cid, dst_cid, src_port, dst_port, len, type, op, flags, buf_alloc, fwd_cnt: 44 bytes
VSOCK_HEADER = struct.Struct("<QQIIIHHIII")
HOST_CID, STREAM = 2, 1
REQUEST, RESPONSE, RST, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST = range(1, 8)
RCV, SEND = 1, 2


_barrier = threading.Lock()  # Python has no fence; this is a locked instruction on x86


class Packet(NamedTuple):
    """A header, and the payload behind it."""

    src_cid: int
    dst_cid: int
    src_port: int
    dst_port: int
    len: int
    type: int
    op: int
    flags: int
    buf_alloc: int
    fwd_cnt: int
    data: bytes = b""

    @classmethod
    def unpack(cls, raw: bytes) -> Packet:
        return cls._make([*VSOCK_HEADER.unpack_from(raw), raw[VSOCK_HEADER.size :]])

    def pack(self) -> bytes:
        return VSOCK_HEADER.pack(*self[:-1]) + self.data


class Vm:
    """A guest with a socket device, its driver up, and `posted` receive buffers of `size` bytes."""

    def __init__(
        self,
        path: Path,
        ram: GuestMemory,
        *,
        posted: int = 32,
        size: int = 4096,
        features_without: int = 0,
    ) -> None:
        self.log: list[str] = []
        self.ram = ram
        self.irq = IrqLine(5)
        self.path = str(path)
        self.listener = Listener(self.path)
        self.device = Vsock(self.listener, CID)
        self.transport = VirtioMmio(self.device, ram, self.irq, warn=self.log.append)
        self.allocator = Allocator(0x1000, ram.size - 0x1000)
        self.driver = MmioDriver(self.transport, self.allocator)
        self.inbox: list[Packet] = []
        self.sockets: list[socket.socket] = []  # closed in the end, not when a test forgets them
        self.up(posted=posted, size=size, features_without=features_without)

    def up(self, *, posted: int = 32, size: int = 4096, features_without: int = 0) -> None:
        """Reset the device, and bring it up with new queues and buffers."""
        self.driver.bring_up(without=features_without)
        self.inbox.clear()
        self.rx: dict[int, Buffer] = {}
        self.tx_pool: list[Buffer] = []
        for queue in self.driver.queues[:2]:
            queue.want_interrupt()
        for _ in range(posted):
            self.post([self.queue(RX).buffer(size, device_writes=True)])

    def queue(self, index: int) -> SplitDriver:
        return self.driver.queues[index]

    def close(self) -> None:
        for end in self.sockets:
            end.close()
        self.transport.close()
        self.listener.close()
        self.irq.close()

    def post(self, buffers: list[Buffer]) -> None:
        """Give the device a chain to receive into; only one of a single buffer is read back."""
        self.rx[self.queue(RX).add(buffers)] = buffers[0]
        self.driver.kick(RX)

    def raw(self, buffers: list[Buffer]) -> None:
        """Send a chain as it is, and wait until the device has returned it."""
        queue = self.queue(TX)
        head = queue.add(buffers)
        self.driver.kick(TX)
        end = time.monotonic() + PATIENCE
        while head in queue.chains:  # no interrupt comes for it alone, for a while
            assert time.monotonic() < end, "the packet was not taken"
            time.sleep(0)
            queue.reap()

    def offer(self, data: bytes) -> None:
        """Send one packet and do not wait."""
        queue = self.queue(TX)
        queue.reap()
        queue.add([queue.buffer(data)])
        self.driver.kick(TX)

    def packet(
        self,
        op: int,
        guest_port: int,
        host_port: int,
        data: bytes = b"",
        *,
        fwd_cnt: int = 0,
        buf_alloc: int = BUF_ALLOC,
        flags: int = 0,
        src_cid: int = CID,
        dst_cid: int = HOST_CID,
        kind: int = STREAM,
        length: int | None = None,
    ) -> Packet:
        size = len(data) if length is None else length
        return Packet(src_cid, dst_cid, guest_port, host_port, size, kind, op, flags, buf_alloc, fwd_cnt, data)

    def send(self, op: int, guest_port: int, host_port: int, data: bytes = b"", **fields: int) -> None:
        """Send one packet, header and payload in buffers of their own as Linux does it."""
        packet = self.packet(op, guest_port, host_port, data, **fields).pack()
        queue = self.queue(TX)
        parts = [queue.buffer(packet[: VSOCK_HEADER.size])]
        if data:
            parts.append(queue.buffer(data))
        self.raw(parts)

    def _wait(self, done: object, look: object) -> None:
        assert callable(done) and callable(look)
        queues = self.driver.queues[:2]
        while True:
            before = [queue.used_idx for queue in queues]
            for queue in queues:
                queue.want_interrupt()
            with _barrier:  # used_event before used.idx (§2.7.7.2)
                pass
            look()
            if done():
                return
            if before != [queue.used_idx for queue in queues]:
                continue  # an interrupt was asked for that has come: ask for the next
            assert select.select([self.irq.fd], [], [], PATIENCE)[0], "no interrupt came"
            self.irq.take()

    def collect(self, *, repost: bool = True) -> list[int]:
        """Take what has come into the inbox; the lengths in the used entries."""
        done = [(self.rx.pop(head), written) for head, written in self.queue(RX).reap()]
        for buffer, written in done:
            if written >= VSOCK_HEADER.size:
                self.inbox.append(Packet.unpack(self.ram.read(buffer.addr, written)))
            if repost:
                self.rx[self.queue(RX).add([buffer])] = buffer
        if done and repost:
            self.driver.kick(RX)
        return [written for _, written in done]

    def receive(self, op: int | None = None) -> Packet:
        """The next packet, which must be an `op`."""
        self._wait(lambda: self.inbox, self.collect)
        packet = self.inbox.pop(0)
        assert op is None or packet.op == op, packet
        return packet

    def silence(self) -> None:
        """Nothing came up to here: the answer to a stray packet is the next one."""
        self.send(RW, 1, 1)
        packet = self.receive(RST)
        assert (packet.dst_port, packet.src_port) == (1, 1), packet

    def receive_nothing_more(self) -> None:
        """Reap both queues, where nothing is under way."""
        self.queue(TX).reap()
        assert not self.collect()

    def wait_for_connections(self, connections: int) -> None:
        """Wait until the device has so many connections: what its sockets say comes in no order."""
        until(lambda: self.device.connections == connections, lambda: f"{self.device.connections} connections")

    def counted(self, name: str, count: int) -> None:
        """Wait until the device's counter is there: it counts after a host program has noticed."""
        until(lambda: self.device.stats[name] == count, lambda: self.device.stats)

    def silence_without_buffers(self) -> None:
        """The device has looked at everything up to here, and could say nothing."""
        before = self.device.stats["packets_rx"]
        self.send(RST, 1, 1)
        assert self.device.stats["packets_rx"] == before

    def host_socket(self) -> socket.socket:
        """A host program, connected, that has not said anything yet."""
        client = socket.socket(socket.AF_UNIX)
        self.sockets.append(client)
        client.settimeout(PATIENCE)
        client.connect(self.path)
        return client

    def host_connect(self, port: int = 5000, verb: str = "CONNECT") -> tuple[socket.socket, Packet]:
        """A host program that asks for `port`; its socket and the REQUEST that the guest sees."""
        client = self.host_socket()
        client.sendall(f"{verb} {port}\n".encode())
        return client, self.receive(REQUEST)

    def host_open(self, port: int = 5000, **fields: int) -> tuple[socket.socket, int]:
        """A connection that a host program has opened; its socket and its host port."""
        client, request = self.host_connect(port)
        self.send(RESPONSE, port, request.src_port, b"", **fields)
        assert read_line(client) == b"OK %d\n" % request.src_port
        return client, request.src_port

    def host_listen(self, port: int, backlog: int = 128) -> socket.socket:
        """A host program that serves `port` for the guest."""
        server = socket.socket(socket.AF_UNIX)
        self.sockets.append(server)
        server.settimeout(PATIENCE)
        server.bind(f"{self.path}_{port}")
        server.listen(backlog)
        return server

    def guest_open(self, server: socket.socket, guest_port: int, host_port: int, **fields: int) -> socket.socket:
        """A connection that the guest has opened; the host program's end."""
        self.send(REQUEST, guest_port, host_port, b"", **fields)
        self.receive(RESPONSE)
        client, _ = server.accept()
        self.sockets.append(client)
        client.settimeout(PATIENCE)
        return client


def read_line(client: socket.socket) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        byte = client.recv(1)
        if not byte:
            break
        line += byte
    return line


def read_exactly(client: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        chunk = client.recv(size - len(data))
        assert chunk, f"the connection ended after {len(data)} of {size} bytes"
        data += chunk
    return data
