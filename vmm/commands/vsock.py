# SPDX-License-Identifier: Apache-2.0
"""``pyvmm vsock``: standard input and output to a port of a guest, by the VM's unix socket."""

from __future__ import annotations

import errno
import os
import select
import socket

from vmm.config import parse_count
from vmm.vsock import connect

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

MAX_PORT = 0xFFFF_FFFE
_CHUNK = 1 << 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``pyvmm vsock``."""
    parser.add_argument("path", metavar="PATH", help="the unix socket of the VM: uds= of its --vsock")
    parser.add_argument(
        "port", metavar="PORT", help=f"the port that a program of the guest listens on, 0 to {MAX_PORT}"
    )


def bridge(stream: socket.socket, source: int, sink: int, escape: bytes = b"") -> bool:
    """Copy `source` to `stream` and `stream` to `sink`, until the guest ends its side.

    The end of `source` is passed on as the end of our side only; what the guest still says comes through. A guest that
    does not read holds up `source` and nothing else.

    :param escape: a byte of `source` that ends it, too. To be seen in time it must not be held up: what a guest leaves
        unread is lost then, but for 64 KiB
    :returns: whether that byte came
    :raises OSError: `sink` cannot be written, or `source` not read
    """
    stream.setblocking(False)
    waiting = b""  # of source, for the guest
    more = True  # source has not ended, and the guest reads
    found = b""
    while not found:
        poll = select.poll()
        poll.register(stream, select.POLLIN | (select.POLLOUT if waiting else 0))
        if more and (escape or not waiting):
            poll.register(source, select.POLLIN)
        ready = dict(poll.poll())
        if source in ready:
            try:
                data = os.read(source, _CHUNK)
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                data = b""  # a terminal that has been hung up
            more = bool(data)
            if not more:
                stream.shutdown(socket.SHUT_WR)
            if escape:
                data, found, _ = data.partition(escape)
            waiting = (waiting + data)[:_CHUNK]
        if waiting:
            try:
                waiting = waiting[stream.send(waiting) :]
            except BlockingIOError:
                pass
            except (BrokenPipeError, ConnectionResetError):
                waiting, more = b"", False  # the guest reads no more; it may still say something
        if stream.fileno() in ready:
            try:
                data = stream.recv(_CHUNK)
            except BlockingIOError:
                continue
            except ConnectionResetError:
                return False
            if not data:
                return False
            while data:
                data = data[os.write(sink, data) :]
    return True


def main(args: argparse.Namespace) -> int:
    """Connect and copy; 0 once the guest has ended the connection."""
    port = parse_count("PORT", args.port, 0, MAX_PORT)
    with connect(args.path, port) as stream:
        bridge(stream, 0, 1)
    return 0
