# SPDX-License-Identifier: Apache-2.0
"""What starts no VM, on a terminal: in front, in the background, hung up, interrupted, in a pid namespace.

``run``, ``serve`` and ``jailer`` are tests/jail/test_terminal.py's.
"""

from __future__ import annotations

import contextlib
import os
import select
import shlex
import signal
import socket
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.jail.jailed import ROOT
from tests.jail.terminal import Terminal
from tests.waiting import PATIENCE, has_ended, until
from vmm.machine.terminal import raw
from vmm.sandbox.process import CLOSE
from vmm.sandbox.registry import Place

Start = Callable[[str, list[str]], Terminal]
PYVMM = str(Path(sys.executable).with_name("pyvmm"))
FAKES = {
    # apt offers a kernel, and is not done with fetching it: mark, then nothing.
    "apt-cache": 'echo "Version: 1\nSize: 1000000\nDepends: linux-image-x (= 1)"',
    "apt-get": """
for word; do case $word in APT::Status-Fd=*) eval "echo dlstatus:1:45.2:kernel >&${word#*=}";; esac; done
exec sleep 60""",
    # What demo.py starts: the tiny guest ends, the other one says something and runs.
    "pyvmm": 'case "$*" in *tiny.elf) exit 42;; *) echo up; exec sleep 60;; esac',
    "qemu-system-x86_64": f"""
[ "$1" = --version ] && echo "QEMU emulator version 9.1.0" && exit
exec {shlex.quote(sys.executable)} {shlex.quote(str(ROOT / "tests/lab/fake_qemu.py"))} "$@" """,
}
# The lab, but for its machine.
LAB = """
import sys
from vmm.commands import cli
from vmm import lab
lab.missing = list
lab.lab_image = lambda progress: lab.image.LabImage("/kernel", "/initramfs", "6.1", "/modules")
sys.argv[1:1] = ["lab", "--timeout", "60"]
cli.entry()
"""
DEMO = "import runpy, sys; sys.executable = sys.argv.pop(1); runpy.run_path('tools/demo.py', run_name='__main__')"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the programs that stand for others first in PATH, and an empty cache."""
    for name, text in FAKES.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("FAKE_LAB_BOOTS", str(tmp_path / "boots"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def start(place: Path) -> Iterator[Start]:
    terminals = []

    def start(how: str, command: list[str]) -> Terminal:
        terminals.append(Terminal(how, command))
        return terminals[-1]

    yield start
    for terminal in terminals:
        terminal.close()


@pytest.fixture
def guest(place: Path) -> Iterator[Path]:
    """A VM's socket, behind which a guest says what it hears."""
    path = place / "v"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("v")
        listener.listen()

        def serve() -> None:
            with contextlib.suppress(OSError):  # nobody came, or went at once
                stream, _ = listener.accept()
                with stream:
                    if stream.recv(64):
                        stream.sendall(b"OK 1\n")
                    while data := stream.recv(64):
                        stream.sendall(data.upper())

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield path
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.fixture
def box(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A sandbox that runs, whose agent says what it hears, and whose every command ends with its input."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(place))
    there = Place("box", {"env": {}, "cwd": None, "user": None})
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(there.socket)
        listener.listen()

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    stream, _ = listener.accept()
                    with stream:
                        stream.recv(64)
                        stream.sendall(b"OK 1\n")
                        stream.recv(4096)
                        stream.sendall(b"p\4\0\0\0\1\0\0\0" + b"o\2\0\0\0up")
                        while (heard := stream.recv(4096)) and heard != CLOSE:
                            stream.sendall(b"o" + heard[1:].upper())
                        stream.sendall(b"x\3\0\0\0\0\7\0")

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
    there.close()


# What comes to its end by itself: the command, its status, and its last word.
BRIEF = {
    "check": ([PYVMM, "check"], None, b"hugepages"),
    "check --help": ([PYVMM, "check", "--help"], 0, b"--kvm"),
    "pull --list": ([PYVMM, "pull", "--list"], 0, b"not pulled"),
    "link": ([PYVMM, "link", "jailer", "{place}"], 0, b"/jailer"),
    "ctl": ([PYVMM, "ctl", "--api-sock", "{place}/no", "status"], 1, b"ask the API"),
    "vsock": ([PYVMM, "vsock", "{place}/no", "1"], 2, b"is not there"),
    "lab": ([sys.executable, "-c", LAB, "echo", "it ran"], 0, b"it ran"),
}
# What waits: for its keys, for a server, for a program; and what it says first.
WAITS = {
    "pull": ([PYVMM, "pull", "busybox"], b"45 %"),
    "lab": ([sys.executable, "-c", LAB, "sh", "-c", "echo up; exec cat"], b"up"),
    "demo": ([sys.executable, "-c", DEMO, "{place}/bin/python"], b"up"),
    "vsock": ([PYVMM, "vsock", "{place}/v", "1"], b""),
    "ctl": ([PYVMM, "ctl", "--api-sock", "{place}/no", "mmds", "put"], b""),
}


def words(command: list[str], place: Path) -> list[str]:
    return [word.replace("{place}", str(place)) for word in command]


@pytest.mark.parametrize("how", ["fg", "bg", "pid namespace"])
@pytest.mark.parametrize("name", BRIEF)
def test_it_does_its_work(place: Path, start: Start, name: str, how: str) -> None:
    command, status, said = BRIEF[name]
    command = words(command, place)
    if how == "pid namespace":
        if os.geteuid():
            pytest.skip("LAYER MISSING: pid namespace: needs root")
        command, how = ["unshare", "--pid", "--fork", *command], "fg"
    terminal = start(how, command)
    terminal.hear(said)
    assert terminal.end() == status or status is None
    assert b"Traceback" not in terminal.heard
    assert (b"stopped" in terminal.heard) == (name == "lab" and how == "bg")  # which wants the keys
    assert termios.tcgetattr(terminal.slave) == terminal.before


def test_the_lab_has_the_keys(place: Path, start: Start) -> None:
    command, said = WAITS["lab"]
    terminal = start("fg", words(command, place))
    terminal.hear(said)
    assert termios.tcgetattr(terminal.slave)[3] & (termios.ICANON | termios.ECHO | termios.ISIG) == 0
    os.write(terminal.master, b"\x03key")
    terminal.hear(b"\x03key")


def test_attached_from_behind_the_terminal_is_given_back(place: Path, start: Start, guest: Path) -> None:
    terminal = start("bg", [PYVMM, "attach", str(guest)])  # is stopped when it wants the keys
    terminal.hear(b"stopped")
    os.write(terminal.master, b"hello\x1d")
    assert terminal.end() == 0
    assert termios.tcgetattr(terminal.slave) == terminal.before


def test_behind_what_reads_is_stopped_until_it_is_in_front(place: Path, start: Start, guest: Path) -> None:
    terminal = start("bg", words(WAITS["vsock"][0], place))
    os.write(terminal.master, b"hello\n\x04")
    terminal.hear(b"HELLO")
    assert terminal.end() == 0
    terminal = start("bg", words(WAITS["ctl"][0], place))
    os.write(terminal.master, b"{}\n\x04")
    terminal.hear(b"ask the API")
    assert terminal.end() == 1 and b"stopped" in terminal.heard


def begun(terminal: Terminal, name: str) -> None:
    """Wait until it waits."""
    terminal.hear(WAITS[name][1])
    if not WAITS[name][1]:  # it says nothing, and sleeps at its terminal
        process = Path("/proc", str(terminal.job()))
        mark = f"\nSigCgt:\t{1 << signal.SIGINT - 1:016x}\n"
        until(lambda: mark in (process / "status").read_text())
        until(lambda: "S (sleeping)" in (process / "status").read_text())


@pytest.mark.parametrize("name", WAITS)
def test_hung_up_it_ends(place: Path, start: Start, guest: Path, name: str) -> None:
    terminal = start("fg", words(WAITS[name][0], place))
    begun(terminal, name)
    job = terminal.job()
    terminal.hang_up()
    until(lambda: has_ended(job))


@pytest.mark.parametrize("name", sorted(set(WAITS) - {"lab"}))
def test_ctrl_c_ends_it_without_a_word(place: Path, start: Start, guest: Path, name: str) -> None:
    terminal = start("fg", words(WAITS[name][0], place))
    begun(terminal, name)
    os.write(terminal.master, b"\x03")
    assert terminal.end() == 130, terminal.heard
    terminal.hear(b"^C")
    assert b"Traceback" not in terminal.heard and terminal.heard.partition(b"^C")[2].count(b"\n") <= 1


def _is_held(process: subprocess.Popen[bytes]) -> bool:
    # Whether the launcher's hold of SIGINT, which lasts some milliseconds, was seen before somebody catches it.
    while True:
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
        if int(status["SigBlk"], 16) == 1 << signal.SIGINT - 1:
            return True
        if int(status["SigCgt"], 16) & 1 << signal.SIGINT - 1:
            return False


@pytest.mark.parametrize("how", ["cold", "warm"])
def test_ctrl_c_while_it_starts(place: Path, guest: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    if how == "warm":  # also where a module has changed since `make install`
        subprocess.run([PYVMM, "prepare"], check=True, capture_output=True, timeout=60)
    monkeypatch.setenv("PYVMM_START", how)
    # As early as the launcher has held it: the signal waits until somebody catches it. With a stdin that does not end.
    pipe, command = subprocess.PIPE, [PYVMM, "vsock", str(guest), "1"]
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe)
    while not _is_held(process):  # we were not run meanwhile
        process.kill()
        process.communicate()
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == (b"", b"") and process.returncode == 130


IN_THE_BOX = [PYVMM, "exec", "box", "sh"]


def test_a_signal_gives_the_terminal_back(start: Start, box: None) -> None:
    terminal = start("fg", IN_THE_BOX)
    terminal.hear(b"up")
    os.write(terminal.master, b"\x03key")
    terminal.hear(b"\x03KEY")
    assert termios.tcgetattr(terminal.slave)[3] & (termios.ICANON | termios.ECHO | termios.ISIG) == 0
    termios.tcflow(terminal.slave, termios.TCOOFF)  # the person has stopped its output
    os.kill(terminal.job(), signal.SIGHUP)
    assert terminal.end() == 128 + signal.SIGHUP
    assert termios.tcgetattr(terminal.slave) == terminal.before


def test_a_signal_passes_what_the_command_does_not_read(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(place))
    box = Place("box", {"env": {}, "cwd": None, "user": None})
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(box.socket)
        listener.listen()
        listener.settimeout(PATIENCE)
        process = subprocess.Popen([PYVMM, "exec", "box", "sh"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        try:
            command, _ = listener.accept()
            assert command.recv(64)
            command.sendall(b"OK 1\n")
            assert command.recv(4096)
            command.sendall(b"p\4\0\0\0\1\0\0\0")
            assert process.stdin is not None
            keys = process.stdin.fileno()
            while select.select([], [keys], [], 0.3)[1]:
                os.write(keys, bytes(4096))
            process.terminate()
            other, _ = listener.accept()
            assert other.recv(64)
            other.sendall(b"OK 2\n")
            assert b'"signal"' in other.recv(4096)
            other.sendall(b"k\0\0\0\0")
            command.sendall(b"x\3\0\0\0\0\7\0")
            assert process.wait(PATIENCE) == 7
        finally:
            process.kill()
            process.wait()
    box.close()


def test_by_nohup_a_command_in_a_sandbox_outlives_its_terminal(start: Start, box: None) -> None:
    terminal = start("nohup", IN_THE_BOX)
    terminal.hear(b"up")
    terminal.hang_up()
    assert terminal.end() == 7, "its input has ended"


def test_by_nohup_the_lab_outlives_its_terminal(place: Path, start: Start) -> None:
    waits = f"echo up; until [ -e {place}/go ]; do sleep 0.02; done"
    terminal = start("nohup", [sys.executable, "-c", LAB, "sh", "-c", waits])
    terminal.hear(b"up")
    terminal.hang_up()
    (place / "go").touch()
    assert terminal.end() == 0


def test_by_nohup_a_pull_outlives_its_terminal(place: Path, start: Start) -> None:
    # Its bar cannot be drawn any more, and the size of the terminal not be asked.
    (place / "bin/apt-get").write_text(
        f"""#!/bin/sh
        touch {place}/waits; until [ -e {place}/go ]; do sleep 0.02; done
        for word; do case $word in APT::Status-Fd=*) eval "echo dlstatus:1:45.2:kernel >&${{word#*=}}";; esac; done
        touch x.deb
        """
    )
    (place / "bin/dpkg-deb").write_text(f"#!/bin/sh\ntouch {place}/unpacked; exit 1\n")
    (place / "bin/dpkg-deb").chmod(0o755)
    terminal = start("nohup", words(WAITS["pull"][0], place))
    until((place / "waits").exists)
    terminal.hang_up()
    (place / "go").touch()
    assert terminal.end() == 1 and (place / "unpacked").exists()


def test_a_signal_as_soon_as_a_terminal_is_raw_leaves_it_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    master, slave = os.openpty()
    before = termios.tcgetattr(slave), signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGHUP)
    set_handler = signal.signal

    def late(number: int, handler: Any) -> object:
        if number == signal.SIGCONT:
            raise SystemExit(128 + signal.SIGTERM)
        return set_handler(number, handler)

    with monkeypatch.context() as patch:
        patch.setattr(signal, "signal", late)
        with pytest.raises(SystemExit), raw(slave, {}):
            pass
    assert (termios.tcgetattr(slave), signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGHUP)) == before
    os.close(slave)
    os.close(master)
