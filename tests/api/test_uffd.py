# SPDX-License-Identifier: Apache-2.0
"""``mem_backend`` Uffd beside Firecracker: its words; and one handler, ours, serves either VMM its snapshot."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.api.differential import Pair, pair
from tests.api.oracle import PATIENCE, ROOT, Process
from tests.api.requests import KERNEL, START
from tests.api.test_differential_snapshot import (
    COUNT,
    FULL,
    PAUSE,
    RESUME,
    TRACK,
    _boot,
    _same,
    _snapshots,
    _tildes,
    _until_more,
)  # fmt: skip

__all__ = ["pair"]

Start = Callable[..., Pair]
HANDLER = ROOT / "examples/uffd_handler.py"
LOAD = {"snapshot_path": "snap", "mem_backend": {"backend_type": "Uffd", "backend_path": "handler"}}
PAGE = 4096


@pytest.fixture
def after(pair: Start) -> Iterator[Callable[[Process, str], Process]]:
    """Ends a VMM, and starts another one in its directory."""
    started: list[Process] = []

    def start(process: Process, output: str) -> Process:
        process.close()
        (process.directory / "api.sock").unlink(missing_ok=True)
        started.append(Process(process.command, process.directory, output=output))
        return started[-1]

    yield start
    for process in started:
        process.close()
        assert "Traceback" not in process.output.read_text(errors="replace")


@pytest.fixture
def handler() -> Iterator[Callable[[Process], subprocess.Popen[bytes]]]:
    """Starts one for the memory file in a VMM's directory."""
    started: list[subprocess.Popen[bytes]] = []

    def start(process: Process) -> subprocess.Popen[bytes]:
        words: list[str | Path] = [sys.executable, HANDLER, "handler", "mem"]
        started.append(subprocess.Popen(words, cwd=process.directory, stderr=subprocess.PIPE))
        end = time.monotonic() + PATIENCE
        while not (process.directory / "handler").exists():
            assert time.monotonic() < end and started[-1].poll() is None
            time.sleep(0.005)
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def _well(handler: subprocess.Popen[bytes]) -> None:
    assert handler.communicate(timeout=PATIENCE)[1] == b""
    assert handler.returncode == 0


@pytest.mark.parametrize("there", ["nothing", "a file", "too long"])
def test_without_a_handler_the_load_fails_and_the_process_ends(
    pair: Start, after: Callable[[Process, str], Process], there: str
) -> None:
    both = pair()
    _snapshots(both)
    first, second = (after(process, "second") for process in both)
    body = LOAD
    if there == "a file":
        for process in both:
            (process.directory / "handler").touch()
    elif there == "too long":
        body = {**LOAD, "mem_backend": {"backend_type": "Uffd", "backend_path": "x" * 120}}
    prefix = "Load snapshot error: Failed to restore from snapshot: Failed to load guest memory: Error creating guest"
    prefix += " memory from uffd: Failed to connect to UDS Unix stream: "
    said = _same((first, second), "PUT", "/snapshot/load", body, prefix=prefix if there == "too long" else None)
    assert said.startswith(prefix)
    assert [process.wait() for process in (first, second)] == [1, 1]


def test_one_handler_serves_firecracker_and_pyvmm(
    pair: Start,
    after: Callable[[Process, str], Process],
    handler: Callable[[Process], subprocess.Popen[bytes]],
) -> None:
    both = pair(code=COUNT)
    _boot(both)
    for process in both:
        _until_more(process.output, 0)
    _same(both, "PATCH", "/vm", PAUSE)
    _same(both, "PUT", "/snapshot/create", FULL)
    first, second = (after(process, "second") for process in both)
    handlers = [handler(process) for process in both]
    others = (first, second)
    _same(others, "PUT", "/snapshot/load", LOAD)
    assert [process.request("GET", "/").json["state"] for process in others] == ["Paused", "Paused"]
    _same(others, "PATCH", "/vm", RESUME)
    for process in others:
        _until_more(process.output, 1)
    # A snapshot leaves the connection: Firecracker's own handlers kill the VMM when it ends.
    _same(others, "PATCH", "/vm", PAUSE)
    _same(others, "PUT", "/snapshot/create", {"snapshot_path": "snap2", "mem_file_path": "mem2"})
    for each in handlers:
        with pytest.raises(subprocess.TimeoutExpired):
            each.wait(0.3)
    for process in others:
        process.close()
    for each in handlers:
        _well(each)


def test_a_machine_that_a_handler_feeds_is_saved_whole(
    pair: Start,
    after: Callable[[Process, str], Process],
    handler: Callable[[Process], subprocess.Popen[bytes]],
) -> None:
    _, ours = pair(code=COUNT)
    for method, path, body in (("PUT", "/machine-config", TRACK), (KERNEL.method, KERNEL.path, KERNEL.body)):
        assert ours.request(method, path, body).status == 204
    assert ours.request(START.method, START.path, START.body).status == 204
    _until_more(ours.output, 0)
    assert ours.request("PATCH", "/vm", PAUSE).status == 204
    assert ours.request("PUT", "/snapshot/create", FULL).status == 204
    fed = handler(ours)
    other = after(ours, "second")
    load: dict[str, Any] = {**LOAD, "resume_vm": True, "enable_diff_snapshots": True}
    assert other.request("PUT", "/snapshot/load", load).status == 204
    _until_more(other.output, 0)
    assert other.request("PATCH", "/vm", PAUSE).status == 204
    whole = {"snapshot_path": "snap2", "mem_file_path": "mem2", "snapshot_type": "Diff"}
    assert other.request("PUT", "/snapshot/create", whole).status == 204
    before, now = ((ours.directory / name).read_bytes() for name in ("mem", "mem2"))
    changed = {at for at in range(0, len(now), PAGE) if now[at : at + PAGE] != before[at : at + PAGE]}
    assert len(now) == len(before) and 2 << 20 in changed and len(changed) < 8, "the counter, the generation"
    assert other.request("PATCH", "/vm", RESUME).status == 204
    _until_more(other.output, _tildes(other.output))
    last = after(other, "third")
    _well(fed)
    from_file = {"snapshot_path": "snap2", "mem_file_path": "mem2", "resume_vm": True}
    assert last.request("PUT", "/snapshot/load", from_file).status == 204
    _until_more(last.output, 1)
