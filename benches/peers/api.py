# SPDX-License-Identifier: Apache-2.0
"""The API compared with Firecracker's: time to the first response, latency, memory, and the cost for a busy guest.

It uses this host's own /dev/kvm, of any kind. ``boot`` measures the start of a Linux guest, in the lab.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from benches.peers import common
from benches.peers.common import FIRECRACKER_NAME, Row, compare
from benches.peers.firecracker import Missing, firecracker
from tests.kvm.ring3 import kernel
from vmm.testing import tiny_elf

TURNS = int(os.environ.get("PYVMM_BENCH_ROUNDS", "5")) * 3
REQUESTS = 1000
PATIENCE = 30
MEMORY_MIB = 32
DISK_MIB = 128
# Requests per second to a running VM: far more than any runtime sends.
LOAD_A_SECOND = 50
LOSS_GOAL = 2.0  # percent
# mov dx, 0x3f8; mov al, 'x'; out dx, al; hlt; jmp to the hlt
HELLO = bytes((0x66, 0xBA, 0xF8, 0x03, 0xB0, ord("x"), 0xEE, 0xF4, 0xEB, 0xFD))


class Client:
    """A persistent connection, as a runtime has."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(PATIENCE)
        self._socket.connect(str(path))

    def request(self, method: str, path: str, body: object = None) -> bytes:
        """The answer, whole.

        :raises Missing: the server answered with an error
        """
        text = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(text)}\r\n\r\n".encode()
        self._socket.sendall((head if text else head.replace(b"Content-Length: 0\r\n", b"")) + text)
        answer = b""
        while b"\r\n\r\n" not in answer:
            piece = self._socket.recv(65536)
            if not piece:
                raise Missing(f"{method} {path}: the connection ended")
            answer += piece
        start, _, rest = answer.partition(b"\r\n\r\n")
        length = next((int(line[15:]) for line in start.split(b"\r\n") if line.startswith(b"Content-Length:")), 0)
        while len(rest) < length:
            rest += self._socket.recv(65536)
        if not answer.startswith(b"HTTP/1.1 2"):
            raise Missing(f"{method} {path}: {answer.decode(errors='replace')}")
        return rest

    def close(self) -> None:
        """Idempotent."""
        self._socket.close()


@contextlib.contextmanager
def serving(command: Sequence[str], path: Path, stdout: int = subprocess.DEVNULL) -> Iterator[subprocess.Popen[bytes]]:
    """A VMM with its socket at `path`, killed at the end."""
    path.unlink(missing_ok=True)
    process = subprocess.Popen(
        [*command, "--api-sock", str(path)], stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.DEVNULL
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def connected(path: Path) -> Client:
    """Wait until the API accepts connections; return a client."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            return Client(path)
        except OSError:
            time.sleep(0.0005)
    raise Missing(f"{path}: nobody answers")


class Turn(NamedTuple):
    """One life of a VMM with a tiny guest."""

    answer_ms: float
    start_ms: float
    rss_mib: float
    get_us: list[float]
    put_us: list[float]


def turn(command: Sequence[str], directory: Path, guest: Path) -> Turn:
    """Start the VMM, send many requests, start the guest, and wait for its first byte."""
    path = directory / "api.sock"
    read, write = os.pipe()
    start = time.perf_counter()
    try:
        with serving(command, path, write) as process:
            client = connected(path)
            client.request("GET", "/")
            answered = time.perf_counter()
            memory = Path(f"/proc/{process.pid}/status").read_text()
            machine = {"vcpu_count": 1, "mem_size_mib": MEMORY_MIB}
            get = [_microseconds(client, "GET", "/machine-config") for _ in range(REQUESTS)]
            put = [_microseconds(client, "PUT", "/machine-config", machine) for _ in range(REQUESTS)]
            client.request("PUT", "/boot-source", {"kernel_image_path": str(guest), "boot_args": ""})
            if "firecracker" in command[0] and common.lacks_xsave():
                client.request("PUT", "/cpu-config", {"kvm_capabilities": [f"!{common.KVM_CAP_XCRS}"]})
            begun = time.perf_counter()
            client.request("PUT", "/actions", {"action_type": "InstanceStart"})
            if not select.select([read], [], [], PATIENCE)[0]:
                raise Missing(f"no word of the guest: {' '.join(command)}")
            ended = time.perf_counter()
            client.close()
    finally:
        os.close(read)
        os.close(write)
    rss = next(int(line.split()[1]) for line in memory.splitlines() if line.startswith("VmRSS"))
    return Turn((answered - start) * 1e3, (ended - begun) * 1e3, rss / 1024, get, put)


def _microseconds(client: Client, method: str, path: str, body: object = None) -> float:
    start = time.perf_counter()
    client.request(method, path, body)
    return (time.perf_counter() - start) * 1e6


def _percentile(values: Sequence[float], percent: int) -> float:
    return statistics.quantiles(values, n=100)[percent - 1]


def _pyvmm() -> list[str]:
    return [common.pyvmm()[0], "serve", "--no-seccomp"]


def _loss(directory: Path) -> list[float]:
    # Percent more time that a guest's reads take while the API is asked LOAD_A_SECOND times a second, each pair of
    # rounds beside one another: one quiet, one asked.
    disk, path = directory / "disk", directory / "loaded.sock"
    disk.write_bytes(os.urandom(1 << 20) * DISK_MIB)
    config = directory / "loaded.json"
    cmdline = "test=3 depth=32 count=20000 rounds=26"
    drive = {"drive_id": "d", "path_on_host": str(disk), "is_root_device": False, "cache_type": "Writeback"}
    config.write_text(
        json.dumps({
            "boot-source": {"kernel_image_path": kernel("blk"), "boot_args": cmdline},
            "machine-config": {"vcpu_count": 1, "mem_size_mib": MEMORY_MIB},
            "drives": [drive],
        })
    )  # fmt: skip
    asked = threading.Event()
    over = threading.Event()
    with serving([*_pyvmm(), "--config-file", str(config)], path, subprocess.PIPE) as process:
        client = connected(path)

        def ask() -> None:
            while not over.wait(1 / LOAD_A_SECOND):
                if asked.is_set():
                    with contextlib.suppress(Missing, OSError):
                        client.request("GET", "/vm/config")

        asker = threading.Thread(target=ask)
        asker.start()
        ticks: list[int] = []
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith(b"ticks="):
                    ticks.append(int(line.partition(b"=")[2].split()[0]))
                    (asked.clear if asked.is_set() else asked.set)()
        finally:
            over.set()
            asker.join()
            client.close()
    if len(ticks) < 20:
        raise Missing(f"the guest at work ended after {len(ticks)} rounds")
    # The first round was quiet, the second asked, and so on; those at the ends warm up and end.
    pairs = zip(ticks[2::2], ticks[3::2], strict=False)
    return [(loaded / quiet - 1) * 100 for quiet, loaded in pairs]


def rows() -> list[Row | Missing]:
    """The API's figures."""
    common.need_kvm()
    with tempfile.TemporaryDirectory(prefix="pyvmm-api-", dir="/dev/shm") as name:
        directory = Path(name)
        guest = directory / "hello.elf"
        guest.write_bytes(tiny_elf(HELLO))
        fire = [firecracker(), "--no-seccomp", "--level", "Error"]  # it would log each request on stdout
        runs = common.in_turn(
            TURNS,
            pyvmm=lambda: turn(_pyvmm(), directory, guest),
            firecracker=lambda: turn(fire, directory, guest),
        )
        ours, theirs = runs["pyvmm"], runs["firecracker"]
        found: list[Row | Missing] = []

        def beside(what: str, unit: str, of: object, goal: float | None = None) -> None:
            assert callable(of)
            values = [of(each) for each in ours], [of(each) for each in theirs]
            found.append(compare(what, unit, *values, FIRECRACKER_NAME, goal))

        beside("API, process start to the first answer", "ms", lambda each: each.answer_ms)
        beside("API, InstanceStart to a guest's first byte", "ms", lambda each: each.start_ms)
        beside("API, resident memory before the start", "MiB", lambda each: each.rss_mib)
        for word, times in (("GET", "get_us"), ("PUT", "put_us")):
            for percent in (50, 99):
                beside(
                    f"API, {word} p{percent}", "us", lambda each, t=times, p=percent: _percentile(getattr(each, t), p)
                )
        try:
            loss = _loss(directory)
            found.append(common.alone(f"API, {LOAD_A_SECOND} requests/s: a guest's reads lose", "%", loss, LOSS_GOAL))
        except Missing as problem:
            found.append(problem)
    return found
