# SPDX-License-Identifier: Apache-2.0
from libc.stdint cimport uint64_t

from vmm._sys cimport pthread_mutex_t

cdef struct Bucket:
    uint64_t size               # capacity in tokens; 0: no limit
    uint64_t refill_ns          # time in which an empty bucket becomes full
    uint64_t burst              # tokens left of the one-time burst; spent before `tokens`
    double tokens               # negative after a request larger than the bucket, which is paid for afterwards
    uint64_t filled_at          # CLOCK_MONOTONIC, ns

cdef class RateLimiter:
    cdef Bucket bandwidth       # bytes
    cdef Bucket ops
    cdef pthread_mutex_t lock
    cdef int active             # atomic: there is a limit
    cdef uint64_t _throttled    # number of times that take() returned a wait
    # Take tokens for `ops` operations of `nbytes` bytes in total. Returns 0, or the nanoseconds to wait before asking
    # again; then nothing was taken. Safe from any thread: the queues of one device share a limiter.
    cdef uint64_t take(self, uint64_t nbytes, uint64_t ops) noexcept nogil
    cdef bint limited(self) noexcept nogil
    # Charge bytes that were moved without take(). Later requests wait for this debt.
    cdef void charge(self, uint64_t nbytes) noexcept nogil
