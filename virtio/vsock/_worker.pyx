# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""The socket device's thread (virtio 1.2 §5.10): moves data between the guest's packets and unix sockets, without the
GIL.

Every connection is a `Conn` in a fixed pool; its index is its epoll token. Its descriptor is watched edge-triggered, so
a connection that must wait costs nothing: `readable` remembers that there may be data, and `used` that guest data waits
for room in the socket. A packet that a connection must send to the guest is a bit in `pending`. Connections take turns,
in one list, which is never longer than the pool. So none is served twice before the others.
"""
import os

from libc.errno cimport EAGAIN, ECONNABORTED, EINTR, errno
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdio cimport snprintf
from libc.stdlib cimport free, malloc
from libc.string cimport memchr, memcpy, memset

from virtio._interrupt cimport interrupt_used
from virtio.vsock._conns cimport (
    BUFFER, CLOSING, CONNECTING, CONNECTIONS, Conn, Connections, FREE, GREETING, KILLED, LEAVING, NONE, OPEN, State,
    packet_sent, packets_forwarded,
)
from virtio.vsock._host cimport (
    AF_UNIX, EPOLLERR, EPOLLET, EPOLLHUP, EPOLLIN, EPOLLOUT, EPOLLRDHUP, MSG_CTRUNC, MSG_DONTWAIT,
    MSG_NOSIGNAL, MSG_PEEK, SHUT_RD_, SHUT_WR_,
    SOCK_CLOEXEC, SOCK_NONBLOCK, SOCK_STREAM, SOL_SOCKET, SO_SNDBUF, accept4, connect,
    lowest_bit, msghdr, peer_closed, peer_shut_down, recv, recvmsg, send, sendmsg, setsockopt, shutdown,
    sockaddr, sockaddr_un, socket, wait_for_room,
)
from virtio.vsock._packet cimport (
    HEADER, HOST_CID, Header, LINE, OP_CREDIT_REQUEST, OP_CREDIT_UPDATE, OP_REQUEST, OP_RESPONSE, OP_RST, OP_RW,
    OP_SHUTDOWN, SHUT_BOTH, SHUT_RCV, SHUT_SEND, TYPE_STREAM, parse_line,
)
from virtio._worker cimport SERVE_EMPTY, SERVE_MORE, SERVE_STALLED, TOKEN_TIMER, QueueWorker
from vmm._budget cimport FOR_OPEN, Budget, granted
from vmm._fastpath cimport (
    QUEUE_CHAIN, QUEUE_EMPTY, DescChain, iovec, load_acquire16, queue_add_used, queue_flush, queue_pop, queue_unpop,
)
from vmm._iov cimport iov_gather, iov_part, iov_scatter
from vmm._sys cimport CLOCK_MONOTONIC, clock_ns, close, counter_add, counter_read, eventfd_write
from vmm.budget import memory

MAX_CONNECTIONS = CONNECTIONS
MAX_WINDOW = BUFFER     # bytes that the guest may send at most before they are forwarded, for each connection
# Counters. Python reads them, without a lock, at any time.
COUNTERS = (
    "packets_tx", "packets_rx", "bytes_tx", "bytes_rx", "opened_by_guest", "opened_by_host", "refused", "closed",
    "resets_sent", "bad_requests", "bad_credit", "bad_lines", "timeouts", "full",
)

cdef enum:
    RX = 0                      # places of the queues; also their numbers in the device (§5.10.2)
    TX = 1
    EVENT = 2
    TOKEN_LISTENER = 0x10000
    MAX_PACKET = 65536          # most payload of one packet, as in Linux (VIRTIO_VSOCK_MAX_PKT_BUF_SIZE)
    TURN = 128                  # chains of one queue before other events are handled
    BATCH = 16                  # most chains filled by one readv
    MAX_CHAIN = 256             # most buffers of a chain: the queue's size
    IOV_MAX = 1024              # Linux UIO_MAXIOV
    PUBLISH = 16                # chains returned between two publications of the used ring
    REPLIES = 256               # most pending resets for packets of unknown connections
    FIRST_HOST_PORT = 1 << 30
    ACCEPTS = 64
    SECOND = 1000000000
    TICK = SECOND // 8
    RETRY = SECOND // 100
    SETTLE = SECOND // 4000
    # Memory that each unread packet takes in a Linux guest in addition to its payload (SKB_TRUESIZE(0) is 576, plus
    # slack). Since Linux 6.12.92 the guest resets a connection if this overhead alone exceeds the announced buffer.
    OVERHEAD = 1024

cdef struct Reply:
    uint64_t src_cid
    uint32_t src_port
    uint32_t dst_port
    uint16_t type

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


cdef class VsockWorker(QueueWorker):
    """The thread of a :class:`virtio.vsock.device.Vsock`, which has the guest's CID and the listening socket."""

    cdef Connections table
    cdef Reply[REPLIES] replies
    cdef uint32_t reply_head
    cdef uint32_t reply_count
    cdef uint32_t deadlines             # number of conns with a deadline
    cdef uint32_t stuck                 # about how many conns wait for credit and may have to ask again
    cdef Budget memory                  # budget for the conns' buffers, bytes
    cdef uint32_t last_port
    cdef uint32_t unpublished
    cdef bint tx_waits                  # the tx queue waits for room in `replies`
    cdef bint tx_owed                   # an interrupt for returned tx chains is due: see return_tx
    cdef uint32_t tx_returned           # tx chains returned since the last interrupt
    cdef bint tx_timed                  # the timer will send that interrupt
    cdef bint listening
    cdef bint reset_due                 # a TRANSPORT_RESET event must be sent to the driver
    cdef object kept                    # a connection that goes on in this copy: its socket and its numbers; or None
    cdef object lost                    # the ports of those that do not: pairs of the guest's and the host's
    cdef bint settling                  # host programs wait until the driver has handled it: it closes all connections
    cdef uint64_t settle_until
    cdef uint16_t events_given          # number of event buffers the driver had offered when the event was sent
    cdef uint64_t guest_cid
    cdef int listener
    cdef int notify_tx
    cdef bytes prefix                   # path prefix of the sockets for guest-initiated connections
    cdef const char *path
    cdef Counters count
    cdef uint64_t line_wait             # longest wait for a CONNECT line, ns
    cdef uint64_t guest_wait
    cdef uint64_t host_wait
    cdef uint64_t end_wait
    cdef uint64_t tx_delay
    cdef iovec[BATCH * MAX_CHAIN] data_iov
    cdef iovec[BATCH * HEADER] header_iov

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

    @property
    def connections(self):
        """Number of connections: open, opening or closing."""
        return counter_read(&self.table.live)

    @property
    def counters(self):
        """Counters since the device was made, by name."""
        cdef uint64_t *words = <uint64_t *>&self.count
        return {name: counter_read(&words[i]) for i, name in enumerate(COUNTERS)}

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

    cdef void deliver(self) noexcept nogil:
        # Deliver the data that the guest sent before it powered off. A host program that does not read gets only what
        # its socket takes. The time limit is for all connections together.
        cdef uint64_t until = clock_ns(CLOCK_MONOTONIC) + self.end_wait, now
        cdef uint32_t i
        cdef Conn *c
        for i in range(self.table.fresh):
            c = &self.table.conns[i]
            while c.state != FREE and c.used:
                now = clock_ns(CLOCK_MONOTONIC)
                wait_for_room(c.fd, <int>((until - now) // 1000000) + 1 if now < until else 0)
                self.flush(c)
                if now >= until:
                    break

    # Called by QueueWorker

    cdef int serve(self, uint32_t place) noexcept nogil:
        if place == RX:
            return self.serve_rx()
        if place == TX:
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

    cdef int run_rx(self) noexcept nogil:
        if self.table.turn_head == NONE and self.reply_count == 0:
            return 0
        return self.run_queue(RX)

    # Connections

    cdef uint32_t token(self, Conn *c) noexcept nogil:
        return <uint32_t>(c - self.table.conns)

    cdef Conn *make(self, int fd, State state) noexcept nogil:
        # Take a Conn for fd. If there is none, close fd and return NULL.
        cdef Conn *c = self.table.take()
        cdef int size
        if c == NULL:
            counter_add(&self.count.full, 1)
            close(fd)
            return NULL
        c.fd = fd
        c.state = state
        c.batch = 1
        size = <int>self.table.window // 2      # the kernel doubles it
        if self.table.window < BUFFER:
            # Otherwise the kernel would buffer as much again as we do.
            setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof(size))
        if self.watch(fd, self.token(c), EPOLLIN | EPOLLRDHUP | EPOLLET) < 0:
            counter_add(&self.count.full, 1)
            self.drop(c)
            return NULL
        return c

    cdef void close_host(self, Conn *c) noexcept nogil:
        # Close the descriptor, which also removes it from epoll, and drop the data for it.
        if c.fd >= 0:
            close(c.fd)
        c.fd = -1
        self.free_buffer(c)
        c.readable = False

    cdef bint make_buffer(self, Conn *c) noexcept nogil:
        # Make the buffer as large as the credit that the guest may still use.
        c.start = 0
        c.size = c.promised - c.fwd_cnt
        if not self.memory.take(c.size):
            return False
        c.buffer = <uint8_t *>malloc(c.size)
        if c.buffer == NULL:
            self.memory.give(c.size)
        return c.buffer != NULL

    cdef void free_buffer(self, Conn *c) noexcept nogil:
        if c.buffer != NULL:
            free(c.buffer)
            self.memory.give(c.size)
        c.buffer = NULL
        c.used = 0

    cdef void drop(self, Conn *c) noexcept nogil:
        # Free a connection. Every connection ends here.
        self.close_host(c)
        self.table.leave(c)
        if c.queued:
            self.table.unqueue(c)
        self.set_deadline(c, 0)
        self.table.give_back(c)
        counter_add(&self.count.closed, 1)
        self.listen()

    cdef void kill(self, Conn *c) noexcept nogil:
        # Reset a connection. The host program sees the end now, the guest when the RST is sent.
        self.close_host(c)
        self.set_deadline(c, 0)
        c.state = KILLED
        c.pending = 1 << OP_RST
        self.queue_if_ready(c)

    cdef void set_deadline(self, Conn *c, uint64_t nanoseconds) noexcept nogil:
        if c.deadline:
            self.deadlines -= 1
        c.deadline = 0
        if nanoseconds:
            c.deadline = clock_ns(CLOCK_MONOTONIC) + nanoseconds
            if self.deadlines == 0 and not self.tx_timed:
                self.wake_after(TICK)
            self.deadlines += 1

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

    # Turns: packets from a connection to the guest

    cdef uint32_t credit(self, Conn *c) noexcept nogil:
        # Payload bytes for which the guest has room (§5.10.6.3). The guest may have shrunk its buffer.
        cdef uint32_t under_way = c.tx_cnt - c.peer_fwd_cnt
        if c.peer_buf_alloc <= under_way or self.packet_credit(c) == 0:
            return 0
        return c.peer_buf_alloc - under_way

    cdef uint32_t packet_credit(self, Conn *c) noexcept nogil:
        # Packets for which the guest has room; at least one if none is in flight. Waiting data is sent in larger
        # packets.
        cdef uint32_t room = c.peer_buf_alloc // <uint32_t>OVERHEAD
        return room - c.packets if room > c.packets else c.packets == 0

    cdef bint waits_for_packets(self, Conn *c) noexcept nogil:
        return c.peer_buf_alloc > c.tx_cnt - c.peer_fwd_cnt and self.packet_credit(c) == 0

    cdef bint has_data(self, Conn *c) noexcept nogil:
        return c.readable and c.state == OPEN and not c.shut & SHUT_SEND and not c.guest_shut & SHUT_RCV

    cdef void queue_if_ready(self, Conn *c) noexcept nogil:
        # Queue the connection for a turn if it can send something now.
        cdef bint data = self.has_data(c)
        if data and self.credit(c) == 0:
            data = False
            if not c.asked:
                c.asked = True
                c.pending |= 1 << OP_CREDIT_REQUEST
                if self.waits_for_packets(c):
                    if self.stuck == 0 and not self.tx_timed:
                        self.wake_after(RETRY)
                    self.stuck += 1
        if not c.queued and (data or c.pending):
            self.table.queue(c)

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

    cdef uint32_t window(self, Conn *c) noexcept nogil:
        # Most bytes that the guest may have in flight to us from now on. If there is a buffer, its size is the limit.
        return self.table.window if c.buffer == NULL else min(self.table.window, c.size)

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

    # Host programs

    cdef void listen(self) noexcept nogil:
        if not self.listening and not self.settling and not self.stopping():
            self.listening = self.watch(self.listener, TOKEN_LISTENER, EPOLLIN) == 0

    cdef void accept_some(self) noexcept nogil:
        cdef int fd, _
        cdef Conn *c
        for _ in range(ACCEPTS):
            fd = granted(accept4(self.listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC), FOR_OPEN)
            if fd < 0:
                if errno == EINTR or errno == ECONNABORTED:
                    continue
                if errno != EAGAIN:
                    # No descriptor is left. Stop watching the listener, which would wake this thread again and again;
                    # drop() or tick() resumes.
                    counter_add(&self.count.full, 1)
                    self.unwatch(self.listener)
                    self.listening = False
                    if not self.tx_timed:
                        self.wake_after(TICK)
                return
            c = self.make(fd, GREETING)
            if c != NULL:
                self.set_deadline(c, self.line_wait)
                self.read_connect_line(c)

    cdef void read_connect_line(self, Conn *c) noexcept nogil:
        # Read the CONNECT line and no byte after it: the following data is for the guest.
        cdef char[LINE] line
        cdef ssize_t n = recv(c.fd, line, LINE, MSG_PEEK)
        cdef const char *end
        cdef int64_t port
        if n <= 0:
            if n == 0 or (errno != EAGAIN and errno != EINTR):
                self.drop(c)
            return
        end = <const char *>memchr(line, 10, <size_t>n)
        if end == NULL and n < LINE and not peer_shut_down(c.fd):
            return                      # wait for the rest of the line
        port = parse_line(line, <size_t>(end - line)) if end != NULL else -1
        if port < 0 or recv(c.fd, line, <size_t>(end - line) + 1, 0) != end - line + 1:
            counter_add(&self.count.bad_lines, 1)
            self.drop(c)
            return
        while True:
            self.last_port = FIRST_HOST_PORT | ((self.last_port + 1) & (FIRST_HOST_PORT - 1))
            if self.table.find(<uint32_t>port, self.last_port) == NULL:
                break
        self.table.enter(c, <uint32_t>port, self.last_port)
        c.state = CONNECTING
        c.pending = 1 << OP_REQUEST
        self.set_deadline(c, self.guest_wait)
        self.queue_if_ready(c)

    cdef void socket_event(self, Conn *c) noexcept nogil:
        # Handle an event of its descriptor. It may be a late event of the previous Conn at this index: only a hint.
        if c.fd < 0:
            return
        if self.events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR):
            c.ending = True
        if c.state == GREETING:
            self.read_connect_line(c)
            return
        if c.used:
            self.flush(c)
        if c.state == OPEN:
            c.readable = True
            # The peer closed both directions, which reading would not show.
            if (c.shut & SHUT_SEND or c.guest_shut & SHUT_RCV) and peer_closed(c.fd):
                self.send_shutdown(c, SHUT_BOTH)
            self.queue_if_ready(c)
        elif c.state == CONNECTING:
            c.readable = True
            if peer_closed(c.fd):
                self.kill(c)

    cdef void send_shutdown(self, Conn *c, uint32_t flags) noexcept nogil:
        if c.shut | flags == c.shut:
            return
        c.shut |= flags
        c.pending |= 1 << OP_SHUTDOWN
        if c.shut == SHUT_BOTH:
            self.close_host(c)
            c.state = CLOSING
            self.set_deadline(c, self.guest_wait)

    cdef void host_stopped_reading(self, Conn *c) noexcept nogil:
        # The host program reads no more. The data that it sent before still goes to the guest.
        c.fwd_cnt += c.used
        self.free_buffer(c)
        if c.state == LEAVING:
            self.drop(c)
        else:
            self.send_shutdown(c, SHUT_RCV)
            self.queue_if_ready(c)

    cdef ssize_t write(self, Conn *c, iovec *iov, size_t count) noexcept nogil:
        # Write to the socket. Returns the bytes written, or -1 if the socket will never take more.
        cdef msghdr message
        cdef ssize_t n
        memset(&message, 0, sizeof(message))
        message.msg_iov = iov
        message.msg_iovlen = count
        n = sendmsg(c.fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL)
        if n < 0 and (errno == EAGAIN or errno == EINTR):
            return 0
        return n

    cdef void flush(self, Conn *c) noexcept nogil:
        cdef iovec[2] iov
        cdef uint32_t first
        cdef ssize_t n = 1
        while c.used and n > 0:
            first = min(c.used, c.size - c.start)
            iov[0].iov_base = c.buffer + c.start
            iov[0].iov_len = first
            iov[1].iov_base = c.buffer
            iov[1].iov_len = c.used - first
            n = self.write(c, iov, 2)
            if n < 0:
                self.host_stopped_reading(c)
                return
            c.start = (c.start + <uint32_t>n) % c.size
            c.used -= <uint32_t>n
            self.forwarded(c, <uint32_t>n)
            if n and c.state == LEAVING:
                self.set_deadline(c, self.host_wait)
        if c.used:
            return
        self.free_buffer(c)
        if c.state == LEAVING:
            self.drop(c)
            return
        self.watch(c.fd, self.token(c), EPOLLIN | EPOLLRDHUP | EPOLLET)
        if c.guest_shut & SHUT_SEND:
            shutdown(c.fd, SHUT_WR_)

    cdef void forwarded(self, Conn *c, uint32_t n) noexcept nogil:
        c.fwd_cnt += n
        cdef uint32_t window = self.window(c)
        # Send a credit update once the guest has at most half of its possible credit left.
        if c.state == OPEN and <int32_t>(c.fwd_cnt + window - c.promised) >= <int32_t>(window // 2):
            c.pending |= 1 << OP_CREDIT_UPDATE
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

    cdef void reply_reset(self, Header *h) noexcept nogil:
        # serve_tx has checked that there is room.
        cdef Reply *r
        if h.op == OP_RST:
            return
        r = &self.replies[(self.reply_head + self.reply_count) % REPLIES]
        r.src_cid, r.src_port, r.dst_port, r.type = h.dst_cid, h.dst_port, h.src_port, h.type
        self.reply_count += 1

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
            memcpy(c.buffer + at, chain.iov[i].iov_base, room)
            memcpy(c.buffer, <uint8_t *>chain.iov[i].iov_base + room, chain.iov[i].iov_len - room)
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
