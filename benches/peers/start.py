# SPDX-License-Identifier: Apache-2.0
"""Start: time from exec to the socket, the first response, the guest's first byte, its end, and Linux's init.

With 1, 8 and 20 copies at once.

On this host's own /dev/kvm. On a software KVM, Linux is r3, a kernel that runs natively there.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from benches.peers import common
from benches.peers.boot import INIT
from benches.peers.common import FIRECRACKER_NAME, MEMORY_MIB, QEMU_NAME, Row, compare
from benches.peers.firecracker import Missing, firecracker
from benches.peers.native import CMDLINE, QEMU_MACHINE, kernel
from vmm.images.cpio import Archive
from vmm.testing import tiny_elf

ROUNDS = int(os.environ.get("PYVMM_BENCH_ROUNDS", "5")) * 3
AT_ONCE = (1, 8, 20)
LEAST_ROUNDS = 3
BYTE, MARK = "x", "\1"
# mov dx, 0x3f8; mov al, 'x'; out dx, al; mov al, 0xfe; out 0x64, al: the end.
HELLO = bytes((0x66, 0xBA, 0xF8, 0x03, 0xB0, ord(BYTE), 0xEE, 0xB0, 0xFE, 0xE6, 0x64, 0xF4))
EXIT = bytes((0xB0, 0x2A, 0xE6, 0xF4))


class Life(NamedTuple):
    """The times of one copy, in ms from its exec; for answers after the first, from their requests."""

    connected: float
    answers: tuple[float, ...]
    asked: float
    mark: float
    end: float
    rss_mib: float


class Starter:
    """Starts copies of a VMM, by ``start.c``.

    :param directory: for its program and the VMMs' sockets
    :raises Missing: no C compiler
    """

    def __init__(self, directory: Path) -> None:
        common.need_compiler()
        self.directory = directory
        self._program = directory / "start"
        source = Path(__file__).with_name("start.c")
        subprocess.run(["cc", "-O2", "-o", str(self._program), str(source)], check=True)

    def run(
        self,
        count: int,
        command: Sequence[str],
        *,
        requests: Sequence[tuple[str, str, object]] = (),
        mark: str = BYTE,
        hold: int = 0,
    ) -> list[Life]:
        """Start `count` copies of `command`, ask each for `requests`, and wait for `mark` and its end.

        :param command: %d in its words is the copy's number
        :param mark: a character of the guest's output; empty: it has no guest
        :param hold: 1: kill it at its mark; 2: half a second after its answer
        :raises Missing: one of them failed
        """
        asked = "-"
        if requests:
            asked = str(self.directory / "requests")
            Path(asked).write_bytes(b"\0".join(_http(*each) for each in requests))
        line = [str(self._program), str(count), str(self.directory), mark or MARK, str(hold), asked, "--", *command]
        done = subprocess.run(line, capture_output=True, text=True)
        if done.returncode:
            raise Missing(f"{' '.join(command)}: {done.stderr}")
        lives = [_life(text) for text in done.stdout.splitlines()]
        if mark and any(each.mark < 0 for each in lives) and hold != 2:
            raise Missing(f"no sign of its guest: {' '.join(command)}")
        return lives


def _http(method: str, path: str, body: object) -> bytes:
    text = b"" if body is None else json.dumps(body).encode()
    length = f"Content-Length: {len(text)}\r\n" if text else ""
    return f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n{length}\r\n".encode() + text


def _life(line: str) -> Life:
    connected, *answers, asked, mark, end, rss = (float(word) for word in line.split())
    ms = [each / 1e3 for each in answers]
    return Life(connected / 1e3, tuple(ms), asked / 1e3, mark / 1e3, end / 1e3, rss / 1024)


def _worst(of: Callable[[Life], float]) -> Callable[[list[Life]], float]:
    return lambda lives: max(of(each) for each in lives)


def _median(of: Callable[[Life], float]) -> Callable[[list[Life]], float]:
    return lambda lives: statistics.median(of(each) for each in lives)


class _Rows:
    # Rounds of one scenario, ours and the peers' in turn, and rows of them.
    def __init__(self, count: int, runs: dict[str, list[list[Life]]]) -> None:
        self.count = count
        self.runs = runs
        self.rows: list[Row] = []

    def add(
        self, what: str, of: Callable[[list[Life]], float], *, peer: str = "firecracker", most: float | None = None,
        ratio: float | None = None, unit: str = "ms",
    ) -> None:  # fmt: skip
        """A row beside `peer`; `most`: the goal is on our own figure, not on the ratio."""
        ours, theirs = ([of(lives) for lives in self.runs[name]] for name in ("pyvmm", peer))
        name = f"start, {self.count} at once: {what}"
        row = compare(name, unit, ours, theirs, {"firecracker": FIRECRACKER_NAME, "qemu": QEMU_NAME}[peer], ratio)
        self.rows.append(row)
        if most is not None:
            self.rows.append(common.alone(name, unit, ours, most))


def _rounds(count: int) -> int:
    return ROUNDS if count == 1 else max(LEAST_ROUNDS, ROUNDS // 3)


def _api(starter: Starter, count: int) -> list[Row]:
    directory = starter.directory
    guest, disk = directory / "hello.elf", directory / "disk"
    guest.write_bytes(tiny_elf(HELLO))
    disk.write_bytes(bytes(1 << 20))
    drive = {"drive_id": "d", "path_on_host": str(disk), "is_root_device": False, "is_read_only": True}
    requests: list[tuple[str, str, object]] = [
        ("GET", "/", None),
        ("GET", "/version", None),
        ("PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": MEMORY_MIB}),
        ("PUT", "/boot-source", {"kernel_image_path": str(guest), "boot_args": ""}),
        ("PUT", "/drives/d", drive),
        ("PUT", "/vsock", {"guest_cid": 3, "uds_path": f"{directory}/v%%.sock"}),
        ("PUT", "/actions", {"action_type": "InstanceStart"}),
    ]

    def turn(name: str) -> Callable[[], list[Life]]:
        def run() -> list[Life]:
            for stale in directory.glob("v*.sock"):
                stale.unlink()
            return starter.run(count, _servers(directory)[name], requests=requests)

        return run

    done = common.in_turn(_rounds(count), **{name: turn(name) for name in _servers(directory)})
    found = _Rows(count, done)
    alone = count == 1
    found.add("socket connectable", _worst(lambda each: each.connected), most=5 if alone else None)
    found.add("first answer, the slowest", _worst(lambda each: each.answers[0]), most={1: 22, 20: 600}.get(count))
    found.add("a later request, the slowest", _worst(lambda each: max(each.answers[1:-1])), most=5 if alone else None)
    found.add("PUTs of the configuration", _median(lambda each: sum(each.answers[2:-1])))
    found.add("InstanceStart", _median(lambda each: each.answers[-1]))
    found.add("InstanceStart to a guest's first byte", _median(lambda each: each.mark - each.asked))
    return found.rows


def _servers(directory: Path) -> dict[str, list[str]]:
    socket = ["--api-sock", f"{directory}/%d.sock"]
    return {
        "pyvmm": [common.pyvmm()[0], "serve", *socket],
        "firecracker": [firecracker(), "--level", "Error", *socket],
    }


def _memory(starter: Starter) -> list[Row]:
    # With the system call filters, as both are run.
    def turn(name: str) -> Callable[[], list[Life]]:
        return lambda: starter.run(1, _servers(starter.directory)[name], requests=[("GET", "/", None)], hold=2)

    found = _Rows(1, common.in_turn(LEAST_ROUNDS, **{name: turn(name) for name in _servers(starter.directory)}))
    found.add("resident memory, API up", _median(lambda each: each.rss_mib), most=13, unit="MiB")
    return found.rows


def _tiny(starter: Starter, count: int) -> list[Row]:
    guest, other = starter.directory / "hello.elf", starter.directory / "exit.elf"
    guest.write_bytes(tiny_elf(HELLO))
    other.write_bytes(tiny_elf(HELLO[:-5] + EXIT))
    exit_port = ("-device", "isa-debug-exit,iobase=0xf4,iosize=4")  # QEMU's microvm has no i8042
    commands = {
        "pyvmm": [*common.pyvmm(), "--memory", f"{MEMORY_MIB}M", str(guest)],
        "qemu": common.qemu_command(other, "-serial", "stdio", *exit_port),
        "firecracker": [*common.firecracker_command(starter.directory, guest), "--level", "Error"],
    }

    def turn(name: str) -> Callable[[], list[Life]]:
        return lambda: starter.run(count, commands[name])

    found = _Rows(count, common.in_turn(_rounds(count), **{name: turn(name) for name in commands}))
    alone = count == 1
    for peer in ("firecracker", "qemu"):
        byte = 18 if alone and peer == "firecracker" else None
        found.add("a tiny guest's first byte", _median(lambda each: each.mark), peer=peer, most=byte)
        end = 1.35 if alone and peer == "firecracker" else None
        found.add("to the exit", _median(lambda each: each.end), peer=peer, ratio=end)
        found.add("first byte to exit", _median(lambda each: each.end - each.mark), peer=peer)
    return found.rows


def _linux(starter: Starter, count: int) -> list[Row]:
    directory, image = starter.directory, kernel()
    init = directory / "init"
    compiler = ["cc", "-O2", "-static", "-nostdlib", "-fno-stack-protector", "-o", str(init), "-xc", "-"]
    subprocess.run(compiler, input=INIT.replace(r"\n@init@\n", r"\1       ").encode(), check=True)
    archive = Archive()
    archive.console()
    archive.file("init", init.read_bytes(), 0o755)
    initrd = directory / "initrd"
    initrd.write_bytes(archive.to_bytes())
    fire = common.firecracker_command(directory, image, initrd=initrd, cmdline=CMDLINE)
    qemu = (
        "-initrd", str(initrd), "-append", CMDLINE.replace("reboot=k", "reboot=t"), "-serial", "stdio", "-no-reboot",
    )  # fmt: skip
    commands = {
        # As Firecracker is started, by the same file.
        "pyvmm": [common.pyvmm()[0], "serve", *fire[1:]],
        "qemu": common.qemu_command(image, *qemu, machine=QEMU_MACHINE),
        "firecracker": fire,
    }

    def whole(name: str) -> Callable[[], list[Life]]:
        return lambda: starter.run(count, commands[name], mark=MARK, hold=1)

    found = _Rows(count, common.in_turn(_rounds(count), **{name: whole(name) for name in commands}))
    for peer in ("firecracker", "qemu"):
        goal = 1.1 if count == 1 and peer == "firecracker" else None
        found.add("to Linux's init", _median(lambda each: each.mark), peer=peer, ratio=goal)

    source = {"kernel_image_path": str(image), "initrd_path": str(initrd), "boot_args": CMDLINE}
    requests: list[tuple[str, str, object]] = [
        ("GET", "/", None),
        ("PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": MEMORY_MIB}),
        ("PUT", "/boot-source", source),
        ("PUT", "/actions", {"action_type": "InstanceStart"}),
    ]
    servers = _servers(directory)

    def by_api(name: str) -> Callable[[], list[Life]]:
        return lambda: starter.run(count, servers[name], requests=requests, mark=MARK, hold=1)

    api = _Rows(count, common.in_turn(_rounds(count), **{name: by_api(name) for name in servers}))
    api.add("InstanceStart to init", _median(lambda each: each.mark - each.asked), ratio=1.0 if count == 1 else None)
    return found.rows + api.rows


def _versions(starter: Starter) -> list[Row]:
    link = starter.directory / "firecracker"
    subprocess.run([common.pyvmm()[0], "link", "firecracker", str(link.parent)], check=True, stdout=subprocess.DEVNULL)
    rows = []
    for option in ("--version", "--help"):
        ours, theirs = [str(link), option], [firecracker(), option]

        def turn(command: list[str]) -> Callable[[], list[Life]]:
            return lambda: starter.run(1, command, mark="")

        found = _Rows(1, common.in_turn(ROUNDS, pyvmm=turn(ours), firecracker=turn(theirs)))
        found.add(f"firecracker {option}", _median(lambda each: each.end), ratio=2.0)
        rows += found.rows
    return rows


def rows() -> list[Row | Missing]:
    """Every row of a start; also alone: ``start-api``, ``start-tiny`` and ``start-linux``."""
    return [*_some("api"), *_some("tiny"), *_some("linux")]


def _some(name: str) -> list[Row | Missing]:
    common.need_kvm()
    found: list[Row | Missing] = []
    with tempfile.TemporaryDirectory(prefix="pyvmm-start-", dir="/dev/shm") as directory:
        starter = Starter(Path(directory))
        if name == "api":
            found += [*_versions(starter), *_memory(starter)]
        for count in AT_ONCE:
            try:
                found += {"api": _api, "tiny": _tiny, "linux": _linux}[name](starter, count)
            except Missing as problem:
                found.append(problem)
    return found
