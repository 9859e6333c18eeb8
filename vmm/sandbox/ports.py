# SPDX-License-Identifier: Apache-2.0
"""TCP ports of a guest, published on the host."""

from __future__ import annotations

import contextlib
import socket
import threading

from vmm import threads
from vmm.errors import ConfigError, HostError, VmmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmm.sandbox.session import Session

_CHUNK = 1 << 16
MOST = 256  # connections at once; who comes then waits


class Published:
    """A port of the host's that leads to one of the guest's loopback; a context manager. Made by ``Session.publish``.

    :ivar address: host address and port that it listens on
    """

    def __init__(self, session: Session, port: int, host: str, host_port: int) -> None:
        if not 1 <= port <= 65535 or not 0 <= host_port <= 65535:
            raise ConfigError("port", f"{port} {host_port}", "must be 1 to 65535; 0 of the host is any that is free")
        self._session = session
        self._port = port
        self._room = threading.Semaphore(MOST)
        self._streams: set[socket.socket] = set()
        self._lock = threading.Lock()
        try:
            self._listener = socket.create_server((host, host_port))
        except OSError as error:
            raise HostError(error.errno or 0, f"listen on {host} port", str(host_port)) from None
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        self._thread = threads.spawn(None, f"port {self.address[1]}", self._accept)

    def _accept(self) -> None:
        while True:
            self._room.acquire()
            try:
                outside, _ = self._listener.accept()
            except OSError:
                return  # closed
            threads.spawn(None, f"port {self.address[1]}", self._serve, outside)

    def _serve(self, outside: socket.socket) -> None:
        try:
            with outside, self._kept(outside), self._session.connect(self._port) as inside, self._kept(inside):
                _relay(outside, inside)
        except (OSError, VmmError):
            pass  # nobody listens in the guest, or one side has gone: the other sees its connection closed
        finally:
            self._room.release()

    @contextlib.contextmanager
    def _kept(self, stream: socket.socket) -> Iterator[None]:
        with self._lock:
            self._streams.add(stream)
        try:
            yield
        finally:
            with self._lock:
                self._streams.discard(stream)

    def close(self) -> None:
        """Listen no more, and end the connections; idempotent."""
        with self._lock:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            for stream in self._streams:
                with contextlib.suppress(OSError):
                    stream.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def __enter__(self) -> Published:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _relay(one: socket.socket, other: socket.socket) -> None:
    there = threads.spawn(None, "port", _copy, one, other)
    _copy(other, one)
    there.join()


def _copy(source: socket.socket, target: socket.socket) -> None:
    # The end of one side is passed on as the end of that side only; a failure ends both.
    try:
        while data := source.recv(_CHUNK):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        for stream in (source, target):
            with contextlib.suppress(OSError):
                stream.shutdown(socket.SHUT_RDWR)
