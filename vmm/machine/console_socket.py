# SPDX-License-Identifier: Apache-2.0
"""A console on a unix socket: ``pyvmm attach``, ``socat`` and the like connect to it, come and go.

One client at a time: a new one takes the place of the one before, whose connection is closed. Otherwise a hung terminal
would lock everybody out (Cloud Hypervisor does the same). The guest does not wait for a client, except for a tenth of a
second for one that has read everything so far. While there is no client, or one that does not read, the last 64 KiB of
the output are kept. Output that was sent to one client is not sent to another.
"""

from __future__ import annotations

import os
import select
import threading
from _queue import SimpleQueue

# Not `socket`, which imports more, on the path of a launch.
from _socket import MSG_DONTWAIT, MSG_NOSIGNAL

from vmm.logger import is_writable
from vmm.threads import spawn
from vmm.unix_socket import Listener

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket
    from collections.abc import Callable

KEPT = 64 << 10  # bytes of output
# By a memory file of this name, and the path, ``pyvmm attach`` finds the socket among a process's descriptors.
MARK = "pyvmm-console:"
_TYPED_MAX = 64 << 10  # bytes that clients have typed and the guest has not taken
_PIECE = 4096
_BACKLOG = 128
_NO_DESCRIPTOR_MS = 100  # how long a client waits to be accepted where no descriptor is left for it
_PATIENCE_MS = 100  # for a client to read, before output is lost and at the end


class ConsoleSocket:
    """A unix socket, of mode 0600, that joins a port to one client at a time.

    :param path: a file that a dead process left behind is replaced
    :param feed: called with what clients type, on a thread of its own; may wait for the guest
    :raises ConfigError: somebody listens there, something else is there, or it cannot be made
    """

    def __init__(self, path: str, feed: Callable[[bytes], None]) -> None:
        self._feed = feed
        self._listener = Listener("--console", path, _BACKLOG, private=True)
        self._mark = os.memfd_create(MARK + path, os.MFD_CLOEXEC)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._server: threading.Thread | None = None
        self._typed: SimpleQueue[bytes] = SimpleQueue()
        self._lock = threading.Condition()  # around all that follows; told when output is sent
        self._output = bytearray()
        self._waits = 0  # bytes in _typed
        self._client: socket | None = None
        self._ended = False  # the client types no more
        self._reads = True  # the client has read everything, or had no time for it yet
        self._closing = False

    def start(self, kind: str | None) -> None:
        """Let clients in.

        :param kind: None: the threads have no filters; see ``vmm.threads.spawn``
        """
        spawn(kind, "console keys", self._pump_typed)
        self._server = spawn(kind and "console-socket", "console socket", self._serve)

    def put(self, data: bytes) -> int:
        """Take the guest's output; returns how many bytes of what was kept are lost for it."""
        with self._lock:
            if self._client is not None and self._reads:
                self._reads = self._lock.wait_for(lambda: self._fits(data), _PATIENCE_MS / 1000)
            self._output += data
            lost = max(len(self._output) - KEPT, 0)
            del self._output[:lost]
            if self._client is not None and not self._closing:
                os.eventfd_write(self._wake, 1)
        return lost

    def _fits(self, data: bytes) -> bool:
        return not self._output or len(self._output) + len(data) <= KEPT or self._client is None

    def close(self, seconds: float) -> None:
        """Remove the file, send what is kept to a client that reads, for so long at most, and hang up."""
        self._listener.remove_file()  # by which a client that is hung up knows that nobody else has its place
        with self._lock:
            self._closing = True
        os.eventfd_write(self._wake, 1)
        self._typed.put(b"")
        if self._server is not None:
            self._server.join(seconds)
            if self._server.is_alive():
                return  # it keeps its descriptors until the process ends
        self._listener.close()
        os.close(self._mark)
        os.close(self._wake)

    def _pump_typed(self) -> None:
        while data := self._typed.get():
            self._feed(data)
            with self._lock:
                self._waits -= len(data)
                if not self._closing:
                    os.eventfd_write(self._wake, 1)

    def _serve(self) -> None:
        full = False
        while not self._closing:
            poll = select.poll()
            poll.register(self._wake, select.POLLIN)
            if not full:
                poll.register(self._listener.fd, select.POLLIN)
            if self._client is not None and ((wanted := self._wanted()) or self._ended):
                poll.register(self._client, wanted)
            ready = dict(poll.poll(_NO_DESCRIPTOR_MS if full else None))
            full = False
            if self._wake in ready:
                os.eventfd_read(self._wake)
            if self._client is not None and (what := ready.get(self._client.fileno(), 0)):
                self._converse(self._client, what)
            if self._listener.fd in ready:
                full = not self._accept()
        self._send_the_rest()
        self._hang_up()

    def _wanted(self) -> int:
        # Of a client: what it types, as long as the guest keeps up, and room for what there is for it.
        with self._lock:
            types = not self._ended and self._waits < _TYPED_MAX
            return (select.POLLIN if types else 0) | (select.POLLOUT if self._output else 0)

    def _accept(self) -> bool:
        try:
            client = self._listener.accept()
        except BlockingIOError:
            return True  # it is gone already
        except OSError:
            return False  # no descriptor is left
        self._hang_up()
        with self._lock:
            self._client, self._ended, self._reads = client, False, True
        return True

    def _converse(self, client: socket, what: int) -> None:
        if what & select.POLLIN:
            self._hear(client)
        elif what & (select.POLLHUP | select.POLLERR) or (what & select.POLLOUT and self._send(client) < 0):
            self._hang_up()

    def _hear(self, client: socket) -> None:
        try:
            data = client.recv(_PIECE, MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            self._hang_up()
            return
        with self._lock:
            self._ended = not data
            self._waits += len(data)
        if data:
            self._typed.put(data)

    def _send(self, client: socket) -> int:
        # How many bytes it took; -1: it is gone.
        with self._lock:
            try:
                sent = client.send(self._output[:_PIECE], MSG_DONTWAIT | MSG_NOSIGNAL)
            except BlockingIOError:
                return 0
            except OSError:
                return -1
            del self._output[:sent]
            self._reads = self._reads or not self._output
            self._lock.notify_all()
        return sent

    def _send_the_rest(self) -> None:
        if self._client is None:
            self._accept()  # who connected right before the end
        if self._client is None:
            return
        while self._output:
            sent = self._send(self._client)
            # Asked only then: poll is slower to find room.
            if sent < 0 or (sent == 0 and not is_writable(self._client.fileno(), _PATIENCE_MS)):
                return

    def _hang_up(self) -> None:
        with self._lock:
            client, self._client = self._client, None
            self._lock.notify_all()
        if client is not None:
            client.close()
