# SPDX-License-Identifier: Apache-2.0
"""Files and directories that are there whole or not at all, also after a kill or a power failure."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

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


def write_all(fd: int, data: bytes | memoryview, offset: int = 0) -> None:
    """Write all of `data` at `offset`.

    :raises OSError: the file cannot be written
    """
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done


def write_whole(*files: tuple[str, Callable[[int], None]]) -> None:
    """Let files be filled that have their names once all of them are whole; who has one before open keeps that.

    :param files: path, and what is given the descriptor of the new file
    :raises OSError: a file cannot be written, ``filename`` is its path; what was there before is as it was
    """
    made: list[tuple[str, int, str, str]] = []
    path = ""
    try:
        for path, fill in files:
            target = os.path.realpath(path)  # a link stays
            if os.path.exists(target) and not os.path.isfile(target):  # a device would be gone
                number = errno.EISDIR if os.path.isdir(target) else errno.EINVAL
                raise OSError(number, os.strerror(number))
            remove_left_behind(target, _unlink_file)
            made.append((*make_beside(target, directory=False), target, path))
            fill(made[-1][1])
            os.fsync(made[-1][1])
        for new, _, target, name in made:
            path = name
            os.rename(new, target)
    except OSError as error:
        for new, *_ in made:
            try:
                os.unlink(new)
            except OSError:
                pass
        error.filename = path
        raise
    finally:
        for _, fd, *_ in made:
            os.close(fd)
    for directory in {os.path.dirname(target) for _, _, target, _ in made}:
        sync(directory)


def make_beside(path: str, *, directory: bool) -> tuple[str, int]:
    """Make a directory or a file beside `path`, which is to take its place.

    :returns: its path, and the descriptor that holds its lock, which says that its process lives
    :raises OSError: the directory or file cannot be made
    """
    made = f"{path}.{os.urandom(4).hex()}.new"
    if directory:
        os.mkdir(made, 0o700)
    try:
        flags = os.O_RDONLY | os.O_DIRECTORY if directory else os.O_RDWR | os.O_CREAT | os.O_EXCL
        lock = os.open(made, flags | os.O_CLOEXEC, 0o600)
    except OSError:
        if directory:
            os.rmdir(made)
        raise
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError:
        pass  # this file system has no locks: then nobody gets one to remove it, either
    if os.path.exists(made):
        return made, lock
    os.close(lock)  # another process has taken it for one that was left behind, in the moment before the lock
    return make_beside(path, directory=directory)


def remove_left_behind(path: str, remove: Callable[[str], object]) -> None:
    """Remove what ``make_beside`` has made for `path`, and whose process was killed.

    :param remove: called with each path; it leaves alone what is not what it should be
    """
    above, name = os.path.split(path)
    try:
        beside = os.listdir(above or ".")
    except OSError:
        return
    unfinished = re.compile(re.escape(name) + r"\.[0-9a-f]{8}\.new")
    for each in filter(unfinished.fullmatch, beside):
        left = os.path.join(above, each)
        lock = -1
        try:
            lock = os.open(left, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove(left)
        except OSError:
            pass  # its process lives, or has removed it meanwhile
        finally:
            if lock >= 0:
                os.close(lock)


def _unlink_file(path: str) -> None:
    if stat.S_ISREG(os.lstat(path).st_mode):
        os.unlink(path)
