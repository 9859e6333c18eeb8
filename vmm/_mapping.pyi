# SPDX-License-Identifier: Apache-2.0
def map_over(address: int, size: int, fd: int, offset: int) -> None:
    """Put a private mapping over [`address`, `address` + `size`), which this process has mapped; whole pages.

    :param fd: what it shows until it is written to, from `offset` on; -1: zeros
    :raises OSError: the kernel refused
    """

def private_runs(pagemap: int, address: int, size: int) -> list[tuple[int, int]]:
    """Pages of a private mapping that were written to since it was made.

    :param pagemap: an open /proc/self/pagemap
    :returns: (offset from `address`, bytes) of each run, in order
    """

def touched_runs(pagemap: int, address: int, size: int) -> list[tuple[int, int]] | None:
    """Pages of a mapping that are there, since they were read or written to; with neighbours that the kernel brought.

    :returns: (offset from `address`, bytes) of each run, in order; None before Linux 6.7
    """

def walk_private_runs(pagemap: int, address: int, size: int) -> list[tuple[int, int]]:
    """Likewise, page by page: what ``private_runs`` does before Linux 6.7."""

def copy_sparse(source: int, start: int, size: int, target: int, offset: int) -> int:
    """Copy [`start`, `start` + `size`) of one file to `offset` of another, but for holes and pages of zeros.

    :param target: reads as zeros there already
    :returns: bytes written
    :raises OSError: it could not be read or written
    """

def copy_pages(address: int, size: int, fd: int, offset: int) -> int:
    """Likewise of memory: write [`address`, `address` + `size`) to the file `fd` at `offset`, but for pages of zeros.

    :param fd: reads as zeros there already
    :returns: bytes written
    :raises OSError: not all of it was written
    """

def copy_out(address: int, size: int, fd: int, offset: int) -> None:
    """Write [`address`, `address` + `size`) to the file `fd` at `offset`.

    :raises OSError: not all of it was written
    """
