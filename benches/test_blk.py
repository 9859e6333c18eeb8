# SPDX-License-Identifier: Apache-2.0
"""The block device's own threads, driven at the speed of C, beside the same reads and writes without a device.

``pytest benches/test_blk.py -s`` prints, beside the time, the CPU time of the device a request. ``PYVMM_BENCH_DISK``
names the directory of the image, /dev/shm if it is not set.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from virtio.blk.device import Block, Disk
from virtio.mmio import VirtioMmio
from virtio.testing import Allocator, MmioDriver
from vmm.irq import IrqLine
from vmm.memory import GuestMemory

HERE = Path(__file__).parent
DISK = 256 << 20
RAM = 96 << 20


class Driver(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("desc", "avail", "used", "slots", "slots_gpa", "disk", "requests")),
        *((name, ctypes.c_uint32) for name in ("size", "depth", "write", "sequential")),
        ("notify", ctypes.c_int32), ("irq", ctypes.c_int32), ("queue_size", ctypes.c_uint16),
        *((name, ctypes.c_uint64) for name in ("kicks", "interrupts", "failed", "driver_ns")),
    )  # fmt: skip


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    built = tmp_path_factory.mktemp("block_driver") / "libdriver.so"
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", built, HERE / "block_driver.c"], check=True)
    return ctypes.CDLL(str(built))


@pytest.fixture(scope="session")
def image() -> Iterator[Path]:
    path = Path(os.environ.get("PYVMM_BENCH_DISK", "/dev/shm")) / f"pyvmm-bench-{os.getpid()}.img"
    with path.open("wb") as file:
        for _ in range(DISK >> 20):
            file.write(os.urandom(1 << 20))
        os.fsync(file.fileno())
    yield path
    path.unlink()


CASES = {
    "4k read": (4096, False, False), "4k write": (4096, True, False),
    "1M read": (1 << 20, False, True), "1M write": (1 << 20, True, True),
}  # fmt: skip


@pytest.mark.parametrize("depth", [1, 8, 32])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("engine", ["sync", "io_uring", "bare"])
def test_requests(benchmark: Any, library: Any, image: Path, engine: str, case: str, depth: int) -> None:
    size, write, sequential = CASES[case]
    if engine == "bare" and depth > 1:
        pytest.skip("no queue, no depth")
    requests = 100_000 if size == 4096 else 2_000
    with GuestMemory(RAM) as ram, Disk(str(image), direct="PYVMM_BENCH_DIRECT" in os.environ) as disk:
        irq = IrqLine(5)
        device = Block(disk, engine="sync" if engine == "bare" else engine)
        transport = VirtioMmio(device, ram, irq)
        allocator = Allocator(0x1000, RAM - 0x1000)
        driver = MmioDriver(transport, allocator)
        (ring,) = driver.bring_up()
        slots = allocator.alloc(depth * (size + 8192), 4096)
        state = Driver(
            *(ram.host_address(at, 16) for at in (ring.desc, ring.avail, ring.used, slots)), slots, DISK, requests,
            size, depth, write, sequential, transport.notify_fds[0], irq.fd, ring.size,
        )  # fmt: skip
        cpu: list[int] = []

        def run() -> None:
            before = time.process_time_ns()
            if engine == "bare":
                assert library.bare(ctypes.byref(state), disk.fd) == 0
            else:
                assert library.drive(ctypes.byref(state)) == 0
                assert state.failed == 0
            cpu.append(time.process_time_ns() - before - (0 if engine == "bare" else state.driver_ns))

        benchmark.pedantic(run, rounds=3, warmup_rounds=1)
        per_second = requests / benchmark.stats.stats.min
        device_ns = min(cpu) / requests
        benchmark.extra_info |= {"per_second": round(per_second), "device_cpu_ns": round(device_ns)}
        print(
            f"\n{engine:6} {case:9} depth {depth:2}: {per_second:10,.0f}/s {per_second * size / 1e6:8,.0f} MB/s, "
            f"CPU {device_ns:8,.0f} ns each, {state.kicks / 4:,.0f} kicks, {state.interrupts / 4:,.0f} interrupts"
        )
        assert device.engine == engine or engine == "bare"
        transport.close()
        irq.close()
