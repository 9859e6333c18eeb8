# SPDX-License-Identifier: Apache-2.0
"""A copy of a disk image for one machine: reflinked if the file system can, else copied with its holes."""

from __future__ import annotations

import fcntl
import os
import stat

from vmm._mapping import copy_sparse
from vmm.errors import host_errors

_FICLONE = 0x40049409  # <linux/fs.h>


def private_copy(source: int, path: str) -> int:
    """Copy what is in the file `source` now.

    :param source: its descriptor, readable
    :param path: its path, for messages and for where the copy goes: the same directory, or the one for temporary files
    :returns: the descriptor of a file without a name; ``/proc/self/fd/N`` opens it, the caller closes it
    :raises HostError: the disk cannot be read, or there is no room for the copy
    """
    with host_errors("copy the disk", path):
        regular = stat.S_ISREG(os.fstat(source).st_mode)
        # Beside a block device, in /dev, is only memory.
        copy = _nameless(os.path.dirname(path) or "." if regular else "")
        try:
            if not (regular and _reflink(source, copy)):
                size = os.lseek(source, 0, os.SEEK_END)
                os.ftruncate(copy, size)
                copy_sparse(source, 0, size, copy, 0, by_kernel=True)
        except BaseException:
            os.close(copy)
            raise
        return copy


def _nameless(directory: str) -> int:
    for place in (directory, os.environ.get("TMPDIR", "/tmp")):
        try:
            return os.open(place, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError:
            pass  # a read-only directory, or a file system without nameless files
    return os.memfd_create("disk", os.MFD_CLOEXEC)


def _reflink(source: int, copy: int) -> bool:
    try:
        fcntl.ioctl(copy, _FICLONE, source)
    except OSError:
        return False  # another file system, or one that has no reflinks
    return True
