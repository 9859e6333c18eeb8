# SPDX-License-Identifier: Apache-2.0
"""Connect to a program of a guest by the unix socket of its VM's socket device."""

from __future__ import annotations

import errno
import socket

from vmm.errors import ConfigError, HostError

_LINE = 32  # bytes of the longest answer, "OK 4294967294\n", and some more


def connect(path: str, port: int) -> socket.socket:
    """Connect to a port of a guest.

    :param path: the unix socket of its VM: ``uds=`` of ``--vsock``, ``VsockConfig.path``
    :param port: the vsock port that a program of the guest listens on
    :returns: the connected socket, which the caller closes
    :raises ConfigError: the socket does not exist
    :raises HostError: no VM listens there, or no program of the guest listens on the port

    Source: Firecracker's docs/vsock.md.
    """
    stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        stream.connect(path)
        stream.sendall(b"CONNECT %d\n" % port)
        answer = b""
        # Byte by byte: what follows the line is the guest's.
        while not answer.endswith(b"\n") and len(answer) < _LINE and (byte := stream.recv(1)):
            answer += byte
    except (FileNotFoundError, NotADirectoryError):
        stream.close()
        raise ConfigError("PATH", path, "is not there; it is the uds= of a running VM's --vsock") from None
    except OSError as error:
        stream.close()
        if str(error).startswith("AF_UNIX path"):
            raise ConfigError("PATH", path, "is too long for a unix socket") from None
        raise HostError(error.errno or 0, "connect to", path) from None
    if not answer.startswith(b"OK "):
        stream.close()
        raise HostError(errno.ECONNREFUSED, f"connect to port {port} of the guest behind", path)
    return stream
