# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""The host programs' ends of a socket device's connections: their sockets, deadlines, and credit.

A descriptor is watched edge-triggered, so a connection that must wait costs nothing: `readable` remembers that there
may be data, and `used` that guest data waits for room in the socket. A packet that must be sent to the guest is a bit
in `pending`. ``queue_if_ready`` adds the connection to the list of turns, which ``virtio/vsock/_worker.pyx`` serves.
"""
from libc.errno cimport EAGAIN, ECONNABORTED, EINTR, errno
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdio cimport snprintf
from libc.stdlib cimport free, malloc
from libc.string cimport memchr, memset
from posix.strings cimport strncasecmp

from virtio.vsock._conns cimport (
    BUFFER, CLOSING, CONNECTING, Conn, FREE, GREETING, KILLED, LEAVING, OPEN, State, packets_forwarded,
)
from virtio.vsock._host cimport *
from virtio.vsock._packet cimport *
from virtio._worker cimport EPOLLERR, EPOLLET, EPOLLHUP, EPOLLIN, EPOLLOUT, EPOLLRDHUP, QueueWorker
from vmm._budget cimport FOR_OPEN, Budget, granted
from vmm._fastpath cimport DescChain, iovec
from vmm._iov cimport copy_once, iov_part
from vmm._sys cimport CLOCK_MONOTONIC, clock_ns, close, counter_add, counter_read, counters_read
from vmm.budget import memory

cdef Budget heap = memory       # for data that waits for host programs, bytes

cdef enum:
    ACCEPTS = 64
    # Memory that each unread packet takes in a Linux guest in addition to its payload (SKB_TRUESIZE(0) is 576, plus
    # slack). Since Linux 6.12.92 the guest resets a connection if this overhead alone exceeds the announced buffer.
    OVERHEAD = 1024

cdef int64_t PORT_ANY = 4294967295      # VMADDR_PORT_ANY: nobody can listen there


cdef int64_t parse_line(const char *line, size_t length) noexcept nogil:
    # The port in "CONNECT port" (any letter case), or a negative number if `line` is not valid. Source: Firecracker
    # docs/vsock.md.
    cdef size_t i = 8
    cdef int64_t port = 0
    if length < i or strncasecmp(line, b"connect ", i) != 0:
        return -1
    while i < length and line[i] == c" ":
        i += 1
    if i == length or not c"0" <= line[i] <= c"9":
        return -1
    while i < length and c"0" <= line[i] <= c"9":
        if port < PORT_ANY:             # stop adding digits, which would overflow
            port = port * 10 + (line[i] - c"0")
        i += 1
    if i < length and line[i] == c"\r":
        i += 1
    if i < length or port >= PORT_ANY:
        return -1
    return port


cdef uint32_t token(VsockSockets self, Conn *c) noexcept nogil:
    return <uint32_t>(c - self.table.conns)

cdef void close_host(Conn *c) noexcept nogil:
    # Close the descriptor, which also removes it from epoll, and drop the data for it.
    if c.fd >= 0:
        close(c.fd)
    c.fd = -1
    free_buffer(c)
    c.readable = False

cdef bint make_buffer(Conn *c) noexcept nogil:
    # Make the buffer as large as the credit that the guest may still use.
    c.start = 0
    c.size = c.promised - c.fwd_cnt
    if not heap.take(c.size):
        return False
    c.buffer = <uint8_t *>malloc(c.size)
    if c.buffer == NULL:
        heap.give(c.size)
    return c.buffer != NULL

cdef void free_buffer(Conn *c) noexcept nogil:
    if c.buffer != NULL:
        free(c.buffer)
        heap.give(c.size)
    c.buffer = NULL
    c.used = 0

cdef void set_deadline(VsockSockets self, Conn *c, uint64_t nanoseconds) noexcept nogil:
    if c.deadline:
        self.deadlines -= 1
    c.deadline = 0
    if nanoseconds:
        c.deadline = clock_ns(CLOCK_MONOTONIC) + nanoseconds
        if self.deadlines == 0:
            self.tick_after(TICK)
        self.deadlines += 1

cdef void read_connect_line(VsockSockets self, Conn *c) noexcept nogil:
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
    set_deadline(self, c, self.guest_wait)
    self.queue_if_ready(c)

cdef void host_stopped_reading(VsockSockets self, Conn *c) noexcept nogil:
    # The host program reads no more. The data that it sent before still goes to the guest.
    c.fwd_cnt += c.used
    free_buffer(c)
    if c.state == LEAVING:
        self.drop(c)
    else:
        self.send_shutdown(c, SHUT_RCV)
        self.queue_if_ready(c)

cdef ssize_t write(Conn *c, iovec *iov, size_t count) noexcept nogil:
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

cdef void flush(VsockSockets self, Conn *c) noexcept nogil:
    cdef iovec[2] iov
    cdef uint32_t first
    cdef ssize_t n = 1
    while c.used and n > 0:
        first = min(c.used, c.size - c.start)
        iov[0].iov_base = c.buffer + c.start
        iov[0].iov_len = first
        iov[1].iov_base = c.buffer
        iov[1].iov_len = c.used - first
        n = write(c, iov, 2)
        if n < 0:
            host_stopped_reading(self, c)
            return
        c.start = (c.start + <uint32_t>n) % c.size
        c.used -= <uint32_t>n
        self.forwarded(c, <uint32_t>n)
        if n and c.state == LEAVING:
            set_deadline(self, c, self.host_wait)
    if c.used:
        return
    free_buffer(c)
    if c.state == LEAVING:
        self.drop(c)
        return
    self.watch(c.fd, token(self, c), EPOLLIN | EPOLLRDHUP | EPOLLET)
    if c.guest_shut & SHUT_SEND:
        shutdown(c.fd, SHUT_WR_)

cdef bint waits_for_packets(VsockSockets self, Conn *c) noexcept nogil:
    return c.peer_buf_alloc > c.tx_cnt - c.peer_fwd_cnt and self.packet_credit(c) == 0


cdef class VsockSockets(QueueWorker):
    """The part of a :class:`virtio.vsock._worker.VsockWorker` that knows host programs. It has no queue."""

    @property
    def connections(self):
        """Number of connections: open, opening or closing."""
        return counter_read(&self.table.live)

    @property
    def stats(self):
        """Counters since the device was made, by name. Any thread may read them."""
        cdef Counters now
        counters_read(&now, &self.count, sizeof(Counters))
        return now

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
        if self.watch(fd, token(self, c), EPOLLIN | EPOLLRDHUP | EPOLLET) < 0:
            counter_add(&self.count.full, 1)
            self.drop(c)
            return NULL
        return c

    cdef void close_all(self) noexcept nogil:
        cdef uint32_t i
        for i in range(self.table.fresh):
            if self.table.conns[i].state != FREE:
                close_host(&self.table.conns[i])
                counter_add(&self.count.closed, 1)

    cdef void drop(self, Conn *c) noexcept nogil:
        # Free a connection. Every connection ends here.
        close_host(c)
        self.table.leave(c)
        if c.queued:
            self.table.unqueue(c)
        set_deadline(self, c, 0)
        self.table.give_back(c)
        counter_add(&self.count.closed, 1)
        self.listen()

    cdef void kill(self, Conn *c) noexcept nogil:
        # Reset a connection. The host program sees the end now, the guest when the RST is sent.
        close_host(c)
        set_deadline(self, c, 0)
        c.state = KILLED
        c.pending = 1 << OP_RST
        self.queue_if_ready(c)

    cdef void tick_after(self, uint64_t nanoseconds) noexcept nogil:
        # Have tick() called after this time at the latest. An earlier time stays, or connections that come and go would
        # put off the others' for ever.
        cdef uint64_t at = clock_ns(CLOCK_MONOTONIC) + nanoseconds
        if self.tick_at == 0 or at < self.tick_at:
            self.tick_at = at
            self.wake_after(nanoseconds)

    cdef void end_overdue(self) noexcept nogil:
        # End the connections whose deadline has passed.
        cdef uint64_t now = clock_ns(CLOCK_MONOTONIC)
        cdef uint32_t i
        cdef Conn *c
        for i in range(self.table.fresh):
            c = &self.table.conns[i]
            if c.state == FREE or c.deadline == 0 or c.deadline > now:
                continue
            counter_add(&self.count.timeouts, 1)
            if c.state == GREETING or c.state == LEAVING:
                self.drop(c)
            else:
                self.kill(c)

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
                    self.tick_after(TICK)
                return
            c = self.make(fd, GREETING)
            if c != NULL:
                set_deadline(self, c, self.line_wait)
                read_connect_line(self, c)

    cdef Conn *connect_to(self, uint32_t port) noexcept nogil:
        # Connect to the host program that listens for a port of the guest's. Returns an open Conn without ports, or
        # NULL.
        cdef sockaddr_un address
        cdef int fd, length
        address.sun_family = AF_UNIX
        length = snprintf(address.sun_path, sizeof(address.sun_path), "%s_%u", self.path, port)
        fd = granted(socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), FOR_OPEN)
        if fd < 0:
            counter_add(&self.count.full, 1)
            return NULL
        if length >= <int>sizeof(address.sun_path) or connect(fd, <sockaddr *>&address, sizeof(address)) < 0:
            counter_add(&self.count.refused, 1)
            close(fd)
            return NULL
        return self.make(fd, OPEN)

    cdef void socket_event(self, Conn *c) noexcept nogil:
        # Handle an event of its descriptor. It may be a late event of the previous Conn at this index: only a hint.
        if c.fd < 0:
            return
        if self.events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR):
            c.ending = True
        if c.state == GREETING:
            read_connect_line(self, c)
            return
        if c.used:
            flush(self, c)
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
            close_host(c)
            c.state = CLOSING
            set_deadline(self, c, self.guest_wait)

    cdef void forwarded(self, Conn *c, uint32_t n) noexcept nogil:
        c.fwd_cnt += n
        cdef uint32_t window = self.window(c)
        # Send a credit update once the guest has at most half of its possible credit left.
        if c.state == OPEN and <int32_t>(c.fwd_cnt + window - c.promised) >= <int32_t>(window // 2):
            c.pending |= 1 << OP_CREDIT_UPDATE
            self.queue_if_ready(c)

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
                flush(self, c)
                if now >= until:
                    break

    # What the guest did to a connection

    cdef void accepted(self, Conn *c) noexcept nogil:
        # The guest has accepted a host program's connection.
        cdef char[LINE] line
        cdef int n = snprintf(line, LINE, "OK %u\n", c.host_port)
        set_deadline(self, c, 0)
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
            n = write(c, chain.iov, count)
            if n < 0:
                c.fwd_cnt += h.len
                host_stopped_reading(self, c)
                return
            self.forwarded(c, <uint32_t>n)
        if <uint32_t>n == h.len:
            return
        if c.buffer == NULL:
            if not make_buffer(c) or self.watch(
                    c.fd, token(self, c), EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET) < 0:
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
        set_deadline(self, c, self.host_wait)

    # Credit of the guest, and ours

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

    cdef bint has_data(self, Conn *c) noexcept nogil:
        return c.readable and c.state == OPEN and not c.shut & SHUT_SEND and not c.guest_shut & SHUT_RCV

    cdef uint32_t window(self, Conn *c) noexcept nogil:
        # Most bytes that the guest may have in flight to us from now on. If there is a buffer, its size is the limit.
        return self.table.window if c.buffer == NULL else min(self.table.window, c.size)

    cdef void queue_if_ready(self, Conn *c) noexcept nogil:
        # Queue the connection for a turn if it can send something now.
        cdef bint data = self.has_data(c)
        if data and self.credit(c) == 0:
            data = False
            if not c.asked:
                c.asked = True
                c.pending |= 1 << OP_CREDIT_REQUEST
                if waits_for_packets(self, c):
                    if self.stuck == 0:
                        self.tick_after(RETRY)
                    self.stuck += 1
        if not c.queued and (data or c.pending):
            self.table.queue(c)

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

    cdef void ask_again(self) noexcept nogil:
        # A guest sends credit updates for bytes, but not always when it has read only some packets. So ask again.
        cdef uint32_t i
        cdef Conn *c
        self.stuck = 0
        for i in range(self.table.fresh):
            c = &self.table.conns[i]
            if c.asked and self.has_data(c) and waits_for_packets(self, c):
                c.asked = False
                self.queue_if_ready(c)
