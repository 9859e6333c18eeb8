# SPDX-License-Identifier: Apache-2.0
"""A file that a user named, with checked reads."""

from __future__ import annotations

import errno
import os
import stat

from vmm.closing import Closing
from vmm.errors import ConfigError, HostError, host_errors

_USERS_MISTAKES = (
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO,
)  # fmt: skip


class Source(Closing):
    """A regular, non-empty file open for reading; a context manager that closes it.

    :param field: the option that named it, for messages
    :param path: the path as the user wrote it
    :raises ConfigError: missing, not permitted, not a regular file, empty
    :raises HostError: when the host fails to open it
    """

    __slots__ = ("_fd", "field", "path", "size")

    def __init__(self, field: str, path: str | os.PathLike[str]) -> None:
        self._fd = -1
        self.field = field
        self.path = os.fspath(path)
        try:
            # O_NONBLOCK: opening a FIFO must not wait for its writer.
            self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
            status = os.fstat(self._fd)
            if stat.S_ISDIR(status.st_mode):
                raise self.fail("is a directory, not a file")
            if not stat.S_ISREG(status.st_mode):
                raise self.fail("is not a regular file")
            if status.st_size == 0:
                raise self.fail("is empty")
            self.size = status.st_size
        except ConfigError:
            self.close()
            raise
        except OSError as error:
            self.close()
            if error.errno in _USERS_MISTAKES:
                raise self.fail(os.strerror(error.errno).lower()) from None
            raise HostError(error.errno or errno.EIO, f"open {field}", self.path) from error
        except ValueError:
            raise self.fail("is not a path") from None

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def fail(self, problem: str) -> ConfigError:
        """Return the error that blames this file."""
        return ConfigError(self.field, self.path, problem)

    def read(self, offset: int, size: int, what: str) -> bytes:
        """Return exactly ``size`` bytes at ``offset``; the caller bounds ``size``.

        :param what: the structure being read, for the message
        :raises ConfigError: when the file ends before that
        """
        if offset + size > self.size:
            raise self._truncated(offset + size, what)
        data = b""
        with host_errors(f"read {self.field}", self.path):
            # A 9p or FUSE file system, or a read of more than 2 GiB, gives some of them, and the rest when asked again.
            while len(data) < size and (more := os.pread(self._fd, size - len(data), offset + len(data))):
                data += more
        if len(data) < size:  # it shrank since it was opened
            raise self._truncated(offset + size, what)
        return data

    def read_into(self, offset: int, view: memoryview, what: str) -> None:
        """Fill ``view`` with the bytes at ``offset``, without a copy in between.

        :raises ConfigError: when the file ends before that
        """
        if offset + len(view) > self.size:
            raise self._truncated(offset + len(view), what)
        done = 0
        while done < len(view):
            with host_errors(f"read {self.field}", self.path):
                count = os.preadv(self._fd, [view[done:]], offset + done)
            if count == 0:  # it shrank since it was opened
                raise self._truncated(offset + len(view), what)
            done += count

    def _truncated(self, need: int, what: str) -> ConfigError:
        return self.fail(f"is truncated: {what} ends at byte {need}, the file at {self.size}")
