# SPDX-License-Identifier: Apache-2.0
"""Forks, pools, snapshots: copies of a tiny guest, and the API's files beside Firecracker's; on this /dev/kvm."""

from __future__ import annotations

import ctypes
import gc
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from benches.peers import common
from benches.peers.api import Client, connected, serving
from benches.peers.common import FIRECRACKER_NAME, Row, alone, compare
from benches.peers.firecracker import firecracker
from vmm import Machine, Pool, undertaker
from vmm.testing import tiny_elf

COPIES, ROUNDS = 100, 5
SIZES = (64, 1024)  # MiB of the API's guests
PARENT_MIB = 256
# Of the same calls in C: 1.2 ms were asked for on a host where C took 0.52.
GOAL_BESIDE_C = 2.3
_LOOK = 2e-5  # seconds between two looks, in which other threads have the interpreter
_PR_SET_TIMERSLACK = 29  # the kernel adds 50 us to each sleep unless it is told otherwise
# 1: out 0x80, al; mov ecx, 100; 2: loop 2b; jmp 1b: a port that nobody has, again and again.
TICKING = bytes((0xE6, 0x80, 0xB9, 100, 0, 0, 0, 0xE2, 0xFE, 0xEB, 0xF5))
# mov edi, 16 MiB; mov ecx, 8 Mi; rep stosd: 32 MiB that are not zero; then cli; hlt.
FILLED = bytes((0xBF, 0, 0, 0, 1, 0xB9, 0, 0, 0x80, 0, 0xB8, 1, 1, 1, 1, 0xF3, 0xAB, 0xFA, 0xF4, 0xEB, 0xFD))


def first_exit(vm: Machine) -> None:
    """Wait until it has had one."""
    while vm.vcpus[0].loop.exits == 0:
        time.sleep(_LOOK)


@contextmanager
def _parent() -> Iterator[Machine]:
    with tempfile.TemporaryDirectory() as name:
        guest = Path(name, "guest.elf")
        guest.write_bytes(tiny_elf(TICKING))
        with Machine(kernel=str(guest), memory=PARENT_MIB << 20) as vm:
            vm.memory.write(32 << 20, b"x" * ((PARENT_MIB - 32) << 20))
            vm.start()
            first_exit(vm)
            yield vm


def _resident_kib() -> int:
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Private_Dirty"))


def _compiled(directory: str) -> list[str]:
    common.need_compiler()
    program = os.path.join(directory, "copies")
    subprocess.run(["cc", "-O2", "-pthread", "-o", program, str(Path(__file__).with_name("copies.c"))], check=True)
    return [program, str(COPIES), str(PARENT_MIB)]


def _forks() -> list[Row]:
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1)
    with tempfile.TemporaryDirectory() as name, _parent() as vm:
        in_c = _compiled(name)
        begun = time.perf_counter()
        vm.pause()
        vm.freeze()
        hold = time.perf_counter() - begun
        vm.resume()
        for child in vm.fork(3):
            child.close()
        each, whole, memory, medians, c_medians = [], [], [], [], []
        for _ in range(ROUNDS):
            undertaker.wait()
            gc.collect()
            before = _resident_kib()
            image = vm.freeze()
            vm.pause()
            children = []
            start = time.perf_counter()
            for _ in range(COPIES):
                begun = time.perf_counter()
                child = Machine(image=image)
                child.start()
                first_exit(child)
                each.append((time.perf_counter() - begun) * 1e3)
                child.pause()
                children.append(child)
            whole.append((time.perf_counter() - start) * 1e3)
            medians.append(statistics.median(each[-COPIES:]))
            memory.append((_resident_kib() - before) / COPIES)
            for child in children:
                child.close()
            undertaker.wait()
            done = subprocess.run(in_c, capture_output=True, text=True, check=True)
            c_medians.append(statistics.median(map(float, done.stdout.split())))
            vm.resume()
        undertaker.wait()
        vm.pause()  # this machine has two cores: one for the copy, one for who waits for it
        with Pool(vm, size=8) as pool:
            taken = []
            for _ in range(40):
                pool.wait_until_full(30)
                begun = time.perf_counter()
                with pool.take(30) as copy:
                    exits = copy.vcpus[0].loop.exits
                    while copy.vcpus[0].loop.exits == exits:
                        time.sleep(_LOOK)
                    taken.append((time.perf_counter() - begun) * 1e3)
    return [
        alone(f"fork of a running {PARENT_MIB} MiB guest, a child to its first exit", "ms", each, 1.2),
        compare("the same beside KVM's calls alone", "ms", medians, c_medians, "a program in C", GOAL_BESIDE_C),
        alone(f"the same, {COPIES} children in all", "ms", whole, 350),
        alone("an idle child's own memory", "KiB", memory, 150),
        alone(f"hold of the parent at the first freeze, {PARENT_MIB} MiB written", "ms", [hold * 1e3], 15),
        alone("Pool.take() to the guest's next exit", "ms", taken, 2),
    ]


def _ask(client: Client, method: str, path: str, body: object) -> float:
    begun = time.perf_counter()
    client.request(method, path, body)
    return (time.perf_counter() - begun) * 1e3


def _turn(command: list[str], directory: Path, guest: Path, mib: int) -> dict[str, float]:
    found: dict[str, float] = {}
    sock = directory / "api.sock"
    files = {"snapshot_path": str(directory / "snap"), "mem_file_path": str(directory / "mem")}
    with serving(command, sock):
        client = connected(sock)
        _ask(client, "PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": mib, "track_dirty_pages": True})
        _ask(client, "PUT", "/boot-source", {"kernel_image_path": str(guest)})
        _ask(client, "PUT", "/actions", {"action_type": "InstanceStart"})
        time.sleep(0.3)
        _ask(client, "PATCH", "/vm", {"state": "Paused"})
        found["full"] = _ask(client, "PUT", "/snapshot/create", files)
        _ask(client, "PATCH", "/vm", {"state": "Resumed"})
        time.sleep(0.05)
        _ask(client, "PATCH", "/vm", {"state": "Paused"})
        found["diff"] = _ask(client, "PUT", "/snapshot/create", {**files, "snapshot_type": "Diff"})
    sock.unlink(missing_ok=True)
    backend = {"backend_type": "File", "backend_path": files["mem_file_path"]}
    with serving(command, sock):
        client = connected(sock)
        time.sleep(0.3)  # a warm server: what is asked is the load
        body = {"snapshot_path": files["snapshot_path"], "mem_backend": backend, "resume_vm": True}
        found["load+resume"] = _ask(client, "PUT", "/snapshot/load", body)
    sock.unlink(missing_ok=True)
    for name in files.values():
        os.unlink(name)
    return found


def _files() -> list[Row]:
    rows = []
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        guest = directory / "guest.elf"
        guest.write_bytes(tiny_elf(FILLED))
        ours, theirs = [*common.pyvmm()[:-1], "serve"], [firecracker()]
        for mib in SIZES:
            found = common.in_turn(
                ROUNDS,
                pyvmm=partial(_turn, ours, directory, guest, mib),
                firecracker=partial(_turn, theirs, directory, guest, mib),
            )
            for what in ("full", "diff", "load+resume"):
                mine, peer = ([turn[what] for turn in found[who]] for who in ("pyvmm", "firecracker"))
                rows.append(compare(f"snapshot, {mib} MiB, {what}", "ms", mine, peer, FIRECRACKER_NAME, 1.0))
    return rows


def rows() -> list[Row]:
    """Forks and pools against their goals, snapshots beside Firecracker."""
    common.need_kvm()
    return [*_forks(), *_files()]
