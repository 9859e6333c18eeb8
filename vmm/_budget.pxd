# SPDX-License-Identifier: Apache-2.0
# Limits on what guests can make this process hold: file descriptors, limited by number, and other amounts, counted.
from libc.stdint cimport uint64_t

cdef enum Purpose:
    FOR_LOOKUP          # the least important: the owner can close the descriptor and open it again later
    FOR_OPEN            # files, connections and mappings that a guest opens

# Returns `fd` if it is below the limit for `purpose`; otherwise closes it, sets errno to ENFILE and returns -1. A
# negative `fd` is returned as it is, with EMFILE changed to ENFILE. Call it right after each call that opens a
# descriptor on behalf of a guest. Any thread.
cdef int granted(int fd, Purpose purpose) noexcept nogil

# An amount shared by several holders. Any thread.
cdef class Budget:
    cdef readonly uint64_t limit
    cdef uint64_t taken                                         # atomic
    cdef bint take(self, uint64_t amount) noexcept nogil        # False: less than `amount` is left
    cdef void give(self, uint64_t amount) noexcept nogil
