# SPDX-License-Identifier: Apache-2.0
"""Pop and add_used without the GIL beside the same in plain C: ``pytest benches/test_queue_cycle.py``.

The goal is at most 1.3 times the C loop's time. Each chain is one request as virtio-blk sees it.
"""

from __future__ import annotations

import ctypes
import importlib.util
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from virtio.testing import Allocator, SplitDriver
from vmm._fastpath import VirtQueue
from vmm.memory import GuestMemory

HERE = Path(__file__).parent
ROUNDS = 2000
SIZE = 256
RAM = 64 << 20


class CRing(ctypes.Structure):
    _fields_ = (
        ("desc", ctypes.c_uint64), ("avail", ctypes.c_uint64), ("used", ctypes.c_uint64),
        ("size", ctypes.c_uint16), ("last_avail", ctypes.c_uint16), ("used_idx", ctypes.c_uint16),
        ("ram_gpa", ctypes.c_uint64), ("ram_size", ctypes.c_uint64), ("ram", ctypes.c_uint64), ("iov", ctypes.c_uint64),
    )  # fmt: skip


@pytest.fixture(scope="session")
def loops(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Build both loops: ours and the one in plain C."""
    directory = tmp_path_factory.mktemp("queue_cycle")
    build = (
        "import sys; from setuptools import Distribution, Extension; from Cython.Build import cythonize;"
        "e = cythonize([Extension('queue_cycle', [sys.argv[1]], extra_compile_args=['-O2'])], build_dir=sys.argv[2],"
        " include_path=[sys.argv[3]], quiet=True, compiler_directives={'wraparound': False, 'cdivision': True});"
        "d = Distribution({'ext_modules': e}); c = d.get_command_obj('build_ext'); c.build_lib = c.build_temp = "
        "sys.argv[2]; c.ensure_finalized(); c.run()"
    )
    command = [sys.executable, "-c", build, str(HERE / "queue_cycle.pyx"), str(directory), str(HERE.parent)]
    subprocess.run(command, check=True, cwd=HERE.parent, capture_output=True)
    spec = importlib.util.spec_from_file_location("queue_cycle", next(directory.glob("queue_cycle*.so")))
    assert spec is not None and spec.loader is not None
    ours = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ours)
    library = directory / "libcycle.so"
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", library, HERE / "queue_cycle.c"], check=True)
    return ours, ctypes.CDLL(str(library))


def seconds(run: Callable[[], int]) -> float:
    start = time.perf_counter()
    assert run() == ROUNDS * SIZE
    return time.perf_counter() - start


@pytest.mark.parametrize("shape", ["one buffer", "three chained", "three indirect"])
def test_beside_c(benchmark: Any, loops: tuple[Any, Any], shape: str) -> None:
    ours, c = loops
    with GuestMemory(RAM) as ram:
        memory: Any = ram
        driver = SplitDriver(memory, Allocator(0x1000, 60 << 20), 1024, event_idx=True)
        driver.size = SIZE  # rings for 1,024, of which the first quarter is used, whatever the shape
        header, data, status = driver.buffer(16), driver.buffer(4096, device_writes=True), driver.buffer(1)
        status = status._replace(device_writes=True)
        for _ in range(SIZE):
            if shape == "one buffer":
                driver.add([data])
            elif shape == "three chained":
                driver.add([header, data, status])
            else:
                driver.add_indirect([header, data, status])
        driver.size = 1024
        queue = VirtQueue(memory, 1024)
        driver.attach(queue)
        # Serve what was offered, so that from here on the loops offer whole rings by themselves.
        heads = {i: ram.read(driver.avail + 4 + 2 * (i % SIZE), 2) for i in range(1024)}
        for i, head in heads.items():
            ram.write(driver.avail + 4 + 2 * i, head)
        ram.write(driver.avail + 2, b"\0\0")
        iov = (ctypes.c_uint64 * 4096)()
        other = CRing(
            *(ram.host_address(at, 16) for at in (driver.desc, driver.avail, driver.used)), 1024, 0, 0,
            0, RAM, ram.host_address(0, RAM), ctypes.addressof(iov),
        )  # fmt: skip
        rounds = ROUNDS * SIZE // 1024

        def run_c() -> int:
            ram.write(driver.avail + 2, other.last_avail.to_bytes(2, "little"))
            return int(c.cycle(ctypes.byref(other), rounds))

        def run_ours() -> int:
            ram.write(driver.avail + 2, queue.last_avail.to_bytes(2, "little"))
            return int(ours.cycle(queue, rounds))

        seconds(run_c), seconds(run_ours)
        pairs = [(seconds(run_ours), seconds(run_c)) for _ in range(15)]
        ratio = statistics.median(a / b for a, b in pairs)
        benchmark.extra_info["ratio_to_c"] = round(ratio, 3)
        benchmark.extra_info["c_ns_per_chain"] = round(min(b for _, b in pairs) / (ROUNDS * SIZE) * 1e9, 1)
        benchmark.extra_info["ns_per_chain"] = round(min(a for a, _ in pairs) / (ROUNDS * SIZE) * 1e9, 1)
        print(f"\n{shape}: {benchmark.extra_info}")
        benchmark.pedantic(run_ours, rounds=10)
