# SPDX-License-Identifier: Apache-2.0
"""TCP ports that lead from the host into a guest, and from a guest to the host."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import socket
import struct
import threading
import time

from vmm import threads
from vmm.closing import Closing
from vmm.errors import ConfigError, HostError, VmmError
from vmm.sandbox.channel import F_FAILED, F_STARTED, Deadline, failure, out_of_turn

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vmm.sandbox.channel import Channel, Link
    from vmm.sandbox.session import Session

_CHUNK = 1 << 16
MOST = 256  # connections at once; who comes then waits
_FIRST = 1 << 20  # of the host's vsock ports that lead to TCP ports
_BACK_OFF = 0.1  # seconds until it is tried again


class Relay(Closing):
    """Connections to one socket, passed on to another; a context manager.

    :param listener: owned by this object
    :param connect: makes the other end of a connection
    :param name: name of its threads
    """

    def __init__(self, listener: socket.socket, connect: Callable[[], socket.socket], name: str) -> None:
        self._listener = listener
        self._connect = connect
        self._name = name
        self._room = threading.Semaphore(MOST)
        self._streams: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._closed = False
        self._pid = os.getpid()
        try:
            threads.spawn(None, name, self._accept)
        except BaseException:  # where it was a signal's handler, the thread may be there
            Relay.close(self)
            raise

    def _accept(self) -> None:
        while True:
            self._room.acquire()
            try:
                threads.spawn(None, self._name, self._serve, self._listener.accept()[0])
            except (OSError, RuntimeError):
                if self._closed:
                    return
                self._room.release()
                time.sleep(_BACK_OFF)  # the host has no descriptor or no thread for it

    def _serve(self, outside: socket.socket) -> None:
        try:
            with outside, self._kept(outside), self._connect() as inside, self._kept(inside):
                _relay(outside, inside)
        except (OSError, VmmError, RuntimeError):
            pass  # nobody listens there, one side has gone, or the host has no thread: the other side is closed, too
        finally:
            self._room.release()

    @contextlib.contextmanager
    def _kept(self, stream: socket.socket) -> Iterator[None]:
        with self._lock:
            if self._closed:
                raise ConnectionAbortedError
            self._streams.add(stream)
        try:
            yield
        finally:
            with self._lock:
                self._streams.discard(stream)

    def close(self) -> None:
        """Listen no more, and end the connections; idempotent. A forked child ends nothing."""
        if self._pid != os.getpid():
            return
        with self._lock:
            self._closed = True
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            for stream in self._streams:
                with contextlib.suppress(OSError):
                    stream.shutdown(socket.SHUT_RDWR)
        self._listener.close()


class Published(Relay):
    """A port of the host's that leads to one of the guest's loopback. Made by ``Session.publish``.

    :ivar address: host address and port that it listens on
    """

    def __init__(self, session: Session, port: int, host: str, host_port: int) -> None:
        try:
            listener = socket.create_server((host, host_port))
        except OSError as error:
            if (error.errno or 0) < 0:  # of the lookup, as gai_strerror(3) has them
                raise ConfigError(
                    "host", host, "must be an IPv4 address of this host, or a name that has one"
                ) from None
            raise HostError(error.errno or 0, f"listen on {host} port", str(host_port)) from None
        self.address: tuple[str, int] = listener.getsockname()[:2]
        super().__init__(listener, lambda: session.connect(port), f"port {self.address[1]}")


class Provided(Relay):
    """A port of the guest's loopback that leads to one of the host's. Made by ``Session.provide``.

    :ivar port: port of the guest's loopback at which its agent listens
    """

    def __init__(self, link: Link, host_port: int, port: int, host: str) -> None:
        deadline, doing = Deadline(30), f"port {port}"
        listener, number, self._path = _listen_beside(link.path)
        self._channel: Channel | None = None
        try:
            channel = self._channel = link.connect(deadline, doing)
            channel.request(deadline, doing, "listen", port=port, to=number)
            kind, data = channel.read(deadline, doing)
            if kind == F_FAILED:
                raise OSError(failure(data)[0], os.strerror(failure(data)[0]), f"port {port} of the guest")
            if kind != F_STARTED or len(data) != 4:
                raise out_of_turn(doing)
            self.port: int = struct.unpack("<I", data)[0]
            super().__init__(listener, lambda: socket.create_connection((host, host_port)), f"port {host_port}")
        except BaseException:
            listener.close()
            self._leave()
            raise

    def _leave(self) -> None:
        if self._channel is not None:
            self._channel.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)

    def close(self) -> None:
        """Listen no more, and end the connections; idempotent. A forked child ends nothing."""
        if self._pid == os.getpid():
            self._leave()
        super().close()


def _listen_beside(path: str) -> tuple[socket.socket, int, str]:
    # What the guest connects to on the host's vsock port N is the unix socket PATH_N: docs/vsock.md.
    listener = socket.socket(socket.AF_UNIX)
    for number in itertools.count(_FIRST):
        try:
            listener.bind(f"{path}_{number}")
            listener.listen(MOST)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                listener.close()
                raise HostError(error.errno or 0, "listen on", f"{path}_{number}") from None
        else:
            return listener, number, f"{path}_{number}"
    raise AssertionError


def _relay(one: socket.socket, other: socket.socket) -> None:
    for stream in (one, other):
        stream.settimeout(None)  # that of socket.setdefaulttimeout is for the program's own
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
