# SPDX-License-Identifier: Apache-2.0
"""The handle of a command that several threads use at once, and time limits of what they do."""

from __future__ import annotations

import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest

from tests.vmm import test_sandbox_host as lying
from tests.vmm.test_sandbox_host import STARTED, Answer, frame
from tests.waiting import until
from vmm.sandbox import CommandTimeout, Result, SandboxGone, Session
from vmm.sandbox.channel import Deadline

agent = lying.agent


def read_frames(stream: socket.socket) -> Iterator[tuple[bytes, bytes]]:
    """Each frame from the host, until it disconnects."""
    with stream.makefile("rb") as file:
        while head := file.read(5):
            yield head[:1], file.read(struct.unpack("<I", head[1:])[0])


def echo(stream: socket.socket) -> None:
    """A command that writes what it reads, until the end of its input."""
    stream.sendall(STARTED)
    for kind, data in read_frames(stream):
        if kind == b"i" and not data:
            break
        stream.sendall(frame(b"o", data))
    stream.sendall(frame(b"x", bytes(3)))


def silent(stream: socket.socket) -> None:
    """A command that says nothing until its connection ends."""
    stream.sendall(STARTED)
    while stream.recv(1 << 16):
        pass


def in_background(work: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    """A thread that does `work`, and what came of it."""
    came: list[object] = []

    def body() -> None:
        try:
            came.append(work())
        except BaseException as error:
            came.append(error)

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    return thread, came


def test_a_thread_reads_without_a_limit_while_another_writes_with_one(agent: Callable[[Answer], Session]) -> None:
    def slow(stream: socket.socket) -> None:
        stream.sendall(STARTED)
        for _, data in read_frames(stream):
            time.sleep(0.2)
            stream.sendall(frame(b"o", data))

    class Between(socket.socket):
        def settimeout(self, value: float | None) -> None:
            super().settimeout(value)
            self.fileno()

        def fileno(self) -> int:
            if writes:
                writes.pop()()
            return super().fileno()

    with agent(slow).exec("x", timeout=None) as process:
        # As another thread, when this one is about to receive.
        writes = [lambda: process.stdin.write(b"late", timeout=0.05)]
        process.channel._socket = Between(fileno=process.channel._socket.detach())
        assert process.stdout.read(4) == b"late"


def test_a_wait_has_its_limit_while_another_thread_reads(agent: Callable[[Answer], Session]) -> None:
    with agent(silent).exec("x", timeout=None) as process:
        thread, came = in_background(process.stdout.read)
        until(process._pumping.locked)
        assert process.poll() is None
        with pytest.raises(CommandTimeout):
            process.wait(0.05)
        process.close()  # which ends the other thread's wait
        thread.join(10)
        assert isinstance(came[0], SandboxGone)


def test_a_write_that_was_not_done_in_time_does_no_harm_to_what_follows(agent: Callable[[Answer], Session]) -> None:
    go = threading.Event()
    seen: list[tuple[bytes, int]] = []

    def answer(stream: socket.socket) -> None:
        stream.sendall(STARTED)
        go.wait(30)
        seen.extend((kind, len(data)) for kind, data in read_frames(stream))

    with agent(answer).exec("x", timeout=None) as process:
        for _ in range(2):  # of the second one nothing goes
            with pytest.raises(CommandTimeout):
                process.stdin.write(bytes(8 << 20), timeout=0.05)
        go.set()
        process.resize(1, 2)
        process.stdin.close()
    until(lambda: (b"i", 0) in seen)
    assert seen[-2:] == [(b"w", 4), (b"i", 0)]
    assert {length for kind, length in seen[:-2]} == {1 << 18}


def test_a_size_is_not_put_into_the_input_that_another_thread_sends(agent: Callable[[Answer], Session]) -> None:
    go = threading.Event()
    seen: list[tuple[bytes, int]] = []

    def answer(stream: socket.socket) -> None:
        stream.sendall(STARTED)
        go.wait(30)
        for kind, data in read_frames(stream):
            seen.append((kind, len(data)))
            if (kind, data) == (b"i", b""):
                stream.sendall(frame(b"x", bytes(3)))

    with agent(answer).exec("x", timeout=None) as process:
        with pytest.raises(CommandTimeout):
            process.stdin.write(bytes(1 << 18), timeout=0.05)
        _, done = in_background(lambda: process.communicate(bytes(3 << 20), 30))
        until(lambda: not select.select([], [process.channel], [], 0)[1])
        _, resized = in_background(lambda: process.resize(1, 2))
        time.sleep(0.1)
        go.set()
        until(lambda: done and resized)
        assert resized == [None]
        assert isinstance(done[0], Result) and done[0].exit_code == 0
    assert [each for each in seen if each[0] == b"i"] == [(b"i", 1 << 18)] * 13 + [(b"i", 0)]
    assert (b"w", 4) in seen
    assert len(seen) == 15


def test_an_end_of_input_that_was_not_taken_is_sent_again(
    agent: Callable[[Answer], Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(deadline: Deadline, doing: str, data: bytes) -> None:
        raise deadline.over(doing)

    process = agent(echo).exec("x", timeout=None)
    with monkeypatch.context() as patch, pytest.raises(CommandTimeout):
        patch.setattr(process.channel, "send", late)
        process.stdin.close()
    process.stdin.close()
    assert process.wait(10).exit_code == 0


def test_input_behind_its_end_is_refused(agent: Callable[[Answer], Session]) -> None:
    with agent(echo).exec("x", timeout=None) as process:
        process.stdin.close()
        with pytest.raises(ValueError, match="standard input is closed"):
            process.communicate(b"more")
        assert process.communicate(b"").exit_code == 0


def test_a_limit_of_weeks_is_none(agent: Callable[[bytes], Session]) -> None:
    said = STARTED + frame(b"x", bytes(3))
    for seconds in (3e6, 1e9, 4294967.5):
        assert agent(said).run("x", timeout=seconds).exit_code == 0


def test_a_read_of_nothing_waits_for_nothing(agent: Callable[[Answer], Session]) -> None:
    with agent(silent).exec("x", timeout=None) as process:
        assert process.stdout.read(0, timeout=1) == b""


def test_a_look_at_a_part_of_a_frame_is_no_error(agent: Callable[[Answer], Session]) -> None:
    go = threading.Event()

    def answer(stream: socket.socket) -> None:
        stream.sendall(STARTED + frame(b"o", b"word")[:7])
        go.wait(30)
        stream.sendall(frame(b"o", b"word")[7:] + frame(b"x", bytes(3)))

    with agent(answer).exec("x", timeout=None) as process:
        until(lambda: process.channel.readable)
        assert process.poll() is None
        go.set()
        assert process.wait(10).stdout == "word"


def test_who_waits_for_a_command_that_is_closed_waits_for_no_other(
    agent: Callable[[Answer], Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    process = agent(silent).exec("x", timeout=None)
    others: list[socket.socket] = []
    real = select.poll

    class Late:
        # A thread that gets no processor between its look at the descriptor and its wait.
        def __init__(self) -> None:
            self._poll = real()
            self.register = self._poll.register

        def poll(self, timeout: float | None) -> list[tuple[int, int]]:
            if not others:
                number = process.channel.fileno()
                process.close()
                while len(others) < 2 or max(each.fileno() for each in others) < number:
                    others.extend(socket.socketpair())
            return self._poll.poll(timeout)

    with monkeypatch.context() as patch:
        patch.setattr("vmm.sandbox.channel.select", SimpleNamespace(**{**vars(select), "poll": Late}))
        thread, came = in_background(process.stdout.read)
        thread.join(10)
    assert isinstance(came[0], SandboxGone)
    for each in others:
        each.close()
    assert process.channel._socket.fileno() < 0
