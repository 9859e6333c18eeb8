# SPDX-License-Identifier: Apache-2.0
"""The host's side of the console: terminals, pipes, files, and readers and guests that do not take a byte."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from devices._serial import Serial
from tests.vmm.serial_guest import LSR, PATIENCE, THRE, Guest
from tests.waiting import until
from vmm.budget import raise_descriptor_limit
from vmm.errors import ConfigError
from vmm.irq import IrqLine
from vmm.machine import console as console_module
from vmm.machine.console import Console


@pytest.fixture
def join() -> Iterator[Callable[..., Console]]:
    """A console on descriptors of the test's instead of 0 and 1."""
    consoles = []

    def make(guest: Guest, stdin: int, stdout: int, **settings: Any) -> Console:
        console = Console(guest.serial, **settings)
        console._in, console._out = stdin, stdout
        consoles.append(console)
        return console

    yield make
    for console in consoles:
        console.close()


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    master, slave = os.openpty()
    yield master, slave
    for fd in (master, slave):
        try:
            os.close(fd)
        except OSError:
            pass  # the test closed it


@pytest.fixture
def pipes() -> Iterator[tuple[int, int, int, int]]:
    """Read and write end of one for stdin, then of one for stdout."""
    ends = [*os.pipe(), *os.pipe()]
    yield ends[0], ends[1], ends[2], ends[3]
    for fd in ends:
        try:
            os.close(fd)
        except OSError:
            pass


def read_until(fd: int, end: bytes) -> bytes:
    heard = b""
    while not heard.endswith(end):
        piece = os.read(fd, 65536)
        if not piece:
            break
        heard += piece
    return heard


def comes_true(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + PATIENCE
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()


def write_in_pieces(fd: int, data: bytes) -> bool:
    for at in range(0, len(data), 512):
        os.write(fd, data[at : at + 512])
    return True


def is_raw(fd: int) -> bool:
    return not termios.tcgetattr(fd)[3] & (termios.ICANON | termios.ECHO | termios.ISIG)


# The terminal


def test_terminal_is_raw_while_it_runs_and_as_it_was_after(guest: Guest, join: Any, terminal: Any) -> None:
    _, slave = terminal
    before = termios.tcgetattr(slave)
    console = join(guest, slave, slave)
    assert termios.tcgetattr(slave) == before, "not before it starts"
    console.start()
    assert is_raw(slave)
    console.close()
    assert termios.tcgetattr(slave) == before
    console.enter_raw_mode()
    assert termios.tcgetattr(slave) == before, "a late SIGCONT changes nothing"


def test_raw_again_after_the_shell_had_its_turn(guest: Guest, join: Any, terminal: Any) -> None:
    _, slave = terminal
    before = termios.tcgetattr(slave)
    console = join(guest, slave, slave)
    console.start()
    termios.tcsetattr(slave, termios.TCSANOW, before)  # as a shell does when a job of its stops
    console.enter_raw_mode()
    assert is_raw(slave)
    console.close()
    assert termios.tcgetattr(slave) == before


def test_start_tells_the_escape_key(guest: Guest, join: Any, terminal: Any, capfd: Any) -> None:
    console = join(guest, terminal[1], terminal[1])
    console.start()
    assert capfd.readouterr().err == (
        "pyvmm: press Ctrl-A x to quit, Ctrl-C twice to end the VM, Ctrl-A Ctrl-A for Ctrl-A itself\n"
    )


def test_keys_and_output_go_through_unchanged(guest: Guest, join: Any, terminal: Any) -> None:
    master, slave = terminal
    join(guest, slave, slave).start()
    every = bytes(byte for byte in range(256) if byte != 0x01)
    os.write(master, every)
    assert guest.read(255) == every
    guest.write(b"login: \r\n")
    # The terminal's own output processing stays: it makes CR CR NL of it, as in QEMU.
    assert read_until(master, b"\n").replace(b"\r", b"") == b"login: \n"


@pytest.mark.parametrize(
    ("keys", "kept", "quits"),
    [
        (b"\x01x", b"", True),
        (b"\x01X", b"", True),
        (b"a\x01\x01b", b"a\x01b", False),
        (b"\x01\x01x", b"\x01x", False),
        (b"\x01hx", b"x", False),
        (b"\x03", b"\x03", False),
        (b"\x03\x03", b"\x03\x03", True),
        (b"\x03a\x03", b"\x03a\x03", False),
        (b"\x01\x03\x03", b"\x03\x03", True),
        (b"\x1a\x1c\x11\x13", b"\x1a\x1c\x11\x13", False),
    ],
)
@pytest.mark.parametrize("one_by_one", [False, True])
def test_own_keys(keys: bytes, kept: bytes, quits: bool, one_by_one: bool) -> None:
    asked: list[bool] = []
    guest = Guest()
    console = Console(guest.serial, on_quit=lambda: asked.append(True))
    pieces = [bytes([key]) for key in keys] if one_by_one else [keys]
    assert b"".join(console._keys(piece) for piece in pieces) == kept
    assert bool(asked) is quits
    guest.close()


def test_two_ctrl_c_far_apart_are_the_guests(monkeypatch: pytest.MonkeyPatch, guest: Guest) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    asked: list[bool] = []
    console = Console(guest.serial, on_quit=lambda: asked.append(True))
    console._keys(b"\x03")
    now += 1.5
    console._keys(b"\x03")
    assert not asked
    now += 0.5
    console._keys(b"\x03")
    assert asked


@pytest.mark.parametrize("keys", [b"\x01x", b"\x03\x03"])
def test_own_keys_work_with_a_stuck_guest(guest: Guest, join: Any, terminal: Any, keys: bytes) -> None:
    # More than the terminal, the wire and a read hold together: our keys come last of all.
    master, slave = terminal
    quit_asked = threading.Event()
    join(guest, slave, slave, on_quit=quit_asked.set).start()
    for _ in range(16):
        os.write(master, b"x" * 1024)
    os.write(master, keys)
    assert quit_asked.wait(PATIENCE)


def test_paste_waits_for_the_guest(guest: Guest, join: Any, terminal: Any) -> None:
    master, slave = terminal
    join(guest, slave, slave).start()
    pasted = b"".join(b"%05d " % number for number in range(20000))
    assert write_in_pieces(master, pasted), "also with a guest that has not begun to read"
    assert guest.read(len(pasted)) == pasted


def test_terminal_that_goes_away(guest: Guest, join: Any, terminal: Any) -> None:
    master, slave = terminal
    console = join(guest, slave, slave)
    console.start()
    os.close(master)
    guest.write(b"into the void\n")
    console.close()
    assert console.lost == 14


def test_a_terminal_of_another_job_in_a_program_with_many_descriptors(
    guest: Guest, join: Any, terminal: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    raise_descriptor_limit()
    eventfd = os.eventfd
    looked = threading.Event()

    def high(*how: int) -> int:
        fd = eventfd(*how)
        above = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 1024)
        os.close(fd)
        return above

    def refuse(fd: int, size: int) -> bytes:
        looked.set()
        raise OSError(5, os.strerror(5))

    console = join(guest, terminal[1], terminal[1])
    monkeypatch.setattr(os, "eventfd", high)
    console.start()
    monkeypatch.setattr(os, "read", refuse)
    os.write(terminal[0], b"a")
    assert looked.wait(PATIENCE)
    time.sleep(0.05)
    assert [each.name for each in console._readers if each.is_alive()] == ["console keys", "console in"]
    monkeypatch.undo()


def test_window_that_changes_its_size_interrupts_nothing(guest: Guest, join: Any, terminal: Any) -> None:
    master, slave = terminal
    old = signal.signal(signal.SIGWINCH, lambda number, frame: None)
    try:
        join(guest, slave, slave).start()
        for _ in range(20):
            os.kill(os.getpid(), signal.SIGWINCH)
        os.write(master, b"still here")
        assert guest.read(10) == b"still here"
    finally:
        signal.signal(signal.SIGWINCH, old)


# What is no terminal


def test_end_of_input_feeds_the_rest_and_output_goes_on(guest: Guest, join: Any, pipes: Any) -> None:
    stdin, typed, shown, stdout = pipes
    console = join(guest, stdin, stdout)
    console.start()
    os.write(typed, b"echo hello\n\x01x\x03\x03")
    os.close(typed)
    assert guest.read(15) == b"echo hello\n\x01x\x03\x03", "a pipe has no keys of ours"
    assert comes_true(lambda: not console._readers[0].is_alive()), "nobody polls a pipe that has ended"
    guest.write(b"hello\r\n")
    assert read_until(shown, b"\n") == b"hello\r\n"


def test_more_input_than_the_guest_takes_fills_the_pipe_only(guest: Guest, join: Any, pipes: Any) -> None:
    stdin, typed, _, stdout = pipes
    join(guest, stdin, stdout).start()
    data = bytes(range(256)) * 512
    writer = threading.Thread(target=write_in_pieces, args=(typed, data))
    writer.start()
    assert guest.read(len(data)) == data
    writer.join(PATIENCE)


def test_closed_stdin_and_dev_null(guest: Guest, join: Any, pipes: Any) -> None:
    stdin, _, shown, stdout = pipes
    os.close(stdin)
    console = join(guest, stdin, stdout)
    console.start()
    guest.write(b"boot\n")
    assert read_until(shown, b"\n") == b"boot\n"
    console.close()
    second = Guest()
    null = os.open(os.devnull, os.O_RDONLY)
    other = join(second, null, stdout)
    other.start()
    second.write(b"again\n")
    assert read_until(shown, b"\n") == b"again\n"
    other.close()
    second.close()
    os.close(null)


def test_broken_pipe_stops_the_writing_only(guest: Guest, join: Any, pipes: Any, capfd: Any) -> None:
    stdin, _, shown, stdout = pipes
    heard: list[bytes] = []
    console = join(guest, stdin, stdout)
    console.listen(heard.append)
    console.start()
    os.close(shown)
    guest.write(b"one")
    assert comes_true(lambda: console.lost == 3)
    guest.write(b"two")
    console.close()
    assert b"".join(heard) == b"onetwo"
    assert console.lost == 6
    assert capfd.readouterr().err == "pyvmm: 6 bytes of the console's output are lost: Broken pipe\n"


def test_full_disk_is_named(guest: Guest, capfd: Any) -> None:
    console = Console(guest.serial, mode="file:/dev/full")
    console.start()
    guest.write(b"x" * 100)
    console.close()
    assert capfd.readouterr().err == ("pyvmm: 100 bytes of the console's output are lost: No space left on device\n")


def test_a_file_that_tells_at_its_end_what_it_could_not_store(
    guest: Guest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    console = Console(guest.serial, mode=f"file:{tmp_path / 'log'}")
    console.start()
    close = os.close

    def full(fd: int) -> None:
        close(fd)
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "close", full)
    console.close()
    monkeypatch.undo()
    assert capfd.readouterr().err == "pyvmm: some of the console's output may be lost: No space left on device\n"


def test_reader_that_does_not_read_holds_up_no_one_for_long(
    guest: Guest, join: Any, pipes: Any, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stdin, typed, shown, stdout = pipes
    monkeypatch.setattr(console_module, "DRAIN_SECONDS", 0.2)
    console = join(guest, stdin, stdout)
    console.start()
    guest.write_until_it_is_stopped()
    os.write(typed, b"still served")
    assert guest.read(12) == b"still served"
    console.close()
    assert "nobody takes the console's output" in capfd.readouterr().err
    os.close(shown)
    assert comes_true(lambda: console._writer is not None and not console._writer.is_alive())


def test_stdout_that_was_made_non_blocking_loses_nothing(guest: Guest, join: Any, pipes: Any) -> None:
    stdin, _, shown, stdout = pipes
    os.set_blocking(stdout, False)
    console = join(guest, stdin, stdout)
    console.start()
    sent = bytes(range(256)) * 1024
    writer = threading.Thread(target=guest.write, args=(sent,))
    writer.start()
    assert comes_true(lambda: not guest._read(LSR) & THRE), "pipe and ring are full"
    heard = bytearray()
    while len(heard) < len(sent):
        heard += os.read(shown, 1000)
    writer.join(PATIENCE)
    assert heard == sent


def test_close_writes_out_all_that_was_sent(guest: Guest, tmp_path: Path) -> None:
    path = tmp_path / "log"
    console = Console(guest.serial, mode=f"file:{path}")
    console.start()
    sent = b"the last words\r\n" * 4000
    guest.write(sent)
    console.close()
    console.close()
    assert path.read_bytes() == sent


# Modes


def test_file_is_emptied_by_start_and_not_before(guest: Guest, tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"of the last run")
    console = Console(guest.serial, mode=f"file:{path}")
    assert path.read_bytes() == b"of the last run", "a dry run comes as far as this"
    console.start()
    console.close()
    assert path.read_bytes() == b""


@pytest.mark.parametrize("path", ["", "/nonexistent/log", "a\0b"])
def test_file_that_cannot_be_written(guest: Guest, path: str, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"--console.*cannot be written: .*(Is a directory|No such file|embedded null)"
    ):
        Console(guest.serial, mode=f"file:{path or tmp_path}")


def test_fifo_without_a_reader_holds_up_no_guest(guest: Guest, tmp_path: Path, capfd: Any) -> None:
    os.mkfifo(tmp_path / "fifo")
    console = Console(guest.serial, mode=f"file:{tmp_path}/fifo")
    console.start()
    sent = bytes(range(256)) * 1024
    guest.write(sent)
    console.close()
    assert len(sent) - 65536 <= console.lost < len(sent), "what a FIFO holds is there for who comes later"
    assert f"{console.lost} bytes of the console's output are lost: nobody took them" in capfd.readouterr().err


def test_reader_of_a_fifo_may_come_and_go(guest: Guest, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    console = Console(guest.serial, mode=f"file:{tmp_path}/fifo")
    console.start()
    for word in (b"one", b"two"):
        guest.write(word)
        with open(tmp_path / "fifo", "rb", buffering=0) as reader:
            heard = b""
            while len(heard) < 3:
                heard += reader.read(3)
        assert heard == word
    console.close()
    assert console.lost == 0


def test_raw_output_that_nobody_takes_is_lost(guest: Guest, join: Any, pipes: Any) -> None:
    stdin, _, shown, stdout = pipes
    console = join(guest, stdin, stdout, mode="raw")
    console.start()
    guest.write(b"x" * 300_000)
    assert comes_true(lambda: console.lost > 0)
    os.set_blocking(shown, False)

    def heard_again() -> bool:
        with contextlib.suppress(BlockingIOError):
            while b"again" not in os.read(shown, 1 << 20):
                pass
            return True
        guest.write(b"heard again")
        return False

    until(heard_again)
    console.close()
    assert os.get_blocking(stdout), "it is another's, and stays as it was"


def test_raw_has_no_keys_of_its_own(guest: Guest, join: Any, terminal: tuple[int, int], capfd: Any) -> None:
    master, slave = terminal
    quits: list[int] = []
    console = join(guest, slave, slave, mode="raw", on_quit=lambda: quits.append(1))
    console.start()
    os.write(master, b"\x01x\x03\x03")
    assert guest.read(4) == b"\x01x\x03\x03"
    console.close()
    assert not quits
    assert capfd.readouterr().err == ""


def test_raw_leaves_a_terminal_to_the_job_that_has_it(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "isatty", lambda fd: True)
    monkeypatch.setattr(os, "tcgetpgrp", lambda fd: os.getpgrp() + 1)
    console = Console(guest.serial, mode="raw")
    assert console._in is None
    console.close()


def test_limit_loses_what_is_too_much(guest: Guest, tmp_path: Path) -> None:
    taken: list[int] = []

    def limit(size: int) -> int:
        taken.append(size)
        return 0 if sum(taken) <= 1000 else 1

    console = Console(guest.serial, mode=f"file:{tmp_path}/log", limit=limit)
    console.start()
    guest.write(b"y" * 5000)
    console.close()
    size = (tmp_path / "log").stat().st_size
    assert 744 < size <= 1000
    assert console.lost == 5000 - size


def test_none_has_callbacks_all_the_same(guest: Guest) -> None:
    heard: list[bytes] = []
    console = Console(guest.serial, mode="none")
    console.listen(heard.append)
    console.start()
    guest.write(b"quiet")
    console.close()
    assert b"".join(heard) == b"quiet"
    assert console.lost == 0


def test_callback_that_raises_is_reported_once_and_stops_nothing(
    guest: Guest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported: list[object] = []
    heard: list[bytes] = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, trace: reported.append(error))

    def callback(data: bytes) -> None:
        raise ZeroDivisionError

    console = Console(guest.serial, mode=f"file:{tmp_path}/log")
    console.listen(callback)
    console.listen(heard.append)
    console.start()
    guest.write(b"one")
    assert comes_true(lambda: bool(reported))
    guest.write(b"two")
    console.close()
    assert (tmp_path / "log").read_bytes() == b"".join(heard) == b"onetwo"
    assert [type(error) for error in reported] == [ZeroDivisionError]


@pytest.mark.parametrize(
    ("pieces", "seen"),
    [
        ([b"[1.0] Kernel panic - not syncing: VFS"], True),
        ([b"[1.0] Kernel pa", b"nic - not syn", b"cing: VFS"], True),
        ([bytes([byte]) for byte in b"Kernel panic - not syncing"], True),
        ([b"Kernel panic", b"\n", b" - not syncing"], False),
        ([b"all is well"], False),
    ],
)
def test_panic_is_seen_across_pieces(pieces: list[bytes], seen: bool) -> None:
    class Port:
        def __init__(self) -> None:
            self.rest = iter([*pieces, b""])

        def feed(self, data: bytes) -> None: ...

        def wait_output(self) -> bytes:
            return next(self.rest)

        def close(self) -> None: ...

    console = Console(Port(), mode="none")
    console.start()
    console.close()
    assert console.panic_seen is seen


@pytest.mark.parametrize(
    ("said", "seen"),
    [
        (b"[1.0] Kernel panic - not syncing: VFS\n" * 2, True),
        (b"KKernel Kernel panic - Kernel panic - not syncing", True),
        (b"Kernel panic\n - not syncing" + bytes(9), False),
        (b"x" * 200_000, False),  # more than the ring
    ],
)
def test_output_that_nobody_hears_takes_no_thread_and_holds_nobody_up(guest: Guest, said: bytes, seen: bool) -> None:
    before = threading.active_count()
    console = Console(guest.serial, mode="none")
    console.start(native=guest.serial)
    assert threading.active_count() == before
    guest.write(said)
    assert console.panic_seen is seen
    console.close()


def test_who_listens_later_hears_what_comes_then(guest: Guest) -> None:
    heard: list[bytes] = []
    console = Console(guest.serial, mode="none")
    console.start(native=guest.serial)
    guest.write(b"before\n")
    console.listen(lambda data: None)
    console.listen(heard.append)
    guest.write(b"after\n")
    console.close()
    assert b"".join(heard) == b"after\n"


def test_who_listens_before_the_start_hears_all(guest: Guest, tmp_path: Path) -> None:
    heard: list[bytes] = []
    console = Console(guest.serial, mode="none")
    console.listen(heard.append)
    console.start(native=guest.serial)
    guest.write(b"all\n")
    console.close()
    assert b"".join(heard) == b"all\n"


# A process of its own: the ways out that a test cannot take itself

PROGRAM = """
import os, signal, sys, time
from devices._serial import Serial
from vmm.machine.console import Console
from vmm.irq import IrqLine
serial = Serial(IrqLine(4))
console = Console(serial, mode="stdio", on_quit=lambda: os.kill(os.getpid(), signal.SIGUSR1))
def end(number, frame):
    console.close()
    sys.exit(7)
signal.signal(signal.SIGUSR1, end)
signal.signal(signal.SIGCONT, lambda number, frame: console.enter_raw_mode())
console.start()
how = sys.argv[1]
if how == "exception":
    raise ValueError("a bug")
if how == "exit":
    sys.exit(3)
while True:
    time.sleep(0.01)
"""


def child_on(slave: int, how: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, how],
        stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
        preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),  # its controlling terminal
    )  # fmt: skip


@pytest.mark.parametrize(("how", "status"), [("exception", 1), ("exit", 3), ("key", 7)])
def test_terminal_is_restored_on_every_way_out(terminal: Any, how: str, status: int) -> None:
    master, slave = terminal
    before = termios.tcgetattr(slave)
    child = child_on(slave, how)
    if how == "key":
        assert comes_true(lambda: is_raw(slave))
        os.write(master, b"\x01x")
    assert child.wait(PATIENCE) == status
    assert termios.tcgetattr(slave) == before
    assert b"Ctrl-A x" in os.read(master, 65536)


def test_stopped_and_continued_it_is_raw_again(terminal: Any) -> None:
    master, slave = terminal
    before = termios.tcgetattr(slave)
    child = child_on(slave, "key")
    try:
        assert comes_true(lambda: is_raw(slave))
        os.kill(child.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
        termios.tcsetattr(slave, termios.TCSANOW, before)
        os.kill(child.pid, signal.SIGCONT)
        assert comes_true(lambda: is_raw(slave))
        os.write(master, b"\x03\x03")
        assert child.wait(PATIENCE) == 7
        assert termios.tcgetattr(slave) == before
    finally:
        child.kill()
        child.wait()


def test_a_file_that_we_make_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "console"
    old = os.umask(0)
    try:
        Console(Serial(IrqLine(4)), mode=f"file:{path}").close()
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o600
