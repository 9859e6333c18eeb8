# SPDX-License-Identifier: Apache-2.0
"""A Diff in place: it writes what has changed into the files of the previous snapshot.

Meanwhile an extended attribute marks the memory file, so that no load accepts it. The mark is on the disk before the
first page is written, and is removed when everything is on the disk. So half of a Diff is never taken for a whole one,
whatever is killed or crashes. On a file system without such attributes it can be.
"""

from __future__ import annotations

import os
import stat

from virtio.blk._request import punch_hole
from vmm import undertaker
from vmm.durable import write_all, write_whole
from vmm.machine.snapshot_file import MERGING, is_merging
from vmm.memory import offset_of, spans

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_BLOCK = 1 << 16  # bytes of zeros that are worth a hole


class Diff:
    """A memory file that is there and takes a Diff; marked from here on until ``close``.

    :param path: path of the file
    :param fd: the open file, owned from here on
    :param size: bytes of guest RAM, and of the file
    """

    def __init__(self, path: str, fd: int, size: int) -> None:
        self._path = path
        self._fd = fd
        self._size = size
        self._whole = not is_merging(fd)
        try:
            os.setxattr(fd, MERGING, b"1")
            self._has_mark = True
        except OSError:
            self._has_mark = False
        self._wait_for_mark = undertaker.sync(fd)  # the caller looks at the machine meanwhile
        self._wait_for_pages: Callable[[], None] = lambda: None
        self._state_fd: int | None = None

    @staticmethod
    def over(path: str, size: int) -> Diff | None:
        """The memory file at `path`; None if no file of that size is there, so a new one is to be made.

        :raises OSError: the file cannot be opened; ``filename`` is its path
        """
        fd = _opened(path)
        if fd is None or os.fstat(fd).st_size == size:
            return None if fd is None else Diff(path, fd, size)
        os.close(fd)
        return None

    def write(
        self, state_path: str, state: bytes, written: list[tuple[int, int]], read: Callable[[int, int], memoryview]
    ) -> None:
        """Begin to write pages and state.

        :param state: what is to be in the file `state_path`
        :param written: (guest address, bytes) of the pages. A file that has half of another Diff gets all of RAM
        :param read: gives RAM by guest address and bytes; it is not needed any more once this returns
        :raises OSError: a file cannot be written, ``filename`` is its path
        """
        self._state_path = state_path
        # With a mark no state file is taken before all is written, so that need not be a new one.
        self._state_fd = _opened(state_path) if self._has_mark else None
        with _Named(self._path):
            self._wait_for_mark()
            runs, self._whole = written if self._whole else spans(self._size), False
            for gpa, length in runs:
                self._put(read(gpa, length), offset_of(gpa))
        self._wait_for_pages = undertaker.sync(self._fd)
        if self._state_fd is None:
            write_whole((state_path, lambda fd: write_all(fd, state)))
            return
        with _Named(state_path):
            write_all(self._state_fd, state)
            os.ftruncate(self._state_fd, len(state))

    def _put(self, data: memoryview, offset: int) -> None:
        # What the guest has given back takes no room, where the file system has holes.
        if len(data) < _BLOCK:
            write_all(self._fd, data, offset)
            return
        for at in range(0, len(data), _BLOCK):
            part = data[at : at + _BLOCK]
            if any(part[:64]) or part.tobytes() != bytes(len(part)) or punch_hole(self._fd, offset + at, len(part)):
                write_all(self._fd, part, offset + at)

    def wait(self) -> None:
        """Return once all that was written is on the disk.

        :raises OSError: a file could not be written; ``filename`` is its path
        """
        if self._state_fd is not None:
            with _Named(self._state_path):
                os.fsync(self._state_fd)
        with _Named(self._path):
            self._wait_for_pages()
        self._whole = True

    def close(self) -> None:
        """Take the mark off, unless half is written."""
        if self._whole:
            try:
                os.removexattr(self._fd, MERGING)
            except OSError:
                pass
        undertaker.sync_and_bury(self._fd)
        if self._state_fd is not None:
            undertaker.bury(self._state_fd)


class _Named:
    """An OSError in its body is of the file at `path`."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            error.filename = self._path


def _opened(path: str) -> int | None:
    # To write into it; None: it is not there, or no regular file.
    try:
        fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    return None
