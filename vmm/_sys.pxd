# SPDX-License-Identifier: Apache-2.0
# Host calls that several Cython loops share.
from libc.stdint cimport uint64_t

cdef extern from *:
    """
    #include <stdint.h>
    #include <sys/prctl.h>
    #include <time.h>
    static inline uint64_t clock_ns(clockid_t clock) {
        struct timespec t;
        clock_gettime(clock, &t);
        return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
    }
    static inline void name_thread(const char *name) { prctl(PR_SET_NAME, name, 0, 0, 0); }
    """
    enum: CLOCK_MONOTONIC, CLOCK_REALTIME
    uint64_t clock_ns(int clock) noexcept nogil
    void name_thread(const char *name) noexcept nogil       # the calling thread; truncated to 15 bytes

cdef extern from "<sys/eventfd.h>" nogil:
    int eventfd_write(int fd, uint64_t value)

cdef extern from "<unistd.h>" nogil:
    int close(int fd)
