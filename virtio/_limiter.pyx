# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""Rate limits by token buckets, with Firecracker's parameters: size, one-time burst, refill time."""
from libc.stdint cimport uint64_t
from vmm._sys cimport (
    CLOCK_MONOTONIC, clock_ns, counter_add, counter_read, flag_read, flag_set, pthread_mutex_init, pthread_mutex_lock,
    pthread_mutex_unlock,
)

cdef uint64_t MOST_MS = <uint64_t>1 << 42  # 139 years, in which no number of nanoseconds overflows


cdef uint64_t wait_for(Bucket *b, uint64_t want, uint64_t now) noexcept nogil:
    # Nanoseconds until `want` tokens may be taken. A request larger than the bucket needs a full one and leaves a debt.
    cdef double need, rate
    if b.size == 0 or want <= b.burst:
        return 0
    rate = <double>b.size / <double>b.refill_ns
    b.tokens = min(b.tokens + <double>(now - b.filled_at) * rate, <double>b.size)
    b.filled_at = now
    need = <double>min(want - b.burst, b.size)
    if b.tokens >= need:
        return 0
    return <uint64_t>min((need - b.tokens) / rate, <double>MOST_MS * 1e6) + 1


cdef void spend(Bucket *b, uint64_t want) noexcept nogil:
    cdef uint64_t burst = min(want, b.burst)
    b.burst -= burst
    b.tokens -= <double>(want - burst)


cdef class RateLimiter:
    """Limits bytes and operations per second. The queues of a device share it; it can change while the device runs.

    :param bandwidth: ``(size, one_time_burst, refill_time)`` in bytes, bytes, milliseconds; None: no limit
    :param ops: the same for operations
    """

    def __cinit__(self):
        pthread_mutex_init(&self.lock, NULL)

    def __init__(self, bandwidth=None, ops=None):
        self.update(bandwidth or (0, 0, 1), ops or (0, 0, 1))

    def update(self, bandwidth=None, ops=None):
        """Replace buckets by full ones. ``(0, 0, 0)`` removes a limit, None leaves it unchanged. Any thread."""
        cdef Bucket new_bandwidth = bucket(bandwidth or (0, 0, 0)), new_ops = bucket(ops or (0, 0, 0))
        pthread_mutex_lock(&self.lock)
        if bandwidth is not None:
            self.bandwidth = new_bandwidth
        if ops is not None:
            self.ops = new_ops
        flag_set(&self.active, self.bandwidth.size != 0 or self.ops.size != 0)
        pthread_mutex_unlock(&self.lock)

    @property
    def buckets(self):
        """The limits of bytes and operations by now, with what is left of their bursts; None: no limit. Any thread."""
        cdef Bucket b[2]
        pthread_mutex_lock(&self.lock)
        b[0], b[1] = self.bandwidth, self.ops
        pthread_mutex_unlock(&self.lock)
        return told(&b[0]), told(&b[1])

    cdef bint limited(self) noexcept nogil:
        return flag_read(&self.active)

    cdef void charge(self, uint64_t nbytes) noexcept nogil:
        pthread_mutex_lock(&self.lock)
        if self.bandwidth.size:
            spend(&self.bandwidth, nbytes)
        pthread_mutex_unlock(&self.lock)

    @property
    def throttled(self):
        """Times that it said wait."""
        return counter_read(&self._throttled)

    cdef uint64_t take(self, uint64_t nbytes, uint64_t ops) noexcept nogil:
        cdef uint64_t now, wait, other
        if not self.limited():
            return 0
        pthread_mutex_lock(&self.lock)
        now = clock_ns(CLOCK_MONOTONIC)
        wait = wait_for(&self.bandwidth, nbytes, now)
        other = wait_for(&self.ops, ops, now)
        wait = max(wait, other)
        if wait == 0:
            spend(&self.bandwidth, nbytes)
            spend(&self.ops, ops)
        else:
            counter_add(&self._throttled, 1)
        pthread_mutex_unlock(&self.lock)
        return wait

    def ask(self, uint64_t nbytes, uint64_t ops=1):
        """Take tokens for `ops` operations of `nbytes` in total.

        :returns: 0, or the nanoseconds to wait before asking again; then nothing was taken
        """
        return self.take(nbytes, ops)


cdef Bucket bucket(parameters):
    size, burst, refill_ms = parameters
    cdef Bucket b
    b.size = size if refill_ms else 0
    b.burst = burst
    b.refill_ns = <uint64_t>min(refill_ms or 1, MOST_MS) * 1000000
    b.tokens = <double>b.size
    b.filled_at = clock_ns(CLOCK_MONOTONIC)
    return b


cdef told(Bucket *b):
    return (b.size, b.burst, b.refill_ns // 1000000) if b.size else None
