# SPDX-License-Identifier: Apache-2.0
"""The API's socket, there before anything else is imported: a runtime waits for it."""

from __future__ import annotations

import errno
import os
import stat
from _socket import AF_UNIX, SOCK_CLOEXEC, SOCK_NONBLOCK, SOCK_STREAM
from _socket import socket as _Socket

from vmm import launched
from vmm.errors import ConfigError

_BACKLOG = 128


class Socket(_Socket):
    """What the library's ``socket`` makes of the same base, whose import (selectors, enumerations) costs 3 ms."""

    def accept(self) -> tuple[Socket, object]:
        """As ``socket.socket.accept``."""
        fd, address = self._accept()  # type: ignore[attr-defined]  # not in the stubs; socket.socket calls it, too
        return Socket(fileno=fd), address


def bind(path: str) -> Socket:
    """A listening socket at `path`; a file that a dead process left there is replaced.

    :raises ConfigError: somebody listens there, something else is there, or it cannot be made
    """
    if (fd := launched.take_socket(path)) is not None:
        return Socket(fileno=fd)
    listener = Socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC)
    try:
        try:
            if not stat.S_ISSOCK(os.lstat(path).st_mode):
                raise ConfigError("--api-sock", path, "is there and is not a socket; give a path that is free")
            probe = Socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK)
            refused = probe.connect_ex(path) == errno.ECONNREFUSED
            probe.close()
            if not refused:
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
