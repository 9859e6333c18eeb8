# SPDX-License-Identifier: Apache-2.0
# The packets from a socket device to the guest: base class of the device's thread.
from libc.stdint cimport uint16_t, uint32_t, uint64_t

from virtio.vsock._conns cimport Conn
from virtio.vsock._packet cimport HEADER, Header
from virtio.vsock._sockets cimport VsockSockets
from vmm._fastpath cimport iovec

cdef enum:
    RX = 0                      # slots of the queues; also their numbers in the device (§5.10.2)
    TX = 1
    EVENT = 2
    MAX_PACKET = 65536          # most payload of one packet, as in Linux (VIRTIO_VSOCK_MAX_PKT_BUF_SIZE)
    TURN = 128                  # chains of one queue before other events are handled
    BATCH = 16                  # most chains filled by one readv
    MAX_CHAIN = 256             # most buffers of a chain: the queue's size
    PUBLISH = 16                # chains returned between two publications of the used ring
    REPLIES = 256               # most pending resets for packets of unknown connections

cdef struct Reply:
    uint64_t src_cid
    uint32_t src_port
    uint32_t dst_port
    uint16_t type

cdef class VsockRx(VsockSockets):
    cdef Reply[REPLIES] replies
    cdef uint32_t reply_head
    cdef uint32_t reply_count
    cdef uint32_t unpublished
    cdef bint tx_waits                  # the tx queue waits for room in `replies`
    cdef bint tx_owed                   # an interrupt for returned tx chains is due: see return_tx
    cdef uint32_t tx_returned           # tx chains returned since the last interrupt
    cdef uint64_t guest_cid
    cdef int notify_tx
    cdef uint64_t tx_delay
    cdef iovec[BATCH * MAX_CHAIN] data_iov
    cdef iovec[BATCH * HEADER] header_iov
    cdef int serve_rx(self) noexcept nogil
    cdef int turn(self, Conn *c) noexcept nogil
    cdef int rx_chain(self, uint64_t size) noexcept nogil
    cdef void give(self, uint16_t head, uint32_t written) noexcept nogil
    cdef void show(self) noexcept nogil
    cdef void interrupt(self) noexcept nogil
    cdef void return_tx(self) noexcept nogil
    cdef void fill(self, Header *h, Conn *c, uint16_t op) noexcept nogil
    cdef int send_control(self, Conn *c, uint16_t op) noexcept nogil
    cdef int send_reply(self) noexcept nogil
    cdef void reply_reset(self, Header *h) noexcept nogil
    cdef int send_data(self, Conn *c) noexcept nogil
    cdef int run_rx(self) noexcept nogil
