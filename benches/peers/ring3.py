# SPDX-License-Identifier: Apache-2.0
"""The devices beside QEMU's and Firecracker's on this host's own /dev/kvm, whatever it is: one small guest in each.

The guest is one of tests/kvm/driver: its driver runs in ring 3, natively even on a software KVM, polls its queues and
tells its ticks for each round. All VMMs run in turn; files are on tmpfs. ``PYVMM_BENCH_ROUNDS`` makes it longer.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from benches.peers import common
from benches.peers.common import FIRECRACKER_NAME, QEMU_NAME, Missing, Row, compare
from tests.kvm.ring3 import Words, kernel

TURNS = int(os.environ.get("PYVMM_BENCH_ROUNDS", "5"))
ROUNDS = 6  # of the guest in one turn; the first warms up, the last may end with the process
MEMORY_MIB = 32
DISK_MIB = 128
PATIENCE = 60
GOAL_RATE, GOAL_CPU = 1.0, 1.1
VCPUS = ("fc_vcpu", "CPU ")  # what the VMMs call the threads of their vCPUs


class Turn(NamedTuple):
    """What one run of one VMM came to."""

    ticks: float  # of the guest's clock, for each unit
    seconds: float  # the same on the host's
    cpu: float  # seconds of the VMM's threads but the vCPU's, for each unit
    kicks: float  # notifications, for each unit
    text: str


def _device_cpu(pid: int) -> float:
    """Seconds on a CPU so far of all threads of a VMM but its vCPUs."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            if not (task / "comm").read_text().startswith(VCPUS):
                total += int((task / "schedstat").read_text().split()[0])
        except OSError:  # it ended meanwhile
            continue
    return total / 1e9


def turn(command: Sequence[str], count: int, status: tuple[int, ...] = (0,)) -> Turn:
    """Run a guest that reports ``ticks`` ROUNDS times, each for `count` units.

    :raises Missing: it failed
    """
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    watchdog = threading.Timer(PATIENCE, process.kill)
    watchdog.start()
    lines: list[str] = []
    marks: list[tuple[float, float]] = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            text = line.decode(errors="replace").strip()
            lines.append(text)
            if text.startswith("ticks=") and len(marks) < ROUNDS - 1:
                marks.append((time.perf_counter(), _device_cpu(process.pid)))
        process.wait()
    finally:
        watchdog.cancel()
        process.kill()
        process.wait()
    text = "\n".join(lines)
    words = Words(text)
    if process.returncode not in status or words.get("exit") != ["0"]:
        raise Missing(f"ended with {process.returncode}: {' '.join(command)}: {text[-300:]}")
    ticks = sorted(int(value) for value in words["ticks"][1:-1])
    units = count * (len(marks) - 1)
    kicks = sum(int(value) for value in words["kicks"][1:-1]) / (count * len(ticks)) if "kicks" in words else 0
    first, last = marks[0], marks[-1]
    return Turn(
        statistics.median(ticks) / count, (last[0] - first[0]) / units, (last[1] - first[1]) / units, kicks, text
    )  # fmt: skip


def pyvmm_command(guest: str, cmdline: str, *more: str) -> list[str]:
    """Command line of ours with that guest."""
    return [*common.pyvmm(), guest, "--cmdline", cmdline, "--memory", f"{MEMORY_MIB}M", *more]


def qemu_command(guest: str, cmdline: str, *more: str) -> list[str]:
    """Command line of QEMU's microvm with that guest."""
    return common.qemu_command(
        Path(guest), "-append", cmdline, "-serial", "stdio", "-no-reboot", "-name", "guest,debug-threads=on",
        "-device", "isa-debug-exit,iobase=0xf4,iosize=4", "-global", "virtio-mmio.force-legacy=false", *more,
        memory=MEMORY_MIB, machine="microvm,acpi=off,pit=off,rtc=off",
    )  # fmt: skip


def firecracker_command(directory: Path, guest: str, cmdline: str, **more: object) -> list[str]:
    """Command line of Firecracker with that guest."""
    place = Path(tempfile.mkdtemp(dir=directory))
    return common.firecracker_command(place, Path(guest), cmdline=cmdline, memory=MEMORY_MIB, more=more)


def _disk(path: Path) -> Path:
    # Written, not sparse: the same pages for all.
    if not path.exists():
        with path.open("wb") as file:
            for _ in range(DISK_MIB):
                file.write(os.urandom(1 << 20))
    return path


def blk(directory: Path, cmdline: str) -> dict[str, list[str]]:
    """Each VMM's command line for the guest of disks."""
    guest = kernel("blk")
    disks = {name: str(_disk(directory / name)) for name in ("pyvmm", "qemu", "firecracker")}

    def fire(engine: str) -> list[str]:
        drive = {
            "drive_id": "d", "path_on_host": disks["firecracker"], "is_root_device": False, "is_read_only": False,
            "io_engine": engine, "cache_type": "Writeback",
        }  # fmt: skip
        return firecracker_command(directory, guest, cmdline, drives=[drive])

    return {
        "pyvmm": pyvmm_command(guest, cmdline, "--disk", disks["pyvmm"]),
        QEMU_NAME: qemu_command(
            guest, cmdline, "-object", "iothread,id=io", "-drive",
            f"file={disks['qemu']},if=none,id=d,format=raw,aio=io_uring,cache=writeback",
            "-device", "virtio-blk-device,drive=d,iothread=io",
        ),
        f"{FIRECRACKER_NAME} sync": fire("Sync"),
        f"{FIRECRACKER_NAME} async": fire("Async"),
    }  # fmt: skip


def _quiet(text: str) -> None:
    pass


# Name, words for the guest, requests in a round
BLK = (
    ("ring-3 blk read 4k QD1", "test=3 depth=1 count=5000", 5000),
    ("ring-3 blk read 4k QD32", "test=3 depth=32 count=20000", 20000),
    ("ring-3 blk write 4k QD1", "test=3 write=1 depth=1 count=5000", 5000),
    ("ring-3 blk write 4k QD32", "test=3 write=1 depth=32 count=20000", 20000),
)  # fmt: skip


def figure(name: str, count: int, commands: dict[str, list[str]], say: Callable[[str], None] = _quiet) -> list[Row]:
    """One piece of work by each VMM in turn: rows of its rate and its CPU time beside the best of the peers."""
    runs: dict[str, list[Turn]] = {program: [] for program in commands}
    for _ in range(TURNS):
        for program, command in commands.items():
            # QEMU's exit device makes 1 of 0.
            runs[program].append(turn(command, count, (0, 1) if program == QEMU_NAME else (0,)))
    for program, turns in runs.items():
        seconds, cpu, kicks = (statistics.median(each[key] for each in turns) for key in (1, 2, 3))
        say(f"{name}: {program:24} {1 / seconds:9,.0f}/s, CPU {cpu * 1e6:6.2f} us each, {kicks:.3f} kicks each")
    # One clock for all rates: what a tick is, by all turns.
    tick = statistics.median(each.seconds / each.ticks for turns in runs.values() for each in turns)
    found: list[Row] = []
    for what, of, unit, goal, more in (
        ("", lambda each: 1 / (each.ticks * tick), "1/s", GOAL_RATE, True),
        (", device CPU", lambda each: each.cpu * 1e6, "us each", GOAL_CPU, False),
    ):
        values = {program: [of(each) for each in turns] for program, turns in runs.items()}
        ours = values.pop("pyvmm")
        best = (max if more else min)(values, key=lambda program: statistics.median(values[program]))
        found.append(compare(name + what, unit, ours, values[best], best, goal, more_is_better=more))
    return found


def rows(say: Callable[[str], None] = _quiet) -> list[Row | Missing]:
    """All figures."""
    common.need_kvm()
    found: list[Row | Missing] = []
    with tempfile.TemporaryDirectory(prefix="pyvmm-ring3-", dir="/dev/shm") as name:
        for figure_name, words, count in BLK:
            found += figure(figure_name, count, blk(Path(name), f"{words} rounds={ROUNDS}"), say)
    return found


if __name__ == "__main__":
    for row in rows(lambda text: print(text, flush=True)):
        print(row)
