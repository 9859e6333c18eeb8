# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""A pair of network queues without the GIL: frames go between the guest's buffers and a tap, or a stream to passt."""
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.errno cimport EAGAIN, EBADFD, ECONNRESET, EINTR, EINVAL, errno
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memcmp, memcpy, memmove, memset

from virtio._limiter cimport RateLimiter
from virtio._worker cimport SERVE_EMPTY, SERVE_MORE, SERVE_STALLED, TOKEN_TIMER, QueueWorker
from virtio.net._policy cimport ALLOWED, DROPPED, HEAD, Judge
from vmm._fastpath cimport (
    QUEUE_CHAIN, DescChain, Ring, iovec, queue_add_used, queue_pop, queue_unpop,
)
from vmm._iov cimport iov_gather, iov_part, iov_scatter
from vmm._sys cimport CLOCK_MONOTONIC, CLOCK_REALTIME, clock_ns

cdef extern from *:
    """
    #include <errno.h>
    #include <stdint.h>
    #include <sys/epoll.h>
    #include <sys/socket.h>
    #include <sys/uio.h>
    #include <unistd.h>
    static inline void net_set_errno(int value) { errno = value; }
    static inline ssize_t net_send(int fd, struct iovec *iov, size_t n) {
        struct msghdr m = { .msg_iov = iov, .msg_iovlen = n };
        return sendmsg(fd, &m, MSG_DONTWAIT | MSG_NOSIGNAL);
    }
    """
    void net_set_errno(int value) noexcept nogil
    ssize_t net_send(int fd, iovec *iov, size_t n) noexcept nogil
    enum: EPOLLIN, EPOLLOUT, EPOLLET

cdef extern from "<sys/uio.h>" nogil:
    ssize_t readv(int fd, const iovec *iov, int count)
    ssize_t writev(int fd, const iovec *iov, int count)

cdef enum:
    TO_MMDS = -1                # beside the policy's verdicts
    RX = 0
    TX = 1
    TOKEN_HOST = 1
    VNET_HEADER = 12            # virtio 1.2 §5.1.6: struct virtio_net_hdr with num_buffers
    NUM_BUFFERS = 10            # its offset
    ETH_HEADER = 14
    FRAME_MAX = 65535 + ETH_HEADER + 4
    UIO_MAXIOV = 1024
    PARTS = UIO_MAXIOV - 1      # of a chain, beside one of ours
    RX_IOV = UIO_MAXIOV - 2     # of the chains held: room for the byte too many, and for a record's head
    NEEDS_CSUM = 1              # in the header's flags
    DETOUR_HEAD = VNET_HEADER + 42  # as much of a frame as tells where it goes: an ARP packet for IPv4
    ANSWER_MAX = ETH_HEADER + 1500
    SERVICES = 2                # a place of NetWorker.resume only
    HELD = 256                  # RX chains taken in advance at most
    BUDGET = 64                 # frames one way before the other has its turn
    LEAST_NS = 5_000_000        # wait so long for buffers that hold the largest frame, then do with what is there
    F_MRG_RXBUF = 1 << 15
    F_MQ = 1 << 22

# An RX chain taken from the ring and not yet returned.
cdef struct Held:
    uint16_t head
    uint32_t n_iov              # of its buffers, which follow one another in NetWorker.iov
    uint64_t size

cdef struct Counters:
    uint64_t rx_packets
    uint64_t rx_bytes
    uint64_t rx_bad_buffers     # not writable, or too short for the header
    uint64_t rx_too_long        # frames that the guest's buffers were too short for; dropped
    uint64_t rx_errors
    uint64_t tx_packets
    uint64_t tx_bytes
    uint64_t tx_bad             # not readable, too short, too long
    uint64_t tx_errors          # the host refused the frame; it is dropped
    uint64_t mmds_errors        # frames for the metadata service that it failed at: our mistake
    uint64_t resolver_errors    # likewise
    uint64_t pcap_errors        # a frame could not be recorded; the ones after it are not


cdef class NetWorker(QueueWorker):
    """The thread of one pair of queues, the receive queue first.

    :param fd: a tap with a header of 12 bytes, or with `stream` a socket to passt; non-blocking, not owned
    :param stream: frames come and go with a length of 4 bytes before each, big endian, and no header
    :param pair: 0 for the first
    :param rx_limiter: of what the guest receives
    :param tx_limiter: of what the guest sends
    :param mmds: the metadata service's endpoint, whose address's frames never reach `fd`; None: there is none
    :param policy: which frames of the guest's may leave, by one thread; None: all
    :param resolver: where those go that are for the policy's resolver, and word of those dropped; None: nowhere
    :param pcap: a file for a copy of each frame, opened for appending; -1: none
    """
    cdef int fd
    cdef int pcap
    cdef uint32_t pair
    cdef bint stream
    cdef bint lost                          # the stream has ended, or the tap was deleted
    cdef bint mergeable
    cdef Ring none                          # never ready: of a pair beyond the first, for a driver without MQ
    cdef readonly RateLimiter rx_limiter
    cdef readonly RateLimiter tx_limiter
    cdef bint patient                       # false: any buffer at all will do
    cdef uint64_t[3] resume                 # when a stalled queue may go on, CLOCK_MONOTONIC; 0: not by time
    cdef bint paid                          # the next TX chain has its tokens
    cdef uint64_t received                  # bytes of a frame that is read and waits for tokens
    cdef Held[HELD] held
    cdef uint32_t n_held
    cdef iovec[UIO_MAXIOV + 1] iov          # one more for the stream's length
    cdef uint32_t n_iov
    cdef uint64_t held_bytes
    # The stream's state: how much of the length, and of the frame, has come; what is left to send.
    cdef uint8_t[4] length
    cdef uint32_t length_got
    cdef uint64_t frame_size
    cdef uint64_t frame_got
    cdef uint8_t[4] tx_length
    cdef bint dropping                      # the rest of this frame was for a driver that is gone
    cdef uint64_t tx_left
    cdef uint64_t tx_size
    # The policy's: what of the frame was judged is in `head`, and is sent from there.
    cdef object policy
    cdef Judge *rules                       # the policy's; NULL: all may leave
    cdef uint8_t[VNET_HEADER + HEAD] head
    cdef uint64_t tx_head                   # bytes of the frame in it
    # The services', which are in this process: the metadata service's and the resolver's.
    cdef object resolver
    cdef bint resolves
    cdef object mmds
    cdef bint detour
    cdef uint8_t[4] mmds_address
    cdef bint frames_due                    # ask them for frames
    cdef uint32_t answer_size               # of the one that waits for buffers; 0: none does
    cdef uint8_t[VNET_HEADER + ANSWER_MAX] answer
    cdef Counters counters

    def __init__(self, device, indices, notify_fds, on_failure, name=None, *, int fd, bint stream, uint32_t pair,
                 RateLimiter rx_limiter not None, RateLimiter tx_limiter not None, mmds=None,
                 policy=None, resolver=None, int pcap=-1):
        super().__init__(device, indices, notify_fds, on_failure, name)
        self.fd = fd
        self.stream = stream
        self.pair = pair
        self.rx_limiter = rx_limiter
        self.tx_limiter = tx_limiter
        self.policy = policy
        self.rules = NULL if policy is None else <Judge *><uintptr_t>policy.pointer
        self.resolver = resolver
        self.resolves = resolver is not None
        self.mmds = mmds
        self.detour = mmds is not None
        if self.detour:
            address = bytes(mmds.address)
            memcpy(self.mmds_address, <const char *>address, 4)
        self.pcap = pcap

    @property
    def stats(self):
        """Counters of this pair by name."""
        return self.counters

    def begin(self):
        """Forget the driver before."""
        if self.pair > 0 and not self.features & F_MQ:
            # One of these may be the control queue then, which is another thread's.
            self.rings[RX] = self.rings[TX] = &self.none
        self.mergeable = self.features & F_MRG_RXBUF != 0
        self.n_held = self.n_iov = 0
        self.held_bytes = self.received = 0
        self.patient = True
        self.resume[RX] = self.resume[TX] = self.resume[SERVICES] = 0
        self.frames_due = self.resolves
        self.answer_size = 0
        self.paid = False
        self.dropping = self.length_got == 4
        self._must_watch(self.fd, TOKEN_HOST, EPOLLIN | EPOLLOUT | EPOLLET)

    cdef int serve(self, uint32_t place) noexcept nogil:
        cdef int status, answered
        self.resume[place] = 0
        status = self.receive() if place == RX else self.transmit()
        self.publish(place)
        if place == TX and status >= 0 and self.frames_due:
            answered = self._kicked(RX)
            if answered < 0:
                return answered
        return status

    cdef int event(self, uint32_t token) noexcept nogil:
        # A frame has come, or there is room for one: for who does not wait for the clock. Or the clock: set_rate_limit
        # has it wake the thread early, and who has to wait on says so again.
        cdef uint32_t place
        cdef int status
        for place in range(2):
            if (self.resume[place] != 0) == (token == TOKEN_TIMER):
                status = self._kicked(place)
                if status < 0:
                    return status
        if token == TOKEN_TIMER and (self.resume[SERVICES] or self.resolves):
            self.resume[SERVICES] = 0
            self.frames_due = True
            return self._kicked(RX)
        return 0

    cdef void finish(self) noexcept nogil:
        # The chains held go back, as if they had never been taken: the queue may be served on by a later thread. A
        # driver whose bad buffer lay between them gets that one twice.
        while self.n_held and self.rings[RX].size:
            queue_unpop(self.rings[RX])
            self.n_held -= 1
        self.n_held = self.n_iov = 0

    cdef void stall(self, uint32_t place, uint64_t nanoseconds) noexcept nogil:
        # One timer for all: the earliest.
        cdef uint64_t now = clock_ns(CLOCK_MONOTONIC), first
        cdef uint32_t other
        self.resume[place] = now + nanoseconds
        first = self.resume[place]
        for other in range(3):
            if self.resume[other]:
                first = min(first, self.resume[other])
        self.wake_after(first - now if first > now else 1)

    # To the guest

    cdef int receive(self) noexcept nogil:
        cdef uint32_t budget = BUDGET
        cdef uint64_t wait
        cdef ssize_t size
        cdef int status
        while not self.stopping():
            if self.received == 0:
                if budget == 0:
                    return SERVE_MORE
                # Not where a part of a frame is in the buffers.
                if self.frames_due and (self.length_got < 4 or self.dropping) \
                        and (self.answer_size or self.ask_services()):
                    status = self.give_answer()
                    if status <= 0:
                        return status
                    budget -= 1
                    continue
                status = self.gather()
                if status <= 0:
                    return status
                budget -= 1
                size = self.read_frame() if self.stream else self.read_tap()
                if size < 0:
                    if errno == EINTR:
                        continue
                    if errno == EAGAIN:
                        return SERVE_STALLED
                    self.counters.rx_errors += 1
                    if self.stream or errno == EBADFD:
                        self.lose()
                        return SERVE_STALLED
                    continue            # of this frame; the next has no event of its own
                if <uint64_t>size > self.held_bytes:
                    self.counters.rx_too_long += 1
                    continue
                if size < VNET_HEADER + ETH_HEADER:
                    self.counters.rx_errors += 1
                    continue
                self.received = size
            wait = self.rx_limiter.take(self.received - VNET_HEADER, 1)
            if wait:
                self.stall(RX, wait)
                return SERVE_STALLED
            self.deliver(self.received)
            self.received = 0
        return SERVE_STALLED

    cdef int gather(self) noexcept nogil:
        # Hold chains for the largest frame that may come: 1; SERVE_EMPTY: the driver has to offer more first.
        cdef Ring *ring = self.rings[RX]
        cdef DescChain *chain = self.chains[RX]
        cdef uint32_t n
        cdef int status
        while self.n_held == 0 or (self.mergeable and self.held_bytes < VNET_HEADER + FRAME_MAX):
            if self.n_held == HELD:
                return 1
            status = queue_pop(ring, self.ram, chain)
            if status < 0:
                return status
            if status != QUEUE_CHAIN:
                if self.n_held == 0:
                    return SERVE_EMPTY
                if self.patient:        # a driver with few buffers may never have as many
                    self.patient = False
                    self.stall(RX, LEAST_NS)
                    return SERVE_EMPTY
                return 1
            n = chain.n_writable
            if chain.n_readable or chain.writable_bytes < VNET_HEADER:
                self.counters.rx_bad_buffers += 1
                queue_add_used(ring, chain.head, 0)
                continue
            if self.n_iov + n > RX_IOV:
                queue_unpop(ring)
                return 1
            memcpy(&self.iov[self.n_iov], chain.iov, n * sizeof(iovec))
            self.held[self.n_held] = Held(chain.head, n, chain.writable_bytes)
            self.n_iov += n
            self.n_held += 1
            self.held_bytes += chain.writable_bytes
        self.patient = True
        return 1

    cdef void deliver(self, uint64_t size) noexcept nogil:
        # The first `size` bytes of the chains held are a header and a frame: return the chains that they fill.
        cdef Ring *ring = self.rings[RX]
        cdef uint64_t left = size, part
        cdef uint32_t used = 0, iovs = 0
        cdef uint8_t[2] count
        if self.pcap >= 0:
            self.capture(self.iov, self.n_iov, size)
        while left:
            part = min(left, self.held[used].size)
            left -= part
            used += 1
        count[0] = <uint8_t>used
        count[1] = <uint8_t>(used >> 8)
        iov_scatter(self.iov, self.n_iov, NUM_BUFFERS, count, 2)
        left = size
        for i in range(used):
            part = min(left, self.held[i].size)
            left -= part
            queue_add_used(ring, self.held[i].head, <uint32_t>part)
            iovs += self.held[i].n_iov
            self.held_bytes -= self.held[i].size
        self.n_held -= used
        self.n_iov -= iovs
        memmove(self.held, &self.held[used], self.n_held * sizeof(Held))
        memmove(self.iov, &self.iov[iovs], self.n_iov * sizeof(iovec))
        self.counters.rx_packets += 1
        self.counters.rx_bytes += size - VNET_HEADER

    cdef ssize_t read_tap(self) noexcept nogil:
        # A frame and its header: their size, larger than the chains held if they are too short for it; -1 and errno.
        cdef uint8_t scrap
        self.iov[self.n_iov] = iovec(<void *>&scrap, 1)     # the tap cuts off and does not say
        return readv(self.fd, self.iov, <int>self.n_iov + 1)

    cdef ssize_t read_frame(self) noexcept nogil:
        # The same from the stream, whose end is ECONNRESET.
        cdef ssize_t got
        cdef uint8_t[VNET_HEADER] header
        while True:
            got = self.read_rest()
            if got < 0:
                return -1
            if got == 0:
                net_set_errno(ECONNRESET)
                return -1
            self.length_got = 0
            if not self.dropping:
                break
            self.dropping = False
        memset(header, 0, VNET_HEADER)
        iov_scatter(self.iov, self.n_iov, 0, header, VNET_HEADER)
        return VNET_HEADER + self.frame_size

    cdef ssize_t read_rest(self) noexcept nogil:
        # The rest of a frame behind its header's place in the chains held: 1, or what a read gave.
        cdef ssize_t got
        cdef uint8_t[4096] scrap
        cdef uint64_t room
        cdef iovec[UIO_MAXIOV] rest
        cdef iovec one
        cdef uint32_t n
        while self.length_got < 4:
            one = iovec(<void *>&self.length[self.length_got], 4 - self.length_got)
            got = readv(self.fd, &one, 1)
            if got <= 0:
                return got
            self.length_got += <uint32_t>got
            if self.length_got == 4:
                self.frame_size = <uint64_t>self.length[0] << 24 | self.length[1] << 16 | self.length[2] << 8 \
                    | self.length[3]
                self.frame_got = 0
        while self.frame_got < self.frame_size:
            room = 0 if self.dropping else self.held_bytes - VNET_HEADER
            if self.frame_got < room:
                n = iov_part(self.iov, self.n_iov, VNET_HEADER + self.frame_got, self.frame_size - self.frame_got, rest,
                             PARTS)
                got = readv(self.fd, rest, n)
            else:
                one = iovec(<void *>scrap, min(<uint64_t>sizeof(scrap), self.frame_size - self.frame_got))
                got = readv(self.fd, &one, 1)
            if got <= 0:
                return got
            self.frame_got += got
        return 1

    # From the guest

    cdef int transmit(self) noexcept nogil:
        cdef Ring *ring = self.rings[TX]
        cdef DescChain *chain = self.chains[TX]
        cdef uint32_t budget = BUDGET
        cdef uint64_t wait
        cdef ssize_t sent
        cdef int status, verdict
        while not self.stopping():
            if budget == 0:
                return SERVE_MORE
            status = queue_pop(ring, self.ram, chain)
            if status != QUEUE_CHAIN:
                return status
            budget -= 1
            if chain.n_writable or not VNET_HEADER + ETH_HEADER <= chain.readable_bytes <= VNET_HEADER + FRAME_MAX \
                    or chain.n_readable > UIO_MAXIOV:
                self.counters.tx_bad += 1
                queue_add_used(ring, chain.head, 0)
                continue
            verdict = ALLOWED
            if self.tx_left == 0:       # or a part of it is on its way
                if self.detour and self.is_for_mmds(chain):
                    verdict = TO_MMDS
                elif self.rules != NULL:
                    verdict = self.judge(chain)
            if verdict != ALLOWED:
                if verdict < DROPPED:
                    self.tell(chain, verdict)
                elif self.resolves and self.rules.may_tell(self.rules.policy):
                    self.refuse(verdict)
                if self.pcap >= 0:
                    self.capture(chain.iov, chain.n_readable, chain.readable_bytes)
                self.paid = False
                queue_add_used(ring, chain.head, 0)
                continue
            if not self.paid:
                wait = self.tx_limiter.take(chain.readable_bytes - VNET_HEADER, 1)
                if wait:
                    queue_unpop(ring)
                    self.stall(TX, wait)
                    return SERVE_STALLED
                self.paid = True
            if self.stream:
                sent = self.write_frame(chain)
            elif self.rules != NULL:
                sent = self.write_judged(chain)
            else:
                # The header is the tap's to judge: the kernel copies it once and refuses what makes no sense.
                sent = writev(self.fd, chain.iov, chain.n_readable)
            if sent < 0:
                if errno == EINTR:
                    queue_unpop(ring)
                    continue
                if errno == EAGAIN:
                    queue_unpop(ring)
                    return SERVE_STALLED
                self.counters.tx_errors += 1
                if self.stream or errno == EBADFD:
                    self.lose()
            else:
                self.counters.tx_packets += 1
                self.counters.tx_bytes += chain.readable_bytes - VNET_HEADER
                if self.rules != NULL:
                    self.rules.count(self.rules.policy, ALLOWED, chain.readable_bytes - VNET_HEADER)
                if self.pcap >= 0:
                    self.capture(chain.iov, chain.n_readable, chain.readable_bytes)
            self.paid = False
            queue_add_used(ring, chain.head, 0)
        return SERVE_STALLED

    cdef void lose(self) noexcept nogil:
        # The host's end is gone, once and for all.
        if not self.lost:
            self.lost = True
            with gil:
                self.device.lose()

    cdef ssize_t write_frame(self, DescChain *chain) noexcept nogil:
        # To the stream: 0 once all of it is there, -1 and errno. A chain put back after a part of it went is the next
        # one again, unless the driver changed it meanwhile: then the stream gets its length in other bytes.
        cdef iovec[UIO_MAXIOV + 1] rest
        cdef uint64_t size = chain.readable_bytes - VNET_HEADER, done
        cdef uint8_t[4096] filler
        cdef ssize_t sent
        cdef uint32_t n
        if self.tx_left == 0:
            self.tx_size = size
            self.tx_left = 4 + size
            for n in range(4):
                self.tx_length[n] = <uint8_t>(size >> (24 - 8 * n))
        while self.tx_left:
            done = 4 + self.tx_size - self.tx_left
            n = 0
            if done < 4:
                rest[0] = iovec(<void *>&self.tx_length[done], 4 - done)
                n = 1
                done = 4
            done -= 4
            if done < self.tx_head:
                rest[n] = iovec(<void *>&self.head[VNET_HEADER + done], self.tx_head - done)
                n += 1
                done = self.tx_head
            if done < size:
                n += iov_part(chain.iov, chain.n_readable, VNET_HEADER + done, min(size, self.tx_size) - done, &rest[n],
                              PARTS)
            elif done < self.tx_size:
                memset(filler, 0, sizeof(filler))
                rest[n] = iovec(<void *>filler, min(<uint64_t>sizeof(filler), self.tx_size - done))
                n += 1
            sent = net_send(self.fd, rest, n)
            if sent < 0:
                if errno != EAGAIN and errno != EINTR:
                    self.tx_left = 0
                return -1
            self.tx_left -= sent
        return 0

    cdef ssize_t write_judged(self, DescChain *chain) noexcept nogil:
        # To the tap, with an empty header: by the guest's the kernel would write a checksum wherever it says.
        cdef iovec[UIO_MAXIOV + 1] whole
        cdef uint64_t done = VNET_HEADER + self.tx_head
        cdef uint32_t n = 1
        if chain.n_readable >= UIO_MAXIOV - 1:
            net_set_errno(EINVAL)   # more pieces than one write takes, with ours before them
            return -1
        memset(self.head, 0, VNET_HEADER)
        whole[0] = iovec(<void *>self.head, done)
        if done < chain.readable_bytes:
            n += iov_part(chain.iov, chain.n_readable, done, chain.readable_bytes - done, &whole[1], PARTS)
        return writev(self.fd, whole, n)

    cdef int judge(self, DescChain *chain) noexcept nogil:
        # By a copy of its head, which is what is sent.
        cdef uint64_t size = chain.readable_bytes - VNET_HEADER
        cdef int verdict
        self.tx_head = iov_gather(chain.iov, chain.n_readable, 0, self.head, VNET_HEADER + HEAD) - VNET_HEADER
        memset(&self.head[VNET_HEADER + self.tx_head], 0, HEAD - self.tx_head)
        verdict = self.rules.judge(self.rules.policy, &self.head[VNET_HEADER], size)
        if verdict != ALLOWED:          # the others are counted once they are sent
            self.rules.count(self.rules.policy, verdict, size)
        return verdict

    # Services inside this process: a slow path, one GIL a frame

    cdef bint is_for_mmds(self, DescChain *chain) noexcept nogil:
        # By a copy of its head; what the driver makes of it meanwhile, the endpoint judges anew.
        cdef uint8_t[DETOUR_HEAD] head
        cdef uint8_t *frame = &head[VNET_HEADER]
        cdef uint64_t size
        memset(head, 0, DETOUR_HEAD)
        size = iov_gather(chain.iov, chain.n_readable, 0, head, DETOUR_HEAD) - VNET_HEADER
        if frame[12] != 0x08:
            return False
        if frame[13] == 0x00:
            return size >= 34 and memcmp(&frame[30], self.mmds_address, 4) == 0
        # ARP over Ethernet for IPv4, a request.
        return frame[13] == 0x06 and size >= 42 and memcmp(&frame[14], b"\0\1\x08\0\6\4\0\1", 8) == 0 \
            and memcmp(&frame[38], self.mmds_address, 4) == 0

    cdef void refuse(self, int verdict) noexcept with gil:
        self.frames_due = True
        try:
            self.resolver.refused(
                PyBytes_FromStringAndSize(<char *>&self.head[VNET_HEADER], HEAD), verdict - DROPPED)
        except Exception as error:
            self.blame(self.resolver, error)

    cdef void tell(self, DescChain *chain, int verdict) noexcept with gil:
        cdef object service = self.mmds if verdict == TO_MMDS else self.resolver
        cdef uint64_t size = min(chain.readable_bytes, <uint64_t>VNET_HEADER + FRAME_MAX)
        cdef bytes copy
        self.frames_due = True
        try:
            copy = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>size)
            iov_gather(chain.iov, chain.n_readable, 0, <uint8_t *><char *>copy, size)
            service.receive(copy[VNET_HEADER:], partial=copy[0] & NEEDS_CSUM != 0)
        except Exception as error:
            self.blame(service, error)

    cdef bint ask_services(self) noexcept with gil:
        # Whether there is a frame for the guest in self.answer.
        cdef bytes frame
        cdef object service = None
        try:
            for service in (self.mmds, self.resolver):
                frame = None if service is None else service.next_frame()
                if frame is not None:
                    if len(frame) > ANSWER_MAX:
                        raise ValueError(f"a frame of {len(frame)} bytes")
                    memset(self.answer, 0, VNET_HEADER)
                    memcpy(&self.answer[VNET_HEADER], <const char *>frame, <size_t>len(frame))
                    self.answer_size = VNET_HEADER + <uint32_t>len(frame)
                    return True
            self.frames_due = False
            self.resume[SERVICES] = 0
            service = self.mmds
            seconds = None if service is None else service.timeout()
            if seconds is not None:
                self.stall(SERVICES, 1 + <uint64_t>(seconds * 1_000_000_000))
        except Exception as error:
            self.frames_due = False
            self.blame(service, error)
        return False

    cdef int give_answer(self) noexcept nogil:
        # To the guest: 1, or what gather() said.
        cdef int status = self.gather()
        if status <= 0:
            return status
        if self.answer_size > self.held_bytes:
            self.counters.rx_too_long += 1
        else:
            iov_scatter(self.iov, self.n_iov, 0, self.answer, self.answer_size)
            self.deliver(self.answer_size)
        self.answer_size = 0
        return 1

    cdef object blame(self, object service, object error):
        if service is self.mmds:
            self.counters.mmds_errors += 1
        else:
            self.counters.resolver_errors += 1
        self.device.context.warn(service.what, f"{self.name}: {service.what}: {type(error).__name__}: {error}")

    # A copy for the one who looks on

    cdef void capture(self, const iovec *iov, uint32_t n_iov, uint64_t size) noexcept nogil:
        # One write, so that the records of several threads do not mix. Source: pcap-savefile(5).
        cdef iovec[UIO_MAXIOV + 1] record
        cdef uint32_t[4] head
        cdef uint64_t now = clock_ns(CLOCK_REALTIME)
        head[0] = <uint32_t>(now // 1_000_000_000)
        head[1] = <uint32_t>(now % 1_000_000_000)
        head[2] = head[3] = <uint32_t>(size - VNET_HEADER)
        record[0] = iovec(<void *>head, 16)
        if writev(self.pcap, record, 1 + iov_part(iov, n_iov, VNET_HEADER, size - VNET_HEADER, &record[1], PARTS)) \
                != <ssize_t>(16 + size - VNET_HEADER):
            self.counters.pcap_errors += 1
            self.pcap = -1          # a file that is full; what followed half a record could not be read
