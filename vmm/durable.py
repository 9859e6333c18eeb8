# SPDX-License-Identifier: Apache-2.0
"""Files and directories that are there whole or not at all, also after a kill or a power failure."""

from __future__ import annotations

import errno
import os

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def put_whole(made: str, directory: str) -> None:
    """Give the directory `made` the name `directory`. What had that name before is `made` then, or gone.

    In one step, where the file system can: whoever looks finds the old one whole, or the new one.
    """
    if os.path.exists(directory):
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        if not libc.renameat2(_AT_FDCWD, os.fsencode(made), _AT_FDCWD, os.fsencode(directory), _RENAME_EXCHANGE):
            return
        number = ctypes.get_errno()
        if number not in (errno.EINVAL, errno.ENOSYS, errno.EXDEV):
            raise OSError(number, os.strerror(number), directory)
        # NFS exchanges no names, and an overlayfs none of its lower layer, which it does not rename, either.
        import shutil

        shutil.rmtree(directory)
    os.rename(made, directory)


def sync(path: str) -> None:
    """Have the disk keep what a file, or a directory, has now."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
