# SPDX-License-Identifier: Apache-2.0
"""The linux layer: stock kernels, right here on hardware KVM, else in one boot of the lab; never skipped silently."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.linux import device_scenarios
from tests.linux.scenarios import SCENARIOS
from tests.linux.tools_guest import tools_image
from vmm import images, lab
from vmm.errors import VmmError
from vmm.kvm import runs_linux

ROOT = Path(__file__).parents[2]
MINUTES = (12, 8, 8)  # for each try; the first usually takes 5
DEVICE_MINUTES = (12, 8)


@pytest.fixture(scope="session")
def scenario(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """The result of one scenario, by name; the first test that asks runs them all."""
    images.pull("busybox")
    directory = tmp_path_factory.mktemp("scenarios")
    return _scenarios("tests.linux.scenarios", list(SCENARIOS), directory, MINUTES, runs_linux())


@pytest.fixture(scope="session")
def device_scenario(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """Likewise of the device scenarios, which need root: who is not has it in the lab."""
    tools_image()
    here = runs_linux() and os.geteuid() == 0
    directory = tmp_path_factory.mktemp("device-scenarios")
    names = list(device_scenarios.SCENARIOS)
    return _scenarios("tests.linux.device_scenarios", names, directory, DEVICE_MINUTES, here, memory="4G")


def _scenarios(
    module: str, names: list[str], directory: Path, minutes: Sequence[int], here: bool, memory: str = "3G"
) -> Callable[[str], dict[str, Any]]:
    command = [sys.executable, "-m", module, str(directory)]
    if here:
        log = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT).stdout
    else:
        if lacks := lab.missing():
            pytest.fail(f"LAYER MISSING: linux: {'; '.join(lacks)}")
        log = b""
        # Now and then a guest stops dead in the emulated machine; QEMU's own guests in there have too. What did not
        # finish is run again, in a boot of its own, and said; a scenario that finished with a wrong result keeps it.
        for each in minutes:
            if unfinished := [name for name in names if not _finished(directory, name)]:
                log += f"in the lab: {', '.join(unfinished)}\n".encode()
                log += _in_lab([*command, *unfinished], directory, each, memory)
    print(log.decode(errors="replace"))

    def result(name: str) -> dict[str, Any]:
        path = directory / f"{name}.json"
        if not path.exists():
            pytest.fail(f"scenario {name} left no result; the lab said:\n{log.decode(errors='replace')[-4000:]}")
        facts: dict[str, Any] = json.loads(path.read_text())
        return facts

    return result


def _finished(directory: Path, name: str) -> bool:
    path = directory / f"{name}.json"
    return path.exists() and json.loads(path.read_text())["status"] not in (-1, 124)


def _in_lab(command: list[str], directory: Path, minutes: int, memory: str) -> bytes:
    log = directory / "lab.log"
    with log.open("wb") as output:
        try:
            lab.run(
                ["env", "-C", str(ROOT), *command], write=[str(directory)], timeout=minutes * 60, memory=memory,
                stdout=output.fileno(), stderr=output.fileno(),
            )  # fmt: skip
        except VmmError as error:
            os.write(output.fileno(), f"{error}\n".encode())
    return log.read_bytes()
