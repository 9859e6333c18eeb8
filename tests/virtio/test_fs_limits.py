# SPDX-License-Identifier: Apache-2.0
"""What the host does for a share counts against its limits, and its end waits for nothing that is long."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.virtio import fuse_client as fuse
from tests.virtio.fuse_client import ROOT, FuseVm
from tests.virtio.test_fs import mount, refused, root_only, tree
from tests.virtio.test_fs_kernel import small_disk
from virtio import spec
from virtio._limiter import RateLimiter
from vmm.config.devices import RateLimiterConfig, ShareConfig
from vmm.errors import ConfigError

__all__ = ["mount", "tree"]

MIB = 1 << 20
PIECE = 16 * MIB
SLOW = 3_600_000  # milliseconds until a bucket is full again


class Copying:
    """A share with two files open, and what may be asked of them."""

    def __init__(self, vm: FuseVm, tree: Path, size: int) -> None:
        (tree / "a").write_bytes(b"x" * size)
        (tree / "b").touch()
        self.vm = vm
        self.a, self.b = vm.lookup("a").nodeid, vm.lookup("b").nodeid
        self.fa, self.fb = vm.open(self.a), vm.open(self.b, os.O_RDWR)

    def copy_request(self, size: int, to: int = 0) -> tuple[int, int, bytes]:
        return fuse.COPY_FILE_RANGE, self.a, struct.pack("<7Q", self.fa, 0, self.b, self.fb, to, size, 0)

    def allocate_request(self, size: int, mode: int = 0) -> tuple[int, int, bytes]:
        return fuse.FALLOCATE, self.b, struct.pack("<QQQII", self.fb, 0, size, mode, 0)

    def held_back(self, request: tuple[int, int, bytes]) -> bool:
        """Whether a request waits for tokens; it stays in the ring."""
        opcode, node, body = request
        before = self.vm.device.stats
        data = self.vm.buffer(self.vm.header(opcode, node, len(body)) + body)
        ring = self.vm.driver.queues[1]
        ring.add_indirect([data, self.vm.buffer(8192, device_writes=True)])
        self.vm.driver.set(spec.MMIO_QUEUE_NOTIFY, 1)
        while True:
            if ring.reap():
                return False
            if self.vm.device.stats["throttled"] > before["throttled"]:
                return True
            time.sleep(0.001)


@pytest.mark.parametrize(
    "name", ["COPY_FILE_RANGE", "FALLOCATE", "FSYNC", "SETXATTR", "MKDIR", "SETATTR", "WRITE", "READ"]
)
def test_what_moves_or_changes_something_is_an_operation(tree: Path, mount: Callable[..., FuseVm], name: str) -> None:
    files = Copying(mount(limiter=RateLimiter(ops=(2, 0, SLOW))), tree, 4096)
    bodies = {
        "COPY_FILE_RANGE": files.copy_request(100),
        "FALLOCATE": files.allocate_request(100),
        "FSYNC": (fuse.FSYNC, files.b, struct.pack("<QII", files.fb, 0, 0)),
        "SETXATTR": (fuse.SETXATTR, files.b, struct.pack("<II", 1, 0) + b"user.a\0x"),
        "MKDIR": (fuse.MKDIR, ROOT, bytes(8) + b"a\0"),
        "SETATTR": (fuse.SETATTR, files.b, bytes(88)),
        "WRITE": (fuse.WRITE, files.b, struct.pack("<QQIIQII", files.fb, 0, 1, 0, 0, 0, 0) + b"x"),
        "READ": (fuse.READ, files.a, struct.pack("<QQIIQII", files.fa, 0, 1, 0, 0, 0, 0)),
    }
    assert [files.held_back(bodies[name]) for _ in range(3)] == [False, False, True]
    assert files.vm.ask(fuse.GETATTR, ROOT, bytes(16), queue=0)  # which costs nothing


def test_copies_cost_what_is_read_and_written(tree: Path, mount: Callable[..., FuseVm]) -> None:
    files = Copying(mount(limiter=RateLimiter(bandwidth=(4 * MIB, 0, SLOW))), tree, 2 * MIB)
    copies = [files.held_back(files.copy_request(MIB, at * MIB)) for at in range(3)]
    assert copies == [False, False, True]


def test_an_allocation_costs_its_length_once_it_is_done(tree: Path, mount: Callable[..., FuseVm]) -> None:
    files = Copying(mount(limiter=RateLimiter(bandwidth=(100 * MIB, 0, 100_000))), tree, 0)  # 1 MiB a second
    assert not files.held_back(files.allocate_request(200 * MIB))
    assert files.held_back(files.copy_request(1))
    files = Copying(mount(limiter=RateLimiter(bandwidth=(100 * MIB, 0, 100_000))), tree, 0)
    assert not files.held_back(files.allocate_request(1 << 60))  # which there is no room for
    assert not files.held_back(files.copy_request(1))


@pytest.mark.parametrize("name", ["copy", "allocate"])
def test_a_length_that_the_guest_changes_later_costs_what_is_done(
    tree: Path, mount: Callable[..., FuseVm], name: str
) -> None:
    count = 40
    vm = mount(limiter=RateLimiter(bandwidth=(count * 2 * PIECE + 8 * MIB, 0, SLOW)))
    files = Copying(vm, tree, PIECE)
    vm.driver.allocator.next = vm.base
    small = files.copy_request(1) if name == "copy" else files.allocate_request(1)
    for opcode, node, body in [files.copy_request(PIECE)] * count + [small]:
        data = vm.buffer(vm.header(opcode, node, len(body)) + body)
        vm.driver.queues[1].add_indirect([data, vm.buffer(64, device_writes=True)])
    vm.driver.set(spec.MMIO_QUEUE_NOTIFY, 1)
    while vm.device.stats["handed_over"] < count + 1:
        time.sleep(0.0001)
    at = data.addr + fuse.IN_HEADER.size + (40 if name == "copy" else 16)
    assert struct.unpack("<Q", vm.ram.read(at, 8)) == (1,)
    vm.ram.write(at, struct.pack("<Q", PIECE))  # helpers have the other copies to do first
    done = 0
    while done <= count:
        done += len(vm.driver.queues[1].reap())
    assert files.held_back(files.copy_request(1))


def test_a_dax_window_cannot_be_limited(mount: Callable[..., FuseVm]) -> None:
    for limiter in (RateLimiter(bandwidth=(1, 0, 1)), RateLimiter(ops=(1, 0, 1))):
        with pytest.raises(ConfigError, match="exclude"):
            mount(dax=8 * MIB, limiter=limiter)
    vm = mount(dax=8 * MIB, limiter=RateLimiter())
    vm.device.set_rate_limit(ops=(0, 0, 0))
    with pytest.raises(ConfigError, match="exclude"):
        vm.device.set_rate_limit(bandwidth=(1, 0, 1))
    with pytest.raises(ConfigError, match="exclude"):
        ShareConfig.parse("t=/tmp,dax=8M,bps=1M")
    assert ShareConfig("t", "/tmp", dax=8 * MIB, rate_limiter=RateLimiterConfig(None, None))


def test_a_copy_is_one_piece_and_its_caller_goes_on(tree: Path, mount: Callable[..., FuseVm]) -> None:
    files = Copying(mount(), tree, 40 * MIB)
    opcode, node, body = files.copy_request(1 << 31)
    assert struct.unpack_from("<I", files.vm.ask(opcode, node, body))[0] == PIECE


def test_an_allocation_of_many_pieces_is_whole(tree: Path, mount: Callable[..., FuseVm]) -> None:
    files = Copying(mount(), tree, 0)
    punch = 3
    files.vm.ask(*files.allocate_request(700 * MIB))
    status = os.stat(tree / "b")
    assert (status.st_size, status.st_blocks * 512 >= 700 * MIB) == (700 * MIB, True)
    files.vm.ask(*files.allocate_request(700 * MIB, punch))
    status = os.stat(tree / "b")
    assert (status.st_size, status.st_blocks * 512 <= MIB) == (700 * MIB, True)


@root_only
def test_an_allocation_that_does_not_fit_takes_nothing(tmp_path: Path) -> None:
    root = small_disk(300 * MIB)
    path = Path(f"/proc/self/fd/{root}")
    with FuseVm(path) as vm:
        files = Copying(vm, path, 0)
        assert refused(vm.ask, *files.allocate_request(301 * MIB)) == "ENOSPC"
        assert os.stat(path / "b").st_blocks == 0
        vm.ask(*files.allocate_request(290 * MIB))
        vm.ask(*files.allocate_request(291 * MIB))  # most of it is there
    os.close(root)


@pytest.mark.parametrize("broken", [False, True])
def test_the_end_drops_what_nobody_has_begun(tree: Path, mount: Callable[..., FuseVm], broken: bool) -> None:
    """Also where the thread that took the requests has ended before, since the driver broke a ring."""
    count = 60 if broken else 200  # the helpers' queue takes 64
    vm = mount()
    files = Copying(vm, tree, PIECE)
    vm.driver.allocator.next = vm.base
    for i in range(count):
        opcode, node, body = files.copy_request(1 << 31, i * PIECE)
        data = vm.buffer(vm.header(opcode, node, len(body)) + body)
        vm.driver.queues[1].add_indirect([data, vm.buffer(64, device_writes=True)])
    if broken:
        vm.driver.queues[1].offer(5000)
    vm.driver.set(spec.MMIO_QUEUE_NOTIFY, 1)
    while not os.stat(tree / "b").st_blocks or (broken and not vm.log):
        time.sleep(0.0001)
    vm.driver.set(spec.MMIO_STATUS, 0)
    assert os.stat(tree / "b").st_blocks * 512 < count * PIECE // (2 if broken else 5)
    served = vm.device.stats["requests"]
    vm.driver.bring_up()
    vm.base = vm.driver.allocator.next
    vm.init()
    found, fh = vm.create("c")
    for _ in range(100):
        vm.ask(fuse.FSYNC, found.nodeid, struct.pack("<QII", fh, 0, 0))  # helpers are there again
    assert vm.device.stats["requests"] == served + 102  # and nothing of before
