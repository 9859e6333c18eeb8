# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""The socket device's thread (virtio 1.2 §5.10): moves data between the guest's packets and unix sockets, without the
GIL.

It has two layers, each a class: the host programs' sockets (``_sockets.pyx``), and on top of it the queues with their
packets and the thread's start and end. Every connection is a `Conn` in a fixed pool; its index is its epoll token.
"""
import os

from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport int32_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from virtio._interrupt cimport interrupt_used
from virtio.vsock._conns cimport (
    BUFFER, CONNECTING, CONNECTIONS, Conn, Connections, FREE, KILLED, LEAVING, NONE, OPEN, packet_sent,
)
from virtio.vsock._host cimport *
from virtio.vsock._packet cimport *
from virtio.vsock._sockets cimport FIRST_HOST_PORT, RETRY, SECOND, TICK, TOKEN_LISTENER, VsockSockets
from virtio._worker cimport SERVE_EMPTY, SERVE_MORE, SERVE_STALLED, TOKEN_TIMER
from vmm._fastpath cimport (
    QUEUE_CHAIN, QUEUE_EMPTY, DescChain, iovec, load_acquire16, queue_add_used, queue_flush, queue_pop, queue_unpop,
)
from vmm._iov cimport iov_gather, iov_part, iov_scatter
from vmm._sys cimport CLOCK_MONOTONIC, clock_ns, counter_add, eventfd_write

MAX_CONNECTIONS = CONNECTIONS
MAX_WINDOW = BUFFER     # bytes that the guest may send at most before they are forwarded, for each connection

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
    IOV_MAX = 1024              # Linux UIO_MAXIOV
    SETTLE = SECOND // 4000


cdef class VsockWorker(VsockSockets):
    """The thread of a :class:`virtio.vsock.device.Vsock`, which has the guest's CID and the listening socket."""

    cdef Header[REPLIES] replies        # resets for packets of unknown connections: a ring
    cdef uint32_t reply_head
    cdef uint32_t reply_count
    cdef uint32_t unpublished
    cdef bint tx_waits                  # the tx queue waits for room in `replies`
    cdef bint tx_owed                   # an interrupt for returned tx chains is due: see return_tx
    cdef bint tx_timed                  # tick() will send it
    cdef uint32_t tx_returned           # tx chains returned since the last interrupt
    cdef uint64_t guest_cid
    cdef int notify_tx
    cdef uint64_t tx_delay
    cdef iovec[BATCH * MAX_CHAIN] data_iov
    cdef iovec[BATCH * HEADER] header_iov
    cdef bint reset_due                 # a TRANSPORT_RESET event must be sent to the driver
    cdef uint64_t settle_until
    cdef uint16_t events_given          # number of event buffers the driver had offered when the event was sent

    def __init__(self, device, indices, notify_fds, on_failure, name=None):
        super().__init__(device, indices, notify_fds, on_failure, name)
        self.table = Connections()
        if max(device.queue_sizes) > MAX_CHAIN:
            raise ValueError(f"a queue of the socket device has at most {MAX_CHAIN} entries")
        self.notify_tx = notify_fds[TX]
        self.guest_cid = device.guest_cid
        self.listener = device.listener.fd
        self.prefix = os.fsencode(device.listener.path)
        self.path = self.prefix
        self.last_port = FIRST_HOST_PORT - 1

    def begin(self):
        """Accept connections from host programs."""
        self.line_wait, self.guest_wait, self.host_wait, self.end_wait, self.tx_delay = (
            int(getattr(self.device, name) * SECOND)
            for name in ("line_wait", "guest_wait", "host_wait", "end_wait", "tx_delay"))
        self.listening = self.tx_timed = False
        self.tick_at = 0
        self.in_flight = True           # poll only for the guest's answer to a packet: other events are of sockets
        self.settling = self.reset_due
        self.settle_until = clock_ns(CLOCK_MONOTONIC) + <uint64_t>int(self.device.settle_wait * SECOND)
        self.listen()
        if self.settling:
            self.tick_after(SETTLE)
        elif self.table.live:
            self.tick_after(1)          # continue the deadlines after a stop

    def forget(self):
        """Close every connection: their driver is gone."""
        self.close_all()
        self.table.forget()
        self.reply_head = self.reply_count = self.deadlines = self.unpublished = self.tx_returned = self.stuck = 0
        self.tx_waits = self.tx_owed = self.reset_due = self.settling = False

    def save(self):
        """The connections that the driver knows. The thread has stopped.

        :returns: nine integers for each: the guest's port, the host's port, 1 if this device holds nothing of it, the
            guest's ``buf_alloc`` and ``fwd_cnt``; in bytes, what was sent to the guest, received from it and forwarded
            to the host, and what may be received in all
        """
        cdef uint32_t i
        cdef Conn *c
        found = []
        for i in range(self.table.fresh):
            c = &self.table.conns[i]
            if c.state != FREE and c.entered:
                found.append((
                    c.guest_port, c.host_port,
                    int(c.state == OPEN and not (c.shut or c.guest_shut or c.used or c.pending & 1 << OP_RESPONSE)),
                    c.peer_buf_alloc, c.peer_fwd_cnt, c.tx_cnt, c.rx_cnt, c.fwd_cnt, c.promised))
        return found

    def keep(self, stream, kept, lost):
        """Go on with one connection of another device, in place of ``reset_transport``. Call it before ``start``.

        :param stream: a socket that does not block, the host's end; this worker owns it from here on
        :param kept: the connection's nine integers, from ``save``
        :param lost: the ports of all others: pairs of the guest's and the host's. The driver gets an RST for each
        """
        cdef Conn *c
        self.reset_due = False
        for guest_port, host_port in lost:
            c = self.table.take()
            if c != NULL:               # there is room: the other device had as many
                c.fd = NONE
                c.state = KILLED
                c.pending = 1 << OP_RST
                self.table.enter(c, guest_port, host_port)
                self.queue_if_ready(c)
        c = self.make(stream.detach(), OPEN)
        if c == NULL:                   # the socket was closed, which its host program sees
            self.reset_due = True
            return
        self.table.enter(c, kept[0], kept[1])
        c.peer_buf_alloc, c.peer_fwd_cnt, c.tx_cnt, c.rx_cnt, c.fwd_cnt, c.promised = kept[3:]
        c.readable = True
        self.forwarded(c, 0)            # a credit update may have been due
        self.queue_if_ready(c)

    def reset_transport(self):
        """Tell the driver that all its connections are gone (§5.10.6.7). Call it before ``start``."""
        self.reset_due = True
        # A guest program that has not yet closed an old connection still holds its ports, so new ones get other ports.
        self.last_port = FIRST_HOST_PORT | int.from_bytes(os.urandom(4), "little") % FIRST_HOST_PORT

    cdef int send_reset_event(self) noexcept nogil:
        # Send VIRTIO_VSOCK_EVENT_TRANSPORT_RESET in the driver's next event buffer.
        cdef DescChain *chain = self.chains[EVENT]
        cdef uint32_t event = 0
        cdef int status
        while self.reset_due:
            status = queue_pop(self.rings[EVENT], self.ram, chain)
            if status != QUEUE_CHAIN:
                return status
            if chain.n_readable or chain.writable_bytes < sizeof(event):
                counter_add(&self.count.bad_requests, 1)
                queue_add_used(self.rings[EVENT], chain.head, 0)
                continue
            iov_scatter(chain.iov, chain.n_writable, 0, &event, sizeof(event))
            self.events_given = load_acquire16(self.rings[EVENT].avail + 2)
            queue_add_used(self.rings[EVENT], chain.head, sizeof(event))
            self.reset_due = False
        if queue_flush(self.rings[EVENT]):
            self.interrupt()
        return SERVE_STALLED

    cdef bint settled(self) noexcept nogil:
        # A driver offers the event buffer again once it has handled the event.
        if clock_ns(CLOCK_MONOTONIC) >= self.settle_until:
            return True
        return not self.reset_due and load_acquire16(self.rings[EVENT].avail + 2) != self.events_given

    cdef void finish(self) noexcept nogil:
        if self.rings[RX].size:
            self.show()
        if self.tx_owed:
            self.interrupt()
        self.unwatch(self.listener)
        if self.leaving():
            self.take_the_rest()
            self.deliver()

    cdef void take_the_rest(self) noexcept nogil:
        # What the guest sent right before its end, while this thread was busy. Nobody looks at the used ring again.
        cdef DescChain *chain = self.chains[TX]
        cdef uint32_t _
        for _ in range(self.rings[TX].size):
            if self.reply_count == REPLIES or queue_pop(self.rings[TX], self.ram, chain) != QUEUE_CHAIN:
                return
            self.packet(chain)

    cdef int serve(self, uint32_t slot) noexcept nogil:
        if slot == RX:
            return self.serve_rx()
        if slot == TX:
            return self.serve_tx()
        return self.send_reset_event() if self.reset_due else SERVE_STALLED   # event buffers are kept for later

    cdef int event(self, uint32_t token) noexcept nogil:
        if token == TOKEN_LISTENER:
            self.accept_some()
        elif token == TOKEN_TIMER:
            self.tick()
        elif token < self.table.fresh:
            self.socket_event(&self.table.conns[token])
        self.in_flight = self.table.turn_head == NONE
        return self.run_rx()

    cdef void tick(self) noexcept nogil:
        self.tx_timed = False
        self.tick_at = 0
        if self.tx_owed:
            self.interrupt()
        self.settling = self.settling and not self.settled()
        self.listen()
        self.end_overdue()
        if self.stuck:
            self.ask_again()
        if self.settling:
            self.tick_after(SETTLE)
        elif self.stuck:
            self.tick_after(RETRY)
        elif self.deadlines or not self.listening:
            self.tick_after(TICK)

    # Packets to the guest: connections take turns, in a list that is never longer than their pool. So none is served
    # twice before the others.

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
            self.tick_after(self.tx_delay)

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
        cdef int status = self.rx_chain(HEADER)
        if status != QUEUE_CHAIN:
            return status
        iov_scatter(chain.iov + chain.n_readable, chain.n_writable, 0, &self.replies[self.reply_head], HEADER)
        self.give(chain.head, HEADER)
        counter_add(&self.count.resets_sent, 1)
        self.reply_head = (self.reply_head + 1) % REPLIES
        self.reply_count -= 1
        return QUEUE_CHAIN

    cdef void reply_reset(self, Header *h) noexcept nogil:
        # serve_tx has checked that there is room.
        cdef Header *reply
        if h.op == OP_RST:
            return
        reply = &self.replies[(self.reply_head + self.reply_count) % REPLIES]
        memset(reply, 0, HEADER)
        reply.src_cid, reply.dst_cid = h.dst_cid, self.guest_cid
        reply.src_port, reply.dst_port = h.dst_port, h.src_port
        reply.type, reply.op = h.type, OP_RST
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

    # Packets from the guest

    cdef int serve_tx(self) noexcept nogil:
        cdef DescChain *chain = self.chains[TX]
        cdef int status = QUEUE_EMPTY, taken = 0
        while taken < TURN and self.reply_count < REPLIES:
            status = queue_pop(self.rings[TX], self.ram, chain)
            if status != QUEUE_CHAIN:
                break
            self.packet(chain)
            queue_add_used(self.rings[TX], chain.head, 0)
            taken += 1
            self.tx_returned += 1
            if taken % PUBLISH == 0:
                self.return_tx()
        self.in_flight = True
        if queue_flush(self.rings[TX]):
            self.tx_owed = True         # set it before any interrupt for rx
        if status < 0:
            self.return_tx()
            return status
        if self.reply_count == REPLIES:
            # §5.10.6.1.2: a guest that sends requests but takes no replies must wait.
            self.tx_waits = True
            status = SERVE_STALLED
        elif taken == TURN:
            status = SERVE_MORE
        else:
            status = SERVE_EMPTY
        taken = self.run_rx()
        self.return_tx()
        return taken if taken < 0 else status

    cdef void packet(self, DescChain *chain) noexcept nogil:
        cdef Header h
        cdef Conn *c
        counter_add(&self.count.packets_tx, 1)
        if iov_gather(chain.iov, chain.n_readable, 0, &h, HEADER) < HEADER or h.src_cid != self.guest_cid:
            counter_add(&self.count.bad_requests, 1)
            return
        if h.dst_cid != HOST_CID or h.type != TYPE_STREAM:
            counter_add(&self.count.bad_requests, 1)
            self.reply_reset(&h)
            return
        c = self.table.find(h.src_port, h.dst_port)
        if h.len > MAX_PACKET or h.len > chain.readable_bytes - HEADER:
            # Bytes of the stream are lost, so the connection cannot continue.
            counter_add(&self.count.bad_requests, 1)
            if c == NULL:
                self.reply_reset(&h)
            elif c.state != KILLED:
                self.kill(c)
        elif c == NULL:
            if h.op == OP_REQUEST:
                self.open(&h)
            else:
                self.reply_reset(&h)
        elif h.op == OP_RST:
            self.guest_closed(c)
        elif c.state != KILLED:
            self.known(c, &h, chain)

    cdef void known(self, Conn *c, Header *h, DescChain *chain) noexcept nogil:
        # Handle a packet of a known connection, which may be closing.
        if not self.credited(c, h):
            self.kill(c)
        elif h.op == OP_RESPONSE and c.state == CONNECTING:
            self.accepted(c)
        elif c.state == CONNECTING or not OP_SHUTDOWN <= h.op <= OP_CREDIT_REQUEST:
            counter_add(&self.count.bad_requests, 1)
            self.kill(c)
        elif h.op == OP_RW:
            self.data(c, h, chain)
        elif h.op == OP_SHUTDOWN:
            self.guest_shutdown(c, h)
        elif h.op == OP_CREDIT_REQUEST:
            c.pending |= 1 << OP_CREDIT_UPDATE
        if c.state != FREE and c.state != LEAVING:
            self.queue_if_ready(c)

    cdef void open(self, Header *h) noexcept nogil:
        cdef Conn *c = self.connect_to(h.dst_port)
        if c == NULL:
            self.reply_reset(h)
            return
        counter_add(&self.count.opened_by_guest, 1)
        self.table.enter(c, h.src_port, h.dst_port)
        c.peer_buf_alloc = h.buf_alloc
        c.pending = 1 << OP_RESPONSE
        self.queue_if_ready(c)

    cdef void guest_shutdown(self, Conn *c, Header *h) noexcept nogil:
        cdef uint32_t fresh = h.flags & SHUT_BOTH & ~c.guest_shut
        c.guest_shut |= fresh           # a guest cannot revoke it (§5.10.6.6)
        if c.guest_shut == SHUT_BOTH:
            # Reply with RST, after which the guest may use its port again.
            self.reply_reset(h)
            self.guest_closed(c)
            return
        if c.fd < 0:
            return
        if fresh & SHUT_RCV:
            shutdown(c.fd, SHUT_RD_)
        if fresh & SHUT_SEND and c.used == 0:
            shutdown(c.fd, SHUT_WR_)
