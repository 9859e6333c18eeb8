# SPDX-License-Identifier: Apache-2.0
"""The devices on /dev/kvm itself, by drivers in ring 3 of a guest (tests/kvm/driver), timed by both sides' clocks.

``pytest benches/test_devices_kvm.py -s`` prints rates; beside QEMU and Firecracker: ``python -m benches.peers ring3``.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kvm.ring3 import Ring3
from vmm.config.devices import DriveConfig

DISK = 128 << 20
SHM = Path("/dev/shm")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    directory = tmp_path_factory.mktemp("images", numbered=True)
    paths = [SHM / f"{directory.name}-{directory.parent.name}-{number}" for number in range(2)]
    for path in paths:
        path.write_bytes(b"pyvmm..." * (DISK // 8))
    yield [str(path) for path in paths]
    for path in paths:
        path.unlink()


@pytest.mark.parametrize("depth", [1, 32])
@pytest.mark.parametrize("write", [0, 1], ids=["read", "write"])
@pytest.mark.parametrize("engine", ["sync", "io_uring"])
def test_blk_4k(benchmark: Any, images: list[str], engine: str, write: int, depth: int) -> None:
    count = 5000 if depth == 1 else 20000
    seconds: list[float] = []
    kicks: list[int] = []

    def run() -> None:
        cmdline = f"test=3 write={write} depth={depth} count={count} rounds=4"
        with Ring3("blk", cmdline, drives=[DriveConfig(images[0], engine=engine)]) as guest:
            marks = guest.times_of(b"ticks=")
            words = guest.start().end()
        ticks = [int(value) for value in words["ticks"][1:]]
        seconds.extend(value * (marks[-1] - marks[0]) / sum(ticks) for value in ticks)
        kicks.extend(map(int, words["kicks"]))

    benchmark.pedantic(run, rounds=3, warmup_rounds=1)
    best = count / min(seconds)
    benchmark.extra_info["per_second"] = round(best)
    print(f"\n{engine}, depth {depth}: {best:,.0f}/s, {min(kicks) / count:.3f} kicks each")


def test_liar_beside_an_honest_driver(benchmark: Any, images: list[str]) -> None:
    """Reads of one disk while another's driver lies, beside the same reads while it is quiet."""
    ratios: list[float] = []

    def run() -> None:
        drives = [DriveConfig(image) for image in images]
        with Ring3("blk", "test=2 rounds=40 count=2000", drives=drives) as guest:
            words = guest.start().end()
        quiet, lying = (statistics.median(map(int, words[name])) for name in ("quiet", "lying"))
        ratios.append(quiet / lying)

    benchmark.pedantic(run, rounds=3)
    benchmark.extra_info["speed"] = statistics.median(ratios)
    print(f"\nspeed beside a liar, of that beside a quiet driver: {', '.join(f'{ratio:.2f}' for ratio in ratios)}")
