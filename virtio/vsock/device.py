# SPDX-License-Identifier: Apache-2.0
"""The socket device (§5.10): unix sockets of the host on one side, AF_VSOCK of the guest on the other.

The hybrid scheme of Firecracker and its kin: a host program connects to the unix socket PATH and says
``CONNECT port\\n``; what the guest connects to, port P of CID 2, is the unix socket ``PATH_P``. What moves the bytes is
``virtio/vsock/_worker.pyx``.
"""

from __future__ import annotations

import os

# Not `socket`, whose import takes longer than all that a first PUT /vsock does.
from _socket import AF_UNIX, SOCK_NONBLOCK, SOCK_STREAM, socket

from virtio import spec
from virtio.device import VirtioDevice
from virtio.vsock._worker import VsockWorker
from vmm.budget import raise_descriptor_limit
from vmm.closing import Closing
from vmm.unix_socket import listen

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

QUEUE_SIZE = 256
MAX_CONNECTIONS = 4096
_BACKLOG = 1024


class Listener(Closing):
    """The unix socket that host programs connect to, listening, and its file, removed by ``close``.

    :param path: a file that a VM left behind is replaced
    :raises ConfigError: somebody listens there, something else is there, or it cannot be made

    Source: Linux unix(7).
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._file: tuple[int, int] | None = None
        self._socket = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK)
        listen(self._socket, "vsock uds_path", path, _BACKLOG)
        status = os.lstat(path)
        self._file = status.st_dev, status.st_ino

    @property
    def fd(self) -> int:
        """The listening descriptor; owned by this object."""
        return self._socket.fileno()

    def close(self) -> None:
        """Stop listening and remove the file, if it is still ours; idempotent."""
        self._socket.close()
        if self._file is None:
            return
        try:
            status = os.lstat(self.path)
            if (status.st_dev, status.st_ino) == self._file:
                os.unlink(self.path)
        except OSError:
            pass  # gone already, or its directory is
        self._file = None


class Vsock(VirtioDevice):
    """A virtio socket device.

    :param listener: where host programs come in; not owned
    :param guest_cid: 3 to 2^32 - 2
    :param name: of the worker's thread

    :ivar line_wait: seconds that a host program has for its CONNECT line
    :ivar guest_wait: seconds that the guest has to answer a connection's beginning or end
    :ivar host_wait: seconds in which a host program must read something of what a closed connection has left
    :ivar end_wait: seconds that a driver's end, or the VM's, waits for host programs to read what the guest sent before
    :ivar settle_wait: seconds that host programs wait until the driver of a copy is done with the connections of before
    :ivar tx_delay: seconds that the interrupt for a packet that was sent may come late, to come with another
    :ivar connections: how many there are, open or on their way in or out

    Until a driver is there host programs wait in the listener's backlog. When it goes, every connection is closed.
    """

    device_type = spec.TYPE_VSOCK
    thread_kind = "vsock"
    queue_sizes = (QUEUE_SIZE, QUEUE_SIZE, QUEUE_SIZE)  # rx, tx, event
    features = spec.VSOCK_F_STREAM
    line_wait: float = 60
    guest_wait: float = 10
    host_wait: float = 30
    end_wait: float = 2
    settle_wait: float = 0.125
    tx_delay: float = 0.005

    def __init__(self, listener: Listener, guest_cid: int, *, name: str = "virtio-vsock") -> None:
        super().__init__()
        self.name = name
        self.listener = listener
        self.guest_cid = guest_cid
        self.config = spec.VSOCK_CONFIG.pack(guest_cid)
        self._worker: VsockWorker | None = None
        raise_descriptor_limit()

    def make_workers(self, notify_fds: Sequence[int], on_failure: Callable[[Exception], None]) -> Sequence[VsockWorker]:
        """One thread for all three queues and every connection."""
        self._worker = VsockWorker(self, range(len(notify_fds)), notify_fds, on_failure)
        return [self._worker]

    def restore(self, state: dict[str, Any]) -> None:
        """Tell the driver that its connections are gone: no copy has the sockets of another machine."""
        if self._worker is not None:
            self._worker.reset_transport()

    @property
    def connections(self) -> int:
        """Connections there are now, open or on their way in or out."""
        return self._worker.connections if self._worker else 0

    @property
    def stats(self) -> dict[str, int]:
        """Counters by name."""
        return self.counters | (self._worker.counters if self._worker else {})
