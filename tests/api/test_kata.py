# SPDX-License-Identifier: Apache-2.0
"""Kata's two drivers for Firecracker, replayed byte for byte against a process; Firecracker 1.12.1 takes the same.

Here the guest is a driver in C; a Linux with Kata's own kernel arguments is in tests/linux/test_kata.py.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benches.peers.firecracker import jailer
from tests.api.oracle import ROOT, firecracker
from tests.api.sandbox import Go, GoJailed, RuntimeRs
from tests.kvm.ring3 import kernel
from vmm.errors import ConfigError
from vmm.kvm.vm import Kvm

WORD = 0x1122334455667788
SECTOR = 512


# Before any test is in a namespace without a network: pip may have to fetch Firecracker.
@pytest.fixture(scope="session", params=["pyvmm", "Firecracker 1.12.1"])
def peer(request: pytest.FixtureRequest) -> str | None:
    try:
        Kvm().close()
    except ConfigError as error:
        pytest.fail(f"LAYER MISSING: kata: {error}", pytrace=False)
    if request.param == "pyvmm":
        return None
    jailer()
    return firecracker()


@pytest.fixture
def program(peer: str | None, tmp_path: Path, namespace: None) -> str:
    """The path that a runtime is told."""
    if peer is not None:
        return peer
    command = [sys.executable, "-c", "from vmm.commands.cli import main; raise SystemExit(main())", "link"]
    for name in ("jailer", "firecracker"):
        link = subprocess.run([*command, name, str(tmp_path)], check=True, capture_output=True, text=True).stdout
    # Kata's Go runtime resolves what its configuration names.
    return os.path.realpath(link.strip())


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    # The link leads to the installed program, which is to import these sources.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A root disk of 2,048 sectors."""
    return disk(tmp_path / "image", 2048, WORD)


@pytest.fixture
def go(program: str, image: Path) -> Iterator[Go]:
    with Go(program, kernel("kata"), image) as sandbox:
        yield sandbox


@pytest.fixture
def rust(program: str, image: Path) -> Iterator[RuntimeRs]:
    with RuntimeRs(program, kernel("kata"), image) as sandbox:
        yield sandbox


def disk(path: Path, sectors: int, word: int) -> Path:
    with path.open("wb") as file:
        file.write(word.to_bytes(8, "little"))
        file.truncate(sectors * SECTOR)
    return path


def line(sectors: int, changed: int, word: int) -> str:
    return f"capacity={sectors} changed={changed} word={word if sectors else 0}"


# The Go runtime


def test_the_version_gate_is_passed(program: str) -> None:
    said = subprocess.run([program, "--version"], check=True, capture_output=True, text=True).stdout
    version = said.split("\n")[0].split(" ")[1].strip().removeprefix("v")
    assert tuple(map(int, version.split("."))) >= (0, 21, 1)


def test_go_runtime_from_its_files_to_its_end(go: Go, tmp_path: Path) -> None:
    go.start()
    assert {"fc_api", "fc_vcpu 0"} <= set(go.threads())
    assert os.stat(go.path(go.uds)).st_mode & 0o777 == 0o640

    with go.agent() as agent:
        assert b"OK" in agent.greeting
        # The root drive, then the placeholders.
        assert agent.ask("0") == line(2048, 0, WORD)
        assert [agent.ask(str(index)) for index in range(1, 9)] == [line(0, 0, 0)] * 8

        for number, sectors in ((3, 640), (0, 8), (7, 100_000)):
            answer = go.plug(number, disk(tmp_path / f"container{number}", sectors, WORD + number))
            assert answer is not None and answer.status == 204, answer
            assert agent.ask(str(1 + number)) == line(sectors, 1, WORD + number)
        told = [agent.ask(str(index)) for index in range(9)]
        assert [0 if "capacity=0 " in each else 1 for each in told] == [1, 1, 0, 0, 1, 0, 0, 0, 1]

        answer = go.unplug(3)
        assert answer is not None and answer.status == 204, answer
        assert agent.ask("4") == line(0, 1, 0)
        assert go.running()
    assert go.stop() < 1, go.console()


def test_go_runtime_gets_metrics_that_it_can_read(go: Go) -> None:
    go.start()
    os.kill(go.pid, 0)  # Check()
    with go.agent() as agent:
        agent.ask("0")
    go.stop()
    if go.program == firecracker():
        return  # it writes at its own end or a minute later, and a signal is not its own
    lines = go.heard("metrics").splitlines()
    assert lines
    for each in lines:
        metrics = json.loads(each)
        # What Kata's FirecrackerMetrics has fields for.
        assert {"api_server", "block", "get_api_requests", "logger", "net", "vcpu", "vmm", "vsock"} <= metrics.keys()
    assert metrics["vsock"]["rx_packets_count"] or metrics["vsock"]["tx_packets_count"]


def test_go_runtime_with_a_jailer(program: str, peer: str | None, image: Path, tmp_path: Path) -> None:
    if peer is not None:
        # It names the jail after the file itself.
        program = str(shutil.copy(peer, tmp_path / "firecracker"))
        shutil.copy(jailer(), tmp_path / "jailer")
    with GoJailed(program, kernel("kata"), image) as go:
        go.start()
        assert {"fc_api", "fc_vcpu 0"} <= set(go.threads())
        with go.agent() as agent:
            assert [agent.ask(str(index)) for index in range(9)] == [line(2048, 0, WORD)] + [line(0, 0, 0)] * 8
            answer = go.plug(3, disk(tmp_path / "container", 640, WORD + 3))
            assert answer is not None and answer.status == 204, answer
            assert agent.ask("4") == line(640, 1, WORD + 3)
            answer = go.unplug(3)
            assert answer is not None and answer.status == 204, answer
            assert agent.ask("4") == line(0, 1, 0)
        assert go.stop() < 1, go.console()


# The Rust runtime


def test_runtime_rs_from_nothing_to_its_end(rust: RuntimeRs, tmp_path: Path) -> None:
    sent = rust.start()
    # It begins before there is a socket; from the first answer on, nothing is refused.
    sent.pop("01-boot-source")  # once more for each time that it came before the socket
    assert set(sent.values()) == {1}, sent
    assert {"fc_api", "fc_vcpu 0"} <= set(rust.threads())

    with rust.agent() as agent:
        assert b"OK" in agent.greeting
        assert agent.ask("0") == line(2048, 0, WORD)
        assert [agent.ask(str(index)) for index in range(1, 6)] == [line(0, 0, 0)] * 5
        for number in (1, 5):
            assert rust.plug(number, disk(tmp_path / "container", 64 * number, WORD + number)) == 1
            assert agent.ask(str(number)) == line(64 * number, 1, WORD + number)

    assert not rust.ended(0.2)
    rust.process.kill()  # type: ignore[union-attr]
    assert rust.ended(5)


# Firecracker does not replace a socket that is there.
@pytest.mark.parametrize("peer", ["pyvmm"], indirect=True)
def test_runtime_rs_starts_again_over_the_sockets_of_a_killed_one(rust: RuntimeRs) -> None:
    rust.start()
    rust.process.kill()  # type: ignore[union-attr]
    assert rust.ended(5)
    rust.process.wait()  # type: ignore[union-attr]
    rust.process.stderr.close()  # type: ignore[union-attr]
    rust.disconnect()
    rust.start()
    with rust.agent() as agent:
        assert agent.ask("0") == line(2048, 0, WORD)
