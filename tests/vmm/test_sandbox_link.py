# SPDX-License-Identifier: Apache-2.0
"""Connections to an agent: where the host, its garbage collector or a fork comes between."""

from __future__ import annotations

import gc
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.forked import fork
from tests.vmm import test_sandbox_host as lying
from tests.vmm.test_sandbox_host import ABOUT, Answer, frame
from tests.vmm.test_sandbox_threads import echo, in_background
from vmm.sandbox import CommandTimeout, Process, SandboxGone, Session
from vmm.sandbox.channel import Channel, Deadline, Link

agent = lying.agent


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    """A socket that listens, and takes nobody by itself."""
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(tmp_path / "agent"))
        made.listen(0)
        yield made


def test_a_stream_that_the_collector_ends_holds_up_nobody(agent: Callable[[bytes], Session]) -> None:
    session = agent(frame(b"d", b"piece") + frame(b"d", b"more"))

    class Open(set[Any]):
        def __iter__(self) -> Iterator[Any]:
            gc.collect()
            return super().__iter__()

    def fail() -> None:
        pieces: list[Any] = [session.files.stream("/x")]
        assert next(pieces[0]) == b"piece"
        pieces.append(pieces)  # so that only a collection ends it
        del pieces
        session._link._open = Open(session._link._open)
        session._link.fail("over")

    thread, came = in_background(fail)
    thread.join(10)
    assert came == [None]


def test_who_comes_when_the_backlog_is_full_waits(listener: socket.socket, tmp_path: Path) -> None:
    path = str(tmp_path / "agent")
    session = Session(Link(path), ABOUT)
    waiting = [socket.socket(socket.AF_UNIX) for _ in range(3)]
    for each in waiting:
        each.setblocking(False)
        each.connect_ex(path)
    with pytest.raises(CommandTimeout):
        session.run("x", timeout=0.1)
    for each in waiting:
        each.close()
    thread, came = in_background(lambda: session.run("x", timeout=10).exit_code)
    while True:
        stream, _ = listener.accept()
        with stream:
            if stream.recv(64):
                stream.sendall(b"OK 1\n" + frame(b"x", bytes(3)))
                thread.join(10)
                break
    assert came == [0]
    assert not [each for each in session._link._open if each not in session._link._idle]


def test_who_is_taken_and_closed_again_comes_again(
    listener: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As by a VM that has no room for one more connection.
    session = Session(Link(str(tmp_path / "agent")), ABOUT)
    session._link.ready = True

    class Late(socket.socket):
        def connect(self, address: Any) -> None:
            super().connect(address)
            stream, _ = listener.accept()
            stream.close()

    with monkeypatch.context() as patch, pytest.raises(CommandTimeout):
        patch.setattr("vmm.sandbox.channel.socket.socket", Late)
        session.run("x", timeout=0.1)
    assert not session._link._open


def test_a_call_that_finds_the_sandbox_gone_leaves_no_descriptor(tmp_path: Path) -> None:
    session = Session(Link(str(tmp_path / "nobody")), ABOUT)
    session._link.ready = True
    with pytest.raises(SandboxGone):
        session.run("x", timeout=5)
    assert not session._link._open


def in_child(work: Callable[[], object]) -> bool:
    """Whether `work` gives something true in a forked child."""
    child = fork()
    if not child:
        status = 1
        try:
            status = 0 if work() else 2
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_forked_child_uses_no_connection_of_its_parent(
    agent: Callable[[Answer], Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(stream: socket.socket) -> None:
        stream.sendall(frame(b"x", bytes(3)))
        stream.recv(1 << 16)

    session = agent(answer)
    session.run("x", timeout=10)
    assert len(session._link._idle) == 1
    own = Channel(session._link)
    with monkeypatch.context() as patch:
        patch.setattr(session._link, "connect", lambda *_: own)
        assert in_child(lambda: session._link.take(Deadline(1), "x") is own)
        assert session._link.take(Deadline(1), "x") is not own
    own.close()


def test_a_forked_child_ends_no_command_of_its_parent(agent: Callable[[Answer], Session]) -> None:
    def close_all(session: Session, process: Process) -> bool:
        process.close()
        session._link.fail("over")
        return True

    session = agent(echo)
    with session.exec("x", timeout=10) as process:
        assert in_child(lambda: close_all(session, process))
        process.stdin.write("word")
        assert process.stdout.read(4, timeout=10) == b"word"


def test_a_connection_ends_also_while_a_forked_child_has_it(agent: Callable[[Answer], Session]) -> None:
    ended = threading.Event()

    def flood(stream: socket.socket) -> None:
        try:
            while True:
                stream.sendall(frame(b"d", bytes(1 << 16)))
        except OSError:
            ended.set()

    pieces = agent(flood).files.stream("/x", timeout=10)
    next(pieces)
    if not (child := fork()):
        signal.pause()
    try:
        pieces.close()  # type: ignore[attr-defined]  # a generator's
        assert ended.wait(10)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_time_limit_of_the_programs_own_sockets_is_not_ours(agent: Callable[[Answer], Session]) -> None:
    def answer(stream: socket.socket) -> None:
        stream.settimeout(None)
        stream.sendall(frame(b"x", bytes(3)))
        while stream.recv(1 << 16):
            pass

    def speak_late(stream: socket.socket) -> None:
        stream.settimeout(None)
        stream.sendall(frame(b"k"))
        stream.recv(1)
        time.sleep(0.3)
        stream.sendall(b"late")

    session = agent(answer)
    server = agent(speak_late)
    socket.setdefaulttimeout(0.1)
    try:
        session.run("x", timeout=10)
        began = time.monotonic()
        assert session._link._idle[0].quiet
        assert time.monotonic() - began < 0.05
        with server.connect(80) as stream:
            assert stream.gettimeout() is None
        with server.publish(80) as port, socket.create_connection(port.address, timeout=10) as client:
            client.sendall(b"x")
            assert client.recv(4) == b"late"
    finally:
        socket.setdefaulttimeout(None)
