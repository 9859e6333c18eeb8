# SPDX-License-Identifier: Apache-2.0
"""The linux layer: Debian's kernel on hardware KVM, r3 on a software KVM; in the lab what only it can run."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.linux import begun, in_lab, kernels, r3
from tests.linux.scenarios import STOCK
from tests.linux.tools_guest import tools_image
from vmm import Sandbox, images, lab
from vmm.errors import ConfigError
from vmm.images.host import PullError
from vmm.kvm.vm import runs_linux

# The process of the session that is beside the tests, and the directory of its results.
_begun: list[subprocess.Popen[bytes]] = []
_directory: list[Path] = []
_again: list[str] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put this layer last, and in it what is run beside the others."""
    here = Path(__file__).parent
    items.sort(key=lambda item: (here in item.path.parents) + (_in_the_lab(item) or _of_devices(item)))


def _in_the_lab(item: pytest.Item) -> bool:
    return item.get_closest_marker("lab") is not None


def _of_devices(item: pytest.Item) -> bool:
    return "device_scenario" in getattr(item, "fixturenames", ())


def pytest_collection_finish(session: pytest.Session) -> None:
    """Begin with what takes long while other layers' tests run: r3's build, if it is not there, and scenarios."""
    here = Path(__file__).parent
    wanted = [item for item in session.items if here in item.path.parents]
    if session.config.option.collectonly or not wanted:
        return
    scenarios = [item for item in wanted if "scenario" in getattr(item, "fixturenames", ())]
    parts = []
    if not runs_linux() and any(map(_in_the_lab, scenarios)) and not lab.missing():
        parts.append("lab")
    if not os.geteuid() and any(map(_of_devices, wanted)):
        parts.append("devices")
    if parts:
        _directory.append(Path(tempfile.mkdtemp(prefix="pyvmm-begun-")))
        _begun.append(begun.start(_directory[0], *parts))
    elif not runs_linux():
        _begun.append(r3.start())


def pytest_sessionfinish() -> None:
    """Leave no process behind."""
    for process in _begun:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()
    for directory in _directory:
        for names in directory.glob(f"*/{in_lab.AGAIN}"):
            _again.extend(names.read_text().split())
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
) -> Iterator[Callable[[str], dict[str, Any]]]:
    """The result of one scenario, by name; run when the first test asks for it, those of the lab all at once."""
    directory = tmp_path_factory.mktemp("scenarios")
    said: dict[str, str] = {}

    def result(name: str) -> dict[str, Any]:
        if name in STOCK and not runs_linux():
            if lacks := lab.missing():
                pytest.fail(f"LAYER MISSING: lab: {'; '.join(lacks)}", pytrace=False)
            return _found(name, *_beside("lab"))
        if name not in said:
            request.getfixturevalue("native")
            said[name] = begun.here("tests.linux.scenarios", directory, name)
            print(said[name])
        return _found(name, directory, said[name])

    yield result
    if (directory / in_lab.AGAIN).exists():
        _again.extend((directory / in_lab.AGAIN).read_text().split())


@pytest.fixture(scope="session")
def device_scenario(native: None) -> Callable[[str], dict[str, Any]]:
    """Likewise of the device scenarios, which share a guest, need root, and are run beside the tests."""
    if os.geteuid():
        pytest.fail("LAYER MISSING: linux: root, for a tap", pytrace=False)
    directory, said = _beside("devices")
    try:
        tools_image(kernels.kernel())
    except PullError as error:
        pytest.fail(f"LAYER MISSING: linux: {error}", pytrace=False)
    return lambda name: _found(name, directory, said)


def _beside(part: str) -> tuple[Path, str]:
    _begun[0].wait()
    directory = _directory[0] / part
    log = directory / in_lab.LOG
    return directory, log.read_text(errors="replace") if log.exists() else "it was not begun"


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
