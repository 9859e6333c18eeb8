# SPDX-License-Identifier: Apache-2.0
IOCTLS: tuple[int, ...]

def create(by_call: bool) -> int:
    """A userfaultfd for the faults of the kernel, too, which also tells of pages that are given back (EVENT_REMOVE).

    :param by_call: by the system call, where there is no /dev/userfaultfd (before Linux 6.1)
    :returns: its descriptor, not blocking
    :raises OSError: the host has none for us
    """

def register(fd: int, address: int, size: int) -> None:
    """Let `fd` tell of each page of [`address`, `address` + `size`) that is missing when it is touched.

    :raises OSError: the kernel refused
    """

def drop(address: int, size: int) -> None:
    """Give the pages back. Returns once the handler has heard of it.

    :raises OSError: the kernel refused
    """

def touch(address: int, size: int) -> None:
    """Have all pages brought that are missing."""

def watch(peer: int, process: int, stop: int) -> None: ...
