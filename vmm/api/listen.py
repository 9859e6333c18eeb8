# SPDX-License-Identifier: Apache-2.0
"""The API's socket, there before anything else is imported: a runtime waits for it."""

from __future__ import annotations

import errno
import os
import socket
import stat

from vmm import launched
from vmm.errors import ConfigError

_BACKLOG = 128


def bind(path: str) -> socket.socket:
    """A listening socket at `path`; a file that a dead process left there is replaced.

    :raises ConfigError: somebody listens there, something else is there, or it cannot be made
    """
    if (fd := launched.take_socket(path)) is not None:
        return socket.socket(fileno=fd)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        try:
            if not stat.S_ISSOCK(os.lstat(path).st_mode):
                raise ConfigError("--api-sock", path, "is there and is not a socket; give a path that is free")
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
                if probe.connect_ex(path) != errno.ECONNREFUSED:
                    raise ConfigError("--api-sock", path, "is in use by another program; give a path that is free")
            os.unlink(path)
        except FileNotFoundError:
            pass
        listener.bind(path)
        listener.listen(_BACKLOG)
    except (OSError, ValueError) as error:
        listener.close()
        if isinstance(error, ConfigError):
            raise
        problem = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        raise ConfigError("--api-sock", path, f"cannot be made: {problem}") from None
    return listener
