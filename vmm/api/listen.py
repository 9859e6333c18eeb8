# SPDX-License-Identifier: Apache-2.0
"""The API's socket, there before anything else is imported: a runtime waits for it."""

from __future__ import annotations

from _socket import AF_UNIX, SOCK_CLOEXEC, SOCK_NONBLOCK, SOCK_STREAM
from _socket import socket as _Socket

from vmm import launched
from vmm.unix_socket import listen

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
    listen(listener, "--api-sock", path, _BACKLOG)
    return listener
