# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""The packets from a socket device to the guest: connections take turns, in one list.

The list is never longer than the pool of connections, so none is served twice before the others.
"""
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport int32_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from virtio._interrupt cimport interrupt_used
from virtio.vsock._conns cimport Conn, FREE, NONE, packet_sent
from virtio.vsock._host cimport MSG_CTRUNC, MSG_DONTWAIT, lowest_bit, msghdr, peer_closed, recvmsg
from virtio.vsock._packet cimport (
    HEADER, HOST_CID, Header, OP_CREDIT_UPDATE, OP_RST, OP_RW, OP_SHUTDOWN, SHUT_BOTH, SHUT_SEND, TYPE_STREAM,
)
from virtio.vsock._sockets cimport VsockSockets
from virtio._worker cimport SERVE_MORE, SERVE_STALLED
from vmm._fastpath cimport (
    QUEUE_CHAIN, QUEUE_EMPTY, DescChain, iovec, queue_add_used, queue_flush, queue_pop, queue_unpop,
)
from vmm._iov cimport iov_part, iov_scatter
from vmm._sys cimport counter_add, eventfd_write

cdef enum:
    IOV_MAX = 1024              # Linux UIO_MAXIOV


cdef class VsockRx(VsockSockets):
    """The part of a :class:`virtio.vsock._worker.VsockWorker` that fills the rx queue."""

    cdef int serve_rx(self) noexcept nogil:
        cdef uint64_t end = self.count.packets_rx + TURN
        cdef int status = QUEUE_CHAIN
        cdef bint more = False
        if self.rings[RX].size == 0:
            return SERVE_STALLED
        while status == QUEUE_CHAIN and (self.reply_count or self.table.turn_head != NONE):
            if self.count.packets_rx >= end:
                more = True
                break
            if self.reply_count:
                status = self.send_reply()
            if status == QUEUE_CHAIN and self.table.turn_head != NONE:
                status = self.turn(&self.table.conns[self.table.turn_head])
        self.show()
        if self.tx_waits and self.reply_count < REPLIES:
            self.tx_waits = False
            eventfd_write(self.notify_tx, 1)
        if status != QUEUE_CHAIN:
            return status               # no buffers left (the driver notifies when it adds some), or a broken ring
        return SERVE_MORE if more else SERVE_STALLED    # nothing left to send: an event of a socket continues

    cdef int turn(self, Conn *c) noexcept nogil:
        cdef int status
        while c.pending:
            status = self.send_control(c, <uint16_t>lowest_bit(c.pending))
            if status != QUEUE_CHAIN:
                return status
            if c.state == FREE:
                return QUEUE_CHAIN
        if self.has_data(c) and self.credit(c):
            status = self.send_data(c)
            if status != QUEUE_CHAIN:
                return status
        self.table.unqueue(c)
        self.queue_if_ready(c)
        return QUEUE_CHAIN

    cdef int rx_chain(self, uint64_t size) noexcept nogil:
        # Take the next chain with room for `size` bytes. Shorter ones are returned empty.
        cdef DescChain *chain = self.chains[RX]
        cdef int status, _
        for _ in range(TURN):           # limited, because a driver could add bad chains for ever
            status = queue_pop(self.rings[RX], self.ram, chain)
            if status != QUEUE_CHAIN or chain.writable_bytes >= size:
                return status
            counter_add(&self.count.bad_requests, 1)
            self.give(chain.head, 0)
        return QUEUE_EMPTY

    cdef void give(self, uint16_t head, uint32_t written) noexcept nogil:
        queue_add_used(self.rings[RX], head, written)
        counter_add(&self.count.packets_rx, 1)
        self.unpublished += 1
        if self.unpublished >= PUBLISH:
            self.show()

    cdef void show(self) noexcept nogil:
        self.unpublished = 0
        if queue_flush(self.rings[RX]):
            self.interrupt()

    cdef void interrupt(self) noexcept nogil:
        # One interrupt is enough for the device: the driver's handler checks every used ring (§4.2.2, InterruptStatus).
        self.tx_owed = False
        self.tx_returned = 0
        interrupt_used(self.call, RX)

    cdef void return_tx(self) noexcept nogil:
        # A driver can only free its returned tx chains, so their interrupt is delayed, usually until one for rx is due.
        # So a request and its answer cost the guest one interrupt, not two.
        if queue_flush(self.rings[TX]):
            self.tx_owed = True
        if not self.tx_owed:
            return
        if self.tx_delay == 0 or self.tx_returned >= self.rings[TX].size // 8:
            self.interrupt()
        elif not self.tx_timed:
            self.tx_timed = True
            self.wake_after(self.tx_delay)

    cdef void fill(self, Header *h, Conn *c, uint16_t op) noexcept nogil:
        # Every packet carries our credit, so a separate credit update is rarely needed.
        h.src_cid = HOST_CID
        h.dst_cid = self.guest_cid
        h.src_port = c.host_port
        h.dst_port = c.guest_port
        h.len = 0
        h.type = TYPE_STREAM
        h.op = op
        h.flags = c.shut if op == OP_SHUTDOWN else 0
        if <int32_t>(c.fwd_cnt + self.window(c) - c.promised) > 0:
            c.promised = c.fwd_cnt + self.window(c)
        h.buf_alloc = c.promised - c.fwd_cnt
        h.fwd_cnt = c.fwd_cnt
        c.pending &= ~(<uint32_t>1 << OP_CREDIT_UPDATE)

    cdef int send_control(self, Conn *c, uint16_t op) noexcept nogil:
        cdef DescChain *chain = self.chains[RX]
        cdef Header h
        cdef int status = self.rx_chain(HEADER)
        if status != QUEUE_CHAIN:
            return status
        self.fill(&h, c, op)
        c.pending &= ~(<uint32_t>1 << op)
        iov_scatter(chain.iov + chain.n_readable, chain.n_writable, 0, &h, HEADER)
        self.give(chain.head, HEADER)
        if op == OP_RST:
            counter_add(&self.count.resets_sent, 1)
            self.drop(c)
        return QUEUE_CHAIN

    cdef int send_reply(self) noexcept nogil:
        cdef DescChain *chain = self.chains[RX]
        cdef Reply *r = &self.replies[self.reply_head]
        cdef Header h
        cdef int status = self.rx_chain(HEADER)
        if status != QUEUE_CHAIN:
            return status
        memset(&h, 0, HEADER)
        h.src_cid, h.dst_cid = r.src_cid, self.guest_cid
        h.src_port, h.dst_port = r.src_port, r.dst_port
        h.type, h.op = r.type, OP_RST
        iov_scatter(chain.iov + chain.n_readable, chain.n_writable, 0, &h, HEADER)
        self.give(chain.head, HEADER)
        counter_add(&self.count.resets_sent, 1)
        self.reply_head = (self.reply_head + 1) % REPLIES
        self.reply_count -= 1
        return QUEUE_CHAIN

    cdef void reply_reset(self, Header *h) noexcept nogil:
        # serve_tx has checked that there is room.
        cdef Reply *r
        if h.op == OP_RST:
            return
        r = &self.replies[(self.reply_head + self.reply_count) % REPLIES]
        r.src_cid, r.src_port, r.dst_port, r.type = h.dst_cid, h.dst_port, h.src_port, h.type
        self.reply_count += 1

    cdef int send_data(self, Conn *c) noexcept nogil:
        # Read once from the socket into the buffers of several packets, leaving room for a header in front of each.
        cdef uint16_t[BATCH] heads
        cdef uint32_t[BATCH] headers            # index of each packet's first header_iov
        cdef size_t[BATCH] rooms
        cdef DescChain *chain = self.chains[RX]
        cdef iovec *iov
        cdef Header h
        cdef size_t want = min(self.credit(c), <uint32_t>MAX_PACKET), room = 0, n
        cdef uint32_t packets = 0, data = 0, header = 0, i, pieces, most = min(c.batch, self.packet_credit(c))
        cdef msghdr message
        cdef ssize_t got
        cdef int status = QUEUE_CHAIN, failure
        while packets < most and room < want:
            status = queue_pop(self.rings[RX], self.ram, chain) if packets else self.rx_chain(HEADER + 1)
            if status != QUEUE_CHAIN:
                break
            if chain.writable_bytes <= HEADER:
                # It must be returned empty, but not among chains that may still have to be put back.
                queue_unpop(self.rings[RX])
                break
            iov = chain.iov + chain.n_readable
            heads[packets] = chain.head
            headers[packets] = header
            n = 0
            i = 0
            while n < HEADER:
                self.header_iov[header] = iov[i]
                n += iov[i].iov_len
                header += 1
                i += 1
            n = min(chain.writable_bytes - HEADER, want - room)
            pieces = iov_part(iov, chain.n_writable, HEADER, n, iov, chain.n_writable)
            memcpy(&self.data_iov[data], iov, pieces * sizeof(iovec))
            data += pieces
            rooms[packets] = n
            room += n
            packets += 1
        if status < 0 or packets == 0:
            return status
        memset(&message, 0, sizeof(message))
        message.msg_iov = self.data_iov
        message.msg_iovlen = min(data, <uint32_t>IOV_MAX)
        got = recvmsg(c.fd, &message, MSG_DONTWAIT)
        failure = errno if got < 0 else 0
        if 0 < got < <ssize_t>room and data <= IOV_MAX and not c.ending and not message.msg_flags & MSG_CTRUNC:
            # A short read emptied the socket, so new data causes a new event (epoll(7), Q9). A message with descriptors
            # (SCM_RIGHTS) also ends a read early, hence the check.
            c.readable = False
        n = 0
        i = 0
        while i < packets and got > 0:
            n = min(rooms[i], <size_t>got)
            self.fill(&h, c, OP_RW)
            h.len = <uint32_t>n
            iov_scatter(&self.header_iov[headers[i]], HEADER, 0, &h, HEADER)
            self.give(heads[i], HEADER + h.len)
            c.tx_cnt += h.len
            packet_sent(c)
            counter_add(&self.count.bytes_rx, n)
            got -= <ssize_t>n
            i += 1
        # Next time twice as many chains if all were filled, otherwise one more than was needed.
        c.batch = min(c.batch * 2, <uint32_t>BATCH) if i == packets and n == rooms[i - 1] \
            else min(i + 1, <uint32_t>BATCH)
        if i == 0:
            if failure == EAGAIN:
                c.readable = False
            elif failure != EINTR:
                # The end of the socket's data, or an error.
                self.send_shutdown(c, SHUT_BOTH if failure or peer_closed(c.fd) else SHUT_SEND)
        while i < packets:
            queue_unpop(self.rings[RX])
            i += 1
        return QUEUE_CHAIN

    cdef int run_rx(self) noexcept nogil:
        if self.table.turn_head == NONE and self.reply_count == 0:
            return 0
        return self.run_queue(RX)
