# SPDX-License-Identifier: Apache-2.0
"""Scale: 50 idle VMs, 20 busy VMs and a neighbour's latency, the start by a VM's size, and many vsock connections.

Compared with Firecracker, on this host's own /dev/kvm. An idle guest is Linux (r3 on a software KVM) that wakes once a
second. Memory is each process's proportional set size (PSS) without guest RAM, which counts shared pages once in total.
Draws bench-results/scale.svg.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from benches.peers import common, devices, start
from benches.peers.common import FIRECRACKER_NAME, MEMORY_MIB, ROOT, Row, compare
from benches.peers.devices_inside import MEMORY_MIB as DEVICES_MIB
from benches.peers.devices_inside import SHM, Servers, vsock_guests
from benches.peers.firecracker import Missing, firecracker
from benches.peers.memory import resident_mib, running
from benches.peers.native import CMDLINE, kernel
from tests.linux import kernels
from tests.linux.tools_guest import GuestFailed
from vmm.budget import raise_descriptor_limit
from vmm.testing import tiny_elf

IDLE, BUSY = 50, 20
ROUNDS = 3
SECONDS = 5.0
GETS = 500
MEMORIES = (1, 4, 16, 64)
DISKS = (1, 4, 8, 17)
VCPUS = (1, 4, 16, 32)
CONNECTIONS = (1, 100, 1000, 4000)  # Firecracker has at most 1,023
# 1: out 0x80, al; jmp 1b: a port that nobody has, so that each turn is an exit to user space.
SPIN = bytes((0x66, 0xBA, 0xF8, 0x03, 0xB0, ord(start.BYTE), 0xEE, 0xE6, 0x80, 0xEB, 0xFC))
Commands = dict[str, Callable[[int], list[str]]]


def _cpu_seconds(pids: Sequence[int]) -> float:
    # From the scheduler's nanoseconds: clock ticks are too coarse for an idle VM.
    tasks = (task for pid in pids for task in Path(f"/proc/{pid}/task").glob("*/schedstat"))
    return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9


def _idle(directory: Path) -> list[Row]:
    image = kernel()
    initrd = directory / "initrd"
    script = "#!/bin/sh\necho re''ady\nwhile :; do sleep 1; done\n"
    initrd.write_bytes(kernels.kernel().initrd((), script))
    cmdline = f"{CMDLINE} rdinit=/init"
    fire = common.firecracker_command(directory, image, initrd=initrd, cmdline=cmdline)
    commands = {
        "pyvmm": [
            *common.pyvmm(),
            "--memory",
            f"{MEMORY_MIB}M",
            "--initrd",
            str(initrd),
            "--append",
            cmdline,
            str(image),
        ],
        "firecracker": fire,
    }

    def turn(name: str) -> Callable[[], tuple[float, float]]:
        def run() -> tuple[float, float]:
            with running([commands[name]] * IDLE, b"ready") as pids:
                time.sleep(1)
                before, begun = _cpu_seconds(pids), time.monotonic()
                time.sleep(SECONDS)
                busy = (_cpu_seconds(pids) - before) / (time.monotonic() - begun) / IDLE
                return busy * 1e3, statistics.fmean(resident_mib(pid, "Pss") for pid in pids)

        return run

    done = common.in_turn(1, **{name: turn(name) for name in commands})
    rows = []
    for index, (what, unit) in enumerate((("CPU of one", "ms/s"), ("memory of one", "MiB"))):
        ours, theirs = ([each[index] for each in done[name]] for name in ("pyvmm", "firecracker"))
        rows.append(compare(f"scale, {IDLE} idle: {what}", unit, ours, theirs, FIRECRACKER_NAME, None))
    return rows


def _servers(directory: Path, config: Path) -> Commands:
    def command(program: Sequence[str]) -> Callable[[int], list[str]]:
        return lambda number: [
            *program, "--api-sock", f"{directory}/s{number}.sock", "--config-file", str(config), "--level", "Error",
        ]  # fmt: skip

    return {"pyvmm": command([common.pyvmm()[0], "serve"]), "firecracker": command([firecracker()])}


def _gets(path: Path) -> list[float]:
    # How long each answer takes, in ms.
    took = []
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        for _ in range(GETS):
            begun = time.perf_counter()
            client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            if not client.recv(4096):
                raise Missing("a VMM that is busy does not answer")
            took.append((time.perf_counter() - begun) * 1e3)
            time.sleep(0.005)
    return took


def _busy(directory: Path) -> list[Row]:
    guest = directory / "spin.elf"
    guest.write_bytes(tiny_elf(SPIN))
    config = Path(common.firecracker_command(directory, guest)[-1])
    servers = _servers(directory, config)

    def turn(name: str) -> Callable[[], tuple[float, float, float]]:
        def run() -> tuple[float, float, float]:
            for stale in directory.glob("s*.sock"):
                stale.unlink()
            with running([servers[name](number) for number in range(BUSY)], start.BYTE.encode()) as pids:
                took = sorted(_gets(directory / "s0.sock"))
                memory = statistics.fmean(resident_mib(pid, "Pss") for pid in pids)
            return took[len(took) // 2], took[len(took) * 99 // 100], memory

        return run

    done = common.in_turn(ROUNDS, **{name: turn(name) for name in servers})
    rows = []
    for index, (what, unit) in enumerate((("GET /, p50", "ms"), ("GET /, p99", "ms"), ("memory of one", "MiB"))):
        ours, theirs = ([each[index] for each in done[name]] for name in ("pyvmm", "firecracker"))
        rows.append(compare(f"scale, {BUSY} busy: {what}", unit, ours, theirs, FIRECRACKER_NAME, None))
    return rows


def _first_byte(starter: start.Starter, command: list[str]) -> float:
    return starter.run(1, command)[0].mark


def _curve(starter: start.Starter, what: str, values: Sequence[int], commands: dict[str, Callable[[int], list[str]]]) \
        -> list[Row]:  # fmt: skip
    rows = []
    for value in values:
        made = {name: make(value) for name, make in commands.items()}
        turns = {name: partial(_first_byte, starter, command) for name, command in made.items()}
        done = common.in_turn(5, **turns)
        name = f"scale, start to first byte with {value} {what}"
        rows.append(compare(name, "ms", done["pyvmm"], done["firecracker"], FIRECRACKER_NAME, None))
    return rows


def _curves(directory: Path) -> list[Row]:
    guest, disk = directory / "hello.elf", directory / "disk"
    guest.write_bytes(tiny_elf(start.HELLO))
    disk.write_bytes(bytes(1 << 20))
    starter = start.Starter(directory)

    def drives(count: int) -> list[dict[str, object]]:
        # The disks of one host file: read-only, so that both take it more than once.
        one = {"path_on_host": str(disk), "is_root_device": False, "is_read_only": True}
        return [{**one, "drive_id": f"d{number}"} for number in range(count)]

    run = [*common.pyvmm(), "--memory"]
    memory: dict[str, Callable[[int], list[str]]] = {
        "pyvmm": lambda gib: [*run, f"{gib}G", str(guest)],
        "firecracker": lambda gib: [
            *common.firecracker_command(directory, guest, memory=gib << 10),
            "--level",
            "Error",
        ],
    }
    disks: dict[str, Callable[[int], list[str]]] = {
        "pyvmm": lambda count: [*run, f"{MEMORY_MIB}M", *["--disk", f"{disk},ro"] * count, str(guest)],
        "firecracker": lambda count: [
            *common.firecracker_command(directory, guest, more={"drives": drives(count)}),
            "--level",
            "Error",
        ],
    }
    vcpus: dict[str, Callable[[int], list[str]]] = {
        "pyvmm": lambda count: [*run, f"{MEMORY_MIB}M", "--cpus", str(count), str(guest)],
        "firecracker": lambda count: [
            *common.firecracker_command(
                directory, guest, more={"machine-config": {"vcpu_count": count, "mem_size_mib": MEMORY_MIB}}
            ),
            "--level",
            "Error",
        ],
    }
    return [
        *_curve(starter, "GiB", MEMORIES, memory), *_curve(starter, "disks", DISKS, disks),
        *_curve(starter, "vCPUs", VCPUS, vcpus),
    ]  # fmt: skip


def _connected(path: Path, count: int, stack: contextlib.ExitStack) -> None:
    # Connections that are open and say nothing.
    for _ in range(count):
        client = stack.enter_context(socket.socket(socket.AF_UNIX))
        client.settimeout(10)
        client.connect(str(path))
        client.sendall(b"CONNECT 7000\n")
        if not client.recv(64).startswith(b"OK"):
            raise Missing(f"{path.name}: no {count} connections")
        client.sendall(b"h")


def _connections(directory: Path) -> list[Row]:
    devices.prepare(directory)
    shutil.rmtree(SHM, ignore_errors=True)
    SHM.mkdir()
    servers: Servers = []
    took: dict[tuple[str, int], list[float]] = {}
    memory: dict[tuple[str, int], list[float]] = {}
    raise_descriptor_limit()
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, SHM, ignore_errors=True)
        guests = {}
        for name, vmm in vsock_guests(directory, servers).items():
            if name in ("pyvmm", "firecracker"):
                guests[name] = stack.enter_context(vmm.start())
                guests[name].wait_ready()
                guests[name].ask("ulimit -n 8192")
                guests[name].ask(vmm.setup)
        for server in servers:
            stack.callback(server.wait)
            stack.callback(server.kill)
        for _ in range(ROUNDS):
            for count in CONNECTIONS:
                for name, guest in guests.items():
                    if name == "firecracker" and count > 1000:
                        continue
                    path = SHM / f"{name}.vsock"
                    time.sleep(1)  # those before are closed on both sides
                    with contextlib.ExitStack() as open_ones:
                        _connected(path, count - 1, open_ones)
                        ping = [str(directory / "probe"), "ping", f"hybrid:{path}:7000", "1"]
                        done = subprocess.run(ping, capture_output=True, text=True, check=True)
                        took.setdefault((name, count), []).append(1e6 / float(done.stdout.split()[0]))
                        memory.setdefault((name, count), []).append(resident_mib(guest.process.pid, "Pss", DEVICES_MIB))
    rows = []
    for what, unit, found in (("round trip", "us", took), ("memory", "MiB", memory)):
        for count in CONNECTIONS:
            name, ours = f"scale, vsock {what} beside {count} connections", found["pyvmm", count]
            theirs = found.get(("firecracker", count))
            rows.append(
                compare(name, unit, ours, theirs, FIRECRACKER_NAME, None)
                if theirs
                else common.alone(name, unit, ours, None)
            )
    return rows


def _draw(rows: Sequence[Row]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    start, trip = "ms to the guest's first byte", "us for a vsock round trip"
    pictures = {"GiB": start, "disks": start, "vCPUs": start, "connections": trip}
    figure, axes = pyplot.subplots(1, len(pictures), figsize=(14, 3), squeeze=False)
    for (what, label), ax in zip(pictures.items(), axes[0], strict=True):
        points = [
            (int(row.name.split()[-2]), row)
            for row in rows
            if row.name.endswith(f" {what}") and row.unit == label.split()[0]
        ]
        ours = [(value, row.ours) for value, row in points]
        theirs = [(value, row.peer) for value, row in points if row.peer is not None]
        for name, curve in (("pyvmm", ours), (FIRECRACKER_NAME, theirs)):
            ax.plot(*zip(*curve, strict=True), marker="o", label=name)
        ax.set_xlabel(what)
        ax.set_ylabel(label)
        ax.set_ylim(bottom=0)
        ax.legend()
    figure.tight_layout()
    (ROOT / "bench-results").mkdir(exist_ok=True)
    figure.savefig(ROOT / "bench-results/scale.svg", metadata={"Date": None})


def rows() -> list[Row | Missing]:
    """Every row."""
    common.need_kvm()
    found: list[Row | Missing] = []
    with tempfile.TemporaryDirectory(prefix="pyvmm-scale-", dir="/dev/shm") as name:
        curves = _curves(Path(name))
        try:
            curves += _connections(Path(name))
        except (Missing, GuestFailed, OSError, subprocess.CalledProcessError) as problem:
            found.append(Missing(f"connections: {problem}"))
        for part in (_idle, _busy):
            try:
                found += part(Path(name))
            except Missing as problem:
                found.append(problem)
    _draw(curves)
    return [*curves, *found]
