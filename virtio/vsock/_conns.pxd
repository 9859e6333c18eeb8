# SPDX-License-Identifier: Apache-2.0
# The connections of a socket device: a fixed pool, found by their ports, and the list of those that wait for a turn.
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t

cdef enum:
    CONNECTIONS = 4096
    BUCKETS = 8192
    NONE = -1
    BUFFER = 262144             # what we grant the guest for a connection at most, bytes
    POOL = 1 << 25              # what all connections together are granted, but for what few had before many came
    GROUPS = 32                 # of packets under way to the guest
    GROUP = 16                  # packets of one, at least until the last group

cdef enum State:
    FREE = 0
    GREETING                    # a host program, its CONNECT line is not here yet; no ports
    CONNECTING                  # REQUEST is sent or pending
    OPEN
    CLOSING                     # no descriptor; the guest was told, its RST or the deadline ends it
    KILLED                      # no descriptor; ends when RST is sent
    LEAVING                     # the guest is done with it; no ports; what it sent is still to be written

cdef struct Conn:
    int fd                      # -1: none
    State state
    uint32_t pending            # 1 << OP_*: packets to send
    uint32_t shut               # SHUT_*: what the guest was told; SEND: the host sent its last, RCV: it reads no more
    uint32_t guest_shut         # SHUT_*: what the guest told
    bint readable               # there may be data: the last read did not say EAGAIN
    bint ending                 # an event said that the host program sends no more: reading tells when all is read
    bint asked                  # CREDIT_REQUEST was sent since there was credit last
    bint queued                 # is in the list of turns
    bint entered                # has its ports in the hash table
    uint32_t guest_port
    uint32_t host_port
    uint32_t peer_buf_alloc     # the guest's credit: free = peer_buf_alloc - (tx_cnt - peer_fwd_cnt)
    uint32_t peer_fwd_cnt
    uint32_t tx_cnt
    uint32_t rx_cnt             # ours: it may become `promised`, which never goes back
    uint32_t fwd_cnt
    uint32_t promised
    uint8_t *buffer             # ring of `size` bytes; NULL while used is 0
    uint32_t size               # what was promised and not forwarded when it was made
    uint32_t start
    uint32_t used
    uint32_t batch              # chains to try to fill at once
    uint32_t packets            # under way to the guest: sent, and not yet forwarded as a whole
    uint32_t group_first        # of the ring of groups: tx_cnt after the last packet of each, and how many it has
    uint32_t group_count
    uint32_t[GROUPS] group_end
    uint32_t[GROUPS] group_packets
    uint64_t deadline           # on the monotonic clock, ns; 0: none
    int32_t hash_next
    int32_t previous            # in the list of turns
    int32_t next                # in it, or of the free ones

cdef class Connections:
    cdef Conn *conns
    cdef int32_t[BUCKETS] buckets
    cdef int32_t free_head
    cdef uint32_t fresh         # conns from here on were never used
    cdef uint32_t live
    cdef uint32_t window        # what each is granted now: BUFFER, or its share of POOL
    cdef int32_t turn_head
    cdef int32_t turn_tail
    cdef void forget(self) noexcept nogil
    cdef Conn *take(self) noexcept nogil                    # a zeroed one; NULL: there is none
    cdef void count(self, int32_t more) noexcept nogil
    cdef void give_back(self, Conn *c) noexcept nogil       # it has no ports and no turn
    cdef Conn *find(self, uint32_t guest_port, uint32_t host_port) noexcept nogil
    cdef void enter(self, Conn *c, uint32_t guest_port, uint32_t host_port) noexcept nogil
    cdef void leave(self, Conn *c) noexcept nogil           # its ports may be used again
    cdef void queue(self, Conn *c) noexcept nogil           # to the end of the list
    cdef void unqueue(self, Conn *c) noexcept nogil

cdef void packet_sent(Conn *c) noexcept nogil           # tx_cnt counts it already
cdef void packets_forwarded(Conn *c) noexcept nogil     # peer_fwd_cnt has changed
