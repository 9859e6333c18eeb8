# SPDX-License-Identifier: Apache-2.0
"""The block device against virtio 1.2 §5.2, a driver that lies and a host whose disk fails."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.guest_driver import Allocator, Buffer, MmioDriver
from virtio import blk, spec
from virtio.blk import Block, Disk, parse
from virtio.mmio import VirtioMmio
from vmm.errors import ConfigError
from vmm.irq import IrqLine
from vmm.memory import GuestMemory

SECTORS = 64
NO_STATUS = -1


class Vm:
    """A guest with one disk and a driver that is up."""

    def __init__(
        self, path: Path, ram: GuestMemory, allocator: Allocator, *, read_only: bool = False
    ) -> None:
        self.log: list[str] = []
        self.ram = ram
        self.irq = IrqLine(5)
        self.disk = Disk(str(path), read_only=read_only)
        self.device = Block(self.disk, serial="serial-0123456789abcdef")
        self.transport = VirtioMmio(self.device, ram, self.irq, warn=self.log.append)
        self.driver = MmioDriver(self.transport, allocator)

    def close(self) -> None:
        self.transport.close()
        self.disk.close()
        self.irq.close()

    def submit(self, buffers: Sequence[Buffer], *, indirect: bool = True) -> int:
        """One chain through the ring; the length in its used entry."""
        ring = self.driver.queues[0]
        ring.want_interrupt()
        head = ring.add_indirect(buffers) if indirect else ring.add(buffers)
        self.driver.kick()
        while not (done := ring.reap()):
            assert select.select([self.irq.fd], [], [], 30)[0], "no interrupt came"
            self.irq.take()
            ring.want_interrupt()
        assert [h for h, _ in done] == [head]
        return done[0][1]

    def buffer(self, data: bytes | int, *, device_writes: bool = False) -> Buffer:
        return self.driver.queues[0].buffer(data, device_writes=device_writes)

    def header(self, kind: int, sector: int = 0) -> Buffer:
        return self.buffer(spec.BLK_HEADER.pack(kind, 0, sector))

    def request(self, kind: int, sector: int = 0, *data: Buffer, **how: bool) -> int:
        """Header, `data`, status byte: the status, 0xee where the device wrote none."""
        status = self.buffer(b"\xee", device_writes=True)
        self.written = self.submit([self.header(kind, sector), *data, status], **how)
        return self.ram.read(status.addr, 1)[0]

    def read(self, sector: int, size: int) -> bytes:
        data = self.buffer(size, device_writes=True)
        assert self.request(spec.BLK_T_IN, sector, data) == spec.BLK_S_OK
        return self.ram.read(data.addr, size)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(b"".join(bytes([i]) * 512 for i in range(SECTORS)))
    return path


@pytest.fixture
def boot(image: Path, ram: GuestMemory, allocator: Allocator) -> Iterator[Callable[..., Vm]]:
    vms: list[Vm] = []

    def boot(*, without: int = 0, read_only: bool = False, size: int | None = None) -> Vm:
        vms.append(Vm(image, ram, allocator, read_only=read_only))
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


def test_5_2_3_features(boot: Callable[..., Vm]) -> None:
    ring = spec.F_VERSION_1 | spec.F_EVENT_IDX | spec.F_INDIRECT_DESC
    common = ring | spec.BLK_F_FLUSH | spec.BLK_F_SEG_MAX | spec.BLK_F_BLK_SIZE
    first = boot(read_only=True)
    assert first.driver.offered() == common | spec.BLK_F_RO
    first.close()
    assert boot().driver.offered() == common


def test_read(vm: Vm) -> None:
    assert vm.read(5, 1024) == bytes([5]) * 512 + bytes([6]) * 512
    assert vm.written == 1025
    assert vm.read(SECTORS - 1, 512) == bytes([SECTORS - 1]) * 512


def test_write(vm: Vm, image: Path) -> None:
    assert vm.request(spec.BLK_T_OUT, 7, vm.buffer(b"w" * 512), vm.buffer(b"x" * 512)) == spec.BLK_S_OK
    assert vm.written == 1
    assert image.read_bytes()[7 * 512 : 9 * 512] == b"w" * 512 + b"x" * 512


def test_whole_disk_in_one_request(vm: Vm, image: Path) -> None:
    assert vm.read(0, SECTORS * 512) == image.read_bytes()


def test_2_7_4_1_any_framing(boot: Callable[..., Vm], image: Path) -> None:
    """Header, data and status cut anywhere, direct and indirect."""
    vm = boot()
    header = spec.BLK_HEADER.pack(spec.BLK_T_OUT, 0, 9)
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
    assert vm.submit([vm.header(spec.BLK_T_IN, 4), data]) == 513
    assert vm.ram.read(data.addr, 513) == bytes([4]) * 512 + b"\0"


def test_flush_is_fdatasync(vm: Vm, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    assert vm.request(spec.BLK_T_OUT, 0, vm.buffer(512)) == spec.BLK_S_OK
    assert synced == []
    assert vm.request(spec.BLK_T_FLUSH) == spec.BLK_S_OK
    assert synced == [vm.disk.fd]


def test_5_2_6_2_writes_are_stable_for_a_driver_that_cannot_flush(
    boot: Callable[..., Vm], monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = boot(without=spec.BLK_F_FLUSH)
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    assert vm.request(spec.BLK_T_OUT, 0, vm.buffer(512)) == spec.BLK_S_OK
    assert synced == [vm.disk.fd]


def test_get_id(vm: Vm) -> None:
    data = vm.buffer(b"\xff" * 20, device_writes=True)
    assert vm.request(spec.BLK_T_GET_ID, 0, data) == spec.BLK_S_OK
    assert vm.ram.read(data.addr, 20) == b"serial-0123456789abcdef"[:20]
    assert vm.written == 21


def test_get_id_in_pieces(vm: Vm) -> None:
    parts = [vm.buffer(n, device_writes=True) for n in (3, 10, 30)]
    assert vm.request(spec.BLK_T_GET_ID, 0, *parts) == spec.BLK_S_OK
    assert b"".join(vm.ram.read(p.addr, p.size) for p in parts)[:20] == b"serial-0123456789abcdef"[:20]
    assert vm.written == 20, "the buffer's end was not written"


def test_many_requests_in_one_notification(vm: Vm) -> None:
    ring = vm.driver.queues[0]
    reads = {}
    for sector in range(40):
        data, status = vm.buffer(512, device_writes=True), vm.buffer(b"\xee", device_writes=True)
        reads[ring.add([vm.header(spec.BLK_T_IN, sector), data, status])] = (sector, data)
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


def test_capacity_change_at_run_time(vm: Vm, image: Path) -> None:
    os.truncate(image, 2 * SECTORS * 512)
    assert vm.request(spec.BLK_T_IN, SECTORS, vm.buffer(512, device_writes=True)) == spec.BLK_S_IOERR
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


# hostile-guest: block. Each request comes back, with a status where there is room for one.


def refused(vm: Vm, status: int, expected: int = spec.BLK_S_IOERR) -> None:
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
    assert vm.submit([vm.header(spec.BLK_T_IN)]) == 0
    assert vm.device.stats["bad_requests"] == 1
    alive(vm)


@pytest.mark.parametrize("kind", [spec.BLK_T_IN, spec.BLK_T_OUT, spec.BLK_T_GET_ID])
def test_no_data(vm: Vm, kind: int) -> None:
    refused(vm, vm.request(kind))


def test_no_status(vm: Vm, image: Path) -> None:
    assert vm.submit([vm.header(spec.BLK_T_OUT, 1), vm.buffer(b"n" * 512)]) == 0
    assert image.read_bytes()[512:1024] == bytes([1]) * 512, "a write that cannot be answered is not done"
    assert vm.device.stats["bad_requests"] == 1
    alive(vm)


def test_status_read_only(vm: Vm) -> None:
    status = vm.buffer(b"\xee")
    assert vm.submit([vm.header(spec.BLK_T_OUT, 1), vm.buffer(512), status]) == 0
    assert vm.ram.read(status.addr, 1) == b"\xee"
    alive(vm)


def test_status_zero_length(vm: Vm) -> None:
    status = vm.buffer(b"\xee", device_writes=True)._replace(size=0)
    assert vm.submit([vm.header(spec.BLK_T_FLUSH), status]) == 0
    assert vm.ram.read(status.addr, 1) == b"\xee"
    assert vm.device.stats["flushes"] == 0
    alive(vm)


@pytest.mark.parametrize("kind", [spec.BLK_T_IN, spec.BLK_T_GET_ID])
def test_data_in_the_wrong_direction_for_in_and_get_id(vm: Vm, kind: int) -> None:
    refused(vm, vm.request(kind, 0, vm.buffer(b"d" * 512)))


def test_data_in_the_wrong_direction_for_out(vm: Vm) -> None:
    refused(vm, vm.request(spec.BLK_T_OUT, 0, vm.buffer(b"d" * 512, device_writes=True)))


@pytest.mark.parametrize("kind", [spec.BLK_T_IN, spec.BLK_T_OUT])
def test_data_in_both_directions(vm: Vm, kind: int) -> None:
    data = vm.buffer(512), vm.buffer(512, device_writes=True)
    refused(vm, vm.request(kind, 0, *data))


@pytest.mark.parametrize("size", [1, 511, 513, 1000])
@pytest.mark.parametrize("kind", [spec.BLK_T_IN, spec.BLK_T_OUT])
def test_length_not_a_multiple_of_512(vm: Vm, kind: int, size: int) -> None:
    refused(vm, vm.request(kind, 0, vm.buffer(size, device_writes=kind == spec.BLK_T_IN)))


@pytest.mark.parametrize("kind", [spec.BLK_T_IN, spec.BLK_T_OUT])
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
    refused(vm, vm.request(kind, sector, vm.buffer(512 * count, device_writes=kind == spec.BLK_T_IN)))
    assert image.read_bytes() == before


@pytest.mark.parametrize(
    "kind", [2, 3, 5, 7, 9, spec.BLK_T_DISCARD, spec.BLK_T_WRITE_ZEROES, 0x8000_0000, 0xFFFF_FFFF]
)
def test_unknown_type(vm: Vm, kind: int) -> None:
    refused(vm, vm.request(kind, 0, vm.buffer(16)), spec.BLK_S_UNSUPP)


@pytest.mark.parametrize("size", [1, 19])
def test_get_id_under_20_bytes(vm: Vm, size: int) -> None:
    refused(vm, vm.request(spec.BLK_T_GET_ID, 0, vm.buffer(size, device_writes=True)))


@pytest.mark.parametrize("device_writes", [False, True])
def test_flush_with_data(vm: Vm, device_writes: bool) -> None:
    refused(vm, vm.request(spec.BLK_T_FLUSH, 0, vm.buffer(512, device_writes=device_writes)))
    assert vm.device.stats["flushes"] == 0


def test_write_to_a_read_only_disk(boot: Callable[..., Vm], image: Path) -> None:
    before = image.read_bytes()
    vm = boot(read_only=True)
    refused(vm, vm.request(spec.BLK_T_OUT, 0, vm.buffer(b"w" * 512)))
    assert image.read_bytes() == before
    assert vm.request(spec.BLK_T_FLUSH) == spec.BLK_S_OK


# hostile-guest: the backing file


def failed(vm: Vm, status: int, message: str) -> None:
    assert status == spec.BLK_S_IOERR
    assert vm.device.stats["io_errors"] == 1
    assert vm.log == [f"virtio-blk: {vm.disk.path}: {message}"]


def test_backing_file_truncated(vm: Vm, image: Path) -> None:
    os.truncate(image, 10 * 512)
    failed(
        vm,
        vm.request(spec.BLK_T_IN, 20, vm.buffer(512, device_writes=True)),
        "the file ends before byte 10752",
    )
    assert vm.request(spec.BLK_T_IN, 9, vm.buffer(1024, device_writes=True)) == spec.BLK_S_IOERR
    assert vm.written == 0
    alive(vm)


def test_backing_file_deleted(vm: Vm, image: Path) -> None:
    image.unlink()
    alive(vm)
    assert vm.request(spec.BLK_T_OUT, 1, vm.buffer(b"d" * 512)) == spec.BLK_S_OK
    assert vm.read(1, 512) == b"d" * 512


@pytest.mark.parametrize(
    ("number", "call"), [(errno.EIO, "preadv"), (errno.ENOSPC, "pwritev"), (errno.EIO, "fdatasync")]
)
def test_backing_file_full_or_returning_eio(
    vm: Vm, monkeypatch: pytest.MonkeyPatch, number: int, call: str
) -> None:
    def fail(*_: Any) -> int:
        raise OSError(number, os.strerror(number))

    kind = {"preadv": spec.BLK_T_IN, "pwritev": spec.BLK_T_OUT, "fdatasync": spec.BLK_T_FLUSH}[call]
    data = [] if kind == spec.BLK_T_FLUSH else [vm.buffer(512, device_writes=kind == spec.BLK_T_IN)]
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        failed(vm, vm.request(kind, 0, *data), os.strerror(number))
        for _ in range(20):
            assert vm.request(kind, 0, *data) == spec.BLK_S_IOERR
    assert len(vm.log) == 5, "1st, 2nd, 4th, 8th and 16th"
    alive(vm)


def test_backing_file_really_full(image: Path, ram: GuestMemory, allocator: Allocator) -> None:
    """RLIMIT_FSIZE stands for a full file system: the kernel itself refuses the write."""
    import resource
    import signal

    with image.open("r+b") as sparse:
        sparse.truncate(1 << 20)
    vm = Vm(image, ram, allocator)
    vm.driver.bring_up()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, limits[1]))
    try:
        status = vm.request(spec.BLK_T_OUT, 1024, vm.buffer(b"f" * 512))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    failed(vm, status, os.strerror(errno.EFBIG))
    alive(vm)
    vm.close()


@pytest.mark.parametrize("most", [1, 100, 511, 512, 700])
def test_short_reads_and_writes(vm: Vm, image: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    def short(call: Callable[..., int]) -> Callable[..., int]:
        def some(fd: int, buffers: list[memoryview], offset: int) -> int:
            cut, room = [], most
            for buffer in buffers:
                cut.append(buffer[:room])
                room -= len(cut[-1])
            return call(fd, cut, offset)

        return some

    monkeypatch.setattr(os, "preadv", short(os.preadv))
    monkeypatch.setattr(os, "pwritev", short(os.pwritev))
    payload = os.urandom(1536)
    parts = [vm.buffer(payload[:300]), vm.buffer(payload[300:900]), vm.buffer(payload[900:])]
    assert vm.request(spec.BLK_T_OUT, 2, *parts) == spec.BLK_S_OK
    assert image.read_bytes()[1024 : 1024 + 1536] == payload
    targets = [vm.buffer(n, device_writes=True) for n in (1, 1000, 535)]
    assert vm.request(spec.BLK_T_IN, 2, *targets) == spec.BLK_S_OK
    assert b"".join(vm.ram.read(t.addr, t.size) for t in targets) == payload


def test_more_buffers_than_iov_max(vm: Vm, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blk, "_IOV_MAX", 3)
    parts = [vm.buffer(bytes([i]) * 64) for i in range(16)]
    assert vm.request(spec.BLK_T_OUT, 0, *parts) == spec.BLK_S_OK
    assert image.read_bytes()[:1024] == b"".join(bytes([i]) * 64 for i in range(16))


def test_iov_max_is_the_kernels() -> None:
    assert os.sysconf("SC_IOV_MAX") == blk._IOV_MAX


# parse() alone


views = st.lists(st.binary(max_size=40).map(lambda b: memoryview(bytearray(b))), max_size=6).map(
    lambda buffers: [b for b in buffers if len(b)]
)
headers = st.builds(
    lambda kind, sector: memoryview(bytearray(spec.BLK_HEADER.pack(kind, 0, sector))),
    st.sampled_from([0, 1, 4, 8, 11, 13]) | st.integers(0, (1 << 32) - 1),
    st.integers(0, 10) | st.integers(0, (1 << 64) - 1),
)
blocks = st.lists(
    st.sampled_from([1, 20, 256, 512, 1024]).map(lambda n: memoryview(bytearray(n))), max_size=4
)


@given(
    readable=views | st.builds(lambda h, rest: [h, *rest], headers, blocks),
    writable=views | blocks,
    capacity=st.integers(0, 8) | st.just(1 << 55),
    read_only=st.booleans(),
)
def test_parse_is_total_and_grants_nothing_out_of_bounds(
    readable: list[memoryview], writable: list[memoryview], capacity: int, read_only: bool
) -> None:
    before = [bytes(b) for b in (*readable, *writable)]
    request = parse(readable, writable, capacity, read_only)
    assert [bytes(b) for b in (*readable, *writable)] == before, "parse writes nothing"
    assert (request.status is None) == (not writable)
    if request.verdict != spec.BLK_S_OK:
        return
    assert request.status is not None and len(request.status) == 1
    assert request.length == sum(map(len, request.data))
    assert all(len(b) for b in request.data)
    match request.type:
        case spec.BLK_T_IN:
            assert request.length == sum(map(len, writable)) - 1
        case spec.BLK_T_OUT:
            assert not read_only
            assert request.length == sum(map(len, readable)) - 16
        case spec.BLK_T_GET_ID:
            assert request.length >= 20
        case _:
            assert (request.type, request.length) == (spec.BLK_T_FLUSH, 0)
    if request.type in (spec.BLK_T_IN, spec.BLK_T_OUT):
        assert request.length and request.length % 512 == 0
        assert 0 <= request.offset and request.offset + request.length <= capacity * 512


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


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EPERM])
def test_disk_that_cannot_be_written_names_ro(
    image: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
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
    pid = os.fork()
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
