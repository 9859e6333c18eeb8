# SPDX-License-Identifier: Apache-2.0
"""The linux layer: Debian's kernel on hardware KVM, r3 on a software KVM; in the lab what only it can run."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.linux import in_lab, kernels, r3
from tests.linux.scenarios import STOCK
from tests.linux.tools_guest import tools_image
from vmm import Sandbox, images, lab
from vmm.errors import ConfigError
from vmm.images.host import PullError
from vmm.kvm.vm import runs_linux

ROOT = Path(__file__).parents[2]
# Processes of the session: the build of r3, and the lab's boots, which begin when it is there.
_begun: list[subprocess.Popen[bytes]] = []
_lab_directory: list[Path] = []
_again: list[str] = []
# r3's own end: its kernel takes an interrupt that comes at its IRET for a fault of that IRET (error_entry).
# Seen in pyvmm and in Firecracker, a few times in a hundred runs under a storm of interrupts.
R3_FAULT = "fixup_bad_iret"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put this layer last, and in it the lab: it runs beside the others."""
    here = Path(__file__).parent
    items.sort(key=lambda item: (here in item.path.parents) + (item.get_closest_marker("lab") is not None))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Begin with what takes long while other layers' tests run: r3's build, if it is not there, and the lab's boots."""
    here = Path(__file__).parent
    wanted = [item for item in session.items if here in item.path.parents]
    if runs_linux() or session.config.option.collectonly or not wanted:
        return
    if any("scenario" in getattr(item, "fixturenames", ()) and item.get_closest_marker("lab") for item in wanted):
        if not lab.missing():
            _lab_directory.append(Path(tempfile.mkdtemp(prefix="pyvmm-lab-")))
            _begun.append(in_lab.start(_lab_directory[0]))
    else:
        _begun.append(r3.start())


def pytest_sessionfinish() -> None:
    """Leave no process behind."""
    for process in _begun:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()
    for directory in _lab_directory:
        if (directory / in_lab.AGAIN).exists():
            _again.extend((directory / in_lab.AGAIN).read_text().split())
        shutil.rmtree(directory, ignore_errors=True)


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


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory, native: None) -> Iterator[Path]:
    """Where the sandboxes of a module are; nothing is left there."""
    place = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(place))
        if not runs_linux():
            patch.setenv("PYVMM_SANDBOX_KERNEL", kernels.kernel().path)
        yield place
        assert not list((place / "pyvmm/sandboxes").iterdir())


@pytest.fixture(scope="session")
def scenario(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Callable[[str], dict[str, Any]]:
    """The result of one scenario, by name; run when the first test asks for it, those of the lab all at once."""
    directory = tmp_path_factory.mktemp("scenarios")
    said: dict[str, str] = {}

    def result(name: str) -> dict[str, Any]:
        if name in STOCK and not runs_linux():
            return _found(name, *_in_the_lab())
        if name not in said:
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
    """Run scenarios here, and once more those whose guest ended by r3's own fault; what was said."""
    said = _run(module, directory, *names)
    faulty = [path.stem for path in directory.glob("*.json") if R3_FAULT in path.read_text()]
    if again := [name for name in faulty if not names or name in names]:
        _again.extend(again)
        said += _run(module, directory, *again)
    return said


def _run(module: str, directory: Path, *names: str) -> str:
    command = [sys.executable, "-m", module, str(directory), *names]
    if os.geteuid() == 0:  # taps, routes and filters are made in a network of their own
        command = ["unshare", "--net", "sh", "-c", 'ip link set lo up; exec "$@"', "sh", *command]
    done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    said = done.stdout.decode(errors="replace")
    print(said)
    return said


def _in_the_lab() -> tuple[Path, str]:
    if lacks := lab.missing():
        pytest.fail(f"LAYER MISSING: lab: {'; '.join(lacks)}", pytrace=False)
    _begun[0].wait()
    directory = _lab_directory[0]
    log = directory / in_lab.LOG
    return directory, log.read_text(errors="replace") if log.exists() else "the lab was not booted"


def _found(name: str, directory: Path, said: str) -> dict[str, Any]:
    facts = in_lab.result(directory, name)
    if facts is None:
        pytest.fail(f"scenario {name} left no result; what was said:\n{said[-4000:]}")
    return facts


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what was run again."""
    if _again:
        terminalreporter.section("linux layer: run again, for the emulated machine's or r3's sake", yellow=True)
        terminalreporter.write_line(f"{len(_again)}: {', '.join(_again)}")


@pytest.fixture(scope="module")
def sandbox(runtime: Path) -> Iterator[Sandbox]:
    """One for the tests that leave it as it is."""
    with Sandbox("busybox", memory="192M", env={"COLOUR": "blue"}) as made:
        yield made
