# SPDX-License-Identifier: Apache-2.0
"""The linux layer: stock kernels, right here on hardware KVM, else in boots of the lab; never skipped silently."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benches.peers.firecracker import Missing, firecracker
from tests.linux import clients, device_scenarios
from tests.linux.scenarios import SCENARIOS
from tests.linux.tools_guest import tools_image
from vmm import images, lab
from vmm.errors import VmmError
from vmm.images.host import PullError
from vmm.kvm import runs_linux

ROOT = Path(__file__).parents[2]
TRIES = 5
# For all boots of the lab in a session together, and for one of them.
ALL_MINUTES, BOOT_MINUTES = 26.0, 12.0
_again: list[str] = []
_first_boot: list[float] = []


@pytest.fixture(scope="session")
def scenario(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """The result of one scenario, by name; the first test that asks runs them all."""
    images.pull("busybox")
    with contextlib.suppress(Missing, PullError):  # what the lab, which has no network, needs; said by who needs it
        firecracker()
        clients.fetch()
    directory = tmp_path_factory.mktemp("scenarios")
    return _scenarios("tests.linux.scenarios", list(SCENARIOS), directory, runs_linux())


@pytest.fixture(scope="session")
def device_scenario(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """Likewise of the device scenarios, which need root: who is not has it in the lab."""
    tools_image()
    here = runs_linux() and os.geteuid() == 0
    directory = tmp_path_factory.mktemp("device-scenarios")
    names = list(device_scenarios.SCENARIOS)
    return _scenarios("tests.linux.device_scenarios", names, directory, here, memory="4G")


def _scenarios(
    module: str, names: list[str], directory: Path, here: bool, memory: str = "3G"
) -> Callable[[str], dict[str, Any]]:
    command = [sys.executable, "-m", module, str(directory)]
    if here:
        log = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT).stdout
    else:
        if lacks := lab.missing():
            pytest.fail(f"LAYER MISSING: linux: {'; '.join(lacks)}")
        log = b""
        for attempt in range(TRIES):
            unfinished = [name for name in names if emulators_fault(_result(directory, name))]
            _first_boot or _first_boot.append(time.monotonic())
            left = ALL_MINUTES * 60 - (time.monotonic() - _first_boot[0])
            if not unfinished or left < 60:
                break
            if attempt:
                _again.extend(unfinished)
            log += f"in the lab: {', '.join(unfinished)}\n".encode()
            log += _in_lab([*command, *unfinished], directory, min(left, BOOT_MINUTES * 60), memory)
    print(log.decode(errors="replace"))

    def result(name: str) -> dict[str, Any]:
        facts = _result(directory, name)
        if facts is None:
            pytest.fail(f"scenario {name} left no result; the lab said:\n{log.decode(errors='replace')[-4000:]}")
        return facts

    return result


def _result(directory: Path, name: str) -> dict[str, Any] | None:
    path = directory / f"{name}.json"
    if not path.exists():
        return None
    facts: dict[str, Any] = {"name": name, **json.loads(path.read_text())}
    return facts


def emulators_fault(result: dict[str, Any] | None) -> bool:
    """Whether a scenario in the lab has to be run again, in a boot of its own: it did not finish, such as a program
    that gets no answer of a guest, or its guest ended by a triple fault that it was not to end by. One that finished
    with a wrong result keeps it.

    Now and then a guest stops dead in the emulated machine, QEMU's own guests in there too (its VMRUN loses the
    interrupt shadow until QEMU 9.1), or faults. On hardware KVM nothing is run again.
    """
    if result is None or result["status"] in (-1, 124) or (result["status"] and result.get("program")):
        return True
    said = "\n".join(str(result.get(key, "")) for key in ("stdout", "stderr", "error"))
    return result["name"] != "triple_fault" and "triple fault" in said


def _in_lab(command: list[str], directory: Path, seconds: float, memory: str) -> bytes:
    log = directory / "lab.log"
    start = log.stat().st_size if log.exists() else 0
    with log.open("ab") as output:
        try:
            lab.run(
                ["env", "-C", str(ROOT), *command], write=[str(directory)], timeout=seconds, memory=memory,
                stdout=output.fileno(), stderr=output.fileno(),
            )  # fmt: skip
        except VmmError as error:
            os.write(output.fileno(), f"{error}\n".encode())
    return log.read_bytes()[start:]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what was run again."""
    if _again:
        terminalreporter.section("linux layer: run again, for the emulated machine's sake", yellow=True)
        terminalreporter.write_line(f"{len(_again)}: {', '.join(_again)}")
