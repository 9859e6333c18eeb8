# SPDX-License-Identifier: Apache-2.0
"""Whether a file is in the page cache, and how it gets out of it."""

from __future__ import annotations

import ctypes
import mmap
import os
import time

PATIENCE = 5.0  # seconds; a page that a processor has just put on its list stays for a moment


def is_cached(fd: int, at: int = 0) -> bool:
    """Whether the page at `at` is in memory, by mincore(2): a read that may not wait starts to read ahead."""
    with mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE) as shown:
        there = ctypes.create_string_buffer(1)
        base = ctypes.addressof(ctypes.c_char.from_buffer(shown))
        if ctypes.CDLL(None, use_errno=True).mincore(ctypes.c_void_p(base + at), ctypes.c_size_t(1), there):
            raise OSError(ctypes.get_errno(), "mincore")
        return bool(there.raw[0] & 1)


def forget(fd: int) -> bool:
    """Take the file out of the page cache; returns whether its first page is gone."""
    os.fsync(fd)
    deadline = time.monotonic() + PATIENCE
    while True:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        if not is_cached(fd):
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
