# SPDX-License-Identifier: Apache-2.0
"""Ports of a sandbox where the host has no descriptor or thread left, and what they leave."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tests.vmm import test_sandbox_host as lying
from tests.vmm.test_sandbox_host import ABOUT, STARTED, Answer
from tests.vmm.test_sandbox_link import in_child
from tests.waiting import until
from vmm.sandbox import SandboxGone, Session
from vmm.sandbox.channel import Link
from vmm.sandbox.ports import Provided, Relay

agent = lying.agent


def test_a_port_outlives_a_host_without_a_descriptor_or_a_thread() -> None:
    class Listener(socket.socket):
        problems: ClassVar[list[Exception]] = [OSError(errno.EMFILE, "x"), RuntimeError("can't start new thread")]

        def accept(self) -> tuple[socket.socket, Any]:
            if self.problems:
                raise self.problems.pop()
            return super().accept()

    listener = Listener(fileno=socket.create_server(("127.0.0.1", 0)).detach())
    with socket.create_server(("127.0.0.1", 0)) as server:
        with Relay(listener, partial(socket.create_connection, server.getsockname()), "port") as relay:
            with socket.create_connection(listener.getsockname(), timeout=10) as client:
                server.settimeout(10)
                inside, _ = server.accept()
                with inside:
                    inside.sendall(b"x")
                    assert client.recv(1) == b"x"
        until(lambda: not relay._streams)
    assert not Listener.problems


def test_a_connection_that_comes_as_the_port_closes_is_ended() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_server(("127.0.0.1", 0)) as listener:
        relay = Relay(listener, partial(socket.create_connection, server.getsockname()), "port")
        relay.close()
        ours, theirs = socket.socketpair()
        with ours:
            ours.settimeout(10)
            relay._room.acquire()
            relay._serve(theirs)  # as a thread that got no processor until now
            assert ours.recv(1) == b""


def test_a_port_that_cannot_be_provided_leaves_no_socket(tmp_path: Path) -> None:
    link = Link(str(tmp_path / "v"))
    link.ready = True
    with pytest.raises(SandboxGone):
        Provided(link, 80, 80, "127.0.0.1")
    assert not list(tmp_path.iterdir())


def test_a_port_whose_thread_was_interrupted_is_free_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        raise KeyboardInterrupt

    session = Session(Link(str(tmp_path / "v")), ABOUT)
    before = set(threading.enumerate())
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(threading.Thread, "start", interrupted)
        session.publish(80)
    until(lambda: set(threading.enumerate()) <= before)


def closed(port: Relay) -> bool:
    port.close()
    return True


def test_a_forked_child_ends_no_port_of_its_parent() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_server(("127.0.0.1", 0)) as listener:
        with Relay(listener, partial(socket.create_connection, server.getsockname()), "port") as relay:
            for _ in range(2):
                with socket.create_connection(listener.getsockname(), timeout=10) as client:
                    server.settimeout(10)
                    inside, _ = server.accept()
                    with inside:
                        assert in_child(partial(closed, relay))
                        inside.sendall(b"x")
                        assert client.recv(1) == b"x"


def test_a_forked_child_ends_nothing_that_its_parent_provides(agent: Callable[[Answer], Session]) -> None:
    ended = threading.Event()

    def listen(stream: socket.socket) -> None:
        stream.sendall(STARTED)
        stream.recv(1)
        ended.set()

    session = agent(listen)
    with session.provide(80, 0) as port:
        assert in_child(partial(closed, port))
        assert not ended.wait(0.2)
        with socket.socket(socket.AF_UNIX) as guest:
            guest.connect(f"{session._link.path}_{1 << 20}")
    assert ended.wait(10)
    assert not os.path.exists(f"{session._link.path}_{1 << 20}")
