# SPDX-License-Identifier: Apache-2.0
"""HTTP/1.1 on a unix socket: one thread, one request at a time, no more connections than Firecracker allows.

What a request means is `answer`'s business; here are bytes, limits and patience. A client that is slow, vanishes or
sends no HTTP costs its own connection, and nobody else's.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time

import httptools

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    class Answer(Protocol):
        def __call__(self, method: str, path: str, body: bytes) -> tuple[int, bytes, tuple[str, ...]]: ...


MAX_CONNECTIONS = 10
MAX_PAYLOAD = 51200
MAX_HEAD = 8192  # bytes of a request line and its headers
REQUEST_SECONDS = 10.0  # from a request's first byte to its last, and for an answer to be read
_CHUNK = 65536
FULL = (
    b"HTTP/1.1 503 \r\nServer: Firecracker API\r\nConnection: close\r\nContent-Length: 40\r\n\r\n"
    b'{ "error": "Too many open connections" }'
)


class _Refused(Exception):
    """A request that is no request; its text goes to the client."""


class _Connection:
    """One client; a parser's protocol object, whose callbacks are httptools'."""

    def __init__(self, sock: socket.socket, server: Server) -> None:
        self.sock = sock
        self.server = server
        self.keep_alive = True
        self.out = b""
        self.closing = False
        self.read_by: float | None = None  # the rest of a request that has begun
        self.written_by: float | None = None  # an answer that the client has not taken
        self.requests: list[tuple[str, str, bytes, bool]] = []
        self.parser = httptools.HttpRequestParser(self)
        self.on_message_begin()
        self.read_by = None

    def on_message_begin(self) -> None:
        self.read_by = time.monotonic() + self.server.patience
        self.url = b""
        self.body = b""
        self.fields = self.pending = 0
        self.in_head = self.begun = True
        self.length: int | None = None
        self.expects = False

    def on_url(self, url: bytes) -> None:
        self.url += url
        self.measure(len(url))

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
            self.out += b"HTTP/1.1 100 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\r\n"

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.read_by = None
        method, path = self.parser.get_method().decode(), self.url.decode("latin-1")
        if "://" in path:
            path = "/" + path.partition("://")[2].partition("/")[2]
        self.requests.append((method, path, self.body, self.parser.should_keep_alive()))

    def respond(self, status: int, body: bytes, headers: tuple[str, ...] = ()) -> None:
        lines = [
            f"HTTP/1.1 {status} ", "Server: Firecracker API",
            f"Connection: {'keep-alive' if self.keep_alive else 'close'}", *headers,
        ]  # fmt: skip
        if body:
            if not any(header.startswith("Content-Type:") for header in headers):
                lines.append("Content-Type: application/json")
            lines.append(f"Content-Length: {len(body)}")
        self.out += "\r\n".join([*lines, "", ""]).encode() + body
        self.closing = self.closing or not self.keep_alive

    def feed(self, data: bytes) -> None:
        """Parse and answer what has come."""
        try:
            self.parser.feed_data(data)
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
        for method, path, body, keep_alive in self.requests:
            self.keep_alive = keep_alive
            self.respond(*self.server.answer(method, path, body))
        self.requests.clear()

    def fail(self, problem: str) -> None:
        """Say why this is no request, and no more to this client: what else it sent cannot be told apart."""
        from json import dumps

        self.requests.clear()
        self.keep_alive = False
        text = dumps(f"{problem}\nAll previous unanswered requests will be dropped.")
        self.respond(400, f'{{ "error": {text} }}'.encode())


class Server:
    """Serves `answer` to the clients of `listener`; owned, closed by ``close``.

    :param listener: from ``vmm.api.listen.bind``; owned
    :param answer: called with method, path and body, on the server's thread; must not raise. Gives the status, the
        body and further headers
    :param max_payload: bytes of a request's body
    :param patience: seconds for a client to finish a request that it began, and to take an answer
    """

    def __init__(
        self,
        listener: socket.socket,
        answer: Answer,
        *,
        max_payload: int = MAX_PAYLOAD,
        patience: float = REQUEST_SECONDS,
    ) -> None:
        self.answer = answer
        self.patience = patience
        self.max_payload = max_payload
        self.refused = 0
        self._path = listener.getsockname()
        self._file = os.stat(self._path).st_ino
        self._listener = listener
        self._connections: dict[int, _Connection] = {}
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poll = select.epoll()
        self._poll.register(listener, select.EPOLLIN)
        self._poll.register(self._wake, select.EPOLLIN)
        self._closing = False
        self._thread: threading.Thread | None = None

    def start(self, on_thread: Callable[[], None] = lambda: None) -> None:
        """Serve on a thread of its own, named ``fc_api``, which calls `on_thread` first."""

        def run() -> None:
            on_thread()
            self.run()

        self._thread = threading.Thread(target=run, name="fc_api", daemon=True)
        self._thread.start()

    def run(self) -> None:
        """Serve until ``close``."""
        while not self._closing:
            for fd, events in self._poll.poll(self._patience()):
                if fd == self._listener.fileno():
                    self._accept()
                elif fd in self._connections:
                    self._serve(self._connections[fd], events)
            self._expire()

    def _patience(self) -> float | None:
        ends = [end for each in self._connections.values() for end in (each.read_by, each.written_by) if end]
        return max(0.0, min(ends) - time.monotonic()) if ends else None

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return  # it went away again, or there is no descriptor left for it just now
        sock.setblocking(False)
        if len(self._connections) >= MAX_CONNECTIONS:
            self.refused += 1
            try:
                sock.send(FULL)
            except OSError:
                pass
            sock.close()
            return
        self._connections[sock.fileno()] = _Connection(sock, self)
        self._poll.register(sock, select.EPOLLIN)

    def _serve(self, connection: _Connection, events: int) -> None:
        try:
            if events & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR) and not connection.closing:
                data = connection.sock.recv(_CHUNK)
                if not data:
                    self._drop(connection)
                    return
                connection.feed(data)
            if connection.out:
                connection.out = connection.out[connection.sock.send(connection.out) :]
        except BlockingIOError:
            pass
        except OSError:
            self._drop(connection)
            return
        if connection.out:
            # Nothing more is read, so nothing more is done, for a client that does not read its answers.
            connection.written_by = connection.written_by or time.monotonic() + self.patience
            self._poll.modify(connection.sock, select.EPOLLOUT)
        elif connection.closing:
            self._drop(connection)
        else:
            connection.written_by = None
            self._poll.modify(connection.sock, select.EPOLLIN)

    def _expire(self) -> None:
        now = time.monotonic()
        for connection in list(self._connections.values()):
            if min(connection.read_by or now, connection.written_by or now) < now:
                self._drop(connection)

    def _drop(self, connection: _Connection) -> None:
        del self._connections[connection.sock.fileno()]
        connection.sock.close()

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
        try:
            if os.stat(self._path).st_ino == self._file:
                os.unlink(self._path)
        except OSError:
            pass  # gone already, or out of a jail's reach
        self._poll.close()
        os.close(self._wake)
