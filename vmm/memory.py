# SPDX-License-Identifier: Apache-2.0
"""Guest RAM: memfds mapped shared around the hole below 4 GiB, and numpy views over them."""

from __future__ import annotations

import mmap
import os

from vmm._fastpath import GuestRam
from vmm.errors import ConfigError, HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Any

    import numpy as np
    import numpy.typing as npt

GIB = 1 << 30
# Between these no RAM is mapped: IOAPIC, local APICs, the TSS of KVM and every virtio-mmio window are there.
HOLE_START = 3 * GIB
HOLE_END = 4 * GIB
# Shared memory with no swap reserved for it: a guest may be given more than the host has free, and pays as it touches.
_MAP_FLAGS = mmap.MAP_SHARED | getattr(mmap, "MAP_NORESERVE", 0x4000)
_HUGE_2MB = os.MFD_HUGETLB | os.MFD_HUGE_2MB


class Region:
    """One stretch of guest RAM: ``gpa`` and ``size`` in bytes, backed from offset 0 of memfd ``fd``."""

    __slots__ = ("fd", "gpa", "size")

    def __init__(self, gpa: int, size: int, fd: int) -> None:
        self.gpa = gpa
        self.size = size
        self.fd = fd

    def __repr__(self) -> str:
        return f"Region({self.gpa:#x}, {self.size:#x})"


class GuestMemory(GuestRam):
    """``size`` bytes of guest RAM, zero-filled, from address 0, going on at 4 GiB where it reaches 3 GiB.

    Owns one memfd and one shared mapping a region. A context manager; ``close`` is idempotent, and slices and views
    that outlive it stay readable.

    :param size: bytes, a positive multiple of the page size (4096)
    :param huge: in pages of 2 MiB that the host has set aside (hugetlbfs); `size` is a multiple of that then
    :raises ConfigError: size is not that
    :raises HostError: the host has no room to map it
    """

    def __init__(self, size: int, *, huge: bool = False) -> None:
        page = 2 << 20 if huge else mmap.PAGESIZE
        if size <= 0 or size % page:
            raise ConfigError("memory", size, f"bytes of RAM must be a positive multiple of {page}")
        self.size = size
        self.regions: tuple[Region, ...] = ()
        spans = [(0, min(size, HOLE_START))]
        if size > HOLE_START:
            spans.append((HOLE_END, size - HOLE_START))
        try:
            for gpa, length in spans:
                fd = os.memfd_create("guest-ram", os.MFD_CLOEXEC | (_HUGE_2MB if huge else 0))
                self.regions += (Region(gpa, length, fd),)
                os.ftruncate(fd, length)
                # Huge pages are reserved: one that is not there at a touch would kill us.
                self.map_region(gpa, mmap.mmap(fd, length, flags=mmap.MAP_SHARED if huge else _MAP_FLAGS))
        except OSError as error:
            self.close()
            pages = " in huge pages (/proc/sys/vm/nr_hugepages)" if huge else ""
            raise HostError(error.errno or 0, f"map {size >> 20} MiB of guest memory{pages}") from error

    def view(self, gpa: int = 0, size: int | None = None, dtype: Any = "u1") -> npt.NDArray[np.generic]:
        """A numpy array over guest RAM: shared with the running guest, not copied.

        :param gpa: first guest physical address
        :param size: bytes, within one region; None for all that follows `gpa` in its region
        :param dtype: any numpy dtype whose size divides `size`
        :returns: one-dimensional array; keeps the mapping alive
        :raises GuestMemoryError: not all inside one region
        """
        import numpy  # 100 ms that launching a VM does not pay

        if size is None:
            size = next((r.gpa + r.size - gpa for r in self.regions if r.gpa <= gpa < r.gpa + r.size), 1)
        return numpy.frombuffer(self.slice(gpa, size), dtype=dtype)

    def close(self) -> None:
        """Give the mappings and memfds back."""
        self.unmap_all()
        for region in self.regions:
            os.close(region.fd)
        self.regions = ()

    def __enter__(self) -> GuestMemory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
