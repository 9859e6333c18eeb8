# SPDX-License-Identifier: Apache-2.0
"""Connections to the agent. The protocol is described in agent/agent.h; all that comes from there may be a lie.

Each wait has a time limit, and ends at once with the VM.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import struct
import threading
import time

from vmm.closing import Closing
from vmm.config.option import check_type
from vmm.errors import ConfigError, HostError
from vmm.sandbox.errors import AgentError, CommandTimeout, SandboxGone
from vmm.signals import LONGEST_POLL

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import TypeAlias

    Parameter: TypeAlias = str | int | Sequence[str] | None

PORT = 521
PROTOCOL = 3  # 1 had words in place of JSON, 2 tar archives
REQUEST_MAX = 1 << 20  # bytes
PARAMETERS_MAX = 8192  # values in a request; an array has several
FRAME_MAX = 1 << 18  # bytes the agent takes in one frame
ANSWER_MAX = FRAME_MAX + 64
_CHUNK = 1 << 19
_KEPT = 4  # idle connections of a sandbox
_PATIENCE = 0.5  # seconds from the end of a VM's connections to that of the VM
_LOOKS = 10
_HEAD = struct.Struct("<BI")
# Types of frames, as agent/agent.h has them.
F_STDIN, F_WINDOW, F_DATA = b"iwd"
F_STARTED, F_STDOUT, F_STDERR, F_EXIT, F_ENTRY, F_CHANGE, F_DONE, F_FAILED = b"poexnckf"
_ANSWERS = frozenset((F_DATA, F_STARTED, F_STDOUT, F_STDERR, F_EXIT, F_ENTRY, F_CHANGE, F_DONE, F_FAILED))


class Deadline:
    """When a wait is over.

    :param seconds: the time until then; None, or more than 24 days: no limit
    :raises ConfigError: `seconds` is not a number
    :raises TypeError: likewise
    """

    def __init__(self, seconds: float | None) -> None:
        check_type("Sandbox", "timeout", "float | None", seconds)
        if seconds is not None and seconds != seconds:
            raise ConfigError("timeout", seconds, "must be a number of seconds, or None")
        self.seconds = seconds
        self._end = None if seconds is None or seconds > LONGEST_POLL else time.monotonic() + seconds

    def left(self, doing: str) -> float | None:
        """Seconds that are left, or None: without limit.

        :param doing: what is waited for, for the error
        :raises CommandTimeout: no time is left
        """
        if self._end is None:
            return None
        left = self._end - time.monotonic()
        if left <= 0:
            raise self.over(doing)
        return left

    def over(self, doing: str) -> CommandTimeout:
        """The error for what was not done in time."""
        return CommandTimeout(f"{doing}: not done within {self.seconds:g} s")

    @contextlib.contextmanager
    def holding(self, lock: threading.Lock, doing: str) -> Iterator[None]:
        """A context manager that holds `lock`, which another thread may hold while it waits for the guest.

        :raises CommandTimeout: the other thread does not release the lock in time
        """
        if not lock.acquire(blocking=False):
            left = self.left(doing)
            if not lock.acquire(timeout=-1 if left is None else left):
                raise self.over(doing)
        try:
            yield
        finally:
            lock.release()


class Link:
    """The way to one sandbox's agent: makes connections, and fails them all when the VM ends.

    :param path: path of the VM's unix socket
    :param ask_why: why the sandbox has ended, or empty, where another process has it, which does not call ``fail``
    :ivar why: why the sandbox is gone; empty: it is there
    """

    def __init__(self, path: str, ask_why: Callable[[], str] | None = None) -> None:
        self.path = path
        self._ask_why = ask_why
        self.ready = False  # the agent has answered before
        self._open: set[Channel] = set()
        self._idle: list[Channel] = []
        self.why = ""
        self._failed = threading.Event()
        self._pid = os.getpid()
        # Reentrant, as a channel's `_closing` is: the garbage collector may end an abandoned `files.stream` anywhere.
        self._lock = threading.RLock()

    def must_run(self) -> None:
        """Refuse what only a sandbox that has not ended can do.

        :raises SandboxGone: the sandbox has ended
        """
        if self.why:
            raise SandboxGone(self.why)

    def fail(self, why: str) -> None:
        """The sandbox is gone: fail every call that waits, and every one from here on. The first reason counts."""
        with self._lock:
            self.why = self.why or why
            channels = list(self._open)
        self._failed.set()
        for channel in channels:
            channel.cut()

    def explained(self, error: SandboxGone) -> SandboxGone:
        """`error` with the reason, where the sandbox is gone: a VM's end closes its connections before it is told."""
        for _ in range(_LOOKS):
            if self.look() or self._failed.wait(_PATIENCE / _LOOKS):
                break
        return SandboxGone(self.why) if self.why else error

    def look(self) -> str:
        """Why the sandbox is gone, or empty; another process that has it is asked."""
        if self._ask_why is not None and not self.why and (why := self._ask_why()):
            self.fail(why)
        return self.why

    def take(self, deadline: Deadline, doing: str) -> Channel:
        """A connection that was kept, or a new one. Errors are those of ``connect``."""
        if self._pid != os.getpid():  # in a forked child they are its parent's
            self._pid, self._idle = os.getpid(), []
        while self._idle:
            with self._lock:
                channel = self._idle.pop() if self._idle else None
            if channel is not None and channel.quiet:
                return channel
            if channel is not None:
                channel.close()
        return self.connect(deadline, doing)

    def keep(self, channel: Channel) -> None:
        """Keep a connection whose last request is done for the next one; for the caller it is closed."""
        stream = None if channel.buffered else channel.release()
        channel.close()
        if stream is not None:
            self.adopt(stream, channel.port)

    @contextlib.contextmanager
    def resting(self) -> Iterator[int]:
        """A context manager that leaves one idle connection alone.

        :returns: the connection's port on the host's side; 0 if no connection is idle
        """
        with self._lock:
            index = next((index for index, each in enumerate(self._idle) if each.port and each.quiet), None)
            channel = None if index is None else self._idle.pop(index)
        try:
            yield channel.port if channel else 0
        finally:
            if channel is not None:
                self.keep(channel)

    def adopt(self, stream: socket.socket, port: int) -> None:
        """Keep a connection to the agent for the next request, or close it if there are enough.

        :param stream: its socket, which becomes this link's
        :param port: its port on the host's side
        """
        channel = Channel(self, stream, port)
        with self._lock:
            kept = len(self._idle) < _KEPT and not self.why
            if kept:
                self.ready = True
                self._open.add(channel)
                self._idle.append(channel)
        if not kept:
            channel.close()

    def close(self) -> None:
        """Close the connections that are kept; idempotent."""
        while self._idle:
            with self._lock:
                idle, self._idle = self._idle, []
            for channel in idle:
                channel.close()

    def connect(self, deadline: Deadline, doing: str) -> Channel:
        """A new connection to the agent, as soon as it listens.

        :raises SandboxGone: the sandbox has ended
        :raises CommandTimeout: the agent does not answer in time
        """
        patience = 0.001
        while True:
            channel = Channel(self)
            try:
                with self._lock:
                    self.must_run()
                    self._open.add(channel)
                if channel.connect(deadline, doing):
                    self.ready = True
                    return channel
            except BaseException:
                channel.close()
                raise
            channel.close()
            if self.look():
                raise SandboxGone(self.why)
            left = deadline.left(doing)
            time.sleep(patience if left is None else min(patience, left))
            patience = min(patience * 1.5, 0.02)

    def forget(self, channel: Channel) -> None:
        """The connection is closed."""
        with self._lock:
            self._open.discard(channel)


class Channel(Closing):
    """One connection; a context manager. Made by ``Link.connect`` and ``Link.take``.

    :param stream: its socket, which it owns; None: a new one
    :ivar port: its port on the host's side; 0: it is not connected
    """

    def __init__(self, link: Link, stream: socket.socket | None = None, port: int = 0) -> None:
        self._link = link
        self._pid = os.getpid()
        self.port = port
        self._socket = stream or socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._socket.settimeout(None)  # that of socket.setdefaulttimeout is for the program's own
        self._room = memoryview(b"")  # what has come, from _at to _end; pages of it are touched as that needs them
        self._at = self._end = 0
        self._closing = threading.RLock()  # guards the next two
        self._closed = False
        self._users = 0  # calls that use the socket; the last one closes it, or another's would have its number
        self._sending = threading.Lock()
        self.unsent = memoryview(b"")  # of a frame that was begun

    def connect(self, deadline: Deadline, doing: str) -> bool:
        """Whether the agent has taken the connection."""
        try:
            self._socket.settimeout(deadline.left(doing))
            self._socket.connect(self._link.path)
            self._socket.settimeout(None)  # for good: threads that send and receive at once have different limits
            with contextlib.suppress(ConnectionError):  # it was taken and closed: then there is no answer, either
                self._socket.sendall(b"CONNECT %d\n" % PORT)
            while b"\n" not in bytes(self._room[: min(self._end, 64)]):
                if self._end > 64 or not self._receive(deadline, doing):
                    return False
        except TimeoutError:
            raise CommandTimeout(f"{doing}: the agent did not answer within {deadline.seconds:g} s") from None
        except BlockingIOError:  # more than the backlog holds wait to be taken
            return False
        except (FileNotFoundError, ConnectionError):
            if self._link.ready and not self._link.why:
                raise SandboxGone(self._link.look() or "the sandbox has ended") from None
            return False
        except OSError as error:
            raise HostError(error.errno or 0, "connect to", self._link.path) from None
        first = bytes(self._room[: min(self._end, 64)])
        self._at = first.index(b"\n") + 1
        if not first.startswith(b"OK "):
            return False
        number = first[3 : self._at - 1]
        self.port = int(number) if number.isdigit() else 0
        return True

    def fileno(self) -> int:
        """Of its socket; -1: it is closed."""
        return -1 if self._closed else self._socket.fileno()

    @property
    def quiet(self) -> bool:
        """Whether it is open, and nothing has come that nobody asked for."""
        try:
            self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return not self.buffered
        except OSError:
            pass
        return False

    def release(self) -> socket.socket | None:
        """Its socket, which is the caller's from here on.

        :returns: None: it was closed before, or another thread waits for it
        """
        with self._closing:
            return None if self.fileno() < 0 or self._users else socket.socket(fileno=self._socket.detach())

    def take(self) -> socket.socket:
        """The connection itself, behind the last frame; the caller's to close. For the channel it is closed.

        :raises AgentError: the guest had said something before it was asked
        """
        if self.buffered:
            raise AgentError("the guest sent more than was asked")
        stream = self.release()
        if stream is None:
            raise self._gone()
        stream.settimeout(None)  # as of every channel's
        return stream

    def cut(self) -> None:
        """End it from another thread: who waits there is woken. In a forked child it is the parent's, and goes on."""
        if self._pid != os.getpid():
            return
        with self._closing:
            try:
                self._socket.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # not connected, or closed

    def close(self) -> None:
        """Close it; a command of this connection is killed by the agent. Idempotent."""
        self._link.forget(self)
        with self._closing:
            self._closed = True
            self.cut()  # a forked child has the socket, too, and would keep the connection
            if not self._users:
                self._socket.close()

    @contextlib.contextmanager
    def _using(self) -> Iterator[None]:
        with self._closing:
            if self._closed:
                raise BrokenPipeError
            self._users += 1
        try:
            yield
        finally:
            with self._closing:
                self._users -= 1
                if self._closed and not self._users:
                    self._socket.close()

    def free_room(self) -> None:
        """Free the memory for what comes; nothing is read from here on. For the thread that reads."""
        self._room = memoryview(b"")
        self._at = self._end = 0

    def request(self, deadline: Deadline, doing: str, verb: str, **parameters: Parameter) -> None:
        """Send a request. A parameter that is None is left out.

        :raises ConfigError: text that the guest cannot have, too many values, or too long
        """
        request = {"verb": verb} | {key: value for key, value in parameters.items() if value is not None}
        count = 0
        for key, value in request.items():
            texts = [value] if isinstance(value, (str, int)) else value
            count += len(texts)
            for text in texts:
                if isinstance(text, str) and not possible(text):
                    raise ConfigError(key, text, "must be text without a NUL byte")
        data = json.dumps(request, separators=(",", ":")).encode()
        if len(data) > REQUEST_MAX or count > PARAMETERS_MAX:
            what = f"of {count} values and {len(data)} bytes"
            raise ConfigError(
                "request", what, f"must be at most {PARAMETERS_MAX} values and {REQUEST_MAX} bytes of JSON"
            )
        self.send(deadline, doing, struct.pack("<I", len(data)) + data)

    def send(self, deadline: Deadline, doing: str, data: bytes) -> None:
        """Send all of `data`. What has begun to go when the time is over goes before the next data.

        :raises CommandTimeout: the guest does not take it in time
        :raises SandboxGone: the sandbox has ended
        """
        with deadline.holding(self._sending, doing):
            self._send_rest(deadline, doing)
            self.unsent = memoryview(data)
            try:
                self._send_rest(deadline, doing)
            finally:
                if len(self.unsent) == len(data):
                    self.unsent = memoryview(b"")

    def _send_rest(self, deadline: Deadline, doing: str) -> None:
        while self.unsent:
            left = deadline.left(doing)
            if sent := self.send_some(self.unsent):
                self.unsent = self.unsent[sent:]
            else:
                self._poll(select.POLLOUT, left)

    def push(self, data: bytes) -> bool:
        """Send what goes at once of what has begun to go, and else of `data`; whether `data` has begun to go.

        :raises SandboxGone: the sandbox has ended
        """
        if not self._sending.acquire(blocking=False):
            return False  # another thread sends a frame of its own
        try:
            begun = not self.unsent
            if begun:
                self.unsent = memoryview(data)
            self.unsent = self.unsent[self.send_some(self.unsent) :]
            return begun
        finally:
            self._sending.release()

    def send_some(self, data: bytes | memoryview) -> int:
        """Send what can be sent at once, and return how much that was.

        :raises SandboxGone: the sandbox has ended
        """
        try:
            with self._using():
                return self._socket.send(data, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0
        except OSError:
            raise self._gone() from None

    @property
    def buffered(self) -> bool:
        """Whether something has come that ``read`` has not returned."""
        return self._end > self._at

    @property
    def readable(self) -> bool:
        """Whether a frame has begun to come, or the end; does not wait."""
        return self._speaks or bool(self._poll(select.POLLIN, 0))

    @property
    def _speaks(self) -> bool:
        return self.buffered or self.fileno() < 0  # of a closed one ``read`` says why

    def _poll(self, events: int, left: float | None) -> int:
        poll = select.poll()
        try:
            with self._using():
                poll.register(self._socket, events)
                ready = poll.poll(None if left is None else left * 1000)
        except (ValueError, BrokenPipeError):  # another thread has closed it
            return select.POLLHUP
        return ready[0][1] if ready else 0

    def wait(self, deadline: Deadline, doing: str, *, writable: bool = False) -> tuple[bool, bool]:
        """Wait until a frame has begun to come, or until something can be sent; whether each is so."""
        if self._speaks:
            return True, False
        seen = self._poll(select.POLLIN | (select.POLLOUT if writable else 0), deadline.left(doing))
        return bool(seen & ~select.POLLOUT), bool(seen & select.POLLOUT)

    def read(self, deadline: Deadline, doing: str, *, last: bool = False) -> tuple[int, bytes]:
        """The next frame: its type and its bytes. Parameters and errors are those of ``read_view``."""
        kind, data = self.read_view(deadline, doing, last=last)
        return kind, bytes(data)

    def read_view(self, deadline: Deadline, doing: str, *, last: bool = False) -> tuple[int, memoryview]:
        """The next frame: its type and its bytes, where they are until the next call.

        :param last: leave what is behind it in the socket: no frame may follow, but bytes of another protocol
        :raises AgentError: the frame does not belong to the protocol
        :raises SandboxGone: the connection ended before
        """
        while True:
            there = self._end - self._at
            wanted = _HEAD.size
            if there >= _HEAD.size:
                kind, length = _HEAD.unpack_from(self._room, self._at)
                if kind not in _ANSWERS or length > ANSWER_MAX:
                    raise AgentError(f"{doing}: the guest sent a frame of type {kind:#x} with {length} bytes")
                wanted += length
                if there >= wanted:
                    start = self._at + _HEAD.size
                    self._at = start + length
                    return kind, self._room[start : self._at]
            if not self._receive(deadline, doing, wanted - there if last else 0):
                raise self._gone()

    def _receive(self, deadline: Deadline, doing: str, most: int = 0) -> bool:
        # More, behind what is there; that moves to the front when the room behind it is less than a frame.
        # No more than `most` bytes; 0: no limit.
        if not self._room:
            self._room = memoryview(bytearray(_CHUNK))
        there = self._end - self._at
        if there == 0 or len(self._room) - self._at < _HEAD.size + ANSWER_MAX:
            self._room[:there] = self._room[self._at : self._end]
            self._at, self._end = 0, there
        try:
            with self._using():
                # The poll comes first: while it sleeps more comes, which then takes one call.
                while not self._poll(select.POLLIN, deadline.left(doing)):
                    pass
                count = self._socket.recv_into(self._room[self._end :], most)
        except CommandTimeout:
            raise
        except OSError:
            return False
        self._end += count
        return count > 0

    def _gone(self) -> SandboxGone:
        return SandboxGone(self._link.why or "the agent has closed the connection")


def possible(text: str) -> bool:
    """Whether a program of the guest can be given `text`: it has no NUL byte, and an encoding."""
    try:
        return b"\0" not in text.encode(errors="surrogateescape")
    except UnicodeEncodeError:
        return False


def frame(kind: int, data: bytes | memoryview = b"") -> bytes:
    """One frame, of at most ``FRAME_MAX`` bytes."""
    return _HEAD.pack(kind, len(data)) + data


def frames(kind: int, data: str | bytes | memoryview) -> Iterator[bytes]:
    """`data` in as many frames as it takes; text as UTF-8."""
    view = memoryview(data.encode() if isinstance(data, str) else data).cast("B")
    for at in range(0, len(view), FRAME_MAX):
        yield frame(kind, view[at : at + FRAME_MAX])


def out_of_turn(doing: str) -> AgentError:
    """The error for a frame that does not belong to the answer to `doing`."""
    return AgentError(f"{doing}: the guest sent something out of turn")


def failure(data: bytes) -> tuple[int, str]:
    """Error number and what was tried, of an F_FAILED frame.

    :raises AgentError: the frame is too short
    """
    if len(data) < 4:
        raise AgentError("the guest sent an error without a number")
    number: int = struct.unpack_from("<I", data)[0]
    return min(number, 4095), data[4:].decode(errors="replace")
