# SPDX-License-Identifier: Apache-2.0
"""The linux layer: Debian's kernel on hardware KVM, r3 on a software KVM; in the lab what only it can run."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.linux import kernels, r3
from tests.linux.scenarios import STOCK
from tests.linux.tools_guest import tools_image
from vmm import images, lab
from vmm.errors import ConfigError, VmmError
from vmm.images.host import PullError
from vmm.kvm import runs_linux

ROOT = Path(__file__).parents[2]
TRIES = 3
# For all boots of the lab in a session together, and for one of them.
ALL_MINUTES, BOOT_MINUTES = 15.0, 8.0
_again: list[str] = []
_first_boot: list[float] = []
_build: list[subprocess.Popen[bytes]] = []


def pytest_collection_finish(session: pytest.Session) -> None:
    """Begin to build r3, if it is not there, while other layers' tests run."""
    here = Path(__file__).parent
    if (
        not runs_linux()
        and not session.config.option.collectonly
        and any(here in i.path.parents for i in session.items)
    ):
        _build.append(r3.start())


def pytest_sessionfinish() -> None:
    """Do not leave the build behind."""
    for process in _build:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()


@pytest.fixture(scope="session")
def native() -> None:
    """A guest kernel for KVM here."""
    try:
        kernels.kernel()
        images.pull("busybox")
    except (PullError, ConfigError) as error:
        pytest.fail(f"LAYER MISSING: linux: {error}", pytrace=False)
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.fail("LAYER MISSING: linux: /dev/kvm is missing, or not permitted", pytrace=False)


@pytest.fixture(scope="session")
def scenario(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Callable[[str], dict[str, Any]]:
    """The result of one scenario, by name; run when the first test asks for it, those of the lab all at once."""
    directory = tmp_path_factory.mktemp("scenarios")
    said: dict[str, str] = {}

    def result(name: str) -> dict[str, Any]:
        in_lab = name in STOCK and not runs_linux()
        if name not in said:
            if in_lab:
                images.pull("busybox")
                said.update(dict.fromkeys(STOCK, _in_the_lab("tests.linux.scenarios", STOCK, directory)))
            else:
                request.getfixturevalue("native")
                said[name] = _here("tests.linux.scenarios", directory, name)
        return _found(name, directory, said[name])

    return result


@pytest.fixture(scope="session")
def device_scenario(tmp_path_factory: pytest.TempPathFactory, native: None) -> Callable[[str], dict[str, Any]]:
    """Likewise of the device scenarios, which share a guest and need root."""
    if os.geteuid():
        pytest.fail("LAYER MISSING: linux: root, for a tap", pytrace=False)
    try:
        tools_image(kernels.kernel())
    except PullError as error:
        pytest.fail(f"LAYER MISSING: linux: {error}", pytrace=False)
    directory = tmp_path_factory.mktemp("device-scenarios")
    said = _here("tests.linux.device_scenarios", directory)
    return lambda name: _found(name, directory, said)


def _here(module: str, directory: Path, *names: str) -> str:
    command = [sys.executable, "-m", module, str(directory), *names]
    if os.geteuid() == 0:  # taps, routes and filters are made in a network of their own
        command = ["unshare", "--net", "sh", "-c", 'ip link set lo up; exec "$@"', "sh", *command]
    done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    said = done.stdout.decode(errors="replace")
    print(said)
    return said


def _in_the_lab(module: str, names: Sequence[str], directory: Path) -> str:
    if lacks := lab.missing():
        pytest.fail(f"LAYER MISSING: lab: {'; '.join(lacks)}", pytrace=False)
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
        command = [sys.executable, "-m", module, str(directory), *unfinished]
        log += _in_lab(command, directory, min(left, BOOT_MINUTES * 60), "3G")
    said = log.decode(errors="replace")
    print(said)
    return said


def _found(name: str, directory: Path, said: str) -> dict[str, Any]:
    facts = _result(directory, name)
    if facts is None:
        pytest.fail(f"scenario {name} left no result; what was said:\n{said[-4000:]}")
    return facts


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
