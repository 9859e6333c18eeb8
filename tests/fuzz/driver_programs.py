# SPDX-License-Identifier: Apache-2.0
"""Random driver programs for any device: requests that are nearly right in rings that are sometimes wrong.

A program is made from a seed, so that one that finds something can be run again: ``Victim(kind).run(seed)``.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import random
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import msgspec

from virtio import spec
from virtio.device import VirtioDevice
from virtio.mmio import VirtioMmio
from virtio.net.mmds import Endpoint
from virtio.testing import Allocator, MmioDriver, SplitDriver
from vmm import undertaker
from vmm.errors import SnapshotError
from vmm.irq import IrqLine
from vmm.memory import GuestMemory

RAM = 1 << 20
ARENA = 0x8000, RAM - 0x8000
QUEUE_SIZE = 16
PATIENCE = 10.0
MMDS_ADDRESS = bytes((169, 254, 169, 254))
# What a request of one descriptor or of several is: bytes to read, lengths to write.
Request = tuple[list[bytes], list[int]]
SIZES = (0, 1, 8, 16, 40, 44, 64, 511, 512, 513, 4096, 65536, RAM, 0xFFFF_FFFF)


def number(rng: random.Random, bits: int) -> int:
    """A number that is likely to be at some edge."""
    return rng.choice((0, 1, 2, 3, rng.getrandbits(bits), rng.getrandbits(8), (1 << bits) - 1, 1 << bits - 1))


def blk_request(rng: random.Random) -> Request:
    kind = rng.choice((0, 0, 1, 1, 4, 8, 11, 13, number(rng, 32)))
    data = rng.choice((512, 1024, 4096, rng.choice(SIZES[:11])))
    header = struct.pack("<IIQ", kind, number(rng, 32), rng.choice((0, 1, 7, 60, 64, number(rng, 64))))
    if kind in (11, 13):
        segments = [struct.pack("<QII", rng.randrange(80), rng.randrange(80), rng.choice((0, 1, 2)))]
        return [header, b"".join(segments * rng.choice((1, 1, 2, 300)))], [1]
    return ([header, rng.randbytes(data)], [1]) if kind == 1 else ([header], [data, 1])


def net_request(rng: random.Random) -> Request:
    gso = (rng.choice((0, 1, 4, number(rng, 8))), rng.choice((0, 1, 3, 4, 5, 0x80, number(rng, 8))))
    header = struct.pack("<BBHHHHH", *gso, *(number(rng, 16) for _ in range(5)))
    frame = rng.randbytes(12) + struct.pack(">H", rng.choice((0x800, 0x86DD, 0x806, 0x8100)))
    return [header + frame + rng.randbytes(rng.choice((0, 20, 46, 1500, 9000)))], []


def net_request_any(rng: random.Random) -> Request:
    """For whatever queue: a frame, a buffer for one, or a command."""
    if rng.random() < 0.4:
        return [], [rng.choice((1, 12, 100, 1536, 65562, rng.choice(SIZES))) for _ in range(rng.choice((1, 1, 2, 5)))]
    if rng.random() < 0.3:
        data = rng.choice((b"\1", b"\1\0", b"\2\0", rng.randbytes(6), rng.randbytes(8), bytes(8), bytes(14)))
        return [bytes((rng.choice((0, 1, 2, 4, 5, 9)), rng.choice((0, 0, 1, 2)))), data], [1]
    return net_request(rng)


def mmds_request(rng: random.Random) -> Request:
    """A frame for the metadata service, where connections begin at 0; or whatever a network device may get."""
    if rng.random() < 0.4:
        return net_request_any(rng)
    head = bytes((rng.choice((1, 1, 1, 0, number(rng, 8))),)) + bytes(11) + rng.randbytes(12)
    if rng.random() < 0.1:
        arp = struct.pack(">HHBBH", 1, 0x800, 6, 4, rng.choice((1, 1, 2))) + rng.randbytes(16) + MMDS_ADDRESS
        return [head + b"\x08\x06" + arp[: rng.choice((28, 28, 27, 8))]], []
    ask = b"GET / HTTP/1.1\r\n\r\n", b"GET /x HTTP/1.1\r\nConnection: close\r\n\r\n"
    data = rng.choice((b"", b"", *ask, bytes(3000)))
    flags = rng.choice((2, 2, 0x10, 0x10, 0x10, 0x11, 4, number(rng, 8)))
    near = [rng.choice((0, 1, 1, rng.randrange(100), number(rng, 32))) for _ in range(2)]
    ports = rng.choice((1, 2, number(rng, 16))), rng.choice((80, 80, 80, 81))
    offset = rng.choice((0x50, 0x50, 0x50, 0x60, number(rng, 8)))
    tcp = struct.pack(">HHIIBBHHH", *ports, *near, offset, flags, number(rng, 16), 0, 0) + data
    size = rng.choice((20 + len(tcp), 20 + len(tcp), 20 + len(tcp), number(rng, 16)))
    words = 0x45, 0, size, 0, rng.choice((0, 0, 0, number(rng, 16))), 64, rng.choice((6, 6, 6, number(rng, 8)))
    ip = struct.pack(">BBHHHBB", *words) + bytes(2) + b"\x0a\x09\x08\x02" + MMDS_ADDRESS
    ip = ip[:10] + (0xFFFF - int.from_bytes(ip, "big") % 0xFFFF).to_bytes(2, "big") + ip[12:]
    frame = head + b"\x08\0" + ip + tcp
    cut = rng.choice((len(frame), len(frame), rng.randrange(len(frame))))
    return [part for part in (frame[:cut], frame[cut:]) if part], []


RESOLVER = b"\x0a\0\2\3"


def policy_request(rng: random.Random) -> Request:
    """A frame for a policy, in which one field lies, or many; or whatever a network device may get."""
    if rng.random() < 0.3:
        return net_request_any(rng)
    lies = rng.choice((0, 0.05, 0.3))

    def field(true: Any, *others: Any) -> Any:
        return rng.choice(others) if rng.random() < lies else true

    names = field(b"\1x\0", b"\1a\1y\0", b"\3bad\0", b"\xc0\x0c", rng.randbytes(5))
    question = struct.pack(">HHHHHH", 1, field(0x100, number(rng, 16)), field(1, 0, 2), 0, 0, 0) + names
    question += struct.pack(">HH", field(1, 28, 16, number(rng, 16)), field(1, 3))
    target, port = rng.choice(((b"\x09" * 4, 80), (RESOLVER, 53), (b"\xff" * 4, 67)))
    ports = 68 if port == 67 else 4000, field(port, 80, 53, number(rng, 16))
    if port == 80 and rng.random() < 0.5:
        protocol = 6
        segment = struct.pack(">HHIIBBHHH", *ports, 0, 0, 0x50, number(rng, 8), 0, 0, 0) + bytes(rng.choice((0, 100)))
    else:
        protocol = 17
        segment = struct.pack(">HHHH", *ports, field(8 + len(question), number(rng, 16)), 0) + question
    protocol = field(protocol, 1, 58, number(rng, 8))
    words: tuple[int, ...]
    if rng.random() < 0.8:
        words = field(0x45, number(rng, 8)), 0, field(20 + len(segment), number(rng, 16)), 0, field(0, number(rng, 16))
        source = field(b"\x0a\0\2\x0f", bytes(4), rng.randbytes(4))
        target = field(target, b"\x7f\0\0\1", b"\x0a\0\2\2", rng.randbytes(4))
        frame = b"\x08\0" + struct.pack(">BBHHHBBH", *words, 64, protocol, 0) + source + target + segment
    else:
        words = 6 << 28, field(24, number(rng, 16)), field(58, protocol), field(255, 64)
        targets = b"\xff\2" + bytes(14), bytes(15) + b"\1", bytes(10) + b"\xff\xff" + b"\x09" * 4, rng.randbytes(16)
        frame = b"\x86\xdd" + struct.pack(">IHBB", *words) + rng.randbytes(16) + field(*targets) + b"\x87" + bytes(23)
    frame = bytes(12) + rng.randbytes(12) + frame
    cut = rng.randrange(len(frame))
    end = field(len(frame), rng.randrange(len(frame)))
    return [part for part in (frame[: min(cut, end)], frame[cut:end]) if part], []


def vsock_request(rng: random.Random) -> Request:
    data = rng.randbytes(rng.choice((0, 0, 1, 100, 4096)))
    header = struct.pack(
        "<QQIIIHHIII", rng.choice((3, number(rng, 64))), rng.choice((2, number(rng, 64))), rng.choice((1, 2, 1024)),
        rng.choice((52, 53, number(rng, 32))), rng.choice((len(data), len(data), number(rng, 32))),
        rng.choice((1, 1, number(rng, 16))), rng.choice((1, 1, 2, 3, 4, 5, 5, 5, 6, 7, number(rng, 16))),
        number(rng, 32), rng.choice((65536, number(rng, 32))), number(rng, 32),
    )  # fmt: skip
    return [header, data], []


NAMES = (b"file", b"dir", b"link", b"new", b".", b"..", b"a/b", b"", b"x" * 255, b"x" * 256, b"../escape", b"\xff")


def fs_request(rng: random.Random) -> Request:
    opcode = rng.choice((rng.randrange(1, 54), rng.randrange(1, 54), number(rng, 32)))
    node = rng.choice((1, 1, 2, 3, 4, 5, number(rng, 64)))
    if opcode == 26:
        body = struct.pack("<IIII", 7, rng.choice((38, 31, number(rng, 32))), 1 << 20, number(rng, 32)) + bytes(48)
    else:
        words = [rng.choice((0, 1, 2, 3, 8, 4096, number(rng, 64))) for _ in range(rng.choice((0, 1, 2, 5, 8, 11)))]
        body = b"".join(word.to_bytes(8, "little") for word in words)
        body += b"".join(rng.choice(NAMES) + b"\0" for _ in range(rng.randrange(3)))
    length = rng.choice((40 + len(body), 40 + len(body), 40 + len(body), number(rng, 32)))
    header = struct.pack("<IIQQIIII", length, opcode, number(rng, 64), node, *(number(rng, 16) for _ in range(3)), 0)
    parts = [header, body] if rng.random() < 0.7 else [header + body]
    return [part for part in parts if part], rng.choice(([], [16], [16, 4096], [128], [16, 128], [4096], [65536]))


def plain_request(rng: random.Random) -> Request:
    """For the small devices: some bytes one way, or both."""
    readable, writable = [rng.randbytes(rng.choice((0, 4, 10, 12, 40)))], [rng.choice((0, 1, 64, 4096))]
    return rng.choice(((readable, []), ([], writable), ([], writable * 2), (readable, writable)))


def balloon_request(rng: random.Random) -> Request:
    pages = [rng.choice((rng.randrange(RAM // 4096), number(rng, 32))) for _ in range(rng.choice((1, 2, 200)))]
    stats = b"".join(struct.pack("<HQ", number(rng, 16), number(rng, 64)) for _ in range(rng.choice((0, 1, 10))))
    return rng.choice((([struct.pack(f"<{len(pages)}I", *pages)], []), ([stats], []), plain_request(rng)))


def console_request(rng: random.Random) -> Request:
    control = struct.pack("<IHH", rng.choice((0, 1, number(rng, 32))), rng.choice((0, 3, 6, number(rng, 16))), 1)
    return rng.choice((([control], []), ([], [4096]), plain_request(rng)))


SECRET = "not for the guest"
_GUARD = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x100000  # MAP_FIXED_NOREPLACE
Maker = Callable[[contextlib.ExitStack, Path], VirtioDevice]


class Kind(NamedTuple):
    """How to fuzz one kind of device: what makes it, a request, queues whose chains it may keep, a first request.

    ``rewrites``: a request may change the ring of any queue, which nobody then notifies the device of.
    """

    make: Maker
    request: Callable[[random.Random], Request]
    keeps: frozenset[int]
    first: tuple[int, Request] | None
    rewrites: bool


KINDS: dict[str, Kind] = {}


def kind(
    name: str,
    request: Callable[[random.Random], Request],
    *,
    keeps: Sequence[int] = (),
    first: tuple[int, Request] | None = None,
    rewrites: bool = False,
) -> Callable[[Maker], Maker]:
    """Register the function that makes a device; it may put what is to be closed or checked on the stack."""

    def register(maker: Maker) -> Maker:
        KINDS[name] = Kind(maker, request, frozenset(keeps), first, rewrites)
        return maker

    return register


class Victim:
    """A device of one kind behind its transport, and random programs against it.

    :param cuts: how often, of 1, a step is followed by a move of the device to another transport by its state
    :param races: another processor of the guest changes descriptors and buffers meanwhile
    """

    def __init__(self, name: str, *, cuts: float = 0.0, races: bool = False) -> None:
        self.kind = KINDS[name]
        self.cuts = cuts
        self.races = races
        self.cut_count = 0
        self._stack = contextlib.ExitStack()
        directory = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        self.ram = self._stack.enter_context(GuestMemory(RAM))
        guard(self.ram.host_address(0, RAM) - 4096)
        guard(self.ram.host_address(0, RAM) + RAM)
        self.irq = IrqLine(5)
        self._stack.callback(self.irq.close)
        self.device = self.kind.make(self._stack, directory)
        self.log: list[str] = []
        self.transport = VirtioMmio(self.device, self.ram, self.irq, warn=self.log.append)
        self._stack.callback(lambda: self.transport.close())

    def cut(self, driver: MmioDriver) -> None:
        """Hold the conversation, save the device's state as a file has it, and go on with another transport."""
        self.transport.stop()
        try:
            state = msgspec.msgpack.decode(msgspec.msgpack.encode(self.transport.save()))
        except SnapshotError:  # a share with a file that is open and was removed
            self.transport.go_on()
            return
        self.cut_count += 1
        self.transport.close()
        self.transport = driver.transport = VirtioMmio(self.device, self.ram, self.irq, warn=self.log.append)
        self.transport.restore(state)
        self.transport.go_on()

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> Victim:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, seed: int) -> None:
        """One program, from reset.

        :raises AssertionError: the device hangs, or returned what it was not given
        """
        rng = random.Random(seed)
        driver = MmioDriver(self.transport, Allocator(*ARENA, gaps=rng))
        without = rng.choice((0, 0, spec.F_EVENT_IDX, spec.F_INDIRECT_DESC))
        driver.bring_up(without=without, size=QUEUE_SIZE)
        if self.kind.first is not None and rng.random() < 0.9:
            index, (readable, writable) = self.kind.first
            ring = driver.queues[index]
            ring.add([ring.buffer(part) for part in readable] + [ring.buffer(n, device_writes=True) for n in writable])
            driver.set(spec.MMIO_QUEUE_NOTIFY, index)
        with self._racing(driver, random.Random(~seed)):
            for _ in range(rng.randrange(1, 12)):
                index = rng.randrange(len(driver.queues))
                try:
                    self._step(rng, driver, driver.queues[index], index)
                except (MemoryError, IndexError):
                    break  # the driver's own memory or descriptors are used up
                if rng.random() < self.cuts:
                    self.cut(driver)
            self._finish(driver)

    @contextlib.contextmanager
    def _racing(self, driver: MmioDriver, rng: random.Random) -> Iterator[None]:
        # The other processor. The available rings are left alone, or `_finish` could not tell when all is served.
        stop = threading.Event()
        buffers = max(ring.used + 6 + 8 * ring.size for ring in driver.queues)

        def run() -> None:
            while not stop.wait(0):
                for _ in range(20):
                    if rng.random() < 0.05:
                        ring = rng.choice(driver.queues)
                        self.ram.write(
                            ring.desc + rng.randrange(16 * ring.size - 4), rng.randbytes(rng.choice((1, 2, 4)))
                        )
                    else:
                        at = min(driver.allocator.next, RAM) - rng.randrange(1, 8192)
                        self.ram.write(max(at, buffers), rng.choice((bytes(4), rng.randbytes(rng.choice((1, 4, 8))))))

        thread = threading.Thread(target=run)
        if self.races:
            thread.start()
        try:
            yield
        finally:
            stop.set()
            if self.races:
                thread.join()

    def _step(self, rng: random.Random, driver: MmioDriver, ring: SplitDriver, index: int) -> None:
        readable, writable = self.kind.request(rng)
        buffers = [ring.buffer(part) for part in readable]
        buffers += [ring.buffer(min(size, 70000), device_writes=True) for size in writable]
        if rng.random() < 0.1:
            rng.shuffle(buffers)
        if not buffers:
            return
        if rng.random() < 0.4:
            ring.add_indirect(buffers, direct=rng.choice((0, 0, 1)) if len(buffers) > 1 else 0)
        else:
            ring.add(buffers)
        if rng.random() < 0.15:
            self._spoil(rng, ring)
        driver.set(spec.MMIO_QUEUE_NOTIFY, index)
        if rng.random() < 0.05:
            driver.set(rng.randrange(0, 0x100, 4), number(rng, 32))
            driver.set(spec.MMIO_QUEUE_SEL, index)

    def _spoil(self, rng: random.Random, ring: SplitDriver) -> None:
        match rng.randrange(4):
            case 0:  # a descriptor
                addr = rng.choice((rng.randrange(RAM), RAM - 1, RAM, number(rng, 64)))
                ring.write_desc(
                    rng.randrange(ring.size), addr, rng.choice(SIZES), rng.choice((0, 1, 2, 3, 4, 5, number(rng, 16))),
                    number(rng, 16),
                )  # fmt: skip
            case 1:  # the available index
                self.ram.write(ring.avail + 2, struct.pack("<H", number(rng, 16)))
            case 2:  # a head
                self.ram.write(ring.avail + 4 + 2 * rng.randrange(ring.size), struct.pack("<H", number(rng, 16)))
            case _:  # anywhere at all, the rings among it
                at = rng.randrange(ARENA[0], RAM - 64)
                self.ram.write(at, rng.randbytes(rng.choice((1, 2, 8, 64))))

    def _finish(self, driver: MmioDriver) -> None:
        # Until each queue is served or the device has given up.
        end = time.monotonic() + PATIENCE
        for queue, ring in zip(self.transport.queues, driver.queues, strict=True):
            while queue.index not in self.kind.keeps and queue.ready and not self._broken():
                if queue.last_avail == struct.unpack("<H", self.ram.read(ring.avail + 2, 2))[0]:
                    break
                if self.kind.rewrites:
                    driver.set(spec.MMIO_QUEUE_NOTIFY, queue.index)
                assert time.monotonic() < end, f"queue {queue.index} is not served"
                time.sleep(0)
        driver.set(spec.MMIO_STATUS, 0)
        assert driver.get(spec.MMIO_STATUS) == 0

    def _broken(self) -> bool:
        return bool(self.transport.status & spec.DEVICE_NEEDS_RESET) or not self.transport.status & spec.DRIVER_OK


@kind("blk", blk_request)
def make_blk(stack: contextlib.ExitStack, directory: Path) -> VirtioDevice:
    from virtio.blk.device import Block, Disk

    image = directory / "disk"
    image.write_bytes(bytes(64 * 512))
    return Block(stack.enter_context(Disk(str(image))))


@kind("rng", plain_request)
def make_rng(stack: contextlib.ExitStack, directory: Path) -> VirtioDevice:
    from virtio.rng import Entropy

    return Entropy()


@kind("balloon", balloon_request, rewrites=True)
def make_balloon(stack: contextlib.ExitStack, directory: Path) -> VirtioDevice:
    from virtio.balloon import Balloon

    return Balloon(64, deflate_on_oom=True, stats_polling_interval_s=1, free_page_reporting=True)


@kind("console", console_request, keeps=(0, 2, 4), rewrites=True)
def make_console(stack: contextlib.ExitStack, directory: Path) -> VirtioDevice:
    from virtio.console import Console, ConsolePort

    def take_all(port: ConsolePort) -> None:
        while port.wait_output():
            if not port._input:
                port.feed(b"x")

    device = Console(["second"])
    for port in device.ports:
        reader = threading.Thread(target=take_all, args=(port,))
        reader.start()
        stack.callback(reader.join)
        stack.callback(port.close)
    return device


def guard(address: int) -> None:
    """Make the page at `address` one that nobody may touch, unless it is in use: one step outside RAM then shows."""
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    # PROT_NONE
    libc.mmap(ctypes.c_void_p(address), ctypes.c_size_t(4096), 0, _GUARD, -1, ctypes.c_long(0))


FUSE_INIT = struct.pack("<IIQQIIII", 104, 26, 1, 0, 0, 0, 0, 0) + struct.pack("<IIII48x", 7, 38, 1 << 20, 0xFFFF_FFFF)


@kind("fs", fs_request, first=(1, ([FUSE_INIT], [128])))
def make_fs(stack: contextlib.ExitStack, directory: Path) -> VirtioDevice:
    from virtio.fs.device import ShareDevice

    outside, share = directory / "outside", directory / "share"
    outside.mkdir()
    (outside / "secret").write_text(SECRET)
    (share / "dir").mkdir(parents=True)
    (share / "file").write_bytes(bytes(range(256)) * 64)
    (share / "link").symlink_to("../outside/secret")
    device = ShareDevice("fuzz", str(share))
    stack.callback(device.close)
    stack.callback(check_outside, outside)
    return device


# Connections stay with the device: the queue of received packets keeps its chains, and so may the one of events.
@kind("vsock", vsock_request, keeps=(0, 2))
def make_vsock(stack: contextlib.ExitStack, directory: Path) -> VirtioDevice:
    from virtio.vsock.device import Listener, Vsock

    for port in (52, 53):
        stack.enter_context(unix_server(directory / f"v_{port}"))
    return Vsock(stack.enter_context(Listener(str(directory / "v"))), 3)


# The receive queues keep their chains: filled ones only come back.
@kind("net", net_request_any, keeps=(0, 2))
def make_net(stack: contextlib.ExitStack, directory: Path) -> VirtioDevice:
    from virtio.net.device import Net
    from virtio.net.host import Tap

    enter_namespace(stack)
    tap = Tap("fuzz%d", 2, make=True)
    stack.callback(tap.close)
    tap.configure(address="10.9.8.1/24")
    device = Net(tap, b"\2\x56\0\0\0\2", pcap=str(directory / "pcap"))
    stack.callback(device.close)
    _keep_busy(stack, lambda udp: udp.sendto(bytes(1200), ("10.9.8.255", 9)))
    return device


@kind("net-mmds", mmds_request, keeps=(0, 2))
def make_net_mmds(stack: contextlib.ExitStack, directory: Path) -> VirtioDevice:
    from virtio.net.device import Net
    from virtio.net.host import Tap

    enter_namespace(stack)
    tap = Tap("fuzz%d", 2, make=True)
    stack.callback(tap.close)
    device = Net(tap, b"\2\x56\0\0\0\2", mmds=_mmds(stack))
    stack.callback(device.close)
    stack.callback(_check_mmds, device)
    return device


def _mmds(stack: contextlib.ExitStack) -> Endpoint:
    from vmm.mmds.store import Mmds

    store = Mmds()
    store.put({"x": "value", "large": "y" * 20_000})
    # A random program would never guess where a connection begins.
    stack.enter_context(mock.patch("virtio.net.mmds.os", SimpleNamespace(urandom=bytes)))
    return Endpoint(store.serve, MMDS_ADDRESS)


def _check_mmds(device: VirtioDevice) -> None:
    stats = device.stats
    assert stats["mmds_errors"] == 0
    # Its answers wait for buffers, which a random driver may never give.
    assert not stats["mmds_rx_count"] or stats["mmds_tx_count"] or stats["mmds_connections_created"]


class StreamBackend:
    """A socket pair in place of passt, whose other end sends any lengths, and takes what comes."""

    stream = True
    name = "stream"

    def __init__(self, stack: contextlib.ExitStack) -> None:
        ours, self.theirs = socket.socketpair()
        ours.setblocking(False)
        self.theirs.setblocking(False)
        self.fds = [stack.enter_context(ours).fileno()]
        stack.enter_context(self.theirs)
        self._rng = random.Random(0)
        self._stopped = False

    def stop(self) -> None:
        """Let ``exchange`` wait no more for a device that takes nothing."""
        self._stopped = True

    def exchange(self, _: socket.socket) -> None:
        """Send a frame in two pieces, and take what there is."""
        size = self._rng.choice((60, 1514, 65550, 0, 13, 14, 70000, 20))
        frame = struct.pack(">I", size) + bytes(size)
        cut = self._rng.randrange(len(frame))
        for piece in (frame[:cut], frame[cut:]):
            while piece and not self._stopped:
                with contextlib.suppress(BlockingIOError):
                    piece = piece[self.theirs.send(piece) :]
                with contextlib.suppress(BlockingIOError):
                    self.hear(self.theirs.recv(1 << 20))
                time.sleep(0.0005)

    def hear(self, data: bytes) -> None:
        """Take some of what the device sends."""

    def gone(self) -> str:
        return "the stream has ended"

    def set_offloads(self, features: int) -> None:
        pass

    def set_pairs(self, count: int) -> None:
        pass


@kind("net-stream", net_request_any, keeps=(0,))
def make_net_stream(stack: contextlib.ExitStack, directory: Path) -> VirtioDevice:
    from virtio.net.device import Net

    backend = StreamBackend(stack)
    device = Net(backend, b"\2\x56\0\0\0\2")
    stack.callback(device.close)
    _keep_busy(stack, backend.exchange)
    stack.callback(backend.stop)
    return device


@kind("net-mmds-stream", mmds_request, keeps=(0,))
def make_net_mmds_stream(stack: contextlib.ExitStack, directory: Path) -> VirtioDevice:
    from virtio.net.device import Net

    backend = StreamBackend(stack)
    device = Net(backend, b"\2\x56\0\0\0\2", mmds=_mmds(stack))
    stack.callback(device.close)
    stack.callback(_check_mmds, device)
    _keep_busy(stack, backend.exchange)
    stack.callback(backend.stop)
    return device


class PolicyBackend(StreamBackend):
    """One that keeps each frame that no policy for 9.9.9.9, port 80, lets through."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        super().__init__(stack)
        self.frames = 0
        self.bad: list[bytes] = []
        self._data = bytearray()

    def hear(self, data: bytes) -> None:
        self._data += data
        while len(self._data) >= 4 and len(self._data) >= (end := 4 + int.from_bytes(self._data[:4], "big")):
            frame = bytes(self._data[4:end])
            del self._data[:end]
            self.frames += 1
            if not self._is_good(frame):
                self.bad.append(frame[:80])

    def _is_good(self, frame: bytes) -> bool:
        if frame[12:14] == b"\x08\0":
            dhcp = frame[30:34] == b"\xff" * 4 and frame[23] == 17 and frame[34:38] == b"\0\x44\0\x43"
            allowed = frame[30:34] == b"\x09" * 4 and frame[23] in (6, 17) and frame[36:38] == b"\0\x50"
            return frame[14] == 0x45 and not int.from_bytes(frame[20:22], "big") & 0x3FFF and (dhcp or allowed)
        if frame[12:14] == b"\x86\xdd":
            return frame[20] == 58 and frame[21] == 255 and frame[54] in (133, 135, 136)
        return frame[12:14] == b"\x08\x06"


@kind("net-policy-stream", policy_request, keeps=(0,))
def make_net_policy_stream(stack: contextlib.ExitStack, directory: Path) -> VirtioDevice:
    from virtio.net._policy import Policy
    from virtio.net.device import Net
    from virtio.net.resolver import Resolver

    backend = PolicyBackend(stack)
    allowed = bytes(10) + b"\xff\xff" + b"\x09" * 4, 128, 80, 80
    policy = Policy(b"\x0a\0\2\x0f", b"\x0a\0\2\2", RESOLVER, [allowed])
    resolver = Resolver(policy, RESOLVER, [("x", 0, 0), ("*.y", 0, 0)])
    resolver.servers, resolver.hosts = [], {"x": [b"\x09\x09\x09\x08"]}
    device = Net(backend, b"\2\x56\0\0\0\2", policy=policy, resolver=resolver)
    stack.callback(device.close)

    def check() -> None:
        assert not backend.bad
        assert device.stats["resolver_errors"] == 0

    stack.callback(check)
    _keep_busy(stack, backend.exchange)
    stack.callback(backend.stop)
    return device


def _keep_busy(stack: contextlib.ExitStack, send: Callable[[socket.socket], object]) -> None:
    # A thread that has the host send all the while; the thread of the test made the namespace, which it inherits.
    stop = threading.Event()

    def run() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            udp.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            while not stop.is_set():
                with contextlib.suppress(OSError):
                    send(udp)
                time.sleep(0.001)

    thread = threading.Thread(target=run)
    thread.start()
    stack.callback(thread.join)
    stack.callback(stop.set)


def enter_namespace(stack: contextlib.ExitStack) -> None:
    """Move this thread into a network namespace of its own, until the stack is left."""
    libc = ctypes.CDLL(None, use_errno=True)
    before = stack.enter_context(open("/proc/thread-self/ns/net"))
    if libc.unshare(0x40000000):
        raise OSError(ctypes.get_errno(), "LAYER MISSING: tap: CAP_SYS_ADMIN for a network namespace")
    stack.callback(lambda: libc.setns(before.fileno(), 0x40000000))


def check_outside(outside: Path) -> None:
    """Nothing beside the share was touched."""
    assert [path.name for path in outside.iterdir()] == ["secret"]
    assert (outside / "secret").read_text() == SECRET


def descriptors() -> int:
    """How many this process has open, and will not have closed soon."""
    undertaker.wait()
    return len(os.listdir("/proc/self/fd"))


@contextlib.contextmanager
def unix_server(path: Path) -> Iterator[socket.socket]:
    """A socket that listens and never accepts."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen(100)
        yield server
