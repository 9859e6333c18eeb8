# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""Guest memory as every hot path sees it: one checked accessor from a guest address to a host address."""
from cpython.buffer cimport PyBUF_WRITE
from cpython.memoryview cimport PyMemoryView_FromMemory
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memcpy

from vmm.errors import GuestMemoryError


cdef class GuestRam:
    """The guest's RAM: up to 8 mapped regions. ``vmm.memory.GuestMemory`` makes the mappings.

    Every method checks [gpa, gpa + size) against one region, end exclusive, and raises ``GuestMemoryError``.
    """

    def __cinit__(self):
        self._count = 0
        self._maps = []

    cdef uint8_t *host(self, uint64_t gpa, uint64_t size) noexcept nogil:
        cdef int i
        cdef uint64_t offset
        for i in range(self._count):
            if gpa >= self._regions[i].gpa:
                offset = gpa - self._regions[i].gpa
                if offset <= self._regions[i].size and size <= self._regions[i].size - offset:
                    return self._regions[i].host + offset
        return NULL

    def map_region(self, uint64_t gpa, mapping):
        """Take `mapping` (a writable buffer, page aligned) as guest RAM from `gpa`; regions come in address order."""
        cdef uint8_t[::1] view = mapping
        cdef RamRegion *last
        if self._count == MAX_REGIONS:
            raise ValueError("a guest has at most 8 memory regions")
        if self._count:
            last = &self._regions[self._count - 1]
            if gpa < last.gpa + last.size:
                raise ValueError("memory regions overlap or are out of order")
        self._regions[self._count].gpa = gpa
        self._regions[self._count].size = <uint64_t>view.shape[0]
        self._regions[self._count].host = &view[0]
        self._maps.append((mapping, memoryview(mapping)))
        self._count += 1

    def unmap_all(self):
        """Forget every region; a mapping goes when its last slice does."""
        self._count = 0
        self._maps = []

    def host_address(self, uint64_t gpa, uint64_t size):
        """Host virtual address of [gpa, gpa + size), for ``KVM_SET_USER_MEMORY_REGION``."""
        cdef uint8_t *p = self.host(gpa, size)
        if p == NULL:
            raise GuestMemoryError(gpa, size)
        return <uintptr_t>p

    def slice(self, gpa, size):
        """A writable memoryview over [gpa, gpa + size): no copy, and it keeps the mapping alive."""
        cdef int i
        cdef uint64_t start, offset
        if not (0 <= gpa < 1 << 64 and 0 <= size < 1 << 64) or self.host(gpa, size) == NULL:
            raise GuestMemoryError(gpa, size)
        start = gpa
        for i in range(self._count):
            offset = start - self._regions[i].gpa
            if start >= self._regions[i].gpa and offset <= self._regions[i].size \
                    and <uint64_t>size <= self._regions[i].size - offset:
                return self._maps[i][1][offset:offset + size]
        raise GuestMemoryError(gpa, size)

    def write(self, gpa, data):
        """Copy `data` (bytes-like) to guest memory at `gpa`."""
        cdef const uint8_t[::1] source
        cdef uint8_t *p
        if not len(data):
            return
        source = memoryview(data).cast("B")
        p = self.host(gpa, <uint64_t>source.shape[0]) if 0 <= gpa < 1 << 64 else NULL
        if p == NULL:
            raise GuestMemoryError(gpa, len(source))
        memcpy(p, &source[0], <size_t>source.shape[0])

    def read(self, gpa, size):
        """The `size` bytes of guest memory at `gpa`, copied."""
        cdef uint8_t *p
        p = self.host(gpa, size) if 0 <= gpa < 1 << 64 and 0 <= size < 1 << 64 else NULL
        if p == NULL:
            raise GuestMemoryError(gpa, size)
        return (<char *>p)[:<Py_ssize_t>size]
