# SPDX-License-Identifier: Apache-2.0
"""A unix socket whose file appears only when it listens, so that a program that sees the file can connect."""

from __future__ import annotations

import errno
import os
import stat

# Not `socket`, which imports more, on the path of a launch and of a first PUT /vsock.
from _socket import AF_UNIX, SOCK_CLOEXEC, SOCK_NONBLOCK, SOCK_STREAM, socket

from vmm.errors import ConfigError

_LONGEST = 107  # bytes of sun_path, less the NUL
_IN_USE = "is in use by another program; give an unused path"


class Listener:
    """A listening unix socket, and its file, which ``close`` removes.

    :param field: the option it came from, for the message
    :param path: a file that a dead process left behind is replaced
    :param backlog: how many clients may wait to be accepted
    :param private: only its owner may connect; False: whoever the umask allows
    :param fd: a descriptor that listens at `path` already, owned from here on; None: a new one
    :raises ConfigError: somebody listens there, something else is there, or it cannot be made

    Source: Linux unix(7).
    """

    def __init__(self, field: str, path: str, backlog: int, *, private: bool = False, fd: int | None = None) -> None:
        self.path = path
        self._file: tuple[int, int] | None = None
        if fd is not None:
            self.socket = socket(fileno=fd)
        else:
            self.socket = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC)
            if private:
                os.fchmod(self.socket.fileno(), 0o600)  # which bind gives to the file
            _listen(self.socket, field, path, backlog)
        self._file = file_at(path)

    @property
    def fd(self) -> int:
        """The listening descriptor; owned by this object."""
        return self.socket.fileno()

    def accept(self) -> socket:
        """The connection of the next client, owned by the caller.

        :raises OSError: no client waits, or no descriptor is left for it
        """
        fd, _ = self.socket._accept()  # type: ignore[attr-defined]  # not in the stubs; socket.socket calls it, too
        return socket(AF_UNIX, SOCK_STREAM, 0, fd)  # which asks the kernel nothing: a filter may be here

    def close(self) -> None:
        """Remove the file, and stop listening; idempotent."""
        self.remove_file()
        self.socket.close()

    def remove_file(self) -> None:
        """Remove the file, if it is still ours, so that nobody new connects; idempotent."""
        if self._file is not None:
            remove_file(self.path, self._file)
            self._file = None


def file_at(path: str) -> tuple[int, int]:
    """What tells the file at `path` from others.

    :raises OSError: nothing is there
    """
    status = os.lstat(path)
    return status.st_dev, status.st_ino


def remove_file(path: str, file: tuple[int, int]) -> None:
    """Remove what is at `path`, if it is still `file`."""
    try:
        if file_at(path) == file:
            os.unlink(path)
    except OSError:
        pass  # gone already, or its directory is, or out of a jail's reach


def _listen(listener: socket, field: str, path: str, backlog: int) -> None:
    # `listener` is closed where it cannot listen at `path`.
    if not path:
        listener.close()
        # Linux would make up a name, and nobody would find it.
        raise ConfigError(field, "", "is empty; give the path of the socket")
    try:
        _clear(field, path)
        made = f"{path}.{os.getpid()}"
        if len(os.fsencode(made)) > _LONGEST:
            listener.bind(path)
            listener.listen(backlog)
        else:
            listener.bind(made)
            try:
                listener.listen(backlog)
                _rename(made, path)
            except OSError:
                os.unlink(made)
                raise
    except FileExistsError:
        listener.close()
        raise ConfigError(field, path, _IN_USE) from None
    except (OSError, ValueError) as error:
        listener.close()
        if isinstance(error, ConfigError):
            raise
        # An over-long path and one with a NUL are Python's own messages.
        problem = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        raise ConfigError(field, path, f"cannot be made: {problem}") from None


def _rename(made: str, path: str) -> None:
    # As rename(2), but it takes the place of nobody who was faster.
    try:
        os.link(made, path)
    except FileExistsError:
        raise
    except OSError:  # on this file system a file has one name
        os.rename(made, path)
    else:
        os.unlink(made)


def _clear(field: str, path: str) -> None:
    # A socket file that nobody listens on any more goes.
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(field, path, "exists and is not a socket; give an unused path")
    probe = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC)
    answer = probe.connect_ex(path)
    probe.close()
    if answer == errno.ECONNREFUSED:
        os.unlink(path)
    elif answer != errno.ENOENT:  # 0, or EAGAIN: its backlog is full
        raise ConfigError(field, path, _IN_USE)
