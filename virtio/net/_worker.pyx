# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""Pairs of network queues, without the GIL: moves frames between the guest's buffers and a tap or a passt socket.

Source: virtio 1.2 §5.1; passt(1) for the stream.
"""
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.mem cimport PyMem_Calloc, PyMem_Free
from libc.errno cimport EAGAIN, EBADFD, EINTR, errno
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memcmp, memcpy, memmove, memset
from posix.uio cimport readv, writev

from virtio._interrupt cimport MAX_QUEUES
from virtio._limiter cimport RateLimiter
from virtio._worker cimport (
    EPOLLET, EPOLLIN, EPOLLOUT, SERVE_EMPTY, SERVE_MORE, SERVE_STALLED, TOKEN_TIMER, QueueWorker,
)
from virtio.net._policy cimport ALLOWED, DROPPED, ETH_HEADER, HEAD, PolicyCalls
from virtio.net._stream cimport (
    AHEAD, PARTS, UIO_MAXIOV, VNET_HEADER, Stream, stream_read, stream_write,
)
from vmm._fastpath cimport (
    QUEUE_CHAIN, DescChain, Ring, iovec, queue_add_used, queue_pop, queue_unpop,
)
from vmm._iov cimport iov_gather, iov_part, iov_scatter
from vmm._sys cimport (
    CLOCK_MONOTONIC, CLOCK_REALTIME, clock_ns, counter_add, counters_read, nap_ns, table_alloc, table_free,
)

cdef extern from "<linux/virtio_net.h>" nogil:
    struct virtio_net_hdr:
        pass
    enum: VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF
    enum: NEEDS_CSUM "VIRTIO_NET_HDR_F_NEEDS_CSUM"

cdef enum:
    TO_MMDS = -1                # a verdict in addition to the policy's
    RX = 0
    TX = 1
    TOKEN_HOST = 1              # plus the number of the pair in this worker
    NUM_BUFFERS = sizeof(virtio_net_hdr)    # offset of num_buffers, which follows it
    FRAME_MAX = 65535 + ETH_HEADER + 4
    RX_IOV = UIO_MAXIOV - 2     # iovecs of the held chains, beside the scrap byte and a pcap record's head
    ANSWER_MAX = ETH_HEADER + 1500
    SERVICES = MAX_QUEUES       # a slot in NetWorker.resume only
    HELD = 256                  # most RX chains taken in advance
    BUDGET = 64                 # frames in one direction before the other has its turn
    LEAST_NS = 5_000_000        # longest wait for buffers for the largest frame, before fewer are used
    # A flood: the tap was emptied FLOOD times with no longer gap between, and the guest has sent nothing meanwhile.
    # Each nap that brings fewer frames than FLOOD_FRAMES counts against it.
    FLOOD = 64
    FLOOD_MOST = 128
    FLOOD_GAP_NS = 1_000_000
    FLOOD_FRAMES = 8
    FLOOD_MISS = 16
    NAP_NS = 150_000
    F_MRG_RXBUF = 1 << VIRTIO_NET_F_MRG_RXBUF
    F_MQ = 1 << VIRTIO_NET_F_MQ

# An RX chain taken from the ring and not yet returned.
cdef struct Held:
    uint16_t head
    uint32_t n_iov              # number of its buffers, which are consecutive in Pair.iov
    uint64_t size

cdef struct Pair:
    int fd                      # a tap, whose frames have a virtio header, or passt's socket; non-blocking
    uint32_t rx                 # slots of its queues
    uint32_t tx
    bint patient                # wait for more RX buffers; False: use those that are there
    bint paid                   # the tokens for the next TX chain were taken
    uint64_t received           # bytes of a frame that was read and waits for tokens
    Held[HELD] held
    uint32_t n_held
    iovec[UIO_MAXIOV + 1] iov   # one extra entry, for the stream's length
    uint32_t n_iov
    uint64_t held_bytes

cdef struct Counters:
    uint64_t rx_packets
    uint64_t rx_bytes
    uint64_t rx_bad_buffers     # chains that are not writable or too short for the header
    uint64_t rx_too_long        # frames dropped because the guest's buffers were too short, or it took them back
    uint64_t rx_errors
    uint64_t tx_packets
    uint64_t tx_bytes
    uint64_t tx_bad             # chains that are not readable, too short or too long
    uint64_t tx_errors          # frames dropped because the host refused them
    uint64_t pcap_errors        # 1 after a frame could not be recorded: recording has stopped


cdef class NetWorker(QueueWorker):
    """A thread for one or more pairs of queues of a :class:`virtio.net.device.Net`, each with the receive queue first,
    and after them perhaps for the control queue, which the device serves in Python.

    All that it uses of the host's is the device's.
    """
    cdef Pair *pairs
    cdef uint32_t n_pairs
    cdef bint stream                        # passt's socket: each frame has a 4-byte length in front, no virtio header
    cdef int pcap                           # a file for copies of all frames; -1: none, or it could not be written
    cdef bint lost                          # the stream has ended, or the tap was deleted
    cdef bint mergeable
    cdef Ring none                          # a ring that is never ready, for what a driver without MQ does not have
    cdef uint32_t control                   # number of the control queue
    cdef RateLimiter rx_limiter
    cdef RateLimiter tx_limiter
    cdef uint64_t[MAX_QUEUES + 1] resume    # when a stalled queue may continue, CLOCK_MONOTONIC; 0: no time is set
    cdef Stream passt                       # the state of the one pair's `fd`, if that is a stream
    cdef uint32_t flood                     # times that a tap was emptied, as for FLOOD
    cdef uint64_t emptied                   # when the last of them was, CLOCK_MONOTONIC
    cdef uint64_t came                      # frames to the guest until then
    cdef uint64_t went                      # frames from it
    # For the policy: `head` is the copy of the frame's start that was checked; it is sent instead of guest memory.
    cdef object policy
    cdef PolicyCalls *rules                 # the policy's functions; NULL: all frames may leave
    cdef RateLimiter telling                # limits the dropped frames that Python looks at
    cdef uint8_t[VNET_HEADER + HEAD] head
    cdef uint64_t tx_head                   # bytes of the frame in `head`
    # For the services in this process: the metadata service and the resolver.
    cdef object resolver
    cdef object mmds
    cdef uint8_t[4] mmds_address
    cdef bint frames_due                    # the services may have frames for the guest
    cdef Counters counters

    def __init__(self, device, indices, notify_fds, on_failure, name=None):
        cdef uint32_t i
        super().__init__(device, indices, notify_fds, on_failure, name)
        self.n_pairs = self.n_queues // 2
        self.pairs = <Pair *>PyMem_Calloc(self.n_pairs, sizeof(Pair))
        if self.pairs == NULL:
            raise MemoryError
        for i in range(self.n_pairs):
            self.pairs[i].fd = device.backend.fds[self.indices[2 * i] // 2]
            self.pairs[i].rx = 2 * i + RX
            self.pairs[i].tx = 2 * i + TX
        self.stream = device.backend.stream
        if self.stream:
            self.passt.ahead = <uint8_t *>table_alloc(AHEAD)
            if self.passt.ahead == NULL:
                raise MemoryError
        self.rx_limiter, self.tx_limiter = device.rx_limiter, device.tx_limiter
        self.policy = device.policy
        self.rules = NULL if self.policy is None else <PolicyCalls *><uintptr_t>self.policy.pointer
        self.telling = RateLimiter(None, (16, 0, 800))     # 16 at once, then one every 50 ms
        self.resolver = device.resolver
        self.mmds = device.mmds
        if self.mmds is not None:
            address = bytes(self.mmds.address)
            memcpy(self.mmds_address, <const char *>address, 4)
        self.pcap = device.pcap_fd

    def __dealloc__(self):
        PyMem_Free(self.pairs)
        table_free(self.passt.ahead, AHEAD)

    @property
    def stats(self):
        cdef Counters now
        counters_read(&now, &self.counters, sizeof(Counters))
        return now

    def begin(self):
        cdef Pair *pair
        cdef uint32_t i
        # Without MQ the third queue is the control queue, whatever we have (§5.1.2), and the last one.
        self.control = 2 * self.device.pairs if self.features & F_MQ else 2
        if not self.features & F_MQ:
            for i in range(self.n_queues):
                if self.numbers[i] > 2:
                    self.rings[i] = &self.none
        self.mergeable = self.features & F_MRG_RXBUF != 0
        memset(self.resume, 0, sizeof(self.resume))
        self.frames_due = self.resolver is not None or self.mmds is not None
        self.passt.cut = self.passt.frame_got > 0
        for i in range(self.n_pairs):
            pair = &self.pairs[i]
            pair.n_held = pair.n_iov = 0
            pair.held_bytes = pair.received = 0
            pair.patient = True
            pair.paid = False
            self._must_watch(pair.fd, TOKEN_HOST + i, EPOLLIN | EPOLLOUT | EPOLLET)

    cdef int _kicked(self, uint32_t slot) noexcept nogil:
        if self.numbers[slot] == self.control:
            return self.process(slot)
        return QueueWorker._kicked(self, slot)

    cdef int serve(self, uint32_t slot) noexcept nogil:
        cdef Pair *pair = &self.pairs[slot // 2]
        cdef int status, answered
        self.resume[slot] = 0
        status = self.receive(pair) if slot == pair.rx else self.transmit(pair)
        self.publish(slot)
        if slot == pair.tx and status >= 0 and self.frames_due:
            answered = self._kicked(pair.rx)
            if answered < 0:
                return answered
        return status

    cdef int event(self, uint32_t token) noexcept nogil:
        # An event of a pair's `fd` (input, or room for output) resumes its queues that wait for no time; TOKEN_TIMER
        # resumes all others. set_rate_limit triggers the timer early; a queue that must still wait sets it again.
        cdef bint timer = token == TOKEN_TIMER
        cdef uint32_t first = 0 if timer else 2 * (token - TOKEN_HOST), slot
        cdef int status
        for slot in range(first, self.n_queues if timer else first + 2):
            if (self.resume[slot] != 0) == timer:
                status = self._kicked(slot)
                if status < 0:
                    return status
        if timer and (self.resume[SERVICES] or self.resolver is not None):
            self.resume[SERVICES] = 0
            self.frames_due = True
            return self._kicked(RX)
        return 0

    cdef void finish(self) noexcept nogil:
        # Put the held chains back, because a later thread may serve this queue. If a bad chain was returned between
        # them, the driver gets that one back twice.
        cdef Pair *pair
        cdef uint32_t i
        for i in range(self.n_pairs):
            pair = &self.pairs[i]
            while pair.n_held and self.rings[pair.rx].size:
                queue_unpop(self.rings[pair.rx])
                pair.n_held -= 1
            pair.n_held = pair.n_iov = 0

    cdef void stall(self, uint32_t slot, uint64_t nanoseconds) noexcept nogil:
        # All slots share one timer: set it to the earliest time.
        cdef uint64_t now = clock_ns(CLOCK_MONOTONIC), first
        cdef uint32_t other
        self.resume[slot] = now + nanoseconds
        first = self.resume[slot]
        for other in range(MAX_QUEUES + 1):
            if self.resume[other]:
                first = min(first, self.resume[other])
        self.wake_after(first - now if first > now else 1)

    # To the guest

    cdef int receive(self, Pair *pair) noexcept nogil:
        cdef uint32_t budget = BUDGET
        cdef uint64_t wait
        cdef ssize_t size
        cdef int status
        cdef uint8_t scrap
        while not self.stopping():
            if pair.received == 0:
                if budget == 0:
                    return SERVE_MORE
                status = self.gather(pair)
                if status <= 0:
                    return status
                budget -= 1
                # Not while the buffers hold a part of a frame.
                if self.frames_due and (self.passt.frame_got == 0 or self.passt.cut):
                    size = self.ask_services(pair)
                    if size > 0:
                        if <uint64_t>size <= pair.held_bytes:
                            self.deliver(pair, size)
                        else:
                            counter_add(&self.counters.rx_too_long, 1)
                        continue
                if self.stream:
                    size = stream_read(&self.passt, pair.fd, pair.iov, pair.n_iov, pair.held_bytes)
                else:
                    # A tap truncates silently: one extra byte shows that a frame was too long.
                    pair.iov[pair.n_iov] = iovec(<void *>&scrap, 1)
                    size = readv(pair.fd, pair.iov, <int>pair.n_iov + 1)
                if size < 0:
                    if errno == EINTR:
                        continue
                    if errno == EAGAIN:
                        if self.is_flood():
                            self.publish(pair.rx)
                            nap_ns(NAP_NS)
                            return SERVE_MORE
                        return SERVE_STALLED
                    counter_add(&self.counters.rx_errors, 1)
                    if self.stream or errno == EBADFD:
                        self.drop_link()
                        return SERVE_STALLED
                    continue            # an error of this frame only; there may be no further event
                if <uint64_t>size > pair.held_bytes:
                    counter_add(&self.counters.rx_too_long, 1)
                    continue
                if size < VNET_HEADER + ETH_HEADER:
                    counter_add(&self.counters.rx_errors, 1)
                    continue
                pair.received = size
            wait = self.rx_limiter.take(pair.received - VNET_HEADER, 1)
            if wait:
                self.stall(pair.rx, wait)
                return SERVE_STALLED
            self.deliver(pair, pair.received)
            pair.received = 0
        return SERVE_STALLED

    cdef bint is_flood(self) noexcept nogil:
        # Whether the tap, which is empty, will soon have more. A thread in epoll would be woken by each frame, at the
        # cost of the sender, and of the guest, which gets an interrupt for each.
        cdef uint64_t now, frames = self.counters.rx_packets - self.came
        if self.stream:
            return False
        if self.flood >= FLOOD and frames < FLOOD_FRAMES:
            self.flood -= FLOOD_MISS
        if frames == 0:                 # or the event was of a frame that was read before
            return False
        now = clock_ns(CLOCK_MONOTONIC)
        if self.went != self.counters.tx_packets or now - self.emptied > FLOOD_GAP_NS:
            self.flood = 0
        self.came, self.went, self.emptied = self.counters.rx_packets, self.counters.tx_packets, now
        self.flood = min(self.flood + 1, <uint32_t>FLOOD_MOST)
        return self.flood >= FLOOD

    cdef int gather(self, Pair *pair) noexcept nogil:
        # Take chains until they hold the largest possible frame. Returns 1, or SERVE_EMPTY if the driver must add more,
        # or a QUEUE_* rule.
        cdef Ring *ring = self.rings[pair.rx]
        cdef DescChain *chain = self.chains[pair.rx]
        cdef uint32_t n
        cdef int status
        while pair.n_held == 0 or (self.mergeable and pair.held_bytes < VNET_HEADER + FRAME_MAX):
            if pair.n_held == HELD:
                return 1
            status = queue_pop(ring, self.ram, chain)
            if status < 0:
                return status
            if status != QUEUE_CHAIN:
                if pair.n_held == 0:
                    return SERVE_EMPTY
                if pair.patient:        # wait once: a driver with few buffers may never offer enough
                    pair.patient = False
                    self.stall(pair.rx, LEAST_NS)
                    return SERVE_EMPTY
                return 1
            n = chain.n_writable
            if chain.n_readable or chain.writable_bytes < VNET_HEADER:
                counter_add(&self.counters.rx_bad_buffers, 1)
                queue_add_used(ring, chain.head, 0)
                continue
            if pair.n_iov + n > RX_IOV:
                queue_unpop(ring)
                return 1
            memcpy(&pair.iov[pair.n_iov], chain.iov, n * sizeof(iovec))
            pair.held[pair.n_held] = Held(chain.head, n, chain.writable_bytes)
            pair.n_iov += n
            pair.n_held += 1
            pair.held_bytes += chain.writable_bytes
        pair.patient = True
        return 1

    cdef void deliver(self, Pair *pair, uint64_t size) noexcept nogil:
        # Return to the driver the held chains that hold the first `size` bytes: a header and a frame.
        cdef Ring *ring = self.rings[pair.rx]
        cdef uint64_t left = size, part
        cdef uint32_t used = 0, iovs = 0
        cdef uint8_t[2] count
        cdef Held *held
        if self.pcap >= 0:
            self.capture(pair.iov, pair.n_iov, size)
        while left:
            held = &pair.held[used]
            part = min(left, held.size)
            left -= part
            queue_add_used(ring, held.head, <uint32_t>part)
            iovs += held.n_iov
            pair.held_bytes -= held.size
            used += 1
        count[0], count[1] = <uint8_t>used, <uint8_t>(used >> 8)
        iov_scatter(pair.iov, pair.n_iov, NUM_BUFFERS, count, 2)
        pair.n_held -= used
        pair.n_iov -= iovs
        memmove(pair.held, &pair.held[used], pair.n_held * sizeof(Held))
        memmove(pair.iov, &pair.iov[iovs], pair.n_iov * sizeof(iovec))
        counter_add(&self.counters.rx_packets, 1)
        counter_add(&self.counters.rx_bytes, size - VNET_HEADER)

    # From the guest

    cdef int transmit(self, Pair *pair) noexcept nogil:
        cdef Ring *ring = self.rings[pair.tx]
        cdef DescChain *chain = self.chains[pair.tx]
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
                    or chain.n_readable >= PARTS:
                counter_add(&self.counters.tx_bad, 1)
                queue_add_used(ring, chain.head, 0)
                continue
            verdict = ALLOWED
            if self.passt.tx_left == 0 and (self.mmds is not None or self.rules != NULL):
                verdict = self.check(chain)     # otherwise part of this frame was sent
            if verdict != ALLOWED:
                if verdict < DROPPED:
                    self.pass_to_service(chain, verdict)
                elif self.resolver is not None and self.telling.take(0, 1) == 0:
                    self.report_dropped(verdict)
                if self.pcap >= 0:
                    self.capture(chain.iov, chain.n_readable, chain.readable_bytes)
                pair.paid = False
                queue_add_used(ring, chain.head, 0)
                continue
            if not pair.paid:
                wait = self.tx_limiter.take(chain.readable_bytes - VNET_HEADER, 1)
                if wait:
                    queue_unpop(ring)
                    self.stall(pair.tx, wait)
                    return SERVE_STALLED
                pair.paid = True
            if self.stream:
                sent = stream_write(&self.passt, pair.fd, chain, &self.head[VNET_HEADER], self.tx_head)
            elif self.rules != NULL:
                sent = self.write_checked(pair, chain)
            else:
                # The kernel validates the header: the tap copies it once and refuses an invalid one.
                sent = writev(pair.fd, chain.iov, chain.n_readable)
            if sent < 0:
                if errno == EINTR:
                    queue_unpop(ring)
                    continue
                if errno == EAGAIN:
                    queue_unpop(ring)
                    return SERVE_STALLED
                counter_add(&self.counters.tx_errors, 1)
                if self.stream or errno == EBADFD:
                    self.drop_link()
            else:
                counter_add(&self.counters.tx_packets, 1)
                counter_add(&self.counters.tx_bytes, chain.readable_bytes - VNET_HEADER)
                if self.rules != NULL:
                    self.rules.count(self.rules.policy, ALLOWED, chain.readable_bytes - VNET_HEADER)
                if self.pcap >= 0:
                    self.capture(chain.iov, chain.n_readable, chain.readable_bytes)
            pair.paid = False
            queue_add_used(ring, chain.head, 0)
        return SERVE_STALLED

    cdef void drop_link(self) noexcept nogil:
        # Report, once, that the host's end is gone for good.
        if not self.lost:
            self.lost = True
            with gil:
                self.device.drop_link()

    cdef ssize_t write_checked(self, Pair *pair, DescChain *chain) noexcept nogil:
        # Send a checked frame to the tap, with an empty header: with the guest's header the kernel would write a
        # checksum at an offset of the guest's choice, after the frame was checked.
        cdef iovec[UIO_MAXIOV + 1] whole
        cdef uint64_t done = VNET_HEADER + self.tx_head
        cdef uint32_t n = 1
        memset(self.head, 0, VNET_HEADER)
        whole[0] = iovec(<void *>self.head, done)
        if done < chain.readable_bytes:
            n += iov_part(chain.iov, chain.n_readable, done, chain.readable_bytes - done, &whole[1], PARTS)
        return writev(pair.fd, whole, n)

    cdef int check(self, DescChain *chain) noexcept nogil:
        # Check a copy of the frame's start; that copy is sent later.
        cdef uint64_t size = chain.readable_bytes - VNET_HEADER
        cdef int verdict
        self.tx_head = iov_gather(chain.iov, chain.n_readable, 0, self.head, VNET_HEADER + HEAD) - VNET_HEADER
        memset(&self.head[VNET_HEADER + self.tx_head], 0, HEAD - self.tx_head)
        if self.mmds is not None and self.is_for_mmds(&self.head[VNET_HEADER]):
            return TO_MMDS
        if self.rules == NULL:
            self.tx_head = 0
            return ALLOWED
        verdict = self.rules.check(self.rules.policy, &self.head[VNET_HEADER], size)
        if verdict != ALLOWED:          # allowed frames are counted when they are sent
            self.rules.count(self.rules.policy, verdict, size)
        return verdict

    # Services in this process: a slow path, which takes the GIL for each frame

    cdef bint is_for_mmds(self, const uint8_t *frame) noexcept nogil:
        # By a copy of the frame's start. The driver may change the frame after this; the endpoint checks it again.
        if frame[12] != 0x08:
            return False
        if frame[13] == 0x00:
            return self.tx_head >= 34 and memcmp(&frame[30], self.mmds_address, 4) == 0
        # An ARP request for Ethernet and IPv4.
        return frame[13] == 0x06 and self.tx_head >= 42 and memcmp(&frame[14], b"\0\1\x08\0\6\4\0\1", 8) == 0 \
            and memcmp(&frame[38], self.mmds_address, 4) == 0

    cdef void report_dropped(self, int verdict) noexcept with gil:
        self.frames_due = True
        try:
            self.resolver.refused(
                PyBytes_FromStringAndSize(<char *>&self.head[VNET_HEADER], HEAD), verdict - DROPPED)
        except Exception as error:
            self.count_failure(self.resolver, error)

    cdef void pass_to_service(self, DescChain *chain, int verdict) noexcept with gil:
        cdef object service = self.mmds if verdict == TO_MMDS else self.resolver
        cdef uint64_t size = min(chain.readable_bytes, <uint64_t>VNET_HEADER + FRAME_MAX)
        cdef bytes copy
        self.frames_due = True
        try:
            copy = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>size)
            iov_gather(chain.iov, chain.n_readable, 0, <uint8_t *><char *>copy, size)
            service.receive(copy[VNET_HEADER:], partial=copy[0] & NEEDS_CSUM != 0)
        except Exception as error:
            self.count_failure(service, error)

    cdef ssize_t ask_services(self, Pair *pair) noexcept with gil:
        # Put one frame of the services into the buffers, behind an empty header. Returns the size of both, which
        # exceeds theirs if the frame did not fit; 0: there is none.
        cdef uint8_t[VNET_HEADER] header
        cdef bytes frame
        cdef object service = None
        try:
            for service in (self.mmds, self.resolver):
                frame = None if service is None else service.next_frame()
                if frame is not None:
                    if len(frame) > ANSWER_MAX:
                        raise ValueError(f"a frame of {len(frame)} bytes, at most {ANSWER_MAX} are allowed")
                    memset(header, 0, VNET_HEADER)
                    iov_scatter(pair.iov, pair.n_iov, 0, header, VNET_HEADER)
                    iov_scatter(pair.iov, pair.n_iov, VNET_HEADER, <const char *>frame, <size_t>len(frame))
                    return VNET_HEADER + len(frame)
            self.frames_due = False
            self.resume[SERVICES] = 0
            service = self.mmds
            seconds = None if service is None else service.timeout()
            if seconds is not None:
                self.stall(SERVICES, 1 + <uint64_t>(seconds * 1_000_000_000))
        except Exception as error:
            self.frames_due = False
            self.count_failure(service, error)
        return 0

    cdef object count_failure(self, object service, object error):
        # A bug in pyvmm.
        self.device.counters["mmds_errors" if service is self.mmds else "resolver_errors"] += 1
        self.device.context.warn(service.what, f"{self.name}: {service.what}: {type(error).__name__}: {error}")

    # Packet capture

    cdef void capture(self, const iovec *iov, uint32_t n_iov, uint64_t size) noexcept nogil:
        # One write for each record, so that records of several threads do not interleave. Source: pcap-savefile(5).
        cdef iovec[UIO_MAXIOV + 1] record
        cdef uint32_t[4] head
        cdef uint64_t now = clock_ns(CLOCK_REALTIME)
        head[0] = <uint32_t>(now // 1_000_000_000)
        head[1] = <uint32_t>(now % 1_000_000_000)
        head[2] = head[3] = <uint32_t>(size - VNET_HEADER)
        record[0] = iovec(<void *>head, 16)
        if writev(self.pcap, record, 1 + iov_part(iov, n_iov, VNET_HEADER, size - VNET_HEADER, &record[1], PARTS)) \
                != <ssize_t>(16 + size - VNET_HEADER):
            counter_add(&self.counters.pcap_errors, 1)
            self.pcap = -1          # stop: after half a record (disk full) the file could not be read further
