# SPDX-License-Identifier: Apache-2.0
# The host programs' ends of a socket device's connections: base class of the device's thread.
from libc.stdint cimport uint32_t, uint64_t

from virtio._worker cimport QueueWorker
from virtio.vsock._conns cimport Conn, Connections, State
from virtio.vsock._packet cimport Header
from vmm._fastpath cimport DescChain, iovec

cdef enum:
    TOKEN_LISTENER = 0x10000
    FIRST_HOST_PORT = 1 << 30   # of the connections that host programs open
    SECOND = 1000000000
    TICK = SECOND // 8          # time between two looks at the deadlines, ns
    RETRY = SECOND // 100       # time until a guest is asked for credit again, ns

cdef struct Counters:
    uint64_t packets_tx         # tx: guest to host
    uint64_t packets_rx
    uint64_t bytes_tx
    uint64_t bytes_rx
    uint64_t opened_by_guest
    uint64_t opened_by_host
    uint64_t refused            # connections to a port on which no program listens, on either side
    uint64_t closed
    uint64_t resets_sent
    uint64_t bad_requests
    uint64_t bad_credit
    uint64_t bad_lines
    uint64_t timeouts
    uint64_t full               # connections refused or reset because there was no place, descriptor or memory

cdef class VsockSockets(QueueWorker):
    cdef Connections table
    cdef uint32_t deadlines             # number of conns with a deadline
    cdef uint32_t stuck                 # about how many conns wait for credit and may have to ask again
    cdef const char *path               # of the listener, and before the port of those that the guest connects to
    cdef bytes prefix                   # keeps `path`
    cdef uint32_t last_port
    cdef uint64_t tick_at               # when the timer calls tick(), CLOCK_MONOTONIC, ns; 0: it is not set
    cdef bint listening
    cdef bint settling                  # host programs wait until the driver has handled it: it closes all connections
    cdef int listener
    cdef Counters count
    cdef uint64_t line_wait             # longest wait for a CONNECT line, ns
    cdef uint64_t guest_wait
    cdef uint64_t host_wait
    cdef uint64_t end_wait
    cdef Conn *make(self, int fd, State state) noexcept nogil
    cdef void close_all(self) noexcept nogil
    cdef void drop(self, Conn *c) noexcept nogil
    cdef void kill(self, Conn *c) noexcept nogil
    cdef void tick_after(self, uint64_t nanoseconds) noexcept nogil
    cdef void end_overdue(self) noexcept nogil
    cdef void listen(self) noexcept nogil
    cdef void accept_some(self) noexcept nogil
    cdef Conn *connect_to(self, uint32_t port) noexcept nogil
    cdef void socket_event(self, Conn *c) noexcept nogil
    cdef void send_shutdown(self, Conn *c, uint32_t flags) noexcept nogil
    cdef void forwarded(self, Conn *c, uint32_t n) noexcept nogil
    cdef void deliver(self) noexcept nogil
    cdef void accepted(self, Conn *c) noexcept nogil
    cdef void data(self, Conn *c, Header *h, DescChain *chain) noexcept nogil
    cdef void guest_closed(self, Conn *c) noexcept nogil
    cdef uint32_t credit(self, Conn *c) noexcept nogil
    cdef uint32_t packet_credit(self, Conn *c) noexcept nogil
    cdef bint has_data(self, Conn *c) noexcept nogil
    cdef uint32_t window(self, Conn *c) noexcept nogil
    cdef void queue_if_ready(self, Conn *c) noexcept nogil
    cdef bint credited(self, Conn *c, Header *h) noexcept nogil
    cdef void ask_again(self) noexcept nogil
