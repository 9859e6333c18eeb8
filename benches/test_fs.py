# SPDX-License-Identifier: Apache-2.0
"""Micro-benchmarks of the share's server: ``pytest benches/test_fs.py``.

A round is a full ring of requests, offered outside the clock and served by the device's thread; divide by REQUESTS.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.virtio import fuse_client as fuse
from tests.virtio.fuse_client import ROOT, FuseVm
from virtio import spec

REQUESTS = 256


@pytest.fixture
def vm(tmp_path: Path) -> Iterator[FuseVm]:
    shared = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else tmp_path
    directory = shared / f"pyvmm-bench-{os.getpid()}"
    directory.mkdir()
    try:
        for i in range(REQUESTS):
            (directory / f"{i}").write_bytes(b"x" * 4096)
        (directory / "big").write_bytes(bytes(1 << 20))
        with FuseVm(directory) as vm:
            yield vm
    finally:
        for file in directory.iterdir():
            file.unlink()
        directory.rmdir()


def measure(benchmark: Any, vm: FuseVm, request: Callable[[int], tuple[int, int, bytes, int]], count: int) -> None:
    """`request(i)` is the opcode, node, body and reply room of the i-th of `count` requests."""
    ring = vm.driver.queues[1]

    def offer() -> None:
        vm.driver.allocator.next = vm.base
        for i in range(count):
            opcode, node, body, room = request(i)
            buffers = [vm.buffer(vm.header(opcode, node, len(body)) + body)]
            ring.add_indirect([*buffers, *(vm.buffer(size, device_writes=True) for size in (16, room))])
        ring.want_interrupt(after=count - 1)

    def serve() -> None:
        vm.driver.set(spec.MMIO_QUEUE_NOTIFY, 1)
        done = 0
        while done < count:
            done += len(ring.reap())

    benchmark.extra_info["requests"] = count
    benchmark.pedantic(serve, setup=offer, rounds=30)


def test_lookup(benchmark: Any, vm: FuseVm) -> None:
    measure(benchmark, vm, lambda i: (fuse.LOOKUP, ROOT, b"%d\0" % i, 128), REQUESTS)


def test_getattr(benchmark: Any, vm: FuseVm) -> None:
    node = vm.lookup("big").nodeid
    measure(benchmark, vm, lambda i: (fuse.GETATTR, node, bytes(16), 104), REQUESTS)


@pytest.mark.parametrize(("size", "count"), [(4096, REQUESTS), (1 << 20, 8)])
def test_read(benchmark: Any, vm: FuseVm, size: int, count: int) -> None:
    node = vm.lookup("big").nodeid
    fh = vm.open(node)
    body = struct.pack("<QQIIQII", fh, 0, size, 0, 0, 0, 0)
    measure(benchmark, vm, lambda i: (fuse.READ, node, body, size), count)


def test_readdirplus(benchmark: Any, vm: FuseVm) -> None:
    """List a whole directory, whose files the guest knows already, a page at a time as Linux does."""
    fh = vm.opendir()
    offsets = [0]
    while found := vm.readdirplus(ROOT, fh, offsets[-1]):
        offsets.append(found[-1][1])
    bodies = [struct.pack("<QQIIQII", fh, offset, 4096, 0, 0, 0, 0) for offset in offsets]
    benchmark.extra_info["entries"] = len(os.listdir(vm.device.path))
    measure(benchmark, vm, lambda i: (fuse.READDIRPLUS, ROOT, bodies[i], 4096), len(bodies))
