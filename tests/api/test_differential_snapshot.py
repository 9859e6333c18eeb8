# SPDX-License-Identifier: Apache-2.0
"""Snapshots by the API, beside Firecracker: the same rules, words and ends; and what goes on afterwards."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.api.differential import Pair, pair, send
from tests.api.oracle import ALONE, PATIENCE, PYVMM, Answer, Process, firecracker
from tests.api.requests import KERNEL, START, Request
from tests.kvm.guests import assemble

__all__ = ["pair"]

Start = Callable[..., Pair]

# Counts in memory at 2 MiB, and says each 4,096 by a tilde on the serial port, which no log line has.
COUNT = assemble("""
    xor ebx, ebx
1:  inc ebx
    mov [0x200000], ebx
    test ebx, 0xfff
    jnz 1b
    mov al, '~'
    mov dx, 0x3f8
    out dx, al
    jmp 1b
""")
MEMORY = 128 << 20
FULL = {"snapshot_path": "snap", "mem_file_path": "mem"}
LOAD = {"snapshot_path": "snap", "mem_backend": {"backend_type": "File", "backend_path": "mem"}}
PAUSE, RESUME = ({"state": state} for state in ("Paused", "Resumed"))
TRACK = {"vcpu_count": 1, "mem_size_mib": 128, "track_dirty_pages": True}


def _both(pair: Pair, method: str, path: str, body: Any) -> tuple[Answer | None, Answer | None]:
    import json

    request = Request(method, path, json.dumps(body).encode())
    theirs, ours = (send(process, request) for process in pair)
    return theirs, ours


def _beside(process: Process, output: str) -> Process:
    # Another one in its directory.
    (process.directory / "api.sock").unlink(missing_ok=True)
    return Process(process.command, process.directory, output=output)


def _same(pair: Pair, method: str, path: str, body: Any, *, prefix: str | None = None) -> str:
    """The message of both: equal, or where only the beginning can be, that."""
    theirs, ours = _both(pair, method, path, body)
    assert theirs is not None and ours is not None
    assert theirs.status == ours.status, (theirs.body, ours.body)
    if theirs.status < 400:
        return ""
    messages = [answer.json["fault_message"] for answer in (theirs, ours)]
    if prefix is None:
        assert messages[0] == messages[1]
    else:
        assert all(message.startswith(prefix) for message in messages), messages
    assert theirs.headers.get("Deprecation") == ours.headers.get("Deprecation")
    return str(messages[1])


def _boot(pair: tuple[Process, ...], machine: dict[str, Any] = TRACK) -> None:
    for process in pair:
        assert process.request("PUT", "/machine-config", machine).status == 204
        assert process.request(KERNEL.method, KERNEL.path, KERNEL.body).status == 204
        assert process.request(START.method, START.path, START.body).status == 204


def test_when_a_snapshot_may_be_made(pair: Start) -> None:
    both = pair()
    before = _same(both, "PUT", "/snapshot/create", FULL)
    assert before == "The requested operation is not supported before starting the microVM."
    _same(both, "PATCH", "/vm", PAUSE)
    _boot(both, {"vcpu_count": 1, "mem_size_mib": 128})
    _same(both, "PUT", "/snapshot/create", FULL)
    _same(both, "PATCH", "/vm", PAUSE)
    _same(both, "PUT", "/snapshot/create", {**FULL, "snapshot_type": "Diff"})
    _same(both, "PUT", "/snapshot/create", {**FULL, "snapshot_path": "none/snap"})
    _same(both, "PUT", "/snapshot/create", {**FULL, "mem_file_path": "none/mem"})
    _same(both, "PUT", "/snapshot/create", {**FULL, "more": 1}, prefix="An error occurred when deserializing")
    _same(both, "PUT", "/snapshot/create", FULL)
    _same(both, "PUT", "/snapshot/load", LOAD)
    for process in both:
        assert (process.directory / "mem").stat().st_size == MEMORY
        assert process.request("GET", "/").json["state"] == "Paused"


def test_what_a_load_asks_for(pair: Start) -> None:
    both = pair()
    _same(both, "PUT", "/snapshot/load", {"snapshot_path": "snap"})
    _same(both, "PUT", "/snapshot/load", {**LOAD, "mem_file_path": "mem"})
    _same(both, "PUT", "/snapshot/load", {**LOAD, "clock": True}, prefix="An error occurred when deserializing")
    _same(both, "PUT", "/snapshot", LOAD)
    _same(both, "PUT", "/snapshot/foo", LOAD)
    for process in both:
        assert process.request("PUT", "/machine-config", TRACK).status == 204
    _same(both, "PUT", "/snapshot/load", LOAD)
    for process in both:
        assert process.request("GET", "/").json["state"] == "Not started", "the process lives"


@pytest.mark.parametrize(
    ("prepare", "prefix"),
    [
        (lambda d: None, None),
        (
            lambda d: (d / "snap").write_bytes(b""),
            "Load snapshot error: Failed to restore from snapshot: Failed to get",
        ),
        (
            lambda d: (d / "snap").write_bytes(b"x" * 4000),
            "Load snapshot error: Failed to restore from snapshot: Failed",
        ),
    ],
    ids=["missing", "empty", "junk"],
)
def test_a_load_that_fails_ends_the_process(pair: Start, prepare: Callable[[Path], Any], prefix: str | None) -> None:
    both = pair(prepare=prepare)
    _same(both, "PUT", "/snapshot/load", LOAD, prefix=prefix)
    assert [process.wait() for process in both] == [1, 1]


def _snapshots(both: Pair) -> None:
    _boot(both)
    _same(both, "PATCH", "/vm", PAUSE)
    _same(both, "PUT", "/snapshot/create", FULL)


@pytest.mark.parametrize("spoil", ["no memory", "short memory", "cut state"])
def test_files_that_do_not_do_end_the_process(pair: Start, tmp_path: Path, spoil: str) -> None:
    both = pair()
    _snapshots(both)
    loaders = []
    for process in both:
        memory, state = process.directory / "mem", process.directory / "snap"
        if spoil == "no memory":
            memory.unlink()
        elif spoil == "short memory":
            with memory.open("r+b") as file:
                file.truncate(MEMORY // 2)
        else:
            state.write_bytes(state.read_bytes()[:-100])
        process.close()
        loaders.append(_beside(process, "second"))
    prefix = "Load snapshot error: Failed to restore from snapshot: Failed to get" if spoil == "cut state" else None
    try:
        _same((loaders[0], loaders[1]), "PUT", "/snapshot/load", LOAD, prefix=prefix)
        assert [process.wait() for process in loaders] == [1, 1]
    finally:
        for process in loaders:
            process.close()


def _tildes(path: Path) -> int:
    return path.read_bytes().count(b"~")


def _until_more(path: Path, than: int) -> int:
    end = time.monotonic() + PATIENCE
    while (tildes := _tildes(path)) <= than:
        assert time.monotonic() < end, "the guest does not go on"
        time.sleep(0.01)
    return tildes


def _go_on(process: Process, body: dict[str, Any], output: str) -> Process:
    process.close()
    other = _beside(process, output)
    answer = other.request("PUT", "/snapshot/load", body)
    assert answer.status == 204, answer.body
    return other


@pytest.mark.parametrize("backend", [LOAD, {"snapshot_path": "snap", "mem_file_path": "mem"}], ids=["backend", "path"])
def test_a_guest_goes_on_where_it_was_in_another_process(pair: Start, backend: dict[str, Any]) -> None:
    both = pair(code=COUNT)
    _boot(both)
    for process in both:
        _until_more(process.output, 0)
    _same(both, "PATCH", "/vm", PAUSE)
    _same(both, "PUT", "/snapshot/create", FULL)
    counted = [
        int.from_bytes((process.directory / "mem").read_bytes()[2 << 20 : (2 << 20) + 4], "little") for process in both
    ]
    assert all(counted)
    others: list[Process] = []
    try:
        others = [_go_on(process, backend, "second") for process in both]
        shown = [process.request("GET", "/vm/config").json for process in others]
        assert shown[0]["machine-config"] == {**shown[1]["machine-config"]}
        assert shown[1]["logger"] is None
        assert [process.request("GET", "/").json["state"] for process in others] == ["Paused", "Paused"]
        assert [_tildes(process.output) for process in others] == [0, 0]
        _same((others[0], others[1]), "PUT", "/snapshot/load", backend)
        _same((others[0], others[1]), "PATCH", "/vm", RESUME)
        _same((others[0], others[1]), "PATCH", "/vm", RESUME)
        for process in others:
            _until_more(process.output, 1)
    finally:
        for process in others:
            process.close()


def test_copies_have_taps_of_their_own(pair: Start) -> None:
    both = pair(code=COUNT)
    for process in both:
        net = {"iface_id": "eth0", "host_dev_name": "tap0"}
        assert process.request("PUT", "/network-interfaces/eth0", net).status == 204
    _boot(both)
    _same(both, "PATCH", "/vm", PAUSE)
    _same(both, "PUT", "/snapshot/create", FULL)
    started: list[Process] = []
    try:
        started += (copies := (_beside(both[0], "second"), _beside(both[1], "second")))
        override = {"iface_id": "eth0", "host_dev_name": "tap1"}
        assert _same(copies, "PUT", "/snapshot/load", {**LOAD, "network_overrides": [override]}) == ""
        for copy in copies:
            networks = copy.request("GET", "/vm/config").json["network-interfaces"]
            assert [each["host_dev_name"] for each in networks] == ["tap1"]
        started += (strangers := (_beside(both[0], "third"), _beside(both[1], "third")))
        unknown = {"iface_id": "eth1", "host_dev_name": "tap1"}
        _same(strangers, "PUT", "/snapshot/load", {**LOAD, "network_overrides": [unknown]})
    finally:
        for process in started:
            process.close()


def test_copies_have_sockets_of_their_own(pair: Start) -> None:
    """Firecracker 1.16's ``vsock_override`` and ``track_dirty_pages``; 1.12.1 has neither."""
    _, ours = pair(code=COUNT)
    assert ours.request("PUT", "/vsock", {"guest_cid": 7, "uds_path": "v"}).status == 204
    _boot((ours,))
    assert ours.request("PATCH", "/vm", PAUSE).status == 204
    assert ours.request("PUT", "/snapshot/create", FULL).status == 204
    second = {**LOAD, "vsock_override": {"uds_path": "w"}, "track_dirty_pages": True, "clock_realtime": True}
    other = _go_on(ours, second, "second")
    try:
        config = other.request("GET", "/vm/config").json
        assert config["vsock"] == {"guest_cid": 7, "uds_path": "w"}
        assert config["machine-config"]["track_dirty_pages"] is True
        assert (ours.directory / "v").is_socket() and (ours.directory / "w").is_socket()
    finally:
        other.close()
    third = _beside(ours, "third")
    try:
        answer = third.request("PUT", "/snapshot/load", {**LOAD, "vsock_override": {"uds_path": "x" * 200}})
        assert answer.status == 400 and "must be at most" in answer.json["fault_message"]
    finally:
        third.close()


def test_a_copy_has_the_disks_and_limits_of_that_moment(pair: Start) -> None:
    both = pair()
    limiter = {"bandwidth": {"size": 1000, "refill_time": 100}}
    drive = {"drive_id": "a", "path_on_host": "a.img", "is_root_device": False, "is_read_only": False}
    balloon = {"amount_mib": 1, "deflate_on_oom": False, "stats_polling_interval_s": 1}
    _same(both, "PUT", "/drives/a", drive)
    _same(both, "PUT", "/network-interfaces/a", {"iface_id": "a", "host_dev_name": "tap0"})
    _same(both, "PUT", "/balloon", balloon)
    _boot(both)
    _same(both, "PATCH", "/drives/a", {"drive_id": "a", "path_on_host": "b.img", "rate_limiter": limiter})
    _same(both, "PATCH", "/network-interfaces/a", {"iface_id": "a", "rx_rate_limiter": limiter})
    _same(both, "PATCH", "/vm", PAUSE)
    _same(both, "PUT", "/snapshot/create", FULL)
    others: list[Process] = []
    try:
        others = [_go_on(process, LOAD, "second") for process in both]
        shown = [process.request("GET", "/vm/config").json for process in others]
        assert shown[0]["drives"] == shown[1]["drives"]
        assert shown[0]["network-interfaces"] == shown[1]["network-interfaces"]
        for process in others:
            opened = {os.path.basename(os.readlink(path)) for path in Path(f"/proc/{process.process.pid}/fd").iterdir()}
            assert {"a.img", "b.img"} & opened == {"b.img"}
    finally:
        for process in others:
            process.close()


def test_diffs_over_a_full_one_are_what_a_full_one_would_be(pair: Start) -> None:
    both = pair(code=COUNT)
    _boot(both)
    ours = both[1]
    _until_more(ours.output, 0)
    for number in range(3):
        assert ours.request("PATCH", "/vm", PAUSE).status == 204
        kind = "Diff" if number else "Full"
        begun = time.monotonic()
        assert ours.request("PUT", "/snapshot/create", {**FULL, "snapshot_type": kind}).status == 204
        print(kind, time.monotonic() - begun)
        whole = {"snapshot_path": "snap2", "mem_file_path": "mem2"}
        assert ours.request("PUT", "/snapshot/create", whole).status == 204
        assert (ours.directory / "mem").read_bytes() == (ours.directory / "mem2").read_bytes()
        assert ours.request("PATCH", "/vm", RESUME).status == 204
        _until_more(ours.output, _tildes(ours.output))
    assert sorted(name for name in (path.name for path in ours.directory.iterdir()) if ".new" in name) == []


def test_a_snapshot_into_the_file_that_the_guest_runs_from(pair: Start) -> None:
    _, ours = pair(code=COUNT)
    for method, path, body in (
        ("PUT", "/machine-config", TRACK),
        ("PUT", "/boot-source", {"kernel_image_path": "kernel"}),
    ):
        assert ours.request(method, path, body).status == 204
    assert ours.request("PUT", "/actions", {"action_type": "InstanceStart"}).status == 204
    _until_more(ours.output, 0)
    assert ours.request("PATCH", "/vm", PAUSE).status == 204
    assert ours.request("PUT", "/snapshot/create", FULL).status == 204
    last = ours
    for number in range(3):
        last = _go_on(last, {**LOAD, "resume_vm": True, "enable_diff_snapshots": True}, f"run{number}")
        _until_more(last.output, 1)
        assert last.request("PATCH", "/vm", PAUSE).status == 204
        assert last.request("PUT", "/snapshot/create", FULL).status == 204
        assert last.request("PATCH", "/vm", RESUME).status == 204
        _until_more(last.output, _tildes(last.output))
    last.close()


def test_versions_are_told() -> None:
    for command in ([firecracker()], [*PYVMM]):
        done = subprocess.run([*ALONE, *command, "--snapshot-version"], capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.startswith("v"), done
        done = subprocess.run([*ALONE, *command, "--describe-snapshot", "/none"], capture_output=True, text=True)
        assert done.returncode != 0 and "Traceback" not in done.stderr
