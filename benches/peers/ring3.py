# SPDX-License-Identifier: Apache-2.0
"""The devices beside QEMU's and Firecracker's on this host's own /dev/kvm, whatever it is: one small guest in each.

The guest is one of tests/kvm/driver: its driver runs in ring 3, natively even on a software KVM, polls its queues and
tells its ticks for each round. All VMMs run in turn; files are on tmpfs. ``PYVMM_BENCH_ROUNDS`` makes it longer.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import multiprocessing
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from benches.peers import common
from benches.peers.common import FIRECRACKER_NAME, QEMU_NAME, Row, compare
from benches.peers.firecracker import Missing
from tests.kvm.ring3 import Words, kernel

TURNS = int(os.environ.get("PYVMM_BENCH_ROUNDS", "5"))
ROUNDS = 6  # of the guest in one turn; the first warms up, the last may end with the process
MEMORY_MIB = 32
DISK_MIB = 128
PATIENCE = 60
MB = 1_000_000
SOCKETS = ("pyvmm.vsock", "firecracker.vsock")
CLONE_NEWNET = 0x40000000
TAP, HOST, GUEST = "ring3", "10.99.0.1", "10.99.0.2"
GOAL_RATE, GOAL_CPU = 1.0, 1.1
VCPUS = ("fc_vcpu", "CPU ")  # what the VMMs call the threads of their vCPUs

Commands = dict[str, list[str]]  # by program


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

    :raises Missing: the command failed
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


def blk(directory: Path, cmdline: str) -> Commands:
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


def vsock(directory: Path, cmdline: str) -> Commands:
    """Each VMM's command line for the guest of sockets; `directory` has our end of them."""
    guest = kernel("vsock")
    ours, theirs = (directory / name for name in SOCKETS)
    ours.unlink(missing_ok=True)

    def fire() -> list[str]:
        theirs.unlink(missing_ok=True)
        return firecracker_command(directory, guest, cmdline, vsock={"guest_cid": 3, "uds_path": str(theirs)})

    return {"pyvmm": pyvmm_command(guest, cmdline, "--vsock", f"cid=3,uds={ours}"), FIRECRACKER_NAME: fire()}


def net(directory: Path, cmdline: str) -> Commands:
    """Each VMM's command line for the guest of frames, all on the tap TAP, one after the other."""
    guest, mac = kernel("net"), "06:00:00:00:00:02"
    interface = {"iface_id": "eth0", "host_dev_name": TAP, "guest_mac": mac}
    return {
        "pyvmm": pyvmm_command(guest, cmdline, "--net", f"tap={TAP},mac={mac}"),
        QEMU_NAME: qemu_command(
            guest, cmdline, "-netdev", f"tap,id=n,ifname={TAP},script=no,downscript=no,vhost=off",
            "-device", f"virtio-net-device,netdev=n,mac={mac}",
        ),
        FIRECRACKER_NAME: firecracker_command(directory, guest, cmdline, **{"network-interfaces": [interface]}),
    }  # fmt: skip


def _sink(connection: socket.socket) -> None:
    room = bytearray(1 << 20)
    while connection.recv_into(room):
        pass


def _source(connection: socket.socket) -> None:
    data = bytes(1 << 20)
    while True:
        connection.sendall(data)


def _echo(connection: socket.socket) -> None:
    while data := connection.recv(1 << 16):
        connection.sendall(data)


def _serve(path: str, with_it: Callable[[socket.socket], None]) -> None:
    def run(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            with_it(connection)

    def accept() -> None:
        while True:
            threading.Thread(target=run, args=(listener.accept()[0],), daemon=True).start()

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    threading.Thread(target=accept, daemon=True).start()


def _flood() -> None:
    # Datagrams for whatever guest is there; most find a full queue, as is the nature of a flood.
    end = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    data = bytes(64)
    while True:
        with contextlib.suppress(OSError):
            end.sendto(data, (GUEST, 7))


@contextlib.contextmanager
def _network() -> Iterator[None]:
    # A namespace of this thread's own, which its children are in too, with a tap.
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/thread-self/ns/net") as before:
        if not os.path.exists("/dev/net/tun") or libc.unshare(CLONE_NEWNET):
            raise Missing("a tap: needs /dev/net/tun and CAP_SYS_ADMIN")
        try:
            for words in (
                f"tuntap add dev {TAP} mode tap",
                f"addr add {HOST}/24 dev {TAP}",
                f"link set {TAP} up",
            ):
                subprocess.run(["ip", *words.split()], check=True)
            yield
        finally:
            libc.setns(before.fileno(), CLONE_NEWNET)


def _quiet(text: str) -> None:
    pass


class Figure(NamedTuple):
    """A row: its name, the words for the guest, its units in a round, and what the guest counts in each of them."""

    name: str
    words: str
    units: int
    unit: str = "1/s"
    each: int = 1


BLK = (
    Figure("ring-3 blk read 4k QD1", "test=3 depth=1", 5000),
    Figure("ring-3 blk read 4k QD32", "test=3 depth=32", 20000),
    Figure("ring-3 blk write 4k QD1", "test=3 write=1 depth=1", 5000),
    Figure("ring-3 blk write 4k QD32", "test=3 write=1 depth=32", 20000),
)
VSOCK = (
    Figure("ring-3 vsock guest to host 64k", "test=2 chunk=65536", 256, "MB/s", MB),
    Figure("ring-3 vsock guest to host 4k", "test=2 chunk=4096", 64, "MB/s", MB),
    Figure("ring-3 vsock host to guest 64k", "test=3 chunk=65536", 256, "MB/s", MB),
    Figure("ring-3 vsock host to guest 4k", "test=3 chunk=4096", 64, "MB/s", MB),
    Figure("ring-3 vsock round trip", "test=4", 5000),
)
NET = (
    Figure("ring-3 net round trip", "test=3", 5000),
    Figure("ring-3 net UDP 64 B guest to host", "test=1", 50000),
    Figure("ring-3 net UDP 64 B host to guest", "test=2", 20000),
)


def figure(what: Figure, commands: Callable[[], Commands], say: Callable[[str], None] = _quiet) -> list[Row]:
    """One piece of work by each VMM in turn: rows of its rate and its CPU time beside the best of the peers."""
    name, count, unit = what.name, what.units, what.unit
    per = "each" if unit == "1/s" else f"a {unit.removesuffix('/s')}"
    runs: dict[str, list[Turn]] = {}
    for _ in range(TURNS):
        for program, command in commands().items():
            # QEMU's exit device makes 1 of 0.
            runs.setdefault(program, []).append(turn(command, count, (0, 1) if program == QEMU_NAME else (0,)))
    for program, turns in runs.items():
        seconds = statistics.median(each.seconds for each in turns)
        cpu = statistics.median(each.cpu for each in turns)
        kicks = statistics.median(each.kicks for each in turns)
        say(f"{name}: {program:24} {1 / seconds:9,.0f} {unit}, CPU {cpu * 1e6:6.2f} us, {kicks:.3f} kicks {per}")
    # One clock for all rates: what a tick is, by all turns.
    tick = statistics.median(each.seconds / each.ticks for turns in runs.values() for each in turns)
    found: list[Row] = []
    kinds: tuple[tuple[str, Callable[[Turn], float], str, float, bool], ...] = (
        ("", lambda each: 1 / (each.ticks * tick), unit, GOAL_RATE, True),
        (", device CPU", lambda each: each.cpu * 1e6, f"us {per}", GOAL_CPU, False),
    )
    for kind, of, each_unit, goal, more in kinds:
        values = {program: [of(each) for each in turns] for program, turns in runs.items()}
        ours = values.pop("pyvmm")
        best = (max if more else min)(values, key=lambda program: statistics.median(values[program]))
        found.append(compare(name + kind, each_unit, ours, values[best], best, goal, more_is_better=more))
    return found


def rows(say: Callable[[str], None] = _quiet, only: str = "") -> list[Row | Missing]:
    """All figures whose names contain `only`."""
    common.need_kvm()
    found: list[Row | Missing] = []
    with tempfile.TemporaryDirectory(prefix="pyvmm-ring3-", dir="/dev/shm") as name, contextlib.ExitStack() as stack:
        directory = Path(name)
        for path in SOCKETS:
            for port, with_it in ((7001, _sink), (7002, _source), (7003, _echo)):
                _serve(f"{directory / path}_{port}", with_it)
        for commands, figures in ((blk, BLK), (vsock, VSOCK), (net, NET)):
            for what in figures:
                if only not in what.name:
                    continue
                try:
                    if commands is net and what is NET[0]:
                        stack.enter_context(_network())
                    if what.words == "test=2" and commands is net:
                        sender = multiprocessing.Process(target=_flood, daemon=True)
                        sender.start()
                        stack.callback(sender.kill)
                    cmdline = f"{what.words} count={what.units * what.each} rounds={ROUNDS}"
                    found += figure(what, functools.partial(commands, directory, cmdline), say)
                except Missing as problem:
                    found.append(Missing(f"{what.name}: {problem}"))
    return found


if __name__ == "__main__":
    for row in rows(lambda text: print(text, flush=True), *sys.argv[1:2]):
        print(row if isinstance(row, Row) else f"MISSING: {row}")
