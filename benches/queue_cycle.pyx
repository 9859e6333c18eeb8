# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""Calls the queue as a device's loop does, without the GIL. Built by test_queue_cycle.py; not part of the package."""
from libc.stdint cimport uint16_t, uint32_t

from vmm._fastpath cimport DescChain, GuestRam, Ring, VirtQueue, queue_add_used, queue_flush, queue_pop


def cycle(VirtQueue queue, uint32_t rounds):
    """Take and return every chain of a full ring, `rounds` times; the chains served.

    The available index moves on by itself, as if the driver had offered the same heads again.
    """
    cdef Ring *ring = &queue.ring
    cdef DescChain *chain = &queue.scratch
    cdef GuestRam ram = queue.memory
    cdef uint32_t i, served = 0
    with nogil:
        for i in range(rounds):
            (<uint16_t *>(ring.avail + 2))[0] += ring.size
            while queue_pop(ring, ram, chain) == 1:
                queue_add_used(ring, chain.head, 1)
                queue_flush(ring)
                served += 1
    return served
