# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""The socket device's thread (virtio 1.2 §5.10): moves data between the guest's packets and unix sockets, without the
GIL.

It has three layers, each a class on top of the one before: the host programs' sockets (``_sockets.pyx``), the packets
to the guest (``_rx.pyx``), and here the packets from the guest and the thread's start and end. Every connection is a
`Conn` in a fixed pool; its index is its epoll token.
"""
import os

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdio cimport snprintf

from virtio.vsock._conns cimport (
    BUFFER, CONNECTING, CONNECTIONS, Conn, Connections, FREE, GREETING, KILLED, LEAVING, NONE, OPEN,
    packets_forwarded,
)
from virtio.vsock._host cimport (
    AF_UNIX, EPOLLET, EPOLLIN, EPOLLOUT, EPOLLRDHUP, MSG_DONTWAIT, MSG_NOSIGNAL, SHUT_RD_, SHUT_WR_, SOCK_CLOEXEC,
    SOCK_NONBLOCK, SOCK_STREAM, connect, send, shutdown, sockaddr, sockaddr_un, socket,
)
from virtio.vsock._packet cimport (
    HEADER, HOST_CID, Header, LINE, OP_CREDIT_REQUEST, OP_CREDIT_UPDATE, OP_REQUEST, OP_RESPONSE, OP_RST, OP_RW,
    OP_SHUTDOWN, SHUT_BOTH, SHUT_RCV, SHUT_SEND, TYPE_STREAM,
)
from virtio.vsock._rx cimport EVENT, MAX_CHAIN, MAX_PACKET, PUBLISH, REPLIES, RX, TURN, TX, VsockRx
from virtio.vsock._sockets cimport FIRST_HOST_PORT, RETRY, SECOND, TICK, TOKEN_LISTENER
from virtio._worker cimport SERVE_EMPTY, SERVE_MORE, SERVE_STALLED, TOKEN_TIMER
from vmm._budget cimport FOR_OPEN, granted
from vmm._fastpath cimport QUEUE_CHAIN, QUEUE_EMPTY, DescChain, load_acquire16, queue_add_used, queue_flush, queue_pop
from vmm._iov cimport copy_once, iov_gather, iov_part, iov_scatter
from vmm._sys cimport CLOCK_MONOTONIC, clock_ns, close, counter_add
from vmm.budget import memory

MAX_CONNECTIONS = CONNECTIONS
MAX_WINDOW = BUFFER     # bytes that the guest may send at most before they are forwarded, for each connection

cdef enum:
    SETTLE = SECOND // 4000


cdef class VsockWorker(VsockRx):
    """The thread of a :class:`virtio.vsock.device.Vsock`, which has the guest's CID and the listening socket."""

    cdef bint reset_due                 # a TRANSPORT_RESET event must be sent to the driver
    cdef object kept                    # a connection that goes on in this copy: its socket and its numbers; or None
    cdef object lost                    # the ports of those that do not: pairs of the guest's and the host's
    cdef uint64_t settle_until
    cdef uint16_t events_given          # number of event buffers the driver had offered when the event was sent
    cdef bytes prefix                   # path prefix of the sockets for guest-initiated connections
    cdef const char *path

    def __init__(self, device, indices, notify_fds, on_failure, name=None):
        super().__init__(device, indices, notify_fds, on_failure, name)
        self.memory = memory
        self.table = Connections()
        if max(device.queue_sizes) > MAX_CHAIN:
            raise ValueError(f"a queue of the socket device has at most {MAX_CHAIN} entries")
        self.notify_tx = notify_fds[TX]
        self.guest_cid = device.guest_cid
        self.listener = device.listener.fd
        self.prefix = os.fsencode(device.listener.path)
        self.path = self.prefix
        self.last_port = FIRST_HOST_PORT - 1
        self.clear()

    def begin(self):
        """Accept connections from host programs."""
        self.line_wait, self.guest_wait, self.host_wait, self.end_wait, self.tx_delay = (
            int(getattr(self.device, name) * SECOND)
            for name in ("line_wait", "guest_wait", "host_wait", "end_wait", "tx_delay"))
        self.listening = False
        self.poll_ns = 0                # no busy polling of the rings: the sockets would have to wait
        self.settling = self.reset_due
        self.settle_until = clock_ns(CLOCK_MONOTONIC) + <uint64_t>int(self.device.settle_wait * SECOND)
        if self.kept is not None:
            self.go_on_with(self.kept, self.lost)
            self.kept = self.lost = None
        self.listen()
        if self.settling:
            self.wake_after(SETTLE)
        elif self.table.live:
            self.wake_after(1)          # continue the deadlines after a stop

    def forget(self):
        """Close every connection: their driver is gone."""
        cdef uint32_t i
        for i in range(self.table.fresh):
            if self.table.conns[i].state != FREE:
                self.close_host(&self.table.conns[i])
                counter_add(&self.count.closed, 1)
        self.clear()

    cdef void clear(self) noexcept nogil:
        self.table.forget()
        self.reply_head = self.reply_count = self.deadlines = self.unpublished = self.tx_returned = self.stuck = 0
        self.tx_waits = self.tx_owed = self.tx_timed = self.reset_due = self.settling = False

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
                    int(c.state == OPEN and not c.shut and not c.guest_shut and not c.used),
                    c.peer_buf_alloc, c.peer_fwd_cnt, c.tx_cnt, c.rx_cnt, c.fwd_cnt, c.promised))
        return found

    def keep(self, stream, kept, lost):
        """Go on with one connection of another device, in place of ``reset_transport``. Call it before ``start``.

        :param stream: a socket that does not block, the host's end; this worker owns it from here on
        :param kept: the connection's nine integers, from ``save``
        :param lost: the ports of all others: pairs of the guest's and the host's. The driver gets an RST for each
        """
        self.kept = stream, kept
        self.lost = lost
        self.reset_due = False

    cdef go_on_with(self, kept, lost):
        cdef Conn *c
        for guest_port, host_port in lost:
            c = self.table.take()
            if c != NULL:               # there is room: the other device had as many
                c.fd = NONE
                c.state = KILLED
                c.pending = 1 << OP_RST
                self.table.enter(c, guest_port, host_port)
                self.queue_if_ready(c)
        stream, numbers = kept
        c = self.make(stream.detach(), OPEN)
        if c == NULL:                   # the socket was closed, which its host program sees
            self.reset_due = self.settling = True
            return
        guest_port, host_port = numbers[:2]
        self.table.enter(c, guest_port, host_port)
        c.peer_buf_alloc, c.peer_fwd_cnt, c.tx_cnt, c.rx_cnt, c.fwd_cnt, c.promised = numbers[3:]
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
        self.tx_timed = False
        self.unwatch(self.listener)
        self.wake_after(0)
        if self.leaving():
            self.deliver()

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
        return self.run_rx()

    cdef void tick(self) noexcept nogil:
        cdef uint64_t now = clock_ns(CLOCK_MONOTONIC)
        cdef uint32_t i
        cdef Conn *c
        self.tx_timed = False
        if self.tx_owed:
            self.interrupt()
        self.settling = self.settling and not self.settled()
        self.listen()
        for i in range(self.table.fresh):
            c = &self.table.conns[i]
            if c.state == FREE or c.deadline == 0 or c.deadline > now:
                continue
            counter_add(&self.count.timeouts, 1)
            if c.state == GREETING or c.state == LEAVING:
                self.drop(c)
            else:
                self.kill(c)
        if self.stuck:
            self.ask_again()
        if self.settling:
            self.wake_after(SETTLE)
        elif self.stuck:
            self.wake_after(RETRY)
        elif self.deadlines or not self.listening:
            self.wake_after(TICK)

    cdef void ask_again(self) noexcept nogil:
        # A guest sends credit updates for bytes, but not always when it has read only some packets. So ask again.
        cdef uint32_t i
        cdef Conn *c
        self.stuck = 0
        for i in range(self.table.fresh):
            c = &self.table.conns[i]
            if c.asked and self.has_data(c) and self.waits_for_packets(c):
                c.asked = False
                self.queue_if_ready(c)

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
            self.guest_shutdown(c, h.flags & SHUT_BOTH)
        elif h.op == OP_CREDIT_REQUEST:
            c.pending |= 1 << OP_CREDIT_UPDATE
        if c.state != FREE and c.state != LEAVING:
            self.queue_if_ready(c)

    cdef bint credited(self, Conn *c, Header *h) noexcept nogil:
        # Read the credit fields of a packet. Returns False if it confirms bytes that were never sent.
        cdef uint32_t under_way = c.tx_cnt - h.fwd_cnt
        if under_way > c.tx_cnt - c.peer_fwd_cnt:
            counter_add(&self.count.bad_credit, 1)
            # An older fwd_cnt is ignored. One ahead of tx_cnt is invalid.
            return under_way < <uint32_t>1 << 31
        c.peer_buf_alloc = h.buf_alloc
        c.peer_fwd_cnt = h.fwd_cnt
        packets_forwarded(c)
        if self.credit(c):
            c.asked = False
        return True

    cdef void open(self, Header *h) noexcept nogil:
        cdef sockaddr_un address
        cdef Conn *c
        cdef int length, fd
        address.sun_family = AF_UNIX
        length = snprintf(address.sun_path, sizeof(address.sun_path), "%s_%u", self.path, h.dst_port)
        fd = granted(socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), FOR_OPEN)
        if fd < 0 or length >= <int>sizeof(address.sun_path) \
                or connect(fd, <sockaddr *>&address, sizeof(address)) < 0:
            if fd < 0:
                counter_add(&self.count.full, 1)
            else:
                close(fd)
                counter_add(&self.count.refused, 1)
            self.reply_reset(h)
            return
        c = self.make(fd, OPEN)
        if c == NULL:
            self.reply_reset(h)
            return
        counter_add(&self.count.opened_by_guest, 1)
        self.table.enter(c, h.src_port, h.dst_port)
        c.peer_buf_alloc = h.buf_alloc
        c.pending = 1 << OP_RESPONSE
        self.queue_if_ready(c)

    cdef void accepted(self, Conn *c) noexcept nogil:
        # The guest has accepted a host program's connection.
        cdef char[LINE] line
        cdef int n = snprintf(line, LINE, "OK %u\n", c.host_port)
        self.set_deadline(c, 0)
        c.state = OPEN
        c.readable = True
        counter_add(&self.count.opened_by_host, 1)
        if send(c.fd, line, <size_t>n, MSG_DONTWAIT | MSG_NOSIGNAL) != n:
            self.kill(c)

    cdef void data(self, Conn *c, Header *h, DescChain *chain) noexcept nogil:
        cdef ssize_t n = 0
        cdef uint32_t count, at, room
        cdef size_t i
        if c.guest_shut & SHUT_SEND or h.len > c.promised - c.rx_cnt:
            counter_add(&self.count.bad_credit, 1)
            self.kill(c)
            return
        counter_add(&self.count.bytes_tx, h.len)
        c.rx_cnt += h.len
        if c.fd < 0 or c.shut & SHUT_RCV:
            c.fwd_cnt += h.len          # no program reads it any more: discard it
            return
        count = iov_part(chain.iov, chain.n_readable, HEADER, h.len, chain.iov, chain.n_readable)
        if c.used == 0 and count:
            n = self.write(c, chain.iov, count)
            if n < 0:
                c.fwd_cnt += h.len
                self.host_stopped_reading(c)
                return
            self.forwarded(c, <uint32_t>n)
        if <uint32_t>n == h.len:
            return
        if c.buffer == NULL:
            if not self.make_buffer(c) or self.watch(
                    c.fd, self.token(c), EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET) < 0:
                counter_add(&self.count.full, 1)
                self.kill(c)
                return
        count = iov_part(chain.iov, count, <size_t>n, h.len - <size_t>n, chain.iov, count)
        for i in range(count):
            at = (c.start + c.used) % c.size
            room = min(<uint32_t>chain.iov[i].iov_len, c.size - at)
            copy_once(c.buffer + at, chain.iov[i].iov_base, room)
            copy_once(c.buffer, <uint8_t *>chain.iov[i].iov_base + room, chain.iov[i].iov_len - room)
            c.used += <uint32_t>chain.iov[i].iov_len

    cdef void guest_shutdown(self, Conn *c, uint32_t flags) noexcept nogil:
        cdef uint32_t fresh = flags & ~c.guest_shut
        cdef Header h
        c.guest_shut |= flags           # a guest cannot revoke it (§5.10.6.6)
        if c.guest_shut == SHUT_BOTH:
            # Reply with RST, after which the guest may use its port again.
            h.src_port, h.dst_port, h.dst_cid = c.guest_port, c.host_port, HOST_CID
            h.type, h.op = TYPE_STREAM, OP_SHUTDOWN
            self.reply_reset(&h)
            self.guest_closed(c)
            return
        if c.fd < 0:
            return
        if fresh & SHUT_RCV:
            shutdown(c.fd, SHUT_RD_)
        if fresh & SHUT_SEND and c.used == 0:
            shutdown(c.fd, SHUT_WR_)

    cdef void guest_closed(self, Conn *c) noexcept nogil:
        # The guest has closed the connection. Data that it sent before still goes to the host program.
        if c.state == CONNECTING:
            counter_add(&self.count.refused, 1)
        if c.used == 0 or c.state != OPEN:
            self.drop(c)
            return
        self.table.leave(c)
        if c.queued:
            self.table.unqueue(c)
        c.state = LEAVING
        c.pending = 0
        self.set_deadline(c, self.host_wait)
