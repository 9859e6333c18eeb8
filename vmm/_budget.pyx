# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""Limits on what guests can make this process hold: file descriptors, limited by number, and other amounts, counted.

Linux assigns the lowest free descriptor number, and ``RLIMIT_NOFILE`` limits numbers. So a descriptor with number N
means that all numbers below N are in use. Guests get no number near the limit: those are reserved for the API, the
disks and everything else that no guest controls. This needs no counter, and covers descriptors that libraries open.
"""
import resource

from libc.errno cimport EMFILE, ENFILE, errno
from libc.stdint cimport uint64_t

from vmm._sys cimport close, counter_read, flag_read, flag_set, set_errno

cdef extern from *:
    """
    #include <stdint.h>
    static inline int budget_take(uint64_t *taken, uint64_t limit, uint64_t amount) {
        uint64_t now = __atomic_load_n(taken, __ATOMIC_RELAXED);
        do {
            if (amount > limit || now > limit - amount)
                return 0;
        } while (!__atomic_compare_exchange_n(taken, &now, now + amount, 1, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
        return 1;
    }
    static inline void budget_give(uint64_t *taken, uint64_t amount) {
        __atomic_fetch_sub(taken, amount, __ATOMIC_RELAXED);
    }
    """
    bint budget_take(uint64_t *taken, uint64_t limit, uint64_t amount) noexcept nogil
    void budget_give(uint64_t *taken, uint64_t amount) noexcept nogil

cdef int[2] granted_below   # numbers, by purpose; atomic

KEPT = 512      # descriptors reserved for the VMM itself


def set_descriptor_limit(int limit):
    """Set the limits: guests may use all but ``KEPT`` of `limit` descriptors, and look-ups three quarters of those."""
    cdef int below = max(limit - <int>KEPT, 0)
    flag_set(&granted_below[<int>FOR_OPEN], below)
    flag_set(&granted_below[<int>FOR_LOOKUP], below // 4 * 3)    # limits of 2^30 are usual: no product above


def raise_descriptor_limit():
    """Raise ``RLIMIT_NOFILE`` as far as the host allows and set the guests' limits.

    :returns: the new limit
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        with open("/proc/sys/fs/nr_open") as limit:
            most = int(limit.read())
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    except (OSError, ValueError):       # not root, or no /proc
        most = hard if hard >= 0 else 1 << 20
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    set_descriptor_limit(most)
    return most


cdef int granted(int fd, Purpose purpose) noexcept nogil:
    if fd < 0:
        if errno == EMFILE:
            set_errno(ENFILE)
    elif fd >= flag_read(&granted_below[<int>purpose]):
        close(fd)
        set_errno(ENFILE)
        return -1
    return fd


cdef class Budget:
    """An amount shared by several holders; safe from any thread.

    :param limit: the total, in the caller's unit
    """

    def __init__(self, uint64_t limit):
        self.limit = limit

    @property
    def used(self):
        """The amount currently taken."""
        return counter_read(&self.taken)

    def ask(self, uint64_t amount):
        """Take `amount`; returns False, and takes nothing, if less than that is left."""
        return self.take(amount)

    def put_back(self, uint64_t amount):
        """Return `amount`, which was taken before."""
        self.give(amount)

    cdef bint take(self, uint64_t amount) noexcept nogil:
        return budget_take(&self.taken, self.limit, amount)

    cdef void give(self, uint64_t amount) noexcept nogil:
        budget_give(&self.taken, amount)


set_descriptor_limit(min(resource.getrlimit(resource.RLIMIT_NOFILE)[0], 1 << 30))
