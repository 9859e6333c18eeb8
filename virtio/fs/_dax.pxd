# SPDX-License-Identifier: Apache-2.0
# The DAX window of a share: files of the host in a stretch of guest physical memory (§5.11.6.4).
from libc.stdint cimport int64_t, uint8_t, uint64_t

from virtio.fs._inodes cimport pthread_mutex_t

cdef enum:
    DAX_SHIFT = 21              # log2 of a slot; Linux maps 2 MiB at a time and takes no larger alignment

cdef struct Slot:
    int fd                      # of the file that is mapped here; -1: none is
    bint writable
    uint64_t offset             # in the file
    uint64_t length             # bytes that the guest asked for, whole pages
    uint64_t backed             # of them, those that are the file's at this moment

cdef class Window:
    cdef pthread_mutex_t lock
    cdef uint8_t *reserved      # what mmap gave
    cdef size_t reserved_size
    cdef uint8_t *base          # of the window; on a slot's boundary, so that the host may use large pages
    cdef readonly uint64_t size
    cdef Slot *slots
    cdef readonly uint64_t mapped       # slots in use
    cdef readonly uint64_t repairs      # times that files had lost their ends
    cdef int patched                    # atomic: memory stands in for a file's end

    # Map [offset, offset + length) of the open `fd`, which stays the caller's, at `where`. 0 or -errno.
    cdef int64_t map(self, int fd, uint64_t offset, uint64_t length, uint64_t where, bint writable) noexcept nogil
    cdef int64_t unmap(self, uint64_t where, uint64_t length) noexcept nogil
    cdef void clear(self) noexcept nogil
    cdef void heal(self) noexcept nogil         # before a request is answered: files may have grown again
    cdef bint _aligned(self, uint64_t where, uint64_t length) noexcept nogil
    cdef bint _blank(self, uint64_t where, uint64_t length) noexcept nogil
    cdef int _put(self, uint64_t where, Slot *slot, uint64_t at) noexcept nogil
    cdef void _drop(self, Slot *slot) noexcept nogil
