# SPDX-License-Identifier: Apache-2.0
"""``pyvmm ctl`` with a served VM whose guest sleeps."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.kvm.guests import write_guest
from vmm.api.server import Server
from vmm.commands.cli import main
from vmm.commands.ctl import Client, _snapshot
from vmm.errors import HostError
from vmm.unix_socket import Listener

HALT = "1: hlt\njmp 1b"
Ctl = Callable[..., str]


@pytest.fixture
def ctl(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Ctl]:
    """Runs ``pyvmm ctl`` with those words, and returns what it printed; the VM is configured, and not started."""
    for name, size in (("disk", 1 << 20), ("other", 2 << 20), ("metrics", 0)):
        (tmp_path / name).write_bytes(bytes(size))
    config = {
        "boot-source": {"kernel_image_path": write_guest(tmp_path, HALT), "boot_args": ""},
        "machine-config": {"vcpu_count": 1, "mem_size_mib": 64},
        "drives": [{"drive_id": "d", "path_on_host": str(tmp_path / "disk"), "is_root_device": False}],
        "balloon": {"amount_mib": 1, "deflate_on_oom": True, "stats_polling_interval_s": 1},
        "metrics": {"metrics_path": str(tmp_path / "metrics")},
        "fs": [{"tag": "work", "shared_dir": str(tmp_path)}],
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    path = str(tmp_path / "api.sock")
    command = [sys.executable, "-m", "vmm", "serve", "--api-sock", path, "--id", "me"]
    process = subprocess.Popen([*command, "--config-file", str(tmp_path / "config.json")], stdin=subprocess.DEVNULL)

    def run(*words: str, status: int = 0) -> str:
        capsys.readouterr()
        assert main(["ctl", "--api-sock", path, *words]) == status
        out, err = capsys.readouterr()
        return err if status else out

    try:
        while not Path(path).exists():
            assert process.poll() is None
        yield run
    finally:
        process.terminate()
        assert process.wait(30) == 0


def test_what_a_person_does(ctl: Ctl, tmp_path: Path) -> None:
    assert ctl("status") == "me: Running (Firecracker API 1.12.1)\n"
    assert json.loads(ctl("--json", "status"))["state"] == "Running"
    ctl("pause")
    assert "Paused" in ctl("status")
    ctl("resume")
    ctl("drive", "d", "--path", str(tmp_path / "other"), "--bps", "10M", "--iops", "0")
    drive = json.loads(ctl("config"))["drives"][0]
    assert drive["path_on_host"] == str(tmp_path / "other")
    assert drive["rate_limiter"]["bandwidth"] == {"size": 1 << 20, "one_time_burst": None, "refill_time": 100}
    ctl("fs", "work", "--iops", "1000")
    limiter = json.loads(ctl("config"))["fs"][0]["rate_limiter"]
    assert limiter == {"bandwidth": None, "ops": {"size": 100, "one_time_burst": None, "refill_time": 100}}
    ctl("balloon", "2")
    assert "amount_mib" in ctl("balloon") and "2" in ctl("balloon")
    assert "target_mib" in ctl("balloon", "--stats")
    before = (tmp_path / "metrics").read_text().count("\n")
    ctl("metrics", "--flush")
    assert (tmp_path / "metrics").read_text().count("\n") == before + 1
    assert "# TYPE pyvmm_" in ctl("metrics")
    ctl("mmds", "put", '{"a": 1}')
    ctl("mmds", "patch", '{"b": 2}')
    assert json.loads(ctl("mmds")) == {"a": 1, "b": 2}
    ctl("ctrl-alt-del")
    assert json.loads(ctl("request", "GET", "/version")) == {"firecracker_version": "1.12.1"}


def test_what_is_refused_is_said_in_one_line(ctl: Ctl, tmp_path: Path) -> None:
    assert ctl("start", status=1).startswith("pyvmm ctl: PUT /actions: The requested operation is not supported")
    assert "nosuch" in ctl("drive", "nosuch", "--path", "/dev/null", status=1)
    assert "é: there is no such drive" in ctl("drive", "é", "--path", "/dev/null", status=1)
    assert "must have no spaces" in ctl("drive", "a b", "--path", "/dev/null", status=2)
    for words in (("drive", "d"), ("net", "n"), ("drive", "d", "--bps", "5"), ("drive", "d", "--bps", "x")):
        assert ctl(*words, status=2).count("\n") == 1
    assert "is not valid JSON" in ctl("mmds", "put", "{", status=2)
    assert "is not valid JSON" in ctl("mmds", "put", "[" * 100_000, status=2)


def test_nobody_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "nobody"
    assert main(["ctl", "--api-sock", str(path), "status"]) == 1
    assert capsys.readouterr().err == f"pyvmm ctl: ask the API {path}: No such file or directory\n"
    path = tmp_path / ("x" * 120)
    assert main(["ctl", "--api-sock", str(path), "status"]) == 2
    assert capsys.readouterr().err == f"pyvmm ctl: --api-sock {path}: is too long for a unix socket\n"


def test_a_slow_answer_is_waited_for_where_it_takes_long(tmp_path: Path) -> None:
    asked = []

    def answer(method: str, path: str, body: bytes) -> tuple[int, bytes, tuple[str, ...]]:
        asked.append(path)
        time.sleep(0.5 if path in ("/snapshot/create", "/mmds") else 0)
        return 200, b'{"state": "Running"}', ()

    server = Server(Listener("socket", str(tmp_path / "s"), 8), answer, 1 << 10)
    server.start()
    try:
        with pytest.raises(HostError, match="Connection timed out"):
            Client(str(tmp_path / "s"), 0.1).ask("GET", "/mmds")
        time.sleep(0.5)
        # A stand-in for argparse's Namespace.
        _snapshot(Client(str(tmp_path / "s"), 0.3), SimpleNamespace(directory=str(tmp_path / "d"), diff=False))  # type: ignore[arg-type]
        assert asked[1:] == ["/", "/vm", "/snapshot/create", "/vm"]
    finally:
        server.close()
