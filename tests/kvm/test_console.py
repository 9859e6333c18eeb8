# SPDX-License-Identifier: Apache-2.0
"""``pyvmm run`` on a terminal, a pipe and nothing at all, with a guest that echoes what it is sent."""

from __future__ import annotations

import os
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from boot.board import PARTS
from tests.kvm.guests import PATIENCE, write_guest

# Says "> ", then sends back each byte that comes, by polling; 'q' ends it with status 9.
ECHO = """
    mov edx, 0x3f8
    mov al, '>'
    out dx, al
1:  mov edx, 0x3fd
    in al, dx
    test al, 1
    jz 1b
    mov edx, 0x3f8
    in al, dx
    cmp al, 'q'
    je 2f
    out dx, al
    jmp 1b
2:  mov al, 9
    out 0xf4, al
"""
FOUR = "mov edx, 0x3f8; mov al, '!'; out dx, al; mov al, 4; out 0xf4, al"
STUCK = "cli; hlt"


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    master, slave = os.openpty()
    yield master, slave
    os.close(master)
    os.close(slave)


def pyvmm(kernel: str, *options: str) -> list[str]:
    return [sys.executable, "-m", "vmm", "run", kernel, "--memory", "4M", *options]


def on_terminal(kernel: str, slave: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(pyvmm(kernel), stdin=slave, stdout=slave, stderr=slave, start_new_session=True)


def read_until(fd: int, end: bytes) -> bytes:
    heard = b""
    while end not in heard:
        heard += os.read(fd, 4096)
    return heard


def test_terminal_from_the_first_key_to_the_guests_status(tmp_path: Path, terminal: tuple[int, int]) -> None:
    master, slave = terminal
    before = termios.tcgetattr(slave)
    child = on_terminal(write_guest(tmp_path, ECHO), slave)
    assert b"Ctrl-A x" in read_until(master, b">")
    assert termios.tcgetattr(slave)[3] & (termios.ICANON | termios.ECHO | termios.ISIG) == 0
    os.write(master, b"a\x03\x1ab")
    assert read_until(master, b"b") == b"a\x03\x1ab", "Ctrl-C and Ctrl-Z are the guest's"
    os.write(master, b"q")
    assert child.wait(PATIENCE) == 9
    assert termios.tcgetattr(slave) == before


@pytest.mark.parametrize("source", [ECHO, STUCK], ids=["guest that reads", "stuck guest"])
@pytest.mark.parametrize("keys", [b"\x01x", b"\x03\x03"], ids=["Ctrl-A x", "Ctrl-C twice"])
def test_own_keys_end_it(tmp_path: Path, terminal: tuple[int, int], source: str, keys: bytes) -> None:
    master, slave = terminal
    before = termios.tcgetattr(slave)
    child = on_terminal(write_guest(tmp_path, source), slave)
    read_until(master, b"Ctrl-A itself")
    os.write(master, keys)
    assert child.wait(PATIENCE) == 130
    assert termios.tcgetattr(slave) == before


@pytest.mark.parametrize("number", [1, 15], ids=["SIGHUP", "SIGTERM"])
def test_signal_restores_the_terminal(tmp_path: Path, terminal: tuple[int, int], number: int) -> None:
    master, slave = terminal
    before = termios.tcgetattr(slave)
    child = on_terminal(write_guest(tmp_path, ECHO), slave)
    read_until(master, b">")
    child.send_signal(number)
    assert child.wait(PATIENCE) == 130
    assert termios.tcgetattr(slave) == before


def test_pipe_in_and_out(tmp_path: Path) -> None:
    done = subprocess.run(pyvmm(write_guest(tmp_path, ECHO)), input=b"hello q", capture_output=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout, done.stderr) == (9, b">hello ", b"")


@pytest.mark.parametrize("closed", ["<&-", "</dev/null", ">&-", "<&- >&- 2>&-"])
def test_closed_descriptors(tmp_path: Path, closed: str) -> None:
    command = ["sh", "-c", f'exec "$@" {closed}', "sh", *pyvmm(write_guest(tmp_path, FOUR))]
    done = subprocess.run(command, capture_output=True, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (4, b"")
    assert done.stdout == (b"" if ">&-" in closed else b"!")


def test_end_of_input_leaves_an_idle_guest_alone(tmp_path: Path) -> None:
    command = pyvmm(write_guest(tmp_path, STUCK))
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        stat = Path(f"/proc/{child.pid}/stat")

        def ticks() -> int:
            fields = stat.read_text().rsplit(")", 1)[1].split()
            return int(fields[11]) + int(fields[12])

        # The start takes what it takes; then nothing is left to do.
        deadline = time.monotonic() + PATIENCE
        before, now = -1, ticks()
        while now != before and time.monotonic() < deadline:
            time.sleep(0.3)
            before, now = now, ticks()
        assert now == before, "it polls an input that has ended"
    finally:
        child.terminate()
        assert child.wait(PATIENCE) == 130


def test_broken_pipe_does_not_end_the_guest(tmp_path: Path) -> None:
    command, pipe = pyvmm(write_guest(tmp_path, ECHO)), subprocess.PIPE
    child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe)
    assert child.stdin is not None and child.stdout is not None and child.stderr is not None
    assert child.stdout.read(1) == b">"
    child.stdout.close()
    child.stdin.write(b"said to nobody" + b"q")
    child.stdin.close()
    assert child.wait(PATIENCE) == 9
    message = child.stderr.read()
    child.stderr.close()
    assert message == b"pyvmm: 14 bytes of the console's output are lost: Broken pipe\n"


def test_file(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"of the last run")
    command = pyvmm(write_guest(tmp_path, FOUR), "--console", f"file:{log}")
    dry = subprocess.run([*command, "--dry-run"], capture_output=True, timeout=PATIENCE)
    assert dry.returncode == 0 and log.read_bytes() == b"of the last run"
    words = dry.stdout.decode().splitlines()
    for part in PARTS:
        for first, count in part.ports:
            assert f"pio      {first:#x}-{first + count - 1:#x} {part.title}" in words
        assert part.gsi is None or f"gsi      {part.gsi} {part.title}" in words
    done = subprocess.run(command, capture_output=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout, done.stderr) == (4, b"", b"")
    assert log.read_bytes() == b"!"
