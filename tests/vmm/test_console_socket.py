# SPDX-License-Identifier: Apache-2.0
"""A console on a unix socket: clients that come, go, never read or type too much, and a guest that waits for none."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import socket
import stat
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.vmm.serial_guest import Guest
from tests.waiting import PATIENCE, until
from vmm.commands import running
from vmm.errors import ConfigError
from vmm.machine import console_socket
from vmm.machine.console import Console
from vmm.machine.console_socket import KEPT

Connect = Callable[[], socket.socket]
FOREIGN = {
    "socat": ["socat", "-", "UNIX-CONNECT:{path}"],
    "nc": ["nc", "-U", "{path}"],
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "console"


@pytest.fixture
def console(guest: Guest, path: Path, capfd: pytest.CaptureFixture[str]) -> Iterator[Console]:
    console = Console(guest.serial, mode=f"unix:{path}")
    console.start()
    yield console
    console.close()
    assert capfd.readouterr().err == ""
    assert not path.exists()


@pytest.fixture
def connect(path: Path) -> Iterator[Connect]:
    with contextlib.ExitStack() as stack:

        def one() -> socket.socket:
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.connect(str(path))
            client.settimeout(PATIENCE)
            return client

        yield one


def hear(client: socket.socket, count: int) -> bytes:
    """So many bytes of output."""
    heard = b""
    while len(heard) < count:
        piece = client.recv(count - len(heard))
        assert piece, heard[-100:]
        heard += piece
    return heard


def is_closed(client: socket.socket) -> bool:
    """Whether the other side hangs up, whatever it has said before."""
    try:
        while client.recv(1 << 16):
            pass
    except ConnectionResetError:
        pass  # it had not read all
    return True


def test_both_ways_and_for_its_owner_alone(guest: Guest, console: Console, path: Path, connect: Connect) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    client = connect()
    guest.write(b"login: ")
    assert hear(client, 7) == b"login: "
    client.sendall(b"root\x03\x1d\n")
    assert guest.read(7) == b"root\x03\x1d\n"


def test_the_last_output_waits_for_a_client(guest: Guest, console: Console, connect: Connect) -> None:
    said = os.urandom(KEPT + 1000)
    guest.write(said)
    until(lambda: console.lost == 1000)
    client = connect()
    assert hear(client, KEPT) == said[1000:]
    guest.write(b"more")
    assert hear(client, 4) == b"more"
    client.close()
    guest.write(b"and")
    other = connect()
    assert hear(other, 3) == b"and", "not what another one was sent"


def test_a_client_that_never_reads_holds_up_nobody(guest: Guest, console: Console, connect: Connect) -> None:
    client = connect()
    client.sendall(b"typed")
    assert guest.read(5) == b"typed"
    said = os.urandom(400_000)
    guest.write(said)
    client.sendall(b"still typing")
    assert guest.read(12) == b"still typing"
    # What its socket holds, and then the last of it.
    heard = b""
    while not heard.endswith(said[-100:]):
        heard += client.recv(1 << 16)
    assert console.lost == len(said) - len(heard) > 0
    assert heard.endswith(said[-KEPT:])


def test_a_client_that_reads_loses_nothing(
    guest: Guest, console: Console, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A busy host may leave this client without the CPU for longer than the console waits for it otherwise.
    monkeypatch.setattr(console_socket, "_PATIENCE_MS", 1000 * PATIENCE)
    client = connect()
    client.sendall(b"typed")
    assert guest.read(5) == b"typed"
    said = os.urandom(400_000)
    writer = threading.Thread(target=guest.write, args=[said])
    writer.start()
    assert hear(client, len(said)) == said
    writer.join()
    assert console.lost == 0


def test_a_new_client_takes_the_place_of_the_one_before(guest: Guest, console: Console, connect: Connect) -> None:
    clients = [connect() for _ in range(20)]
    assert all(map(is_closed, clients[:-1]))
    clients[-1].sendall(b"x")
    guest.write(b"y")
    assert guest.read(1) == b"x" and hear(clients[-1], 1) == b"y"


def test_a_thousand_clients_leave_nothing(guest: Guest, console: Console, path: Path, connect: Connect) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for number in range(1000):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            if number % 2:
                client.send(b"x")
            if number % 3:
                client.shutdown(socket.SHUT_WR)
    last = connect()
    guest.write(b"here")
    assert hear(last, 4) == b"here"
    until(lambda: len(os.listdir("/proc/self/fd")) == before + 2)  # both ends of the last one
    assert len(guest.read(1)) == 1


def test_what_is_typed_before_hanging_up_arrives(guest: Guest, console: Console, connect: Connect) -> None:
    typed = os.urandom(20_000)
    with connect() as client:
        client.sendall(typed)
    assert guest.read(len(typed)) == typed


def test_a_client_that_types_no_more_still_hears(guest: Guest, console: Console, connect: Connect) -> None:
    client = connect()
    client.sendall(b"ls")
    client.shutdown(socket.SHUT_WR)
    assert guest.read(2) == b"ls"
    guest.write(b"files")
    assert hear(client, 5) == b"files"


def test_a_guest_that_reads_nothing_holds_up_who_types(guest: Guest, console: Console, connect: Connect) -> None:
    client = connect()
    client.setblocking(False)
    typed = bytearray()
    piece = bytes(range(256)) * 16
    with contextlib.suppress(BlockingIOError):
        while len(typed) < 8 << 20:
            typed += piece[: client.send(piece)]
    assert len(typed) < 8 << 20
    guest.write(b"output")
    client.settimeout(PATIENCE)
    assert hear(client, 6) == b"output"
    until(lambda: guest.read(1))
    other = connect()
    guest.write(b"again")
    assert hear(other, 5) == b"again"


def test_last_words_are_heard_and_the_name_is_gone_first(guest: Guest, path: Path, connect: Connect) -> None:
    console = Console(guest.serial, mode=f"unix:{path}")
    console.start()
    client = connect()
    said = os.urandom(60_000)
    guest.write(said)
    console.close()
    assert not path.exists()
    assert hear(client, len(said)) == said and client.recv(1) == b""


def test_an_end_is_not_held_up_by_who_does_not_read(guest: Guest, path: Path, connect: Connect) -> None:
    before = len(os.listdir("/proc/self/fd"))
    console = Console(guest.serial, mode=f"unix:{path}")
    console.start()
    client = connect()
    guest.write(b"x" * 500_000)
    console.close()
    client.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_without_a_descriptor_left_a_client_waits(guest: Guest, console: Console, connect: Connect) -> None:
    _, hard = limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    first, second = connect(), socket.socket(socket.AF_UNIX)
    first.sendall(b"x")
    assert guest.read(1) == b"x"  # it is served: the next one is not accepted in its stead
    with second:
        resource.setrlimit(resource.RLIMIT_NOFILE, (second.fileno(), hard))
        try:
            second.settimeout(PATIENCE)
            second.connect(str(console._socket._listener.path))  # type: ignore[union-attr]
            guest.write(b"to the first")
            assert hear(first, 12) == b"to the first"
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert is_closed(first)
        guest.write(b"to the second")
        assert hear(second, 13) == b"to the second"


def test_a_file_that_is_there(guest: Guest, path: Path, console: Console) -> None:
    with pytest.raises(ConfigError, match=r"--console .*: is in use by another program"):
        Console(guest.serial, mode=f"unix:{path}")
    path.with_name("file").touch()
    with pytest.raises(ConfigError, match=r"--console .*: exists and is not a socket"):
        Console(guest.serial, mode=f"unix:{path}".replace("console", "file"))
    with pytest.raises(ConfigError, match=r"--console .*: cannot be made: AF_UNIX path too long"):
        Console(guest.serial, mode=f"unix:{path}" + "x" * 100)
    with pytest.raises(ConfigError, match=r"--console .*: cannot be made: No such file or directory"):
        Console(guest.serial, mode=f"unix:{path}-no/such")
    dead = path.with_name("dead")
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(dead))
    Console(guest.serial, mode=f"unix:{dead}").close()
    assert not dead.exists() and path.exists()


def test_it_is_found_by_its_mark(console: Console, path: Path) -> None:
    assert running.consoles(os.getpid()) == [f"/proc/{os.getpid()}/root{path}"]


@pytest.mark.parametrize("client", FOREIGN)
def test_foreign_clients(guest: Guest, console: Console, path: Path, client: str) -> None:
    if not shutil.which(client):
        pytest.skip(f"no {client} here")
    command = [word.format(path=path) for word in FOREIGN[client]]
    guest.write(b"before\n")
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == b"before\n"
        process.stdin.write(b"typed\n")
        assert guest.read(6) == b"typed\n"
        guest.write(b"answer\n")
        assert process.stdout.readline() == b"answer\n"
        process.kill()
