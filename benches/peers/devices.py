# SPDX-License-Identifier: Apache-2.0
"""The four devices compared with QEMU's and Firecracker's: a guest's throughput, and the host's CPU time for it.

One guest of Debian's tools in every VMM, files on tmpfs: natively, with Debian's kernel on hardware KVM and r3 on a
software KVM; with ``PYVMM_BENCH_LAB=1`` in the lab, for what needs that (vhost). A row compares with the best of the
peers, in each figure. ``PYVMM_BENCH_REPEATS`` and ``PYVMM_BENCH_SECONDS`` shorten or lengthen it.
"""

from __future__ import annotations

import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benches.peers import common, native
from benches.peers.boot import vmlinux
from benches.peers.common import FIRECRACKER_NAME, QEMU_NAME, ROOT, Row, compare
from benches.peers.devices_inside import GUEST_SH, MARK, REPEATS, TABLES, Phase
from benches.peers.firecracker import Missing, firecracker
from tests.linux.tools_guest import initrd_with, probe, tools_image
from vmm import lab
from vmm.errors import VmmError
from vmm.images import apt
from vmm.kvm.vm import runs_linux

TRIES = 3  # the emulated machine stops dead now and then: what it did not come to is done in another
TRY_SECONDS = 900
LAB_MEMORY = "5G"
NAMES = {
    "qemu": QEMU_NAME,
    "firecracker": FIRECRACKER_NAME,
    "firecracker_sync": f"{FIRECRACKER_NAME} sync",
    "firecracker_async": f"{FIRECRACKER_NAME} async",
}
GOAL_RATE, GOAL_CPU, GOAL_DAX = 1.0, 1.1, 2.0
CEILING = {"vsock": "qemu"}  # vhost, in the kernel: for the record

# What each program left, by phase: "rate" and "cpu", or "missing".
Round = dict[tuple[str, str], dict[str, Any]]


def prepare(directory: Path) -> None:
    """Put what the guests and this side need into a directory."""
    image = tools_image()
    program = probe()
    if native.here():
        (directory / "vmlinux").symlink_to(native.kernel())
    else:
        (directory / "vmlinux").write_bytes(vmlinux(image.kernel))
    (directory / "rootfs").symlink_to(image.rootfs)
    (directory / "probe").write_bytes(program)
    (directory / "probe").chmod(0o755)
    # What runs on this side, by names without versions.
    (directory / "iperf3").write_text(f'#!/bin/sh\nexec {shlex.join(image.iperf3)} "$@"\n')
    (directory / "iperf3").chmod(0o755)
    (directory / "nginx").symlink_to(apt.package("nginx").tree / "usr/sbin/nginx")
    initrd_with(image, directory / "initrd", {"bench.sh": GUEST_SH, "mark": MARK, "probe": program})


def _try(directory: Path, table: str, phases: list[str]) -> list[Round]:
    """Measure the phases; return a round for each repeat, as far as it came."""
    command = [sys.executable, "-m", "benches.peers.devices_inside", str(directory), table, *phases]
    runs = directory / "runs"
    runs.unlink(missing_ok=True)
    if runs_linux() or native.here():
        subprocess.run(command, cwd=ROOT, check=False)
    elif lacks := lab.missing():
        raise Missing(f"the lab lacks {'; '.join(lacks)}")
    else:
        shell = f"cd {shlex.quote(str(ROOT))} && exec {shlex.join(command)}"
        try:
            lab.run(
                ["sh", "-c", shell], write=[str(directory)], timeout=TRY_SECONDS, memory=LAB_MEMORY, stdin=None,
                stdout=2,
            )  # fmt: skip
        except VmmError as error:
            print(f"{table}: cut short: {error}", file=sys.stderr)
    rounds: list[Round] = [{} for _ in range(REPEATS)]
    for line in map(json.loads, runs.read_text().splitlines() if runs.exists() else []):
        rounds[line.get("repeat", 0)][line["program"], line["phase"]] = line
    return rounds


def _values(rounds: list[Round], phase: Phase, ours: str, peer: str, key: str) -> tuple[list[float], list[float]]:
    pairs = [(each.get((ours, phase.name), {}), each.get((peer, phase.name), {})) for each in rounds]
    whole = [(a[key], b[key]) for a, b in pairs if a.get(key) and b.get(key)]
    return [a for a, _ in whole], [b for _, b in whole]


def _row(
    name: str, unit: str, rounds: list[Round], phase: Phase, ours: str, peers: list[str], key: str, goal: float | None
) -> Row | Missing:
    # The best of the peers, as a median.
    more = key == "rate"
    found = {peer: _values(rounds, phase, ours, peer, key) for peer in peers}
    medians = {peer: statistics.median(theirs) for peer, (_, theirs) in found.items() if theirs}
    if not medians:
        why = [
            f"{program}: {line['missing']}"
            for each in rounds
            for (program, _), line in each.items()
            if "missing" in line and program in (ours, *peers)
        ]
        return Missing(f"{name}: {why[0] if why else 'no round came to its end'}")
    best = (max if more else min)(medians, key=lambda peer: medians[peer])
    scale = 1.0 if more else 1e6
    mine, theirs = ([value * scale for value in values] for values in found[best])
    return compare(name, unit, mine, theirs, NAMES[best], goal, more_is_better=more)


def rows(table: str) -> list[Row | Missing]:
    """One table: a name of ``TABLES``.

    :raises Missing: it cannot be measured here
    """
    if table in ("queues", "netqueues") and native.here():
        raise Missing("several queues: r3 has one CPU, and so one queue; PYVMM_BENCH_LAB=1 measures them in the lab")
    common.pyvmm()
    firecracker()  # fetched out here: the lab has no network
    # Not in /tmp, which may be a tmpfs: the kernel is 50 MB.
    with tempfile.TemporaryDirectory(prefix="pyvmm-devices-", dir=os.environ.get("TMPDIR", "/var/tmp")) as name:
        directory = Path(name)
        try:
            prepare(directory)
        except VmmError as error:
            raise Missing(str(error)) from None
        phases = TABLES[table][0]()
        rounds: list[Round] = []
        todo = [phase.name for phase in phases]
        for _ in range(TRIES):
            rounds += _try(directory, table, todo)
            todo = [name for name in todo if "rate" not in rounds[-1].get(("pyvmm", name), {})]
            if not todo:
                break
    prefix = "native " if native.here() else ""
    programs = {program for each in rounds for program, _ in each}
    rated = [peer for peer in NAMES if peer in programs and CEILING.get(table) != peer]
    result: list[Row | Missing] = []
    for phase in phases:
        result.append(_row(prefix + phase.name, phase.unit, rounds, phase, "pyvmm", rated, "rate", GOAL_RATE))
        per = f"us/{phase.unit.removesuffix('/s').replace('IOPS', 'op')}"
        result.append(_row(f"{prefix}{phase.name}, host CPU", per, rounds, phase, "pyvmm", rated, "cpu", GOAL_CPU))
        if CEILING.get(table) in programs:
            result.append(_row(prefix + phase.name, phase.unit, rounds, phase, "pyvmm", [CEILING[table]], "rate", None))
        if table == "fs" and "read" in phase.name:
            goal = GOAL_DAX if "read 1m" in phase.name else None
            name = f"{prefix}{phase.name}, DAX"
            result.append(_row(name, phase.unit, rounds, phase, "pyvmm_dax", rated, "rate", goal))
        if phase.name == "fs small files again":
            name = f"{prefix}{phase.name}, cache=always"
            result.append(_row(name, phase.unit, rounds, phase, "pyvmm_always", rated, "rate", None))
    return result
