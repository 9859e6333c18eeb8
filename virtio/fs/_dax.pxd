# SPDX-License-Identifier: Apache-2.0
# The DAX window of a share: host files mapped into guest physical memory (virtio 1.2 §5.11.6.4).
from libc.stdint cimport int64_t, uint8_t, uint64_t

from vmm._sys cimport pthread_mutex_t

cdef enum:
    DAX_SHIFT = 21              # log2 of a slot; Linux maps 2 MiB at a time and takes no larger alignment

cdef struct Slot:
    int fd                      # duplicate of the mapped file's descriptor; owned; -1: nothing is mapped
    bint writable
    uint64_t offset             # offset in the file, bytes
    uint64_t length             # bytes that the guest asked for, whole pages
    uint64_t backed             # bytes of `length` that map the file now; the rest is anonymous memory

cdef class Window:
    cdef pthread_mutex_t lock
    cdef uint8_t *reserved      # the whole reservation: a slot more than `size`
    cdef uint8_t *base          # start of the window; aligned to a slot, so that the host may use large pages
    cdef readonly uint64_t size
    cdef Slot *slots
    cdef uint64_t mapped, _repairs      # slots in use; repairs after a mapped file was truncated
    cdef int patched                    # atomic: anonymous memory replaces the end of some file

    # Map [offset, offset + length) of `fd` (borrowed) at offset `where` of the window. Returns 0 or -errno.
    cdef int64_t map(self, int fd, uint64_t offset, uint64_t length, uint64_t where, bint writable) noexcept nogil
    cdef int64_t unmap(self, uint64_t where, uint64_t length) noexcept nogil
    cdef void clear(self) noexcept nogil
    cdef void map_regrown(self) noexcept nogil         # called before each request: map the ends of regrown files
