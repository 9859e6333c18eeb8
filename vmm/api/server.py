# SPDX-License-Identifier: Apache-2.0
"""HTTP/1.1 on a unix socket: one thread, one request at a time, no more connections than Firecracker allows.

`answer` decides what a request means; this module handles bytes, limits and timeouts. A client that is slow,
disconnects or sends invalid HTTP affects only its own connection. Clients take turns, one request each. Nothing more is
read from a client whose requests wait, or that has not read its last answer.
"""

from __future__ import annotations

import errno
import os
import select
import threading
import time
from _collections import deque  # type: ignore[import-not-found]  # `collections` takes long to import
from _socket import MSG_PEEK

import httptools

from vmm.signals import deaf

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket
    from collections.abc import Callable
    from typing import Protocol

    from vmm.unix_socket import Listener

    class Answer(Protocol):
        def __call__(self, method: str, path: str, body: bytes) -> tuple[int, bytes, tuple[str, ...]]: ...


MAX_CONNECTIONS = 10
MAX_HEAD = 8192  # bytes of a request line and its headers
REQUEST_SECONDS = 10.0  # from a request's first byte to its last, and for an answer to be read
# Read of one client in one turn: what it holds has to be taken apart before anybody else is heard.
_CHUNK = 4096
BACK_OFF = 0.1  # seconds without new clients after the host had no descriptor for one
FULL = (
    b"HTTP/1.1 503 \r\nServer: Firecracker API\r\nConnection: close\r\nContent-Length: 40\r\n\r\n"
    b'{ "error": "Too many open connections" }'
)
# A target as the parser takes it, which is of ASCII only.
_MASK = bytes(range(128)) + b"?" * 128


class _Refused(Exception):
    """An invalid request; its text goes to the client."""


class _Connection:
    """One client; a parser's protocol object, whose callbacks are httptools'."""

    def __init__(self, sock: socket, server: Server) -> None:
        self.sock = sock
        self.server = server
        self.keep_alive = True
        self.out = memoryview(b"")
        self.closing = False
        self.line = b""  # a request's first line, as far as it has come
        self.asked = False
        self.heard = time.monotonic()
        self.interest = select.EPOLLIN
        self.read_by: float | None = None  # the rest of a request that has begun
        self.written_by: float | None = None  # an answer that the client has not taken
        self.requests: deque[tuple[str, str, bytes, bool]] = deque()
        self.parser = httptools.HttpRequestParser(self)
        self.on_message_begin()
        self.read_by = None

    def on_message_begin(self) -> None:
        self.read_by = time.monotonic() + REQUEST_SECONDS
        self.url = b""
        self.body: list[bytes] = []
        self.fields = self.pending = 0
        self.in_head = self.begun = True
        self.length: int | None = None
        self.expects = False

    def on_url(self, url: bytes) -> None:
        self.url += url
        self.measure(len(url))

    def _masked(self, data: bytes) -> bytes:
        # Firecracker takes a target of UTF-8: the parser gets it masked, and `line` has it as it is.
        if self.line.endswith(b"\n") or (not self.line and self.read_by is not None):
            return data  # of what follows the line, or of a request that began behind another
        line, end, rest = (data if self.line else data.lstrip(b"\r\n")).partition(b"\n")
        self.line += line + end
        return line.translate(_MASK) + end + rest

    def _path(self) -> str:
        url = self.url
        if not self.line.isascii():
            at = self.line.translate(_MASK).find(url, self.line.find(b" "))
            url = self.line[at : at + len(url)]
        try:
            return url.decode()
        except UnicodeDecodeError:
            raise _Refused("Invalid URI: Cannot parse URI as UTF-8.") from None

    def measure(self, size: int) -> None:
        self.fields += size
        if max(self.fields, self.pending) > MAX_HEAD:
            raise _Refused(f"A request's head is larger than the limit of {MAX_HEAD} bytes allowed by server.")

    def on_header(self, name: bytes, value: bytes) -> None:
        self.measure(len(name) + len(value))
        match name.lower():
            case b"content-length":
                self.length = int(value)
                if self.length > self.server.max_payload:
                    raise _Refused(
                        f"Request payload with size {self.length} is larger than the limit of "
                        f"{self.server.max_payload} allowed by server."
                    )
            case b"transfer-encoding":
                raise _Refused("Invalid header: Reason: Unsupported value. Key:Transfer-Encoding; only Content-Length")
            case b"expect":
                if value.lower() != b"100-continue":
                    raise _Refused("Invalid header: Reason: Unsupported value. Key:Expect; only 100-continue")
                self.expects = True

    def on_headers_complete(self) -> None:
        self.in_head = False
        if self.parser.get_method() not in (b"GET", b"PUT", b"PATCH"):
            raise _Refused("Invalid HTTP Method: Unsupported HTTP method; only GET, PUT and PATCH.")
        if self.parser.get_http_version() not in ("1.1", "1.0"):
            raise _Refused("Invalid HTTP Version: Unsupported HTTP version; only HTTP/1.1 and HTTP/1.0.")
        if self.expects and self.length:
            self._put(b"HTTP/1.1 100 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self.body.append(body)

    def on_message_complete(self) -> None:
        self.read_by = None
        method, path = self.parser.get_method().decode(), self._path()
        self.line = b""
        if "://" in path and not path.startswith("/"):
            path = "/" + path.partition("://")[2].partition("/")[2]
        self.requests.append((method, path, b"".join(self.body), self.parser.should_keep_alive()))

    def _put(self, data: bytes) -> None:
        self.out = memoryview(bytes(self.out) + data)

    def respond(self, status: int, body: bytes, headers: tuple[str, ...] = ()) -> None:
        lines = [
            f"HTTP/1.1 {status} ", "Server: Firecracker API",
            f"Connection: {'keep-alive' if self.keep_alive else 'close'}", *headers,
        ]  # fmt: skip
        if body:
            if not any(header.startswith("Content-Type:") for header in headers):
                lines.append("Content-Type: application/json")
            lines.append(f"Content-Length: {len(body)}")
        self._put("\r\n".join([*lines, "", ""]).encode() + body)
        self.closing = self.closing or not self.keep_alive

    def feed(self, data: bytes) -> None:
        """Take apart what has come, into ``requests``."""
        self.asked = True
        self.heard = time.monotonic()
        try:
            self.parser.feed_data(self._masked(data))
            if self.in_head and not self.begun:
                self.pending += len(data)  # of a field that does not end, which only the parser has
                self.measure(0)
            self.begun = False
        except httptools.HttpParserUpgrade:
            self.fail("Invalid header: Reason: Unsupported value. Key:Upgrade")
        except httptools.HttpParserCallbackError as error:
            cause = error.__context__
            if not isinstance(cause, _Refused):
                raise
            self.fail(str(cause))
        except (_Refused, httptools.HttpParserError) as error:
            self.fail(str(error))

    def answer_one(self) -> None:
        """Answer the first of what was asked."""
        method, path, body, self.keep_alive = self.requests.popleft()
        self.respond(*self.server.answer(method, path, body))
        if not self.keep_alive:
            self.requests.clear()
        if not self.requests and self.read_by is not None:
            self.read_by = time.monotonic() + REQUEST_SECONDS  # the rest of the next is waited for from here

    @property
    def idle(self) -> bool:
        """It has asked nothing that is not answered, nor begun to."""
        if self.read_by is not None or self.requests or self.out:
            return False
        try:
            return not self.sock.recv(1, MSG_PEEK)
        except OSError:
            return True

    def fail(self, problem: str) -> None:
        """Answer why the request is invalid, and close: the start of the next request cannot be found."""
        from _json import encode_basestring_ascii as quoted  # of `json`, whose import is slow

        self.requests.clear()
        self.keep_alive = False
        text = quoted(f"{problem}\nAll previous unanswered requests will be dropped.")
        self.respond(400, f'{{ "error": {text} }}'.encode())


class Server:
    """Serves `answer` to the clients of `listener`; closed by ``close``.

    :param listener: the socket; owned
    :param answer: called with method, path and body, on the server's thread; must not raise. Gives the status, the
        body and further headers
    :param max_payload: bytes of a request's body
    """

    def __init__(self, listener: Listener, answer: Answer, max_payload: int) -> None:
        self.answer = answer
        self.max_payload = max_payload
        self._listener = listener
        self._connections: dict[int, _Connection] = {}
        self._accepting_from: float | None = None  # None: it accepts
        # For a client that comes when the host has no other descriptor for it; None: it is in use.
        self._spare: int | None = os.dup(listener.fd)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poll = select.epoll()
        self._poll.register(listener.fd, select.EPOLLIN)
        self._poll.register(self._wake, select.EPOLLIN)
        self._closing = False
        self._then: Callable[[], None] | None = None
        self._thread: threading.Thread | None = None

    def start(self, on_thread: Callable[[], None] = lambda: None) -> None:
        """Serve on a thread of its own, named ``fc_api``, which calls `on_thread` first."""

        def run() -> None:
            deaf()
            on_thread()
            self.run()

        thread = threading.Thread(target=run, name="fc_api", daemon=True)
        thread.start()
        self._thread = thread

    def run(self) -> None:
        """Serve until ``close``."""
        while not self._closing:
            waiting = [each for each in self._connections.values() if each.requests and not each.out]
            for fd, events in self._poll.poll(0 if waiting else self._patience()):
                if fd == self._listener.fd:
                    self._accept()
                elif (connection := self._connections.get(fd)) is not None and connection not in waiting:
                    self._serve(connection, events)
            for connection in waiting:
                if not self._closing:
                    self._serve(connection, 0)
            self._expire()

    def then(self, callback: Callable[[], None]) -> None:
        """Call `callback` once the answer that is being made has gone out, or cannot; on the server's thread."""
        self._then = callback

    def _patience(self) -> float | None:
        ends = [end for each in self._connections.values() for end in (each.read_by, each.written_by) if end]
        if self._accepting_from is not None:
            ends.append(self._accepting_from)
        return max(0.0, min(ends) - time.monotonic()) if ends else None

    def _accept(self) -> None:
        sock = self._accepted()
        if sock is None:
            return
        sock.setblocking(False)
        try:
            if len(self._connections) < MAX_CONNECTIONS or self._make_room():
                self._poll.register(sock, select.EPOLLIN)
                self._connections[sock.fileno()] = _Connection(sock, self)
                return
            sock.send(FULL)
        except OSError:
            pass  # it is gone, or the host can watch no more
        sock.close()
        self._keep_spare()

    def _accepted(self) -> socket | None:
        # None: it went away again, or the host has no descriptor for it: then it waits until one is free.
        for _ in range(3):
            try:
                return self._listener.accept()
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    return None
            if self._spare is not None:
                os.close(self._spare)
                self._spare = None
            elif not self._make_room():
                break
        self._accepting_from = time.monotonic() + BACK_OFF
        self._poll.modify(self._listener.fd, 0)
        return None

    def _make_room(self) -> bool:
        # The client that has said nothing for the longest time, and is owed nothing, goes; one that never said anything
        # before one that keeps its connection for the next request.
        idle = [each for each in self._connections.values() if each.idle]
        if idle:
            self._drop(min(idle, key=lambda each: (each.asked, each.heard)))
        return bool(idle)

    def _keep_spare(self) -> None:
        if self._spare is None:
            try:
                self._spare = os.dup(self._listener.fd)
            except OSError:
                pass  # later

    def _serve(self, connection: _Connection, events: int) -> None:
        # One step: what is left of an answer, or else the next request, or else what has come.
        try:
            if not connection.out and not connection.requests and not connection.closing and events:
                data = connection.sock.recv(_CHUNK)
                if not data:
                    self._drop(connection)
                    return
                connection.feed(data)
            if not connection.out and connection.requests:
                connection.answer_one()
            if connection.out:
                connection.out = connection.out[connection.sock.send(connection.out) :]
        except BlockingIOError:
            pass
        except OSError:
            self._drop(connection)
            return
        if connection.out:
            # Nothing more is read, so nothing more is done, for a client that does not read its answers.
            connection.written_by = connection.written_by or time.monotonic() + REQUEST_SECONDS
            self._watch(connection, select.EPOLLOUT)
        elif connection.closing:
            self._drop(connection)
        else:
            connection.written_by = None
            self._watch(connection, 0 if connection.requests else select.EPOLLIN)

    def _watch(self, connection: _Connection, interest: int) -> None:
        if connection.interest != interest:
            connection.interest = interest
            self._poll.modify(connection.sock, interest)

    def _expire(self) -> None:
        if self._then is not None and not any(each.out for each in self._connections.values()):
            then, self._then = self._then, None
            then()
        now = time.monotonic()
        for connection in list(self._connections.values()):
            waits = connection.written_by if connection.out or connection.requests else connection.read_by
            if waits is not None and waits < now:
                self._drop(connection)
        if self._accepting_from is not None and self._accepting_from <= now:
            self._accept_again()

    def _accept_again(self) -> None:
        self._accepting_from = None
        self._poll.modify(self._listener.fd, select.EPOLLIN)

    def _drop(self, connection: _Connection) -> None:
        del self._connections[connection.sock.fileno()]
        connection.sock.close()
        self._keep_spare()
        if self._accepting_from is not None:
            self._accept_again()

    def close(self) -> None:
        """Stop serving and remove the socket's file, if it is still ours; idempotent."""
        if self._closing:
            return
        self._closing = True
        os.eventfd_write(self._wake, 1)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        for connection in list(self._connections.values()):
            self._drop(connection)
        self._listener.close()
        if self._spare is not None:
            os.close(self._spare)
        self._poll.close()
        os.close(self._wake)
