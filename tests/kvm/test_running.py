# SPDX-License-Identifier: Apache-2.0
"""pyvmm ps, stop and logs, of VMs that other processes run."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest

from tests.api.oracle import Process
from vmm.commands import running, stop
from vmm.commands.cli import main
from vmm.testing import tiny_guest

PYVMM = str(Path(sys.executable).with_name("pyvmm"))
WORD = f"guest{os.getpid()}"  # other VMs may run here
# Says "up" on the serial port. When its power button is pressed, it ends: by exit port 5, or by a triple fault.
BUTTON = """
    mov dx, 0x3f8; mov al, 'u'; out dx, al; mov al, 'p'; out dx, al; mov al, 10; out dx, al
    mov dx, 0x604
again:
    in al, dx; test al, 2; jz again
    mov al, 5; out 0xf4, al; ud2
"""
DEAF = "again: jmp again"
Start = Callable[..., "subprocess.Popen[bytes]"]


def pyvmm(*words: str) -> subprocess.CompletedProcess[str]:
    """One command line."""
    return subprocess.run([PYVMM, *words], capture_output=True, text=True, timeout=60)


def listed(pid: int) -> dict[str, Any] | None:
    """What ps says of a process."""
    done = pyvmm("ps", "--json")
    assert not done.stderr
    return next((each for each in map(json.loads, done.stdout.splitlines()) if each["pid"] == pid), None)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts `pyvmm run` with a guest of that code, its output in a file `console`; returns when ps says it runs."""
    begun = []

    def run(code: str, name: str = WORD) -> subprocess.Popen[bytes]:
        guest = tiny_guest(tmp_path, code, name)
        with open(tmp_path / "console", "wb") as console:
            words = [PYVMM, "run", guest, "--memory", "16M"]
            begun.append(subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=console, stderr=console))
        while (seen := listed(begun[-1].pid)) is None or seen["state"] != "running":
            assert begun[-1].poll() is None
        return begun[-1]

    yield run
    for process in begun:
        process.kill()
        process.wait()


def test_ps_lists_a_vm(start: Start) -> None:
    process = start(DEAF)
    seen = listed(process.pid)
    assert seen is not None
    assert (seen["name"], seen["kind"], seen["state"]) == (WORD, "run", "running")
    assert seen["image"].endswith(f"/{WORD}") and 1 << 20 < seen["memory"] < 1 << 30
    assert abs(time.time() - seen["began"]) < 60 and seen["cpu_percent"] >= 0
    heading, *rows = pyvmm("ps").stdout.splitlines()
    assert heading.split() == ["NAME", "COMMAND", "PID", "STATE", "UPTIME", "MEMORY", "CPU", "IMAGE"]
    (row,) = (row.split() for row in rows if row.startswith(WORD))
    assert row[1:4] == ["run", str(process.pid), "running"]


def test_stop_presses_the_power_button(start: Start) -> None:
    process = start(BUTTON)
    done = pyvmm("stop", WORD)
    assert (done.returncode, done.stderr) == (0, "")
    assert process.wait(timeout=10) == 5
    assert listed(process.pid) is None


def test_stop_ends_a_guest_that_does_not_listen(start: Start) -> None:
    process = start(DEAF)
    assert pyvmm("stop", "--timeout", "0", str(process.pid)).returncode == 0
    assert process.wait(timeout=10) == 130


def test_a_guest_that_does_not_listen_has_its_time(start: Start) -> None:
    process = start(DEAF)
    process.send_signal(signal.SIGPWR)
    began = time.monotonic()
    assert pyvmm("stop", "--timeout", "1", WORD).returncode == 0
    assert time.monotonic() - began >= 1
    assert process.wait(timeout=10) == 130


def test_logs_are_the_files_that_it_writes(start: Start, tmp_path: Path) -> None:
    start(BUTTON)
    following = subprocess.Popen([PYVMM, "logs", "--follow", WORD], stdout=PIPE)
    while (tmp_path / "console").read_bytes() != b"up\n":
        pass
    assert pyvmm("logs", WORD).stdout == "up\n"
    assert pyvmm("stop", WORD).returncode == 0
    assert following.communicate(timeout=10)[0] == b"up\n"


def test_what_a_shell_or_a_terminal_would_obey_is_no_name(start: Start) -> None:
    process = start(DEAF, "a\x1b[31m$(id)")
    seen = listed(process.pid)
    assert seen is not None and seen["name"] == f"run-{process.pid}"
    assert "a\\x1b[31m$(id)\n" in pyvmm("ps").stdout


def test_one_that_does_not_end_is_said(
    start: Start, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stop, "_PATIENCE", 0.1)
    process = start(DEAF)
    process.send_signal(signal.SIGSTOP)
    assert main(["stop", "--timeout", "0", str(process.pid)]) == 1
    assert capsys.readouterr().err == f"pyvmm stop: PID {process.pid} did not end within 10 s after SIGTERM\n"


@pytest.mark.parametrize(
    ("answer", "state"),
    [(b'HTTP/1.1 200 \r\n\r\n{"state":"Paused"}', "paused"), (b'{"state": "\x1b[2J"}', ""), (b"", ""), (None, "")],
)
def test_an_api_that_is_not_what_it_was_holds_nobody_up(tmp_path: Path, answer: bytes | None, state: str) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "s"))
    listener.listen()

    def serve() -> None:
        client, _ = listener.accept()
        try:
            for piece in [b"x"] * 100 if answer is None else [answer]:
                client.sendall(piece)
                time.sleep(0.1 if answer is None else 0)
        except OSError:
            pass  # it has given up
        client.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    began = time.monotonic()
    assert running._asked(str(tmp_path / "s")) == state
    assert time.monotonic() - began < 5
    thread.join()
    listener.close()


def test_a_thread_that_ends_meanwhile_hides_no_vm(monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen(["sleep", "60"]) as process:  # this process may have another test's vCPU
        monkeypatch.setattr(os, "listdir", lambda path: ["4194305", str(process.pid)])
        assert running._state(process.pid, "run", ()) == "not started"
        process.kill()


def test_two_of_one_name_are_told_apart_by_pid(start: Start) -> None:
    processes = [start(DEAF), start(DEAF)]
    done = pyvmm("stop", WORD)
    assert done.returncode == 2
    pids = ", ".join(sorted(str(process.pid) for process in processes))
    assert done.stderr == f"pyvmm stop: NAME {WORD}: is the name of 2 VMs; give a PID: {pids}\n"


@pytest.mark.parametrize("command", ["stop", "logs"])
def test_a_name_that_is_not_there(command: str) -> None:
    done = pyvmm(command, "no-such-vm")
    assert done.returncode == 2
    assert done.stderr.startswith(f"pyvmm {command}: NAME no-such-vm: is not the name or PID of a VM that runs here; ")


def test_where_sandboxes_have_no_place_vms_are_listed(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pyvmm").write_text("no directory can be made here")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    process = start(DEAF)
    assert pyvmm("stop", "--timeout", "0", WORD).returncode == 0
    assert process.wait(timeout=10) == 130


def test_a_served_vm_says_its_state_by_its_api(tmp_path: Path) -> None:
    guest = tiny_guest(tmp_path, BUTTON)
    (tmp_path / "log").touch()
    with Process([PYVMM, "serve", "--id", WORD, "--log-path", str(tmp_path / "log")], tmp_path) as process:
        boot = {"kernel_image_path": guest}
        assert process.request("PUT", "/boot-source", boot).status == 204
        assert process.request("PUT", "/actions", {"action_type": "InstanceStart"}).status == 204
        pid = process.process.pid
        seen = listed(pid)
        assert seen is not None and (seen["name"], seen["kind"], seen["state"]) == (WORD, "serve", "running")
        assert process.request("PATCH", "/vm", {"state": "Paused"}).status == 204
        assert (seen := listed(pid)) is not None and seen["state"] == "paused"
        assert process.request("PATCH", "/vm", {"state": "Resumed"}).status == 204
        assert "] Running Firecracker v" in pyvmm("logs", WORD).stdout
        assert pyvmm("stop", "--timeout", "60", str(pid)).returncode == 0
        assert process.process.wait(timeout=10) == 0 and listed(pid) is None


def test_a_program_with_vms_is_listed_and_not_stopped(tmp_path: Path) -> None:
    guest = tiny_guest(tmp_path, DEAF)
    program = tmp_path / f"{WORD}.py"
    program.write_text(f"""
from vmm import Machine
with Machine({guest!r}, memory="16M") as vm:
    vm.start()
    print("up", flush=True)
    input()
""")
    with subprocess.Popen([sys.executable, program], stdin=PIPE, stdout=PIPE, stderr=PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"up\n"
        seen = listed(process.pid)
        assert seen is not None and (seen["name"], seen["kind"]) == (f"{WORD}.py", "python")
        done = pyvmm("stop", f"{WORD}.py")
        assert done.returncode == 2 and "belongs to another program" in done.stderr
        done = pyvmm("logs", f"{WORD}.py")
        assert done.returncode == 2 and "writes to no file, but to pipe:" in done.stderr
        process.communicate(b"\n")
    assert process.returncode == 0


def test_isolated_copies_are_listed_by_the_program_that_has_them(tmp_path: Path) -> None:
    program = tmp_path / f"{WORD}.py"
    program.write_text(f"""
from vmm import Machine
if __name__ == "__main__":
    with Machine({tiny_guest(tmp_path, DEAF)!r}, memory="16M") as vm:
        vm.start()
        (copy,) = vm.fork(1, isolated=True)
        print(copy.pid, flush=True)
        input()
        copy.close()
""")
    with subprocess.Popen([sys.executable, program], stdin=PIPE, stdout=PIPE) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        seen = listed(pid)
        assert seen is not None and (seen["name"], seen["kind"]) == (f"{WORD}.py-{pid}", "copy")
        assert seen["image"] == str(program)
        assert "belongs to another program" in pyvmm("stop", str(pid)).stderr
        assert pyvmm("ps", "--quiet").stdout.count(WORD) == 2
        process.communicate(b"\n")
    assert process.returncode == 0
