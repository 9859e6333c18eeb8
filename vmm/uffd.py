# SPDX-License-Identifier: Apache-2.0
"""Guest RAM whose pages a program at a unix socket brings when they are first touched: Firecracker's UFFD protocol.

The program gets, in one message, a userfaultfd and a JSON array of the regions of guest RAM: where each is in this
process, and where in the memory file its contents begin. Source: Firecracker 1.12.1, src/vmm/src/persist.rs.
"""

from __future__ import annotations

import errno
import mmap
import os
import struct

# Not `socket`, which imports more, on the path of a restore.
from _socket import AF_UNIX, SCM_RIGHTS, SOCK_CLOEXEC, SOCK_STREAM, SOL_SOCKET, socket

import msgspec

from vmm import _uffd, threads
from vmm.closing import Closers
from vmm.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

SO_PEERPIDFD = 77  # <asm-generic/socket.h>, Linux 6.5


class HandlerError(HostError):
    """A page fault handler cannot be had; ``step`` is which of ``create``, ``register``, ``connect``, ``send`` failed.

    :param step: that
    :param errno: the system's error number
    :param path: the handler's socket
    """

    def __init__(self, step: str, errno: int, path: str) -> None:
        super().__init__(errno, f"page fault handler: {step}", path)
        self.step = step


class FaultHandler:
    """The connection to a handler, and our own copy of the userfaultfd: a handler that dies frees no fault.

    :param path: the handler's socket
    :param regions: host address, bytes and offset in the memory file of each region; mapped private, and untouched
    :raises HandlerError: the host has no userfaultfd for this process, or no handler listens
    """

    def __init__(self, path: str, regions: Sequence[tuple[int, int, int]]) -> None:
        self._socket: socket | None = None
        self._closers = Closers()
        step = "create"
        try:
            fd = _uffd.create()
            self._closers.append(lambda: os.close(fd))
            step = "register"
            for address, size, _ in regions:
                _uffd.register(fd, address, size)
            step = "connect"
            # Kept as long as the machine, as Firecracker does: its end tells the handler of ours.
            self._socket = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC)
            if "\0" in path:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            self._socket.connect(path)
            step = "send"
            data = _mappings(regions)
            sent = self._socket.sendmsg([data], [(SOL_SOCKET, SCM_RIGHTS, struct.pack("i", fd))])
            if sent != len(data):
                raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
            self._watch(self._socket)
        except (OSError, RuntimeError) as error:
            self.close()
            # A path that is too long has no number; no thread is left where it is no OSError.
            number = error.errno or errno.ENAMETOOLONG if isinstance(error, OSError) else errno.EAGAIN
            raise HandlerError(step, number, path) from None

    def _watch(self, peer: socket) -> None:
        try:
            process = peer.getsockopt(SOL_SOCKET, SO_PEERPIDFD)
        except OSError:
            return  # before Linux 6.5, or it has ended already
        self._closers.append(lambda: os.close(process))
        stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._closers.append(lambda: os.close(stop))
        watcher = threads.spawn("undertaker", "page fault handler", _uffd.watch, peer.fileno(), process, stop)
        self._closers.append(watcher.join)
        self._closers.append(lambda: os.eventfd_write(stop, 1))

    def release(self) -> None:
        """Need the handler no more; pages that are still missing are zeros once it has gone, too. Idempotent.

        The connection stays: Firecracker's own handlers kill the VMM, by the number of its process, when it ends.
        """
        self._closers.close()

    def close(self) -> None:
        """End the connection, too. Idempotent."""
        self.release()
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _mappings(regions: Sequence[tuple[int, int, int]]) -> bytes:
    page = mmap.PAGESIZE  # in bytes under both names: the second one is Firecracker's mistake, and handlers read it
    return msgspec.json.encode([
        {"base_host_virt_addr": address, "size": size, "offset": offset, "page_size": page, "page_size_kib": page}
        for address, size, offset in regions
    ])  # fmt: skip
