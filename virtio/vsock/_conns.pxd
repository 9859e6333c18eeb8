# SPDX-License-Identifier: Apache-2.0
# The connections of a socket device: a fixed pool, a hash table by ports, and the list of those waiting for a turn.
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t

cdef enum:
    CONNECTIONS = 4096
    BUCKETS = 8192
    NONE = -1
    BUFFER = 262144             # most credit granted to the guest for one connection, bytes
    POOL = 1 << 25              # credit for all connections together, bytes; earlier grants may exceed it
    GROUPS = 32                 # groups of packets in flight to the guest
    GROUP = 16                  # packets in one group; the last group may have more

cdef enum State:
    FREE = 0
    GREETING                    # a host program whose CONNECT line has not arrived; no ports yet
    CONNECTING                  # REQUEST is sent or pending
    OPEN
    CLOSING                     # no descriptor; the guest was told; ends with its RST or at the deadline
    KILLED                      # no descriptor; ends when our RST is sent
    LEAVING                     # closed by the guest; no ports; its data must still be written to the socket

cdef struct Conn:
    int fd                      # -1: none
    State state
    uint32_t pending            # 1 << OP_*: packets to send
    uint32_t shut               # SHUT_* sent to the guest: SEND: the host sends no more; RCV: it reads no more
    uint32_t guest_shut         # SHUT_* received from the guest
    bint readable               # the socket may have data: the last read did not return EAGAIN
    bint ending                 # an event said that the host program sends no more; read until the end
    bint asked                  # CREDIT_REQUEST was sent since credit ran out
    bint queued                 # it is in the list of turns
    bint entered                # its ports are in the hash table
    uint32_t guest_port
    uint32_t host_port
    uint32_t peer_buf_alloc     # the guest's credit: free = peer_buf_alloc - (tx_cnt - peer_fwd_cnt)
    uint32_t peer_fwd_cnt
    uint32_t tx_cnt
    uint32_t rx_cnt             # our credit: rx_cnt may grow to `promised`, which never shrinks
    uint32_t fwd_cnt
    uint32_t promised
    uint8_t *buffer             # ring buffer of `size` bytes, owned; NULL while `used` is 0
    uint32_t size               # the credit not yet forwarded when the buffer was made
    uint32_t start
    uint32_t used
    uint32_t batch              # number of chains to fill with the next read
    uint32_t packets            # packets in flight to the guest: sent but not wholly forwarded
    uint32_t group_first        # start of the ring of groups: for each, tx_cnt after its last packet, and its packets
    uint32_t group_count
    uint32_t[GROUPS] group_end
    uint32_t[GROUPS] group_packets
    uint64_t deadline           # CLOCK_MONOTONIC, ns; 0: none
    int32_t hash_next
    int32_t previous            # previous in the list of turns
    int32_t next                # next in the list of turns, or in the free list

cdef class Connections:
    cdef Conn *conns
    cdef int32_t[BUCKETS] buckets
    cdef int32_t free_head
    cdef uint32_t fresh         # the conns from this index on were never used
    cdef uint64_t live
    cdef uint32_t window        # credit for one connection now, bytes: BUFFER, or its share of POOL
    cdef int32_t turn_head
    cdef int32_t turn_tail
    cdef void forget(self) noexcept nogil
    cdef Conn *take(self) noexcept nogil                    # a zeroed Conn; NULL: none is free
    cdef void count(self, int32_t more) noexcept nogil
    cdef void give_back(self, Conn *c) noexcept nogil       # free it; it has no ports and no turn
    cdef Conn *find(self, uint32_t guest_port, uint32_t host_port) noexcept nogil
    cdef void enter(self, Conn *c, uint32_t guest_port, uint32_t host_port) noexcept nogil
    cdef void leave(self, Conn *c) noexcept nogil           # remove its ports from the table
    cdef void queue(self, Conn *c) noexcept nogil           # add it to the end of the list
    cdef void unqueue(self, Conn *c) noexcept nogil

cdef void packet_sent(Conn *c) noexcept nogil           # after tx_cnt was increased
cdef void packets_forwarded(Conn *c) noexcept nogil     # after peer_fwd_cnt has changed
