# SPDX-License-Identifier: Apache-2.0
# What guests may make this process hold: descriptors, judged by their numbers, and anything else, counted.
from libc.stdint cimport uint64_t

cdef enum Purpose:
    FOR_LOOKUP          # the least important: its holder can close it and open it again
    FOR_OPEN            # what a guest opens: files, connections, mappings

# `fd` if a guest may have it for that purpose; otherwise it is closed, errno is ENFILE, the result -1. A negative `fd`
# passes through, EMFILE becoming ENFILE. Every descriptor whose number of copies a guest decides goes through this,
# right after the call that made it. Any thread.
cdef int granted(int fd, Purpose purpose) noexcept nogil

# An amount that many holders share. Any thread.
cdef class Budget:
    cdef readonly uint64_t limit
    cdef uint64_t taken                                         # atomic
    cdef bint take(self, uint64_t amount) noexcept nogil        # False: there is not so much left
    cdef void give(self, uint64_t amount) noexcept nogil
