# SPDX-License-Identifier: Apache-2.0
"""Shared code of the comparisons: the peers' command lines, timed runs in turn, and rows of the report."""

from __future__ import annotations

import compileall
import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from benches.peers.firecracker import Missing, firecracker

ROOT = Path(__file__).parents[2]
PYVMM = [str(Path(sys.executable).with_name("pyvmm")), "run"]
QEMU = "qemu-system-x86_64"
QEMU_NAME = "QEMU microvm"
FIRECRACKER_NAME = "Firecracker 1.12.1"
MEMORY_MIB = 128
KVM_CAP_XCRS = 56

_T = TypeVar("_T")


class Row(NamedTuple):
    """One line of the report: our figure, a peer's, and whether the goal is met.

    ``goal`` is the largest ratio ours/peer that holds it, or where ``peer`` is None the largest value of
    ours; where more is better, the smallest. A goal of None is a figure for the record. ``samples`` are what the
    medians are of, by program.
    """

    name: str
    unit: str
    ours: float
    peer: float | None
    peer_name: str
    ratio: float | None
    goal: float | None
    samples: Mapping[str, Sequence[float]]
    more_is_better: bool = False

    @property
    def held(self) -> bool:
        """Whether the goal is met."""
        if self.goal is None:
            return True
        value = self.ours if self.ratio is None else self.ratio
        return value >= self.goal if self.more_is_better else value <= self.goal

    def __str__(self) -> str:
        peer = "peer none, ratio none"
        if self.peer is not None:
            peer = f"{self.peer_name} {self.peer:.1f} {self.unit}, ratio {self.ratio:.2f}"
        goal = "goal none"
        if self.goal is not None:
            bound = "at least " if self.more_is_better else ""
            goal = f"goal {bound}{self.goal:g}, {'held' if self.held else 'missed'}"
        return f"{self.name}: pyvmm {self.ours:.1f} {self.unit}, {peer}, {goal}"


class Run(NamedTuple):
    """One finished process."""

    wall_ms: float
    cpu_ms: float


@functools.cache  # not once more between two starts that are measured
def pyvmm() -> list[str]:
    """Command line of ``pyvmm run``, with its byte code made, as pip makes it, and prepared (``pyvmm prepare``).

    PYVMM_START=cold in the environment is obeyed: the figures are then those of an interpreter.

    :raises Missing: pyvmm is not installed, or cannot be prepared
    """
    if not os.access(PYVMM[0], os.X_OK):
        raise Missing(f"{PYVMM[0]}: run `make install`")
    for room in ("vmm", "boot", "devices", "virtio"):
        compileall.compile_dir(ROOT / room, quiet=2)
    if subprocess.run([PYVMM[0], "--version"], env={"PYVMM_START": "warm"}, capture_output=True).returncode:
        done = subprocess.run([PYVMM[0], "prepare"], capture_output=True, text=True)
        if done.returncode:
            raise Missing(done.stderr.strip())
    return PYVMM


def lacks_xsave() -> bool:
    """Whether this CPU is the lab's, in which Firecracker needs a template."""
    return " xsave " not in Path("/proc/cpuinfo").read_text()


def firecracker_command(
    directory: Path,
    kernel: Path,
    *,
    initrd: Path | None = None,
    cmdline: str = "",
    memory: int = MEMORY_MIB,
    more: Mapping[str, object] | None = None,
) -> list[str]:
    """Command line that boots `kernel`, an ELF file, in Firecracker without its API.

    :param directory: where its configuration is written
    :param memory: MiB
    :param more: further objects of its configuration, as its devices
    :raises Missing: Firecracker cannot be fetched
    """
    source = {"kernel_image_path": str(kernel), "boot_args": cmdline}
    if initrd is not None:
        source["initrd_path"] = str(initrd)
    facts: dict[str, object] = {
        "boot-source": source,
        "drives": [],
        "machine-config": {"vcpu_count": 1, "mem_size_mib": memory},
        **(more or {}),
    }
    if lacks_xsave():
        # Firecracker requires KVM_CAP_XCRS, which KVM has only with XSAVE, and the lab's CPU has no XSAVE.
        template = directory / "cpu.json"
        template.write_text(json.dumps({"kvm_capabilities": [f"!{KVM_CAP_XCRS}"]}))
        facts["cpu-config"] = str(template)
    config = directory / f"{kernel.name}.json"
    config.write_text(json.dumps(facts))
    return [firecracker(), "--no-api", "--config-file", str(config)]


def qemu_command(
    kernel: Path,
    *more: str,
    memory: int = MEMORY_MIB,
    cpu: str = "host,-arch-capabilities",
    machine: str = "microvm",
) -> list[str]:
    """Command line that boots `kernel` in QEMU's microvm, with no devices but those in `more`.

    :param memory: MiB
    :param machine: microvm, perhaps with properties
    :param cpu: QEMU's CPU model; the default suits a software KVM, which has no MSR_IA32_ARCH_CAPABILITIES
    :raises Missing: not installed
    """
    if shutil.which(QEMU) is None:
        raise Missing(f"{QEMU}: apt-get install qemu-system-x86")
    return [
        QEMU, "-M", machine, "-accel", "kvm", "-cpu", cpu, "-m", str(memory), "-nodefaults",
        "-no-user-config", "-display", "none", "-kernel", str(kernel), *more,
    ]  # fmt: skip


def need_compiler() -> None:
    """Check that there is a C compiler.

    :raises Missing: there is none
    """
    if shutil.which("cc") is None:
        raise Missing("cc: apt-get install gcc")


def need_kvm() -> None:
    """Check that /dev/kvm is there.

    :raises Missing: /dev/kvm does not exist, or this user may not open it
    """
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        raise Missing("/dev/kvm: not there or not permitted")


def timed(command: Sequence[str], status: int) -> Run:
    """Run `command` to its end, with no input and no output.

    :raises Missing: the exit status is not `status`
    """
    null = subprocess.DEVNULL
    start = time.perf_counter()
    process = subprocess.Popen(command, stdin=null, stdout=null, stderr=null)
    _, code, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(code)
    if process.returncode != status:
        raise Missing(f"ended with {process.returncode}, not {status}: {' '.join(command)}")
    cpu = usage.ru_utime + usage.ru_stime
    return Run(wall * 1e3, cpu * 1e3)


def in_turn(count: int, **what: Callable[[], _T]) -> dict[str, list[_T]]:
    """Run each of `what` once to warm up, then all in turn `count` times, so that a slow moment affects all."""
    for run in what.values():
        run()
    results: dict[str, list[_T]] = {name: [] for name in what}
    for _ in range(count):
        for name, run in what.items():
            results[name].append(run())
    return results


def compare(
    name: str,
    unit: str,
    ours: Sequence[float],
    peer: Sequence[float],
    peer_name: str,
    goal: float | None,
    *,
    more_is_better: bool = False,
) -> Row:
    """Make a row of medians; the ratio is the median of the pairs' ratios."""
    ratio = statistics.median(a / b for a, b in zip(ours, peer, strict=True))
    samples = {"pyvmm": list(ours), peer_name: list(peer)}
    return Row(
        name, unit, statistics.median(ours), statistics.median(peer), peer_name, ratio, goal, samples, more_is_better
    )  # fmt: skip


def alone(name: str, unit: str, ours: Sequence[float], goal: float | None) -> Row:
    """Make a row without a peer."""
    return Row(name, unit, statistics.median(ours), None, "", None, goal, {"pyvmm": list(ours)})
