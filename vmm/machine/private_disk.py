# SPDX-License-Identifier: Apache-2.0
"""A copy of a disk image for one machine: reflinked if the file system can, else copied with its holes."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat

from vmm.durable import write_all
from vmm.errors import host_errors

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_FICLONE = 0x40049409  # <linux/fs.h>
_PIECE = 1 << 30
_READ = 1 << 20


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
                for start, end in _pieces(source, size):
                    _copy(source, copy, start, end)
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


def _pieces(source: int, size: int) -> Iterator[tuple[int, int]]:
    # Where the source has data.
    at = 0
    while at < size:
        try:
            start = os.lseek(source, at, os.SEEK_DATA)
            end = os.lseek(source, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return  # a hole to the end
            if error.errno != errno.EINVAL:
                raise
            start, end = at, size  # a block device, which knows no holes
        yield start, end
        at = end


def _copy(source: int, copy: int, start: int, end: int) -> None:
    while start < end:
        try:
            done = os.copy_file_range(source, copy, min(end - start, _PIECE), start, start)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            return _read_and_write(source, copy, start, end)
        if not done:
            return  # it was made shorter meanwhile
        start += done


def _read_and_write(source: int, copy: int, start: int, end: int) -> None:
    # By whole blocks in memory of whole pages, as a source that bypasses the page cache wants it.
    with mmap.mmap(-1, _READ) as pages, memoryview(pages) as view:
        while start < end and (done := os.preadv(source, [view], start)):
            done = min(done, end - start)
            write_all(copy, view[:done], start)
            start += done
