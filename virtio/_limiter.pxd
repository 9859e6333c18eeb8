# SPDX-License-Identifier: Apache-2.0
# Token buckets, as a device's thread asks them.
from libc.stdint cimport uint64_t

cdef struct Bucket:
    uint64_t size               # tokens at most; 0: no limit
    uint64_t refill_ns          # in which an empty bucket becomes full
    uint64_t burst              # tokens of the one-time burst left, spent before the bucket's own
    double tokens               # may be negative: a request larger than the bucket is paid for afterwards
    uint64_t filled_at          # CLOCK_MONOTONIC, ns

cdef class RateLimiter:
    cdef Bucket bandwidth       # bytes
    cdef Bucket ops
    cdef int lock
    cdef readonly uint64_t throttled        # times that take() said wait
    # 0: granted, for `ops` operations of `nbytes` bytes together; otherwise ask again in so many nanoseconds.
    # Safe from any thread: the queues of one device share a limiter.
    cdef uint64_t take(self, uint64_t nbytes, uint64_t ops) noexcept nogil
    cdef bint limited(self) noexcept nogil
    # What was done beyond what take() was asked for: a debt, which the next pay for by waiting.
    cdef void charge(self, uint64_t nbytes) noexcept nogil
