# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""The connections of a socket device: a fixed pool, a hash table by ports, and the list of those waiting for a turn.

All memory is allocated by the constructor, so a guest's connections cost the host a fixed amount.
"""

from libc.stdint cimport int64_t
from libc.string cimport memset

from vmm._sys cimport counter_add, table_alloc, table_free


cdef uint32_t bucket(uint32_t guest_port, uint32_t host_port) noexcept nogil:
    return ((guest_port * <uint32_t>2654435761) ^ (host_port * <uint32_t>2246822519)) >> 19


cdef class Connections:
    """At most ``CONNECTIONS`` connections, used by one thread. A connection's number is its index in the pool."""

    def __cinit__(self):
        self.conns = <Conn *>table_alloc(CONNECTIONS * sizeof(Conn))
        if self.conns == NULL:
            raise MemoryError()
        self.forget()

    def __dealloc__(self):
        table_free(self.conns, CONNECTIONS * sizeof(Conn))

    cdef void forget(self) noexcept nogil:
        memset(self.conns, 0, self.fresh * sizeof(Conn))
        memset(self.buckets, 0xff, sizeof(self.buckets))
        self.free_head = self.turn_head = self.turn_tail = NONE
        self.fresh = 0
        counter_add(&self.live, -<int64_t>self.live)
        self.window = BUFFER

    cdef Conn *take(self) noexcept nogil:
        cdef uint32_t i
        if self.free_head != NONE:
            i = <uint32_t>self.free_head
            self.free_head = self.conns[i].next
        elif self.fresh < CONNECTIONS:
            i = self.fresh
            self.fresh += 1
        else:
            return NULL
        memset(&self.conns[i], 0, sizeof(Conn))
        self.count(1)
        return &self.conns[i]

    cdef void give_back(self, Conn *c) noexcept nogil:
        c.state = FREE
        c.next = self.free_head
        self.free_head = <int32_t>(c - self.conns)
        self.count(-1)

    cdef void count(self, int32_t more) noexcept nogil:
        counter_add(&self.live, more)
        self.window = min(<uint32_t>BUFFER, <uint32_t>POOL // <uint32_t>max(self.live, <uint64_t>1))

    # Look-up by ports

    cdef Conn *find(self, uint32_t guest_port, uint32_t host_port) noexcept nogil:
        cdef int32_t i = self.buckets[bucket(guest_port, host_port)]
        while i != NONE:
            if self.conns[i].guest_port == guest_port and self.conns[i].host_port == host_port:
                return &self.conns[i]
            i = self.conns[i].hash_next
        return NULL

    cdef void enter(self, Conn *c, uint32_t guest_port, uint32_t host_port) noexcept nogil:
        cdef int32_t *head = &self.buckets[bucket(guest_port, host_port)]
        c.guest_port = guest_port
        c.host_port = host_port
        c.entered = True
        c.hash_next = head[0]
        head[0] = <int32_t>(c - self.conns)

    cdef void leave(self, Conn *c) noexcept nogil:
        cdef int32_t *link = &self.buckets[bucket(c.guest_port, c.host_port)]
        if not c.entered:
            return
        c.entered = False
        while link[0] != <int32_t>(c - self.conns):
            link = &self.conns[link[0]].hash_next
        link[0] = c.hash_next

    # Turns

    cdef void queue(self, Conn *c) noexcept nogil:
        cdef int32_t i = <int32_t>(c - self.conns)
        c.queued = True
        c.next = NONE
        c.previous = self.turn_tail
        if self.turn_tail == NONE:
            self.turn_head = i
        else:
            self.conns[self.turn_tail].next = i
        self.turn_tail = i

    cdef void unqueue(self, Conn *c) noexcept nogil:
        c.queued = False
        if c.previous == NONE:
            self.turn_head = c.next
        else:
            self.conns[c.previous].next = c.next
        if c.next == NONE:
            self.turn_tail = c.previous
        else:
            self.conns[c.next].previous = c.previous


# Packets in flight, counted in groups, so that many small packets need no long table

cdef void packet_sent(Conn *c) noexcept nogil:
    cdef uint32_t last = (c.group_first + c.group_count - 1) % <uint32_t>GROUPS
    if c.group_count == 0 or (c.group_packets[last] >= GROUP and c.group_count < GROUPS):
        last = (c.group_first + c.group_count) % <uint32_t>GROUPS
        c.group_packets[last] = 0
        c.group_count += 1
    c.group_end[last] = c.tx_cnt
    c.group_packets[last] += 1
    c.packets += 1


cdef void packets_forwarded(Conn *c) noexcept nogil:
    while c.group_count and <int32_t>(c.peer_fwd_cnt - c.group_end[c.group_first]) >= 0:
        c.packets -= c.group_packets[c.group_first]
        c.group_first = (c.group_first + 1) % <uint32_t>GROUPS
        c.group_count -= 1
