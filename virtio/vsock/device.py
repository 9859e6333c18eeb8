# SPDX-License-Identifier: Apache-2.0
"""The socket device (§5.10): unix sockets of the host on one side, AF_VSOCK of the guest on the other.

The hybrid scheme of Firecracker and its kin: a host program connects to the unix socket PATH and says
``CONNECT port\\n``; what the guest connects to, port P of CID 2, is the unix socket ``PATH_P``. What moves the bytes is
``virtio/vsock/_worker.pyx``.
"""

from __future__ import annotations

from virtio import spec
from virtio.device import VirtioDevice
from virtio.vsock._worker import MAX_CONNECTIONS, MAX_WINDOW, VsockWorker
from vmm.budget import raise_descriptor_limit
from vmm.closing import Closing
from vmm.unix_socket import Listener as UnixListener

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence
    from typing import Any

QUEUE_SIZE = 256
_BACKLOG = 1024
_U32 = 0xFFFF_FFFF


class Listener(UnixListener, Closing):
    """The unix socket that host programs connect to.

    :param path: the path of the socket's file
    :raises ConfigError: as ``vmm.unix_socket.Listener``
    """

    def __init__(self, path: str) -> None:
        super().__init__("vsock uds_path", path, _BACKLOG)


class Vsock(VirtioDevice):
    """A virtio socket device.

    :param listener: the listening socket for host programs; not owned
    :param guest_cid: 3 to 2^32 - 2
    :param name: name of the worker's thread

    :ivar line_wait: seconds that a host program has for its CONNECT line
    :ivar guest_wait: seconds that the guest has to answer a connection's beginning or end
    :ivar host_wait: seconds in which a host program must read something of what a closed connection has left
    :ivar end_wait: seconds that a driver's end, or the VM's, waits for host programs to read what the guest sent before
    :ivar settle_wait: seconds that host programs wait until the driver of a copy is done with the connections of before
    :ivar tx_delay: seconds that the interrupt for a packet that was sent may come late, to come with another
    :ivar connections: number of connections, open or being opened or closed

    Until a driver is there host programs wait in the listener's backlog. When it goes, every connection is closed.
    In a copy all are reset, but one that ``keep`` names.
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
        self._saved: list[tuple[int, ...]] = []  # connections of the device whose state this one has
        raise_descriptor_limit()

    def make_workers(self, notify_fds: Sequence[int], on_failure: Callable[[Exception], None]) -> Sequence[VsockWorker]:
        """One thread for all three queues and every connection."""
        self._workers = [VsockWorker(self, range(len(notify_fds)), notify_fds, on_failure)]
        return self._workers

    def save(self) -> dict[str, Any]:
        """The connections, for ``keep``."""
        return {"connections": [list(numbers) for worker in self._workers for numbers in worker.save()]}

    def restore(self, state: dict[str, Any]) -> None:
        """Tell the driver that its connections are gone: no copy has the sockets of another machine.

        :raises ValueError: connections that no device has
        """
        self._saved = [tuple(numbers) for numbers in state.get("connections", ())]
        if len({numbers[:2] for numbers in self._saved}) != len(self._saved) or len(self._saved) > MAX_CONNECTIONS:
            raise ValueError("connections")
        for numbers in self._saved:
            guest_port, host_port, _, _, _, _, received, forwarded, promised = numbers
            left = promised - forwarded & _U32
            if (
                any(not 0 <= number <= _U32 for number in numbers)
                or not (promised - received & _U32) <= left <= MAX_WINDOW
            ):
                raise ValueError(f"connection {guest_port} to {host_port}")
        for worker in self._workers:
            worker.reset_transport()

    def keep(self, host_port: int) -> socket.socket | None:
        """Let one of the saved connections go on, and reset only the others; in a copy, before it starts.

        :param host_port: its port on the host's side, as the answer to CONNECT said
        :returns: the host's end, the caller's to close; None: it was not there, or something of it was under way
        """
        kept = next((numbers for numbers in self._saved if numbers[1:3] == (host_port, 1)), None)
        if kept is None or not self._workers:
            return None
        lost = [(numbers[0], numbers[1]) for numbers in self._saved if numbers is not kept]
        import socket  # a launch has no time for it

        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        ours.setblocking(False)
        self._workers[0].keep(ours, kept, lost)
        self._saved = []
        return theirs

    @property
    def connections(self) -> int:
        """Connections there are now, open or on their way in or out."""
        return sum(worker.connections for worker in self._workers)
