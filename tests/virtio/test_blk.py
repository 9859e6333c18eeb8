# SPDX-License-Identifier: Apache-2.0
"""The block device against virtio 1.2 §5.2, a driver that lies and a host whose disk fails."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import os
import random
import select
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.forked import fork
from tests.virtio import blk_driver
from tests.waiting import until
from virtio import spec
from virtio._limiter import RateLimiter
from virtio.blk import _worker as _blk
from virtio.blk import device as blk
from virtio.blk.device import Block, Disk
from virtio.mmio import VirtioMmio
from virtio.testing import Allocator, Buffer, MmioDriver
from vmm import _uring
from vmm.errors import ConfigError
from vmm.irq import IrqLine
from vmm.machine.private_disk import private_copy
from vmm.memory import GuestMemory

SECTORS = 64
NO_STATUS = -1


class Vm:
    """A guest with one disk and a driver that is up."""

    def __init__(
        self,
        path: Path | str,
        ram: GuestMemory,
        allocator: Allocator,
        *,
        read_only: bool = False,
        direct: bool = False,
        discard_block: int = 0,
        **how: Any,
    ) -> None:
        self.log: list[str] = []
        self.ram = ram
        self.irq = IrqLine(5)
        self.disk = Disk(str(path), read_only=read_only, direct=direct, discard_block=discard_block)
        self.device = Block(self.disk, serial="serial-0123456789abcdef", **how)
        self.transport = VirtioMmio(self.device, ram, self.irq, warn=self.log.append)
        self.driver = MmioDriver(self.transport, allocator)

    def close(self) -> None:
        self.transport.close()
        self.disk.close()
        self.irq.close()

    def submit(self, buffers: Sequence[Buffer], *, indirect: bool = True, queue: int = 0) -> int:
        """One chain through the ring; the length in its used entry."""
        ring = self.driver.queues[queue]
        ring.want_interrupt()
        head = ring.add_indirect(buffers) if indirect else ring.add(buffers)
        self.driver.kick(queue)
        while not (done := ring.reap()):
            assert select.select([self.irq.fd], [], [], 30)[0], "no interrupt came"
            self.irq.take()
            ring.want_interrupt()
        assert [h for h, _ in done] == [head]
        return done[0][1]

    def buffer(self, data: bytes | int, *, device_writes: bool = False) -> Buffer:
        return self.driver.queues[0].buffer(data, device_writes=device_writes)

    def header(self, kind: int, sector: int = 0) -> Buffer:
        return self.buffer(blk_driver.HEADER.pack(kind, 0, sector))

    def request(self, kind: int, sector: int = 0, *data: Buffer, **how: Any) -> int:
        """Header, `data`, status byte: the status, 0xee where the device wrote none."""
        status = self.buffer(b"\xee", device_writes=True)
        self.written = self.submit([self.header(kind, sector), *data, status], **how)
        return self.ram.read(status.addr, 1)[0]

    def read(self, sector: int, size: int) -> bytes:
        data = self.buffer(size, device_writes=True)
        assert self.request(blk_driver.T_IN, sector, data) == blk_driver.S_OK
        return self.ram.read(data.addr, size)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(b"".join(bytes([i]) * 512 for i in range(SECTORS)))
    return path


@pytest.fixture(params=["sync", "io_uring"])
def engine(request: pytest.FixtureRequest) -> str:
    if request.param == "io_uring" and (refused := _uring.probe()):
        pytest.skip(f"LAYER MISSING: io_uring: {os.strerror(refused)}")
    return str(request.param)


@pytest.fixture
def boot(image: Path, ram: GuestMemory, allocator: Allocator, engine: str) -> Iterator[Callable[..., Vm]]:
    vms: list[Vm] = []

    def boot(*, without: int = 0, size: int | None = None, path: str | None = None, **how: Any) -> Vm:
        vms.append(Vm(path or image, ram, allocator, **{"engine": engine} | how))
        vms[-1].driver.bring_up(without=without, size=size)
        return vms[-1]

    yield boot
    for vm in vms:
        vm.close()


@pytest.fixture
def vm(boot: Callable[..., Vm]) -> Vm:
    return boot()


def alive(vm: Vm) -> None:
    """The device still serves, and nothing asked for a reset."""
    assert vm.read(3, 512) == bytes([3]) * 512
    assert vm.device.stats["needs_reset"] == 0
    assert vm.driver.get(spec.MMIO_STATUS) == 0xF


# What a correct driver gets


def test_5_2_4_config(vm: Vm) -> None:
    capacity, size_max, seg_max = struct.unpack("<QII", vm.driver.config(0, 16))
    assert (capacity, size_max, seg_max) == (SECTORS, 0, blk.QUEUE_SIZE - 2)
    assert vm.driver.config(20, 4) == (512).to_bytes(4, "little")
    assert spec.BLK_CONFIG.size == 60
    # physical_block_exp, alignment_offset, min_io_size, opt_io_size: 4 KiB, as the host's page cache has it
    assert struct.unpack("<BBHI", vm.driver.config(24, 8)) == (3, 0, 8, 0)
    assert struct.unpack("<H", vm.driver.config(34, 2)) == (1,)
    assert struct.unpack("<5IB", vm.driver.config(36, 21)) == (1 << 22, 1, 8, 1 << 17, 1, 1)


def test_5_2_4_a_host_that_wants_larger_transfers_than_can_be_said(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a RAID with large chunks: min_io_size has 16 bits."""
    monkeypatch.setattr(Disk, "topology", lambda self: (4096, 64 << 20, 128 << 20))
    with Disk(str(image)) as disk:
        *_, least, best, _, _ = struct.unpack_from("<QIIHBBIBBHIBxH", Block(disk).config)
    assert (least, best) == (0xFFFF, 128 << 20 >> 9)


def test_5_2_3_features(boot: Callable[..., Vm]) -> None:
    ring = spec.F_VERSION_1 | spec.F_EVENT_IDX | spec.F_INDIRECT_DESC
    common = ring | spec.BLK_F_FLUSH | spec.BLK_F_SEG_MAX | spec.BLK_F_BLK_SIZE | spec.BLK_F_TOPOLOGY
    first = boot(read_only=True)
    assert first.driver.offered() == common | spec.BLK_F_RO
    first.close()
    common |= spec.BLK_F_DISCARD | spec.BLK_F_WRITE_ZEROES
    second = boot()
    assert second.driver.offered() == common
    second.close()
    assert boot(queues=3).driver.offered() == common | spec.BLK_F_MQ


def test_read(vm: Vm) -> None:
    assert vm.read(5, 1024) == bytes([5]) * 512 + bytes([6]) * 512
    assert vm.written == 1025
    assert vm.read(SECTORS - 1, 512) == bytes([SECTORS - 1]) * 512


def test_write(vm: Vm, image: Path) -> None:
    assert vm.request(blk_driver.T_OUT, 7, vm.buffer(b"w" * 512), vm.buffer(b"x" * 512)) == blk_driver.S_OK
    assert vm.written == 1
    assert image.read_bytes()[7 * 512 : 9 * 512] == b"w" * 512 + b"x" * 512


def test_whole_disk_in_one_request(vm: Vm, image: Path) -> None:
    assert vm.read(0, SECTORS * 512) == image.read_bytes()


def test_2_7_4_1_any_framing(boot: Callable[..., Vm], image: Path) -> None:
    """Header, data and status cut anywhere, direct and indirect."""
    vm = boot()
    header = blk_driver.HEADER.pack(blk_driver.T_OUT, 0, 9)
    message = header + bytes(range(256)) * 4
    for cut in (1, 7, 15, 16, 17, 300, len(message)):
        for indirect in (False, True):
            pieces = [message[i : i + cut] for i in range(0, len(message), cut)]
            if len(pieces) > 200:
                pieces = [*pieces[:100], b"".join(pieces[100:])]
            status = vm.buffer(b"\xee", device_writes=True)
            vm.submit([*map(vm.buffer, pieces), status], indirect=indirect)
            assert vm.ram.read(status.addr, 1) == b"\0"
            assert image.read_bytes()[9 * 512 : 11 * 512] == bytes(range(256)) * 4
    data = vm.buffer(513, device_writes=True)  # the data and the status byte in one descriptor
    assert vm.submit([vm.header(blk_driver.T_IN, 4), data]) == 513
    assert vm.ram.read(data.addr, 513) == bytes([4]) * 512 + b"\0"


def dirty_pages(path: Path) -> int:
    """Pages of the file that are not on its disk yet."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    span, counts = (ctypes.c_uint64 * 2)(0, 0), (ctypes.c_uint64 * 5)()
    with path.open("rb") as file:
        if libc.syscall(451, file.fileno(), span, counts, 0):
            pytest.skip("cachestat(2) is of Linux 6.5")
    return int(counts[1])


def test_flush_is_fdatasync(vm: Vm, image: Path) -> None:
    assert vm.request(blk_driver.T_OUT, 0, vm.buffer(512)) == blk_driver.S_OK
    assert dirty_pages(image) > 0
    assert vm.request(blk_driver.T_FLUSH) == blk_driver.S_OK
    assert dirty_pages(image) == 0
    assert vm.device.stats["flushes"] == 1


def test_5_2_6_2_writes_are_stable_for_a_driver_that_cannot_flush(boot: Callable[..., Vm], image: Path) -> None:
    vm = boot(without=spec.BLK_F_FLUSH)
    assert vm.request(blk_driver.T_OUT, 0, vm.buffer(512)) == blk_driver.S_OK
    assert dirty_pages(image) == 0
    assert vm.request(blk_driver.T_OUT, 8, vm.buffer(512), vm.buffer(512)) == blk_driver.S_OK
    assert dirty_pages(image) == 0
    assert vm.request(blk_driver.T_WRITE_ZEROES, 0, part(vm, 8, 16)) == blk_driver.S_OK
    assert dirty_pages(image) == 0


def test_unsafe_cache_leaves_it_to_the_host(boot: Callable[..., Vm], image: Path) -> None:
    vm = boot(unsafe=True)
    assert not vm.device.features & spec.BLK_F_FLUSH
    assert vm.request(blk_driver.T_OUT, 0, vm.buffer(512)) == blk_driver.S_OK
    assert vm.request(blk_driver.T_FLUSH) == blk_driver.S_OK
    assert dirty_pages(image) > 0


def part(vm: Vm, sector: int, count: int, flags: int = 0) -> Buffer:
    """The segment of a DISCARD or WRITE_ZEROES."""
    return vm.buffer(blk_driver.RANGE.pack(sector, count, flags))


def blocks_of(path: Path) -> int:
    """Bytes that the host has for it."""
    return path.stat().st_blocks * 512


def test_discard_frees_the_hosts_blocks(vm: Vm, image: Path) -> None:
    before = blocks_of(image)
    assert vm.request(blk_driver.T_DISCARD, 0, part(vm, 8, 40)) == blk_driver.S_OK
    assert vm.written == 1
    assert blocks_of(image) <= before - 40 * 512
    assert vm.read(7, 512) + vm.read(48, 512) == bytes([7]) * 512 + bytes([48]) * 512
    assert vm.device.stats["discards"] == 1


@pytest.mark.parametrize(
    ("sector", "count", "gone"),
    [
        (8, 40, range(16, 48)),
        (16, 16, range(16, 32)),
        (17, 30, range(0)),
        (1, 14, range(0)),
        (32, 28, range(32, 60)),
        (32, 27, range(32, 48)),
        (57, 3, range(0)),
    ],
)
def test_discard_of_a_file_that_gives_back_whole_blocks(
    boot: Callable[..., Vm], image: Path, sector: int, count: int, gone: range
) -> None:
    os.truncate(image, 60 * 512)  # its last block is shorter
    vm = boot(discard_block=16 * 512)
    assert spec.BLK_CONFIG.unpack(vm.device.config)[-4] == 16, "discard_sector_alignment"
    assert vm.request(blk_driver.T_DISCARD, 0, part(vm, sector, count)) == blk_driver.S_OK
    assert image.read_bytes() == b"".join(bytes([0 if i in gone else i]) * 512 for i in range(60))


@pytest.mark.parametrize("flags", [0, blk_driver.RANGE_UNMAP])
def test_write_zeroes(vm: Vm, image: Path, flags: int) -> None:
    before = blocks_of(image)
    assert vm.request(blk_driver.T_WRITE_ZEROES, 0, part(vm, 3, 47, flags)) == blk_driver.S_OK
    expected = b"".join(bytes([i if not 3 <= i < 50 else 0]) * 512 for i in range(SECTORS))
    assert image.read_bytes() == expected
    assert (blocks_of(image) < before) == bool(flags), "unmap says whether the blocks may go"
    assert vm.device.stats["write_zeroes"] == 1


@pytest.mark.parametrize("flags", [0, blk_driver.RANGE_UNMAP])
def test_write_zeroes_where_the_file_system_has_no_such_call(boot: Callable[..., Vm], flags: int) -> None:
    """tmpfs has no FALLOC_FL_ZERO_RANGE."""
    with in_memory(1 << 20) as path:
        vm = boot(path=path)
        assert vm.request(blk_driver.T_OUT, 0, vm.buffer(b"x" * 512 * 400)) == blk_driver.S_OK
        assert vm.request(blk_driver.T_WRITE_ZEROES, 0, part(vm, 1, 398, flags)) == blk_driver.S_OK
        assert vm.read(0, 512 * 400) == b"x" * 512 + bytes(512 * 398) + b"x" * 512


@contextlib.contextmanager
def in_memory(size: int) -> Iterator[str]:
    """Path of a file on tmpfs."""
    fd = os.memfd_create("disk")
    os.truncate(fd, size)
    yield f"/proc/self/fd/{fd}"
    os.close(fd)


@pytest.mark.parametrize("kind", [blk_driver.T_DISCARD, blk_driver.T_WRITE_ZEROES, blk_driver.T_OUT])
def test_a_range_costs_its_length(boot: Callable[..., Vm], kind: int) -> None:
    """The host may have to write every byte of it, so the limiter counts as many."""
    vm = boot(limiter=RateLimiter(bandwidth=(20 * 512, 0, 1 << 40)))
    data = vm.buffer(bytes(20 * 512)) if kind == blk_driver.T_OUT else part(vm, 8, 20)
    assert vm.device.limiter.ask(1, 0) == 0
    vm.device.set_rate_limit(bandwidth=(20 * 512, 0, 1 << 40))
    assert vm.request(kind, 0, data) == blk_driver.S_OK
    assert vm.device.limiter.ask(1, 0) > 0


def test_long_requests_are_done_in_pieces(boot: Callable[..., Vm]) -> None:
    with in_memory(16 << 20) as path:
        vm = boot(path=path)
        at = vm.driver.allocator.alloc(2 << 20, 4096)
        vm.ram.write(at, random.Random(1).randbytes(2 << 20))
        pieces = [Buffer(at + 512 * i, (1 << 20) + 512 * i) for i in range(6)]
        expected = b"".join(vm.ram.read(each.addr, each.size) for each in pieces)
        assert vm.request(blk_driver.T_OUT, 3, *pieces) == blk_driver.S_OK
        assert vm.device.stats["bytes_written"] == len(expected)
        assert Path(path).read_bytes()[3 * 512 : 3 * 512 + len(expected)] == expected
        for flags in (0, blk_driver.RANGE_UNMAP):
            assert vm.request(blk_driver.T_WRITE_ZEROES, 0, part(vm, 4, 10_000, flags)) == blk_driver.S_OK
        assert vm.request(blk_driver.T_DISCARD, 0, part(vm, 10_004, 1000)) == blk_driver.S_OK
        start = 11_004 * 512
        assert Path(path).read_bytes()[:start] == bytes(1536) + expected[:512] + bytes(start - 2048)
        assert Path(path).read_bytes()[start : 1536 + len(expected)] == expected[start - 1536 :]
        vm.ram.write(at, bytes(2 << 20))
        assert vm.request(blk_driver.T_IN, 11_004, *[Buffer(at, 1 << 20, True)] * 5) == blk_driver.S_OK
        last = start + (4 << 20)
        assert vm.ram.read(at, 4096) == Path(path).read_bytes()[last : last + 4096]
        assert vm.request(blk_driver.T_IN, 11_004, *[Buffer(at, 1 << 20, True)] * 16) == blk_driver.S_IOERR
        os.truncate(path, 12 << 20)
        assert vm.request(blk_driver.T_IN, 11_004, *[Buffer(at, 1 << 20, True)] * 10) == blk_driver.S_IOERR
        assert vm.log == [f"virtio-blk: {path}: the file ends before byte {start + (10 << 20)}"]


def _zeroings(vm: Vm, count: int) -> dict[int, int]:
    """Ranges to be zeroed, each 64 MiB, which tmpfs has no call for; where their status goes, by head."""
    ring = vm.driver.queues[0]
    header, range_ = vm.header(blk_driver.T_WRITE_ZEROES), part(vm, 0, 1 << 17)
    statuses = {}
    for _ in range(count):
        status = vm.buffer(b"\xee", device_writes=True)
        statuses[ring.add_indirect([header, range_, status])] = status.addr
    vm.driver.kick()
    return statuses


def test_what_nobody_has_begun_is_dropped_at_the_end(boot: Callable[..., Vm]) -> None:
    with in_memory(64 << 20) as path:
        vm = boot(path=path)
        _zeroings(vm, 100)
        vm.driver.set(spec.MMIO_STATUS, 0)
        assert vm.device.stats["write_zeroes"] < 50
        vm.driver.bring_up()
        assert vm.read(3, 512) == bytes(512)


def test_a_stop_between_the_pieces_of_a_request(boot: Callable[..., Vm]) -> None:
    with in_memory(64 << 20) as path:
        vm = boot(path=path)
        assert vm.request(blk_driver.T_OUT, 131_000, vm.buffer(b"x" * 512)) == blk_driver.S_OK
        statuses = _zeroings(vm, 4)
        for _ in range(10):
            vm.transport.stop()
            vm.transport.go_on()
        done: set[int] = set()
        deadline = time.monotonic() + 30
        while len(done) < 4 and time.monotonic() < deadline:
            done |= {head for head, _ in vm.driver.queues[0].reap()}
        assert {vm.ram.read(at, 1) for at in statuses.values()} == {bytes([blk_driver.S_OK])}
        assert done == set(statuses)
        assert not any(Path(path).read_bytes())
        assert vm.device.stats["write_zeroes"] == 4


@pytest.mark.parametrize("threads", [0, 1, 3, 9])
def test_several_queues(boot: Callable[..., Vm], image: Path, threads: int) -> None:
    vm = boot(queues=4, threads=threads)
    for queue in range(4):
        assert vm.request(blk_driver.T_OUT, queue, vm.buffer(bytes([90 + queue]) * 512), queue=queue) == 0
    assert image.read_bytes()[: 4 * 512] == b"".join(bytes([90 + i]) * 512 for i in range(4))
    assert vm.driver.config(34, 2) == b"\4\0"
    number = min(threads or max(1, len(os.sched_getaffinity(0)) // 2), 4)
    names = {Path(f"/proc/self/task/{task}/comm").read_text().strip() for task in os.listdir("/proc/self/task")}
    expected = {f"virtio-blk.{thread}" for thread in range(number)} if number > 1 else {"virtio-blk"}
    assert {name for name in names if name.startswith("virtio-blk")} == expected
    assert vm.device.stats["requests"] == 4


def test_a_full_queue_does_not_keep_the_others_of_its_thread_waiting(boot: Callable[..., Vm]) -> None:
    """A limit lets 150 of 201 requests through. The full queue comes first; the thread takes 128 of it at a time."""
    vm = boot(queues=2, threads=1, limiter=RateLimiter(ops=(150, 0, 1 << 40)))
    vm.transport.stop()
    statuses = []
    for queue, number in ((0, 200), (1, 1)):
        for _ in range(number):
            statuses.append(vm.buffer(b"\xee", device_writes=True))
            vm.driver.queues[queue].add_indirect([vm.header(blk_driver.T_FLUSH), statuses[-1]])
    vm.transport.go_on()
    until(lambda: vm.device.stats["throttled"] > 0)
    until(lambda: vm.ram.read(statuses[-1].addr, 1) == b"\0")
    until(lambda: [vm.ram.read(status.addr, 1) for status in statuses].count(b"\0") == 150)
    vm.device.set_rate_limit(ops=(0, 0, 0))
    until(lambda: all(vm.ram.read(status.addr, 1) == b"\0" for status in statuses))


def test_requests_of_several_queues_are_in_flight_together(boot: Callable[..., Vm]) -> None:
    """More than the thread has room for; each answer is in the ring that its request came from."""
    vm = boot(queues=4, threads=1, direct=True)
    block = vm.disk.block_size
    places = [vm.driver.allocator.alloc(block, block) for _ in range(4)]
    vm.transport.stop()
    heads: list[set[int]] = []
    done: list[list[tuple[int, int]]] = [[], [], [], []]

    def all_done() -> bool:
        for ring, used in zip(vm.driver.queues, done, strict=True):
            used += ring.reap()
        return all(len(used) >= 100 for used in done)

    for queue, place in enumerate(places):
        ring = vm.driver.queues[queue]
        parts = [vm.header(blk_driver.T_IN, queue * block // 512), Buffer(place, block, True)]
        heads.append({ring.add_indirect([*parts, vm.buffer(b"\xee", device_writes=True)]) for _ in range(100)})
    vm.transport.go_on()
    until(all_done)
    for queue, place in enumerate(places):
        assert {head for head, _ in done[queue]} == heads[queue]
        assert {length for _, length in done[queue]} == {block + 1}
        assert vm.ram.read(place, 512) == bytes([queue * block // 512]) * 512


def test_direct_io_takes_aligned_buffers_and_others(boot: Callable[..., Vm], image: Path) -> None:
    vm = boot(direct=True)
    block = vm.disk.block_size
    assert vm.driver.config(20, 4) == block.to_bytes(4, "little")
    size = 4096
    for align in (4096, 1):
        at = vm.driver.allocator.alloc(3 * size, 4096) + (0 if align > 1 else 3)
        payload = os.urandom(2 * size)
        vm.ram.write(at, payload)
        halves = Buffer(at, size + 8), Buffer(at + size + 8, size - 8)
        assert vm.request(blk_driver.T_OUT, 8, *halves) == blk_driver.S_OK
        assert image.read_bytes()[8 * 512 : 8 * 512 + 2 * size] == payload
        vm.ram.write(at, bytes(2 * size))
        back = Buffer(at, 100, True), Buffer(at + 100, 2 * size - 100, True)
        assert vm.request(blk_driver.T_IN, 8, *back) == blk_driver.S_OK
        assert vm.ram.read(at, 2 * size) == payload


def test_get_id(vm: Vm) -> None:
    data = vm.buffer(b"\xff" * 20, device_writes=True)
    assert vm.request(blk_driver.T_GET_ID, 0, data) == blk_driver.S_OK
    assert vm.ram.read(data.addr, 20) == b"serial-0123456789abcdef"[:20]
    assert vm.written == 21


def test_get_id_in_pieces(vm: Vm) -> None:
    parts = [vm.buffer(n, device_writes=True) for n in (3, 10, 30)]
    assert vm.request(blk_driver.T_GET_ID, 0, *parts) == blk_driver.S_OK
    assert b"".join(vm.ram.read(p.addr, p.size) for p in parts)[:20] == b"serial-0123456789abcdef"[:20]
    assert vm.written == 20, "the buffer's end was not written"


def test_many_requests_in_one_notification(vm: Vm) -> None:
    ring = vm.driver.queues[0]
    reads = {}
    for sector in range(40):
        data, status = vm.buffer(512, device_writes=True), vm.buffer(b"\xee", device_writes=True)
        reads[ring.add([vm.header(blk_driver.T_IN, sector), data, status])] = (sector, data)
    ring.want_interrupt(after=39)
    vm.driver.kick()
    done: list[tuple[int, int]] = []
    while len(done) < 40:
        assert select.select([vm.irq.fd], [], [], 30)[0]
        vm.irq.take()
        done += ring.reap()
        ring.want_interrupt()
    for head, written in done:
        sector, data = reads[head]
        assert (written, vm.ram.read(data.addr, 512)) == (513, bytes([sector]) * 512)


def test_interrupts_of_long_writes(boot: Callable[..., Vm], image: Path) -> None:
    """One when as many are done as still wait: after two of four, one of the other two, and the last."""
    os.truncate(image, 1 << 20)
    vm = boot(without=spec.F_EVENT_IDX)
    ring = vm.driver.queues[0]
    data = vm.buffer(1 << 18)
    counts = []
    for _ in range(20):
        wanted = vm.device.stats["writes"] + 4
        for _ in range(4):
            ring.add([vm.header(blk_driver.T_OUT), data, vm.buffer(1, device_writes=True)])
        ring.want_interrupt()
        vm.driver.kick()
        while vm.device.stats["writes"] < wanted:
            time.sleep(0.001)
        vm.transport.stop()  # the last interrupt has come
        assert len(ring.reap()) == 4
        counts.append(int.from_bytes(os.read(vm.irq.fd, 8), "little"))
        if counts[-1] == 3:
            break
        vm.transport.go_on()
        vm.irq.take()  # it gives one again
    assert counts[-1] == 3, "of io_uring, what ends late has an interrupt of its own, but not each time"
    assert len(counts) == 1 or vm.device.engine == "io_uring"


def test_capacity_change_at_run_time(vm: Vm, image: Path) -> None:
    os.truncate(image, 2 * SECTORS * 512)
    assert vm.request(blk_driver.T_IN, SECTORS, vm.buffer(512, device_writes=True)) == blk_driver.S_IOERR
    vm.driver.take_interrupt()
    generation = vm.driver.get(spec.MMIO_CONFIG_GENERATION)
    vm.device.set_capacity(2 * SECTORS * 512)
    assert vm.driver.take_interrupt() == spec.INTERRUPT_CONFIG
    assert vm.driver.get(spec.MMIO_CONFIG_GENERATION) != generation
    assert vm.driver.config(0, 8) == (2 * SECTORS).to_bytes(8, "little")
    assert vm.read(SECTORS, 512) == bytes(512)


@pytest.mark.parametrize("size", [0, -512, 511, 513])
def test_capacity_that_no_disk_has(vm: Vm, size: int) -> None:
    with pytest.raises(ConfigError, match="multiple of 512"):
        vm.device.set_capacity(size)


def test_a_disk_that_is_being_replaced_is_closed_after_that(vm: Vm, tmp_path: Path) -> None:
    # Or the other file would take the place of whatever has its descriptor's number by then.
    other = tmp_path / "other.img"
    other.write_bytes(bytes(512))
    disk = vm.disk
    open_then: list[int] = []

    class Changing:
        def change(self, *_: object) -> None:
            closing.start()
            closing.join(0.2)
            open_then.append(disk.fd)

    closing = threading.Thread(target=disk.close)
    vm.device.backend = Changing()  # type: ignore[assignment]  # a stand-in, which looks meanwhile
    vm.device.replace(str(other))
    closing.join()
    assert open_then[0] >= 0 and disk.fd == -1
    with pytest.raises(ConfigError, match="is closed"):
        vm.device.replace(str(other))


def test_another_file_at_run_time(vm: Vm, image: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.img"
    other.write_bytes(b"o" * 512 * 2 * SECTORS)
    vm.device.replace(str(other))
    assert vm.driver.take_interrupt() == spec.INTERRUPT_CONFIG
    assert vm.driver.config(0, 8) == (2 * SECTORS).to_bytes(8, "little")
    assert vm.read(2 * SECTORS - 1, 512) == b"o" * 512
    assert vm.request(blk_driver.T_OUT, 1, vm.buffer(b"n" * 512)) == blk_driver.S_OK
    assert other.read_bytes()[512:1024] == b"n" * 512
    Disk(str(image)).close()  # its lock is gone
    assert problem(other).startswith("is in use by another VM")
    vm.device.replace(str(image))
    assert vm.driver.config(0, 8) == SECTORS.to_bytes(8, "little")
    assert vm.request(blk_driver.T_IN, SECTORS, vm.buffer(512, device_writes=True)) == blk_driver.S_IOERR
    assert vm.read(3, 512) == bytes([3]) * 512


@pytest.mark.parametrize("said", [None, "raw"])
def test_another_file_that_looks_like_qcow2(image: Path, tmp_path: Path, said: str | None) -> None:
    """It is taken where the disk was said to be raw, as at the start."""
    other = tmp_path / "other.img"
    other.write_bytes(b"QFI\xfb".ljust(1024))
    with Disk(str(image), image_format=said) as disk:
        device = Block(disk)
        if said is None:
            with pytest.raises(ConfigError, match="is a qcow2 image"):
                device.replace(str(other))
        else:
            device.replace(str(other))
            assert device.capacity == 2


def test_the_same_file_grown_at_run_time(vm: Vm, image: Path) -> None:
    os.truncate(image, 3 * SECTORS * 512)
    vm.device.replace(str(image))
    assert vm.driver.config(0, 8) == (3 * SECTORS).to_bytes(8, "little")
    assert vm.read(3 * SECTORS - 1, 512) == bytes(512)
    assert problem(image).startswith("is in use by another VM")


def test_a_change_between_many_requests_loses_no_place_for_one(vm: Vm, image: Path) -> None:
    """A queue has 256 places for requests. Each must be free again, however often the disk changes meanwhile."""
    ring = vm.driver.queues[0]
    status = vm.buffer(1, device_writes=True)
    read = [vm.header(blk_driver.T_IN), vm.buffer(512, device_writes=True), status]
    write = [vm.header(blk_driver.T_OUT), vm.buffer(image.read_bytes()), status]  # takes long enough for a change
    chains = [read, write] * 15
    end = threading.Event()

    def change() -> None:
        while not end.is_set():
            vm.device.backend.change(vm.device._workers, SECTORS * 512)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(500):
            for chain in chains:
                ring.add(chain)
            vm.driver.set(spec.MMIO_QUEUE_NOTIFY, 0)
            left, limit = len(chains), time.monotonic() + 30
            while left:
                select.select([vm.irq.fd], [], [], 0.001)
                vm.irq.take()
                left -= len(ring.reap())
                assert time.monotonic() < limit, f"{left} requests were not served"
    finally:
        end.set()
        thread.join()
    alive(vm)


def test_a_file_that_is_no_disk_changes_nothing(vm: Vm, tmp_path: Path) -> None:
    (tmp_path / "odd").write_bytes(bytes(100))
    for path in (tmp_path / "odd", tmp_path / "none", tmp_path):
        with pytest.raises(ConfigError):
            vm.device.replace(str(path))
    alive(vm)


@pytest.mark.parametrize("threads", [1, 2])
def test_files_that_change_while_the_driver_reads(
    boot: Callable[..., Vm], image: Path, tmp_path: Path, threads: int
) -> None:
    """Each read is of one file or the other, and none is beyond the end of the smaller."""
    vm = boot(queues=2, threads=threads)
    small = tmp_path / "small.img"
    small.write_bytes(b"s" * 512 * 8)
    stop = threading.Event()

    def change() -> None:
        while not stop.is_set():
            vm.device.replace(str(small))
            vm.device.replace(str(image))

    thread = threading.Thread(target=change)
    thread.start()
    try:
        # Each queue in memory of its own: ThreadSanitizer does not see that the driver orders the two threads.
        starts = [vm.driver.allocator.alloc(4096) for _ in range(2)]
        for turn in range(400):
            vm.driver.allocator.next = starts[turn % 2]
            data = vm.buffer(512, device_writes=True)
            assert vm.request(blk_driver.T_IN, 5, data, queue=turn % 2) == blk_driver.S_OK
            assert vm.ram.read(data.addr, 512) in (bytes([5]) * 512, b"s" * 512)
            data = vm.buffer(b"\xee" * 512, device_writes=True)
            if vm.request(blk_driver.T_IN, 20, data, queue=turn % 2) == blk_driver.S_OK:
                assert vm.ram.read(data.addr, 512) == bytes([20]) * 512
    finally:
        stop.set()
        thread.join()
    assert vm.log == [], "no request reached a file that is too short for it"


# Block devices


@contextlib.contextmanager
def loop_device(tmp_path: Path, *options: str) -> Iterator[tuple[str, Path]]:
    """A block device, and the file behind it."""
    if os.geteuid() or not os.path.exists("/dev/loop-control") or not shutil.which("losetup"):
        pytest.skip("LAYER MISSING: block devices: no loop device for this user")
    backing = tmp_path / "backing"
    backing.write_bytes(b"".join(bytes([i % 251]) * 4096 for i in range(256)))
    made = subprocess.run(["losetup", *options, "--find", "--show", backing], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"LAYER MISSING: block devices: {made.stderr.strip()}")
    try:
        yield made.stdout.strip(), backing
    finally:
        subprocess.run(["losetup", "--detach", made.stdout.strip()], check=True)


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    with loop_device(tmp_path) as device:
        yield device


def test_a_direct_disk_is_copied_to_another_file_system(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(b"12345678" * 8192)
    os.truncate(tmp_path / "disk", 1 << 20)
    with Disk(str(tmp_path / "disk"), direct=True) as disk:
        copy = private_copy(disk.fd, "/dev/shm/disk")
        assert os.pread(copy, 1 << 21, 0) == b"12345678" * 8192 + bytes((1 << 20) - 65536)
        os.close(copy)


@pytest.mark.parametrize("direct", [False, True])
def test_block_device(boot: Callable[..., Vm], loop: tuple[str, Path], direct: bool) -> None:
    device, backing = loop
    vm = boot(path=device, direct=direct)
    assert vm.device.capacity == 2048
    assert vm.driver.offered() & spec.BLK_F_DISCARD
    at = vm.driver.allocator.alloc(8192, 4096)
    vm.ram.write(at, b"w" * 4096)
    assert vm.request(blk_driver.T_OUT, 8, Buffer(at, 4096)) == blk_driver.S_OK
    assert vm.request(blk_driver.T_FLUSH) == blk_driver.S_OK
    assert backing.read_bytes()[4096:8192] == b"w" * 4096
    assert vm.request(blk_driver.T_IN, 80, Buffer(at, 4096, True)) == blk_driver.S_OK
    assert vm.ram.read(at, 4096) == bytes([10]) * 4096
    before = blocks_of(backing)
    assert vm.request(blk_driver.T_DISCARD, 0, part(vm, 1024, 1024)) == blk_driver.S_OK
    assert blocks_of(backing) <= before - (1 << 19)
    for flags in (0, blk_driver.RANGE_UNMAP):
        assert vm.request(blk_driver.T_WRITE_ZEROES, 0, part(vm, 80 + 8 * flags, 8, flags)) == blk_driver.S_OK
    assert vm.request(blk_driver.T_FLUSH) == blk_driver.S_OK
    assert backing.read_bytes()[80 * 512 : 96 * 512] == bytes(8192)
    os.truncate(backing, 1 << 18)
    data = Buffer(at, 4096, True)
    assert vm.request(blk_driver.T_IN, 1000, data) == blk_driver.S_IOERR
    assert vm.log == [f"virtio-blk: {device}: {os.strerror(errno.EIO)}"]


@pytest.mark.parametrize("direct", [False, True])
def test_a_copy_of_a_block_device(loop: tuple[str, Path], direct: bool) -> None:
    """What each fork of a machine makes: lseek(2) finds no holes in a block device, and refuses to look.

    Beside it, in /dev, there is only memory.
    """
    device, backing = loop
    with Disk(device, direct=direct) as disk:
        copy = private_copy(disk.fd, device)
    try:
        assert not os.readlink(f"/proc/self/fd/{copy}").startswith("/dev/")
        assert os.pread(copy, 1 << 21, 0) == backing.read_bytes()
    finally:
        os.close(copy)


@pytest.mark.parametrize("size", [1 << 21, (3 << 20) + 512])
def test_a_copy_on_another_file_system(tmp_path: Path, size: int) -> None:
    """Where copy_file_range(2) does not help, a disk that bypasses the page cache is read by whole blocks."""
    if os.stat("/dev/shm").st_dev == os.stat(tmp_path).st_dev:
        pytest.skip("LAYER MISSING: copies: no second file system")
    path = tmp_path / "disk"
    data = os.urandom(1 << 20) + bytes(size - (1 << 20) - 512) + b"e" * 512
    path.write_bytes(data)
    try:
        disk = Disk(str(path), direct=True)
    except ConfigError:
        pytest.skip("LAYER MISSING: copies: a file system without direct I/O")
    with disk:
        copy = private_copy(disk.fd, "/dev/shm/disk")
    try:
        assert os.pread(copy, 1 << 23, 0) == data
    finally:
        os.close(copy)


def test_a_read_only_block_device_is_not_opened_for_writing(tmp_path: Path) -> None:
    # The kernel lets it be opened, and fails each write.
    with loop_device(tmp_path, "--read-only") as (device, _):
        with pytest.raises(ConfigError, match=f"disk {device}: is a read-only block device; add ,ro"):
            Disk(device)
        with Disk(device, read_only=True) as disk:
            assert Block(disk).features & spec.BLK_F_RO


@pytest.mark.parametrize("direct", [False, True])
def test_a_block_device_of_4_kib_sectors(boot: Callable[..., Vm], tmp_path: Path, direct: bool) -> None:
    with loop_device(tmp_path, "--sector-size", "4096") as (device, backing):
        vm = boot(path=device, direct=direct)
        try:
            assert vm.driver.config(20, 4) == (4096).to_bytes(4, "little"), "what the guest's requests are multiples of"
            assert vm.device.capacity == 2048
            before = blocks_of(backing)
            assert vm.request(blk_driver.T_DISCARD, 0, part(vm, 1024, 1024)) == blk_driver.S_OK
            assert blocks_of(backing) < before
            for flags in (0, blk_driver.RANGE_UNMAP):
                assert vm.request(blk_driver.T_WRITE_ZEROES, 0, part(vm, 80 + 8 * flags, 8, flags)) == blk_driver.S_OK
            assert vm.request(blk_driver.T_FLUSH) == blk_driver.S_OK
            assert backing.read_bytes()[80 * 512 : 96 * 512] == bytes(8192)
            assert vm.request(blk_driver.T_WRITE_ZEROES, 0, part(vm, 1, 1)) == blk_driver.S_IOERR
        finally:
            vm.close()


# Engines


def test_a_kernel_without_io_uring(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_uring, "probe", lambda: errno.EPERM)
    with Disk(str(image)) as disk:
        assert Block(disk).engine == "sync"
        with pytest.raises(ConfigError) as error:
            Block(disk, engine="io_uring")
    expected = "engine io_uring: the kernel refuses io_uring (Operation not permitted); use sync"
    assert str(error.value) == expected


NO_RING = """
import sys
from pathlib import Path
from virtio.testing import Allocator
from tests.virtio import blk_driver
from tests.virtio.test_blk import Vm, alive
from vmm import _uring
from vmm.memory import GuestMemory
assert _uring.stock(1) == _uring.stock(5) == 1
with GuestMemory(1 << 20) as ram:
    disks = zip(sys.argv[1:], (0x1000, 0x80000))
    vms = [Vm(path, ram, Allocator(base, 0x40000), engine="io_uring") for path, base in disks]
    for vm in vms:
        vm.driver.bring_up()
        vm.driver.bring_up()
        assert vm.request(blk_driver.T_OUT, 9, vm.buffer(b"n" * 512)) == blk_driver.S_OK
        alive(vm)
        print(vm.log)
    for vm in vms:
        vm.close()
    vm = Vm(sys.argv[1], ram, Allocator(0x1000, 0x40000), engine="io_uring")
    vm.driver.bring_up()
    print(vm.log)  # the ring came back
    vm.close()
"""


def test_a_thread_that_gets_no_ring_goes_on_without(image: Path, tmp_path: Path) -> None:
    """Behind a filter there are as many rings as were made before it; each is kept over resets, and given back."""
    if refused := _uring.probe():
        pytest.skip(f"LAYER MISSING: io_uring: {os.strerror(refused)}")
    other = tmp_path / "other"
    other.write_bytes(image.read_bytes())
    root = Path(__file__).parents[2]
    told = subprocess.run(
        [sys.executable, "-c", NO_RING, str(image), str(other)], capture_output=True, text=True, cwd=root, timeout=60
    )
    assert told.returncode == 0, told.stderr
    without = f"['virtio-blk: no io_uring, goes on with system calls: {os.strerror(errno.EMFILE)}']"
    assert told.stdout.splitlines() == ["[]", without, "[]"]
    assert [path.read_bytes()[9 * 512 : 10 * 512] for path in (image, other)] == [b"n" * 512] * 2


def test_a_device_that_was_attached_before_keeps_nothing_of_it(image: Path, ram: GuestMemory) -> None:
    with Disk(str(image)) as disk, contextlib.closing(IrqLine(5)) as irq:
        device = Block(disk)
        for _ in range(3):
            VirtioMmio(device, ram, irq).close()
        gc.collect()
        workers = [each for each in gc.get_objects() if isinstance(each, _blk.BlockWorker) and each.device is device]
        assert len(workers) == 1


def test_the_engine_follows_the_file(image: Path) -> None:
    with Disk(str(image)) as disk:
        can = disk.can_wait_aside() and not _uring.probe()
        assert Block(disk).engine == ("io_uring" if can else "sync")
    with in_memory(4096) as path, Disk(path) as disk:
        assert disk.can_wait_aside() or Block(disk).engine == "sync"


def test_reset_waits_for_what_is_under_way(boot: Callable[..., Vm], image: Path) -> None:
    """After a reset the driver's memory is its own again: no byte arrives late."""
    vm = boot(direct=True)
    for _ in range(20):
        ring = vm.driver.queues[0]
        data = [vm.driver.allocator.alloc(4096, 4096) for _ in range(16)]
        for at in data:
            status = vm.buffer(1, device_writes=True)
            ring.add_indirect([vm.header(blk_driver.T_IN, 8), Buffer(at, 4096, True), status])
        vm.driver.kick()
        vm.driver.set(spec.MMIO_STATUS, 0)
        for at in data:
            vm.ram.write(at, b"\xaa" * 4096)
        time.sleep(0.002)
        for at in data:
            assert vm.ram.read(at, 4096) == b"\xaa" * 4096
        vm.driver.allocator.next = 0x1000
        vm.driver.bring_up()
    alive(vm)


def test_more_requests_than_there_are_places(boot: Callable[..., Vm]) -> None:
    """A driver that lies about its chains makes the same one available again and again, while it is under way."""
    vm = boot()
    ring = vm.driver.queues[0]
    data, status = vm.buffer(512, device_writes=True), vm.buffer(b"\xee", device_writes=True)
    ring.write_chain([vm.header(blk_driver.T_IN, 3), data, status], [0, 1, 2])
    ring.want_interrupt(after=5 * ring.size - 1)
    for _ in range(5):
        before = vm.device.stats["requests"]
        for _ in range(ring.size):
            ring.offer(0)
        vm.driver.set(spec.MMIO_QUEUE_NOTIFY, 0)
        deadline = time.monotonic() + 30
        while vm.device.stats["requests"] < before + ring.size and time.monotonic() < deadline:
            time.sleep(0.001)
    assert vm.device.stats["requests"] == 5 * ring.size
    assert vm.device.stats["needs_reset"] == 0
    assert vm.ram.read(data.addr, 512) == bytes([3]) * 512


# Rate limits


@pytest.mark.parametrize(
    ("limit", "size", "expected"),
    [
        pytest.param({"ops": (100, 0, 100)}, 512, 1000, id="1000 operations a second"),
        pytest.param({"bandwidth": (1 << 18, 0, 100)}, 4096, 640, id="2.5 MiB a second"),
    ],
)
def test_rate_limit_within_a_tenth(
    boot: Callable[..., Vm], limit: dict[str, tuple[int, int, int]], size: int, expected: int
) -> None:
    """Shared by the queues; what is counted is requests, and the clock is that of the limiter."""
    vm = boot(queues=2, threads=2, limiter=RateLimiter(**limit))
    heads = [
        ring.add_indirect(
            [vm.header(blk_driver.T_IN), vm.buffer(size, device_writes=True), vm.buffer(1, device_writes=True)]
        )
        for ring in vm.driver.queues
    ]

    def measure() -> float:
        start = time.monotonic()
        while not vm.device.limiter.ask(size):  # the bucket is full at first, and once we were kept from asking
            pass
        first = vm.device.stats["requests"]
        while time.monotonic() < start + 0.7:
            for index, ring in enumerate(vm.driver.queues):
                for _ in ring.reap():
                    ring.free.pop()
                    ring.offer(heads[index], [heads[index]])
                vm.driver.set(spec.MMIO_QUEUE_NOTIFY, index)
            time.sleep(0.0005)
        return (vm.device.stats["requests"] - first) / (time.monotonic() - start) / expected

    # A busy machine may keep this driver from asking, never the device from giving too much.
    rates: list[float] = []
    while not rates or (max(rates) < 0.9 and len(rates) < 8):
        rates.append(measure())
    assert 0.9 <= max(rates) <= 1.1, rates
    assert vm.device.stats["throttled"] > 0


def test_a_limit_is_changed_while_a_request_waits_for_it(boot: Callable[..., Vm]) -> None:
    vm = boot(limiter=RateLimiter(ops=(1, 0, 1 << 40)))  # one operation in 35 years
    assert vm.request(blk_driver.T_FLUSH) == blk_driver.S_OK
    timer = threading.Timer(0.2, lambda: vm.device.set_rate_limit(ops=(0, 0, 0)))
    timer.start()
    assert vm.request(blk_driver.T_FLUSH) == blk_driver.S_OK
    timer.join()
    assert vm.device.stats["throttled"] >= 1


@pytest.mark.parametrize("threads", [1, 2])
def test_a_limit_is_changed_though_the_driver_uses_one_queue_of_two(boot: Callable[..., Vm], threads: int) -> None:
    vm = boot(queues=2, threads=threads)
    vm.driver.set(spec.MMIO_QUEUE_SEL, 1)
    vm.driver.set(spec.MMIO_QUEUE_READY, 0)
    vm.device.set_rate_limit(ops=(0, 0, 0))
    time.sleep(0.05)
    alive(vm)


def test_reset_while_a_request_waits_for_the_limit(boot: Callable[..., Vm]) -> None:
    vm = boot(limiter=RateLimiter(ops=(1, 0, 1 << 40)))
    assert vm.request(blk_driver.T_FLUSH) == blk_driver.S_OK
    status = vm.buffer(b"\xee", device_writes=True)
    vm.driver.queues[0].add([vm.header(blk_driver.T_FLUSH), status])
    vm.driver.kick()
    vm.driver.bring_up()
    assert vm.ram.read(status.addr, 1) == b"\xee"
    vm.device.set_rate_limit(ops=(0, 0, 0))
    alive(vm)


# hostile-guest: block. Each request comes back, with a status where there is room for one.


def refused(vm: Vm, status: int, expected: int = blk_driver.S_IOERR) -> None:
    assert status == expected
    assert vm.device.stats["bad_requests"] == 1
    alive(vm)


def test_header_write_only(vm: Vm) -> None:
    header = vm.buffer(b"\xaa" * 16, device_writes=True)
    status = vm.buffer(b"\xee", device_writes=True)
    assert vm.submit([header, vm.buffer(512, device_writes=True), status]) == 0
    assert vm.ram.read(header.addr, 16) == b"\xaa" * 16
    refused(vm, vm.ram.read(status.addr, 1)[0])


@pytest.mark.parametrize("size", [1, 8, 15])
def test_header_short(vm: Vm, size: int) -> None:
    status = vm.buffer(b"\xee", device_writes=True)
    assert vm.submit([vm.buffer(size), status]) == 1
    refused(vm, vm.ram.read(status.addr, 1)[0])


def test_header_alone_has_no_data_and_no_status(vm: Vm) -> None:
    assert vm.submit([vm.header(blk_driver.T_IN)]) == 0
    assert vm.device.stats["bad_requests"] == 1
    alive(vm)


@pytest.mark.parametrize("kind", [blk_driver.T_IN, blk_driver.T_OUT, blk_driver.T_GET_ID])
def test_no_data(vm: Vm, kind: int) -> None:
    refused(vm, vm.request(kind))


def test_no_status(vm: Vm, image: Path) -> None:
    assert vm.submit([vm.header(blk_driver.T_OUT, 1), vm.buffer(b"n" * 512)]) == 0
    assert image.read_bytes()[512:1024] == bytes([1]) * 512, "a write that cannot be answered is not done"
    assert vm.device.stats["bad_requests"] == 1
    alive(vm)


def test_status_read_only(vm: Vm) -> None:
    status = vm.buffer(b"\xee")
    assert vm.submit([vm.header(blk_driver.T_OUT, 1), vm.buffer(512), status]) == 0
    assert vm.ram.read(status.addr, 1) == b"\xee"
    alive(vm)


def test_status_zero_length(vm: Vm) -> None:
    status = vm.buffer(b"\xee", device_writes=True)._replace(size=0)
    assert vm.submit([vm.header(blk_driver.T_FLUSH), status]) == 0
    assert vm.ram.read(status.addr, 1) == b"\xee"
    assert vm.device.stats["flushes"] == 0
    alive(vm)


@pytest.mark.parametrize("kind", [blk_driver.T_IN, blk_driver.T_GET_ID])
def test_data_in_the_wrong_direction_for_in_and_get_id(vm: Vm, kind: int) -> None:
    refused(vm, vm.request(kind, 0, vm.buffer(b"d" * 512)))


def test_data_in_the_wrong_direction_for_out(vm: Vm) -> None:
    refused(vm, vm.request(blk_driver.T_OUT, 0, vm.buffer(b"d" * 512, device_writes=True)))


@pytest.mark.parametrize("kind", [blk_driver.T_IN, blk_driver.T_OUT])
def test_data_in_both_directions(vm: Vm, kind: int) -> None:
    data = vm.buffer(512), vm.buffer(512, device_writes=True)
    refused(vm, vm.request(kind, 0, *data))


@pytest.mark.parametrize("size", [1, 511, 513, 1000])
@pytest.mark.parametrize("kind", [blk_driver.T_IN, blk_driver.T_OUT])
def test_length_not_a_multiple_of_512(vm: Vm, kind: int, size: int) -> None:
    refused(vm, vm.request(kind, 0, vm.buffer(size, device_writes=kind == blk_driver.T_IN)))


@pytest.mark.parametrize("kind", [blk_driver.T_IN, blk_driver.T_OUT])
@pytest.mark.parametrize(
    ("sector", "count"),
    [
        pytest.param(SECTORS, 1, id="beyond"),
        pytest.param(SECTORS + 5, 1, id="far beyond"),
        pytest.param(SECTORS - 1, 2, id="crossing"),
        pytest.param(0, SECTORS + 1, id="larger"),
        pytest.param((1 << 55) - 1, 1, id="overflow in bytes"),
        pytest.param((1 << 64) - 1, 2, id="overflow in sectors"),
        pytest.param(1 << 63, 1, id="sign"),
    ],
)
def test_sector_beyond_the_end_crossing_it_or_overflowing(
    vm: Vm, image: Path, kind: int, sector: int, count: int
) -> None:
    before = image.read_bytes()
    refused(vm, vm.request(kind, sector, vm.buffer(512 * count, device_writes=kind == blk_driver.T_IN)))
    assert image.read_bytes() == before


@pytest.mark.parametrize("kind", [2, 3, 5, 7, 9, 10, 12, 14, 0x8000_0000, 0xFFFF_FFFF])
def test_unknown_type(vm: Vm, kind: int) -> None:
    refused(vm, vm.request(kind, 0, vm.buffer(16)), blk_driver.S_UNSUPP)


@pytest.mark.parametrize("size", [1, 19])
def test_get_id_under_20_bytes(vm: Vm, size: int) -> None:
    refused(vm, vm.request(blk_driver.T_GET_ID, 0, vm.buffer(size, device_writes=True)))


@pytest.mark.parametrize("device_writes", [False, True])
def test_flush_with_data(vm: Vm, device_writes: bool) -> None:
    refused(vm, vm.request(blk_driver.T_FLUSH, 0, vm.buffer(512, device_writes=device_writes)))
    assert vm.device.stats["flushes"] == 0


def test_write_to_a_read_only_disk(boot: Callable[..., Vm], image: Path) -> None:
    before = image.read_bytes()
    vm = boot(read_only=True)
    refused(vm, vm.request(blk_driver.T_OUT, 0, vm.buffer(b"w" * 512)))
    assert image.read_bytes() == before
    assert vm.request(blk_driver.T_FLUSH) == blk_driver.S_OK


RANGES = [blk_driver.T_DISCARD, blk_driver.T_WRITE_ZEROES]


@pytest.mark.parametrize("kind", RANGES)
@pytest.mark.parametrize(
    ("sector", "count"),
    [
        pytest.param(0, 0, id="empty"),
        pytest.param(SECTORS, 1, id="beyond"),
        pytest.param(SECTORS - 1, 2, id="crossing"),
        pytest.param(0, 0xFFFF_FFFF, id="larger"),
        pytest.param((1 << 64) - 1, 2, id="overflow in sectors"),
        pytest.param((1 << 55) - 1, 1, id="overflow in bytes"),
    ],
)
def test_range_beyond_the_end(vm: Vm, image: Path, kind: int, sector: int, count: int) -> None:
    before = image.read_bytes()
    refused(vm, vm.request(kind, 0, part(vm, sector, count)))
    assert image.read_bytes() == before


@pytest.mark.parametrize("kind", RANGES)
@pytest.mark.parametrize("size", [1, 8, 15, 17, 31])
def test_range_malformed(vm: Vm, kind: int, size: int) -> None:
    refused(vm, vm.request(kind, 0, vm.buffer((blk_driver.RANGE.pack(0, 1, 0) * 2)[:size])))


@pytest.mark.parametrize("kind", RANGES)
def test_range_missing(vm: Vm, kind: int) -> None:
    refused(vm, vm.request(kind))


@pytest.mark.parametrize("kind", RANGES)
def test_too_many_ranges(vm: Vm, image: Path, kind: int) -> None:
    before = image.read_bytes()
    refused(vm, vm.request(kind, 0, part(vm, 0, 1), part(vm, 5, 1)))
    assert image.read_bytes() == before


@pytest.mark.parametrize("kind", RANGES)
def test_range_in_the_wrong_direction(vm: Vm, kind: int) -> None:
    refused(vm, vm.request(kind, 0, vm.buffer(16, device_writes=True)))


@pytest.mark.parametrize("kind", RANGES)
def test_range_longer_than_the_device_takes(boot: Callable[..., Vm], kind: int) -> None:
    with in_memory(1 << 40) as path:
        vm = boot(path=path)
        most = {
            blk_driver.T_DISCARD: _blk.MAX_DISCARD_SECTORS,
            blk_driver.T_WRITE_ZEROES: _blk.MAX_WRITE_ZEROES_SECTORS,
        }
        assert vm.request(kind, 0, part(vm, 0, most[kind] + 1)) == blk_driver.S_IOERR
        assert vm.request(kind, 0, part(vm, 0, most[kind], kind == blk_driver.T_WRITE_ZEROES)) == blk_driver.S_OK


@pytest.mark.parametrize("kind", RANGES)
@pytest.mark.parametrize("flags", [2, 3, 0x8000_0000])
def test_5_2_6_2_unknown_flags(vm: Vm, kind: int, flags: int) -> None:
    refused(vm, vm.request(kind, 0, part(vm, 0, 1, flags)), blk_driver.S_UNSUPP)


def test_5_2_6_2_discard_with_unmap(vm: Vm) -> None:
    refused(vm, vm.request(blk_driver.T_DISCARD, 0, part(vm, 0, 1, blk_driver.RANGE_UNMAP)), blk_driver.S_UNSUPP)


@pytest.mark.parametrize("kind", RANGES)
def test_range_that_was_not_negotiated(boot: Callable[..., Vm], image: Path, kind: int) -> None:
    before = image.read_bytes()
    vm = boot(without=spec.BLK_F_DISCARD | spec.BLK_F_WRITE_ZEROES)
    refused(vm, vm.request(kind, 0, part(vm, 0, 1)), blk_driver.S_UNSUPP)
    assert image.read_bytes() == before


@pytest.mark.parametrize("kind", RANGES)
def test_range_of_a_read_only_disk(boot: Callable[..., Vm], image: Path, kind: int) -> None:
    before = image.read_bytes()
    vm = boot(read_only=True)
    refused(vm, vm.request(kind, 0, part(vm, 0, 1)), blk_driver.S_UNSUPP)  # it is not even offered
    assert image.read_bytes() == before


# hostile-guest: the backing file


def failed(vm: Vm, status: int, message: str) -> None:
    assert status == blk_driver.S_IOERR
    assert vm.device.stats["io_errors"] == 1
    assert vm.log == [f"virtio-blk: {vm.disk.path}: {message}"]


def test_backing_file_truncated(vm: Vm, image: Path) -> None:
    os.truncate(image, 10 * 512)
    failed(
        vm,
        vm.request(blk_driver.T_IN, 20, vm.buffer(512, device_writes=True)),
        "the file ends before byte 10752",
    )
    assert vm.request(blk_driver.T_IN, 9, vm.buffer(1024, device_writes=True)) == blk_driver.S_IOERR
    assert vm.written == 0
    alive(vm)


def test_backing_file_deleted(vm: Vm, image: Path) -> None:
    image.unlink()
    alive(vm)
    assert vm.request(blk_driver.T_OUT, 1, vm.buffer(b"d" * 512)) == blk_driver.S_OK
    assert vm.read(1, 512) == b"d" * 512


def stand_in(vm: Vm, path: str) -> None:
    """Put another open file in the place of the disk's."""
    with open(path, "r+b", buffering=0) as other:
        os.dup2(other.fileno(), vm.disk.fd, inheritable=False)


@pytest.mark.parametrize(
    ("path", "kind", "number"),
    [
        pytest.param("/dev/full", blk_driver.T_OUT, errno.ENOSPC, id="full"),
        pytest.param("/proc/self/mem", blk_driver.T_IN, errno.EIO, id="EIO on read"),
        pytest.param("/proc/self/mem", blk_driver.T_OUT, errno.EIO, id="EIO on write"),
        pytest.param("/proc/self/mem", blk_driver.T_FLUSH, errno.EINVAL, id="failing flush"),
        pytest.param("/dev/full", blk_driver.T_WRITE_ZEROES, errno.ENODEV, id="failing fallocate"),
        pytest.param("/dev/full", blk_driver.T_DISCARD, errno.ENODEV, id="failing discard"),
    ],
)
@pytest.mark.parametrize("buffers", [1, 2])
def test_backing_file_full_or_returning_eio(vm: Vm, path: str, kind: int, number: int, buffers: int) -> None:
    """/dev/full has no space, and no page is mapped at the start of a process, where /proc/self/mem gives EIO."""
    if kind == blk_driver.T_FLUSH:
        data = []
    elif kind in RANGES:
        data = [part(vm, 0, 1)]
    else:
        data = [vm.buffer(512, device_writes=kind == blk_driver.T_IN) for _ in range(buffers)]
    kept = os.dup(vm.disk.fd)
    stand_in(vm, path)
    failed(vm, vm.request(kind, 0, *data), os.strerror(number))
    for _ in range(20):
        assert vm.request(kind, 0, *data) == blk_driver.S_IOERR
    assert len(vm.log) == 5, "1st, 2nd, 4th, 8th and 16th"
    assert vm.log[-1].endswith(f"{os.strerror(number)} (seen 16 times)")
    assert vm.device.stats["io_errors"] == 21
    os.dup2(kept, vm.disk.fd, inheritable=False)
    os.close(kept)
    alive(vm)


def test_backing_file_full_in_the_middle_of_a_write(boot: Callable[..., Vm], image: Path) -> None:
    """RLIMIT_FSIZE stands for a file system that becomes full: the kernel writes a part, then refuses."""
    import resource
    import signal

    with image.open("r+b") as sparse:
        sparse.truncate(1 << 20)
    vm = boot()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, limits[1]))
    try:
        status = vm.request(blk_driver.T_OUT, 1020, vm.buffer(b"f" * 4096))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    failed(vm, status, os.strerror(errno.EFBIG))
    assert vm.read(1020, 4096) == b"f" * 2048 + bytes(2048)
    alive(vm)


@pytest.mark.large
@pytest.mark.parametrize("kind", [blk_driver.T_IN, blk_driver.T_OUT])
def test_short_reads_and_writes(engine: str, kind: int) -> None:
    """No call moves more than 2 GiB less a page: one request of 3 GiB, in which buffers are one piece of memory."""
    piece, count = 12 << 20, 252
    with GuestMemory(16 << 20) as ram, in_memory(piece * count) as path:
        vm = Vm(path, ram, Allocator(0x1000, (16 << 20) - 0x1000), engine=engine)
        vm.driver.bring_up()
        memory = vm.driver.allocator.alloc(piece, 4096)
        offset = piece * (count - 1) + 12345  # in the last piece, after the cut
        data = [Buffer(memory, piece, kind == blk_driver.T_IN)] * count
        if kind == blk_driver.T_IN:
            os.pwrite(vm.disk.fd, b"mark", offset)
            assert vm.request(kind, 0, *data) == blk_driver.S_OK
            assert vm.written == piece * count + 1
            assert ram.read(memory + 12345, 4) == b"mark"
        else:
            # Only the last pieces hold something, or the test would need 3 GiB: the first are cut to a sector.
            ram.write(memory + 12345, b"mark")
            assert vm.request(kind, 0, *data) == blk_driver.S_OK
            assert os.pread(vm.disk.fd, 4, offset) == b"mark"
        assert vm.device.stats["bytes_read" if kind == blk_driver.T_IN else "bytes_written"] == piece * count
        vm.close()


def test_no_request_has_more_buffers_than_one_call_takes() -> None:
    assert os.sysconf("SC_IOV_MAX") >= blk.QUEUE_SIZE


# Any request at all


def validated(out: bytes, room: int, capacity: int, read_only: bool) -> int | None:
    """The status that §5.2.6 demands for a request with `out` to read and `room` to write; None: no place for one."""
    if room == 0:
        return None
    room -= 1
    if len(out) < 16:
        return blk_driver.S_IOERR
    kind, _, sector = blk_driver.HEADER.unpack(out[:16])
    data = out[16:]
    match kind:
        case blk_driver.T_IN | blk_driver.T_OUT:
            size, other = (room, data) if kind == blk_driver.T_IN else (len(data), room)
            good = size and not size % 512 and not other and sector + size // 512 <= capacity
            good = good and not (read_only and kind == blk_driver.T_OUT)
        case blk_driver.T_FLUSH:
            good = not data and not room
        case blk_driver.T_GET_ID:
            good = not data and room >= 20
        case blk_driver.T_DISCARD | blk_driver.T_WRITE_ZEROES if not read_only:
            if room or len(data) != 16:
                return blk_driver.S_IOERR
            sector, count, flags = blk_driver.RANGE.unpack(data)
            if flags > 1 or (flags and kind == blk_driver.T_DISCARD):
                return blk_driver.S_UNSUPP
            good = count and sector + count <= capacity
        case _:
            return blk_driver.S_UNSUPP
    return blk_driver.S_OK if good else blk_driver.S_IOERR


sectors = st.integers(0, 10) | st.integers(0, (1 << 64) - 1)
headers = st.builds(
    lambda kind, sector: blk_driver.HEADER.pack(kind, 0, sector),
    st.sampled_from([0, 1, 4, 8, 11, 13]) | st.integers(0, (1 << 32) - 1),
    sectors,
)
ranges = st.builds(blk_driver.RANGE.pack, sectors, st.integers(0, 9), st.sampled_from([0, 0, 1, 2]))
blocks = st.sampled_from([b"", bytes(20), bytes(512), bytes(1024)]) | st.binary(max_size=40)


@pytest.mark.parametrize("read_only", [False, True])
def test_any_request_is_answered_as_the_standard_says(boot: Callable[..., Vm], read_only: bool) -> None:
    vm = boot(read_only=read_only)
    vm.device.set_capacity(8 * 512)
    start = vm.driver.allocator.next

    @given(
        out=st.builds(lambda *parts: b"".join(parts), headers, st.just(b"") | ranges | blocks) | st.binary(max_size=40),
        room=st.sampled_from([0, 1, 1, 1, 20, 21, 513, 1025, 4097, 4609]),
        cuts=st.lists(st.integers(1, 600), max_size=4),
    )
    def check(out: bytes, room: int, cuts: list[int]) -> None:
        if not out and not room:
            return
        vm.driver.allocator.next = start
        buffers: list[Buffer] = []
        for size, device_writes in ((len(out), False), (room, True)):
            if size:
                whole = vm.buffer(out if not device_writes else b"\xee" * room, device_writes=device_writes)
                at = 0
                for cut in (*cuts, size):
                    if piece := min(cut, size - at):
                        buffers.append(Buffer(whole.addr + at, piece, device_writes))
                        at += piece
        written = vm.submit(buffers)
        expected = validated(out, room, 8, read_only)
        if expected is None:
            assert written == 0
            return
        assert vm.ram.read(whole.addr + room - 1, 1)[0] == expected
        if expected != blk_driver.S_OK:
            assert vm.ram.read(whole.addr, room - 1) == b"\xee" * (room - 1), "only the status is written"
        assert written <= room

    check()
    vm.device.set_capacity(SECTORS * 512)
    assert vm.log == []


# Disk: a user's mistakes, one line each


def problem(path: object, *, read_only: bool = False) -> str:
    with pytest.raises(ConfigError) as error:
        Disk(str(path), read_only=read_only)
    message = str(error.value)
    assert message.startswith(f"disk {path}: ") and "\n" not in message
    return message.removeprefix(f"disk {path}: ")


def test_disk_missing(tmp_path: Path) -> None:
    assert problem(tmp_path / "none") == "cannot be opened: No such file or directory"


@pytest.mark.parametrize("read_only", [False, True])
def test_disk_is_a_directory(tmp_path: Path, read_only: bool) -> None:
    assert problem(tmp_path, read_only=read_only) == "is a directory; a disk is a file or a block device"


def test_disk_is_a_device_but_no_disk() -> None:
    assert problem("/dev/null") == "is neither a file nor a block device; a disk is a file or a block device"


def test_disk_is_a_fifo(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert "neither a file nor a block device" in problem(tmp_path / "fifo")
    assert "neither a file nor a block device" in problem(tmp_path / "fifo", read_only=True)


def test_disk_empty(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert problem(tmp_path / "empty") == "is empty; a disk has a positive multiple of 512 bytes"


@pytest.mark.parametrize("size", [1, 511, 513, 1000])
def test_disk_size_not_a_multiple_of_512(tmp_path: Path, size: int) -> None:
    (tmp_path / "odd").write_bytes(bytes(size))
    assert problem(tmp_path / "odd") == f"has {size} bytes; a disk has a multiple of 512"


def test_bytes_after_the_last_whole_sector_stay_as_they_are(tmp_path: Path) -> None:
    """They are no part of the disk. What the file can do is tried after them."""
    path = tmp_path / "odd"
    path.write_bytes(b"x" * 1000)
    with Disk(str(path), any_size=True) as disk:
        assert disk.size == 512
        Block(disk)
    assert path.read_bytes() == b"x" * 1000


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EPERM])
def test_disk_that_cannot_be_written_names_ro(image: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """As root every file can be opened, so the kernel's refusal is put in."""
    real = os.open

    def guarded(path: Any, flags: int, *rest: Any) -> int:
        if flags & os.O_ACCMODE == os.O_RDWR:
            raise OSError(number, os.strerror(number))
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", guarded)
    assert problem(image) == "cannot be opened for writing; add ,ro for a read-only disk"
    Disk(str(image), read_only=True).close()


def test_disk_unreadable(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert problem(image) == "cannot be opened: Permission denied"


def test_second_writer_is_locked_out(image: Path) -> None:
    with Disk(str(image)):
        assert problem(image).startswith("is in use by another VM")
        assert problem(image, read_only=True).startswith("is in use by another VM")
    Disk(str(image)).close()


def test_readers_share_and_lock_writers_out(image: Path) -> None:
    with Disk(str(image), read_only=True), Disk(str(image), read_only=True):
        assert problem(image).startswith("is in use by another VM")
    Disk(str(image)).close()


def test_the_process_that_holds_a_classic_lock_is_named(image: Path) -> None:
    ready, child_ready = os.pipe()
    done, child_done = os.pipe()
    pid = fork()
    if pid == 0:  # a classic lock belongs to a process: it needs one
        with image.open("r+b") as file:
            fcntl.lockf(file, fcntl.LOCK_EX)
            os.write(child_ready, b"x")
            os.close(child_done)
            os.read(done, 1)
        os._exit(0)
    os.close(done)
    try:
        os.read(ready, 1)
        assert problem(image) == f"is locked by process {pid}; one writer or several readers may have it"
    finally:
        for fd in (child_done, ready, child_ready):
            os.close(fd)
        os.waitpid(pid, 0)


def test_disk_gives_its_descriptor_back(image: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with Disk(str(image)):
            problem(image)
    disk = Disk(str(image))
    disk.close()
    disk.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_direct_on_a_file_system_without_it(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = fcntl.fcntl

    def refuse(fd: int, command: int, argument: Any = 0) -> Any:
        if command == fcntl.F_SETFL:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(fd, command, argument)

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    with pytest.raises(ConfigError, match="is on a file system without direct I/O; leave ,direct out"):
        Disk(str(image), direct=True)


# Other formats


def test_an_image_that_looks_like_qcow2_is_refused_or_taken_as_it_is(image: Path) -> None:
    with image.open("r+b") as file:
        file.write(b"QFI\xfb")
    for direct in (False, True):
        with pytest.raises(ConfigError, match="is a qcow2 image; convert it by `qemu-img convert -O raw`"):
            Disk(str(image), direct=direct)
    with Disk(str(image), image_format="raw") as disk:
        assert disk.size == SECTORS * 512
    os.truncate(image, 196616)  # as qemu-img makes them
    with pytest.raises(ConfigError, match="is a qcow2 image"):
        Disk(str(image))
    with image.open("r+b") as file:
        file.write(b"raw.")
    with pytest.raises(ConfigError, match="has 196616 bytes; a disk has a multiple of 512"):
        Disk(str(image))
    with image.open("r+b") as file:
        file.write(b"QFI\xfb")
    os.truncate(image, SECTORS * 512)
    with Disk(str(image), image_format="raw") as disk:
        assert os.pread(disk.fd, 4, 0) == b"QFI\xfb"


@pytest.mark.parametrize("head", [b"KDMV", b"# Disk DescriptorFile", b"vhdxfile", b"conectix"])
def test_an_image_of_another_format_is_refused(image: Path, head: bytes) -> None:
    with image.open("r+b") as file:
        file.write(head)
    with pytest.raises(
        ConfigError, match=r"is a V\w+ image; convert it by `qemu-img convert -O raw`; ,format=raw takes"
    ):
        Disk(str(image))
    Disk(str(image), image_format="raw").close()
