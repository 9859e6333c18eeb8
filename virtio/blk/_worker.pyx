# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""The threads of a block device, without the GIL: they run requests by system calls or by io_uring."""
from cpython.mem cimport PyMem_Calloc, PyMem_Free
from libc.errno cimport EAGAIN, EINTR, EINVAL, EIO, EOPNOTSUPP, errno
from libc.stdint cimport int32_t, int64_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy
from posix.fcntl cimport O_CLOEXEC
from posix.uio cimport RWF_DSYNC, RWF_NOWAIT, preadv2
from posix.unistd cimport usleep

from virtio.blk._request cimport (
    F_FLUSH, FILE_ENDS, HEADER_BYTES, ID_BYTES, MAX_DISCARD, MAX_WRITE_ZEROES, PIECE, S_IOERR, S_OK, S_UNSUPP, SECTOR,
    T_DISCARD, T_FLUSH, T_GET_ID, T_IN, T_OUT, T_WRITE_ZEROES, BlockFile, Request, advance, clear, execute,
    execute_piece, range_mode, validate,
)
from virtio._limiter cimport RateLimiter
from vmm._uring cimport (
    IORING_FSYNC_DATASYNC, IORING_OP_FALLOCATE, IORING_OP_FSYNC, IORING_OP_READ, IORING_OP_READV, IORING_OP_WRITE,
    IORING_OP_WRITEV, RING_ENTRIES, Uring, io_uring_cqe, io_uring_sqe, uring_close, uring_next, uring_open, uring_peek,
    uring_seen, uring_submit,
)
from virtio._worker cimport EPOLLIN, SERVE_MORE, SERVE_STALLED, QueueWorker
from vmm._sys cimport (
    counter_add, counters_read, flag_read, flag_set, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_t,
    pthread_mutex_unlock, table_alloc, table_free,
)
from vmm._fastpath cimport (
    QUEUE_CHAIN, Ring, iovec, load_relaxed16, queue_add_used, queue_pop, queue_unpop, store_release16,
)

cdef extern from "<unistd.h>" nogil:
    int dup3(int old, int new, int flags)

cdef enum:
    TOKEN_RING = 1
    # The driver is interrupted after this many requests or bytes, and when the queue is empty.
    BATCH = 32
    BATCH_BYTES = 1 << 18
    COPIED_BYTES = 1 << 21      # for writes to the page cache, which do not take long
    TURN = 128                  # requests of a queue before the thread's other queues are served

MAX_DISCARD_SECTORS = MAX_DISCARD
MAX_WRITE_ZEROES_SECTORS = MAX_WRITE_ZEROES

cdef struct Counters:
    uint64_t requests
    uint64_t bad_requests
    uint64_t reads
    uint64_t bytes_read
    uint64_t writes
    uint64_t bytes_written
    uint64_t flushes
    uint64_t discards
    uint64_t write_zeroes
    uint64_t io_errors


cdef class Backend:
    """The state that the workers of one disk share: the file, its size and its options.

    :param disk: the open disk; its descriptor is borrowed
    :param serial: the answer to GET_ID; truncated to 20 bytes
    :param limiter: rate limiter for all queues
    :param unsafe: whether a flush does nothing
    :param use_uring: whether to use io_uring instead of system calls
    """
    cdef BlockFile file
    cdef uint64_t generation            # number of change() calls
    cdef bint use_uring
    cdef bint cached                    # a regular file that uses the host's page cache
    cdef RateLimiter limiter
    cdef int changing                   # atomic: a worker that sees it waits for change()
    cdef pthread_mutex_t gate           # held by change(); workers hold it only for an instant

    def __init__(self, disk, bytes serial, RateLimiter limiter not None, *, bint unsafe, bint use_uring):
        cdef bytes padded = serial[:ID_BYTES].ljust(ID_BYTES, b"\0")
        self.file.fd = disk.fd
        self.file.sectors = disk.size // SECTOR
        memcpy(self.file.serial, <const char *>padded, ID_BYTES)
        self.limiter = limiter
        self.file.read_only = disk.read_only
        self.file.block_device = disk.block_device
        self.file.discard_block = disk.discard_block
        self.file.direct = disk.direct
        self.file.unsafe = unsafe
        self.use_uring = use_uring
        self.cached = not self.file.block_device and not self.file.direct
        pthread_mutex_init(&self.gate, NULL)

    def change(self, workers, uint64_t size, int fd=-1, bint block_device=False):
        """Set the disk's size and, if `fd` is given, replace the file by a duplicate of `fd`. Any thread but the
        workers.

        The change takes effect between two requests. Requests already submitted to io_uring finish on the old file.

        :param workers: all that the disk has now
        :param size: bytes
        :param fd: borrowed; -1: keep the file
        :param block_device: whether `fd` is a block device

        :raises OSError: `fd` cannot be duplicated
        """
        cdef BlockWorker worker
        cdef int failed
        with nogil:     # a worker may need the GIL for a warning
            pthread_mutex_lock(&self.gate)
            flag_set(&self.changing, 1)
        for worker in workers:
            with nogil:
                pthread_mutex_lock(&worker.lock)
        with nogil:     # the old file is closed: of a block device, what is not written is written first
            failed = errno if fd >= 0 and dup3(fd, self.file.fd, O_CLOEXEC) < 0 else 0
        if not failed:
            self.file.sectors = size // SECTOR
            self.generation += 1
            if fd >= 0:
                self.file.block_device = block_device
                self.file.discard_block = 0
                self.cached = not block_device and not self.file.direct
        for worker in workers:
            pthread_mutex_unlock(&worker.lock)
        flag_set(&self.changing, 0)
        pthread_mutex_unlock(&self.gate)
        if failed:
            raise OSError(failed, "dup3")


cdef class BlockWorker(QueueWorker):
    """A thread of a block device, for one or more of its queues."""
    cdef Backend disk
    cdef pthread_mutex_t lock           # held while requests are validated and submitted; Backend.change takes it
    cdef Uring ring                     # open if backend.use_uring; kept when the driver changes
    cdef int no_ring                    # errno if the ring could not be opened; 0: none, or already reported
    cdef Counters counters
    cdef uint64_t[256] failures         # count by errno; [0]: FILE_ENDS
    cdef Request *requests
    cdef iovec *iov
    cdef size_t iov_bytes
    cdef iovec *piece_iov               # for a piece of a long request; as many as a chain has
    cdef Request *idle                  # free requests
    cdef uint32_t n_requests
    cdef uint32_t flying                # requests in flight in the kernel
    cdef uint32_t written               # submissions prepared since the last uring_submit
    cdef uint32_t done                  # requests completed since the used rings were last published
    cdef uint64_t done_bytes
    cdef uint64_t done_slots            # bit mask of the queues that they are of
    cdef bint by_ring                   # use the ring: the backend asks for it and it could be opened
    cdef bint warm                      # the last reads were in the page cache
    cdef bint no_nowait                 # the file system has no RWF_NOWAIT
    cdef int dsync                      # RWF_DSYNC: the driver cannot flush, so each write must be durable (§5.2.6.2)

    def __cinit__(self, *args, **kwargs):
        self.ring.fd = -1
        pthread_mutex_init(&self.lock, NULL)

    def __init__(self, device, indices, notify_fds, on_failure, name=None):
        cdef uint32_t i, size = max(device.queue_sizes)
        super().__init__(device, indices, notify_fds, on_failure, name)
        self.disk = device.backend
        if self.disk.use_uring:
            self.no_ring = -uring_open(&self.ring)
            self.by_ring = self.no_ring == 0
            if self.by_ring:
                self._must_watch(self.ring.fd, TOKEN_RING, EPOLLIN)
        self.n_requests = min(size, <uint32_t>RING_ENTRIES) if self.by_ring else 1
        self.requests = <Request *>PyMem_Calloc(self.n_requests, sizeof(Request))
        self.iov_bytes = (<size_t>self.n_requests + 1) * size * sizeof(iovec)
        self.iov = <iovec *>table_alloc(self.iov_bytes)
        if self.requests == NULL or self.iov == NULL:
            raise MemoryError()
        self.piece_iov = self.iov + <size_t>self.n_requests * size
        for i in range(self.n_requests):
            self.requests[i].chain.iov = self.iov + <size_t>i * size
            self.requests[i].next = self.idle
            self.idle = &self.requests[i]

    def __dealloc__(self):
        uring_close(&self.ring)
        PyMem_Free(self.requests)
        table_free(self.iov, self.iov_bytes)

    @property
    def stats(self):
        """Counters of this thread's queues, by name."""
        cdef Counters now
        counters_read(&now, &self.counters, sizeof(Counters))
        return now

    def close(self):
        """Stop the thread and close its file descriptors and its ring. Idempotent."""
        super().close()
        uring_close(&self.ring)

    def begin(self):
        """Prepare for a new driver."""
        if self.no_ring:
            self.device.report_no_ring(self.no_ring)
            self.no_ring = 0
        self.dsync = 0 if self.features & F_FLUSH or self.disk.file.unsafe else RWF_DSYNC

    cdef int serve(self, uint32_t slot) noexcept nogil:
        cdef Ring *ring = self.rings[slot]
        cdef Request *r
        cdef uint64_t wait
        cdef uint32_t left = TURN
        cdef int status, refusal
        pthread_mutex_lock(&self.lock)
        while True:
            status = SERVE_STALLED
            if flag_read(&self.disk.changing):
                self.yield_to_change()  # completes requests, which are idle then
            r = self.idle
            if r == NULL:
                break                   # all requests are in flight: a completion resumes this queue
            if left == 0 and self.n_queues > 1:
                status = SERVE_MORE
                break
            left -= 1
            status = queue_pop(ring, self.ram, &r.chain)
            if status != QUEUE_CHAIN:
                if status < 0:
                    self.chains[slot].head = r.chain.head
                    self.chains[slot].index = r.chain.index
                break
            refusal = validate(r, &self.disk.file, self.features)
            if refusal == S_OK:
                wait = self.disk.limiter.take(r.length, 1)      # also for ranges: the host may have to write them
                if wait:
                    queue_unpop(ring)
                    self.wake_after(wait)
                    status = SERVE_STALLED
                    break
            self.idle = r.next
            r.slot = slot
            counter_add(&self.counters.requests, 1)
            if refusal != S_OK:
                counter_add(&self.counters.bad_requests, 1)
                self.answer(r, refusal)
            elif r.length > PIECE:
                if not self.execute_long(r):
                    # The thread must stop. The request was not completed, and it is safe to execute it again later.
                    queue_unpop(ring)
                    r.next = self.idle
                    self.idle = r
                    counter_add(&self.counters.requests, -1)
                    break
            elif not self.by_ring or not self.prepare(r):
                self.complete(r, execute(r, &self.disk.file, self.dsync))
            if self.done + self.written >= BATCH or (self.done_bytes >= BATCH_BYTES and self.is_enough(r)):
                self.submit_and_reap()
            if self.stopping():
                break
        self.submit_and_reap()
        pthread_mutex_unlock(&self.lock)
        return status

    cdef bint is_enough(self, const Request *last) noexcept nogil:
        # Whether to interrupt the driver for BATCH_BYTES. Of what is only copied, once as many requests are done as
        # still wait: then the driver and this thread work at the same time, and it is woken less often.
        cdef Ring *ring = self.rings[last.slot]
        return not self.is_copied(last) or self.done_bytes >= COPIED_BYTES \
            or self.done >= <uint16_t>(load_relaxed16(ring.avail + 2) - ring.last_avail)

    cdef bint is_copied(self, const Request *r) noexcept nogil:
        return r.type == T_OUT and self.disk.cached and not self.dsync

    cdef bint execute_long(self, Request *r) noexcept nogil:
        # Execute a long request in pieces. Returns False, with the request unfinished, if the thread must stop: so a
        # guest cannot delay the stop.
        cdef uint64_t generation = self.disk.generation
        cdef int failed = 0
        while r.length and not failed:
            if self.stopping():
                return False
            if flag_read(&self.disk.changing):
                self.yield_to_change()
            failed = EIO if self.disk.generation != generation \
                else execute_piece(r, &self.disk.file, self.dsync, self.piece_iov)
            if not failed:
                self.submit_and_reap()      # completed requests must not wait for this one
        self.complete(r, failed)
        return True

    cdef void submit_and_reap(self) noexcept nogil:
        # Submit the prepared requests, reap the completed ones and publish those.
        if self.written:
            self.submit(0)
            self.warm = self.flying == 0 and not self.no_nowait
        elif self.flying:
            self.reap()
        self.show()

    cdef void yield_to_change(self) noexcept nogil:
        # Let Backend.change go first: without the gate this thread would release its lock and take it again at once.
        if self.written:
            self.submit(0)
        pthread_mutex_unlock(&self.lock)
        pthread_mutex_lock(&self.disk.gate)
        pthread_mutex_unlock(&self.disk.gate)
        pthread_mutex_lock(&self.lock)

    cdef int event(self, uint32_t token) noexcept nogil:
        if token == TOKEN_RING:
            pthread_mutex_lock(&self.lock)
            self.submit_and_reap()
            pthread_mutex_unlock(&self.lock)
        return self.run_waiting()

    cdef void finish(self) noexcept nogil:
        pthread_mutex_lock(&self.lock)
        while self.flying:
            self.submit(1)
        self.show()
        pthread_mutex_unlock(&self.lock)

    # One request

    cdef void complete(self, Request *r, int failed) noexcept nogil:
        cdef uint64_t size
        if failed == EOPNOTSUPP and r.type == T_DISCARD:
            self.answer(r, S_UNSUPP)
            return
        if failed:
            counter_add(&self.counters.io_errors, 1)
            self.report(failed, r.offset + r.length)
            self.answer(r, S_IOERR)
            return
        if r.type == T_IN:
            size = r.chain.writable_bytes - 1
            counter_add(&self.counters.reads, 1)
            counter_add(&self.counters.bytes_read, size)
            self.done_bytes += size
        elif r.type == T_OUT:
            size = r.chain.readable_bytes - HEADER_BYTES
            counter_add(&self.counters.writes, 1)
            counter_add(&self.counters.bytes_written, size)
            self.done_bytes += size
        elif r.type == T_FLUSH:
            counter_add(&self.counters.flushes, 1)
        elif r.type == T_DISCARD:
            counter_add(&self.counters.discards, 1)
        elif r.type == T_WRITE_ZEROES:
            counter_add(&self.counters.write_zeroes, 1)
        self.answer(r, S_OK)

    cdef void answer(self, Request *r, int status) noexcept nogil:
        # The used length counts a contiguous prefix (§2.7.8.2). The status byte comes last, so it counts only if all
        # bytes before it were written.
        cdef Ring *ring = self.rings[r.slot]
        cdef uint64_t filled = 0
        if r.status != NULL:
            r.status[0] = status
            if status == S_OK and r.type == T_IN:
                filled = r.chain.writable_bytes - 1
            elif status == S_OK and r.type == T_GET_ID:
                filled = ID_BYTES
            if filled + 1 == r.chain.writable_bytes:
                filled += 1
        queue_add_used(ring, r.chain.head, <uint32_t>filled)
        # A driver that is running sees the request before any interrupt; show() checks whether it wants one.
        store_release16(ring.used + 2, ring.next_used)
        self.done += 1
        self.done_slots |= <uint64_t>1 << r.slot
        r.next = self.idle
        self.idle = r

    cdef void show(self) noexcept nogil:
        cdef uint32_t slot
        if self.done:
            for slot in range(self.n_queues):
                if self.done_slots >> slot & 1:
                    self.publish(slot)
            self.done = 0
            self.done_bytes = self.done_slots = 0

    cdef void report(self, int failed, uint64_t end) noexcept nogil:
        # Take the GIL only for the 1st, 2nd, 4th, 8th, ... failure with the same errno.
        cdef uint64_t *seen = &self.failures[0 if failed == FILE_ENDS else failed & 255]
        seen[0] += 1
        if seen[0] & (seen[0] - 1) == 0:
            with gil:
                self.device.report(0 if failed == FILE_ENDS else failed, end, seen[0])

    # By io_uring

    cdef bint prepare(self, Request *r) noexcept nogil:
        # Prepare the request for io_uring. Returns False if the caller must execute it. That includes writes to the
        # page cache: io_uring runs those on a kernel thread, one at a time for each file, four times slower (measured;
        # Linux 6.18, tmpfs and ext4).
        cdef io_uring_sqe *sqe
        cdef ssize_t done
        if self.is_copied(r):
            return False
        if r.type == T_IN and self.warm and self.written == 0 \
                and load_relaxed16(self.rings[r.slot].avail + 2) == self.rings[r.slot].last_avail:
            # Read a single request directly if its data is probably cached, as the last one's was: cheaper than
            # io_uring.
            done = preadv2(self.disk.file.fd, r.data, r.count, r.offset, RWF_NOWAIT)
            if done == <ssize_t>r.length:
                self.complete(r, 0)
                return True
            self.warm = False
            self.no_nowait = done < 0 and errno == EOPNOTSUPP
        if r.type == T_GET_ID or (r.type == T_FLUSH and self.disk.file.unsafe) \
                or (r.type == T_DISCARD and (self.disk.file.block_device or self.disk.file.discard_block)) \
                or (r.type == T_WRITE_ZEROES and self.dsync):
            return False
        sqe = uring_next(&self.ring)
        if sqe == NULL:
            return False
        sqe.fd = self.disk.file.fd
        sqe.user_data = <uint64_t>r
        sqe.off = r.offset
        if r.type == T_IN or r.type == T_OUT:
            if r.count == 1:
                sqe.opcode = IORING_OP_READ if r.type == T_IN else IORING_OP_WRITE
                sqe.addr = <uint64_t>r.data.iov_base
                sqe.len = <uint32_t>r.data.iov_len
            else:
                sqe.opcode = IORING_OP_READV if r.type == T_IN else IORING_OP_WRITEV
                sqe.addr = <uint64_t>r.data
                sqe.len = r.count
            if r.type == T_OUT:
                sqe.rw_flags = self.dsync
        elif r.type == T_FLUSH:
            # A flush covers only writes that were completed before it (§5.2.6.2), so it need not wait for those in
            # flight.
            sqe.opcode = IORING_OP_FSYNC
            sqe.off = 0
            sqe.fsync_flags = IORING_FSYNC_DATASYNC
        else:
            sqe.opcode = IORING_OP_FALLOCATE
            sqe.addr = r.length
            sqe.len = range_mode(r)
        r.generation = self.disk.generation
        self.flying += 1
        self.in_flight = True
        self.written += 1
        return True

    cdef void submit(self, unsigned int wait) noexcept nogil:
        while True:
            status = uring_submit(&self.ring, wait)
            self.reap()
            if status == 0:
                break
            usleep(100)                 # the kernel had no memory, or its completion ring was full
        self.written = 0

    cdef void reap(self) noexcept nogil:
        cdef io_uring_cqe *cqe
        cdef Request *r
        cdef int32_t result
        while True:
            cqe = uring_peek(&self.ring)
            if cqe == NULL:
                return
            r = <Request *>cqe.user_data
            result = cqe.res
            uring_seen(&self.ring)
            self.flying -= 1
            self.in_flight = self.flying != 0
            self.complete(r, self.handle_completion(r, result))

    cdef int handle_completion(self, Request *r, int32_t result) noexcept nogil:
        # Handle the completion `result`; the rest of a partial transfer is executed here. Returns as execute() does.
        cdef bint again = result == -EAGAIN or result == -EINTR
        if r.type == T_IN or r.type == T_OUT:
            if <int64_t>result == <int64_t>r.length:
                return 0
            if result > 0:
                advance(r, result)
            elif result == 0:
                return FILE_ENDS
            elif not again and not (result == -EINVAL and self.disk.file.direct):
                return -result
        elif not again and not (result == -EOPNOTSUPP and r.type != T_FLUSH):
            return -result
        if r.generation != self.disk.generation:
            return EIO                  # Backend.change has replaced the file
        if result == -EOPNOTSUPP:
            return clear(r, &self.disk.file, False)
        return execute(r, &self.disk.file, self.dsync)
