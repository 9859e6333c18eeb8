# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""A block device's queue without the GIL: requests judged, then done by system calls or by io_uring."""
from cpython.mem cimport PyMem_Calloc, PyMem_Free
from libc.errno cimport EAGAIN, EINTR, EINVAL, EIO, ENOMEM, EOPNOTSUPP, errno
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memcpy

from virtio._limiter cimport RateLimiter
from virtio._uring cimport (
    IORING_FSYNC_DATASYNC, IORING_OP_FALLOCATE, IORING_OP_FSYNC, IORING_OP_READ, IORING_OP_READV, IORING_OP_WRITE,
    IORING_OP_WRITEV, Uring, io_uring_cqe, io_uring_sqe, uring_close, uring_next, uring_open, uring_peek, uring_seen,
    uring_submit,
)
from virtio._worker cimport SERVE_STALLED, WORKER_HOST, QueueWorker
from vmm._fastpath cimport (
    QUEUE_CHAIN, DescChain, Ring, iovec, load_relaxed16, queue_add_used, queue_pop, queue_unpop, store_release16,
)

cdef extern from *:
    """
    #include <fcntl.h>
    #include <linux/falloc.h>
    #include <linux/fs.h>
    #include <pthread.h>
    #include <stdint.h>
    #include <stdlib.h>
    #include <sys/ioctl.h>
    #include <sys/uio.h>
    #include <unistd.h>
    struct blk_header { uint32_t type, reserved; uint64_t sector; };                /* virtio 1.2 §5.2.6 */
    struct blk_range { uint64_t sector; uint32_t sectors, flags; };
    static const _Alignas(4096) uint8_t zeroes[1 << 16];
    /* Once, whatever the guest does to it meanwhile. */
    static inline void copy_once(void *to, const void *from, size_t n) {
        __builtin_memcpy(to, from, n);
        __asm__ __volatile__("" : : "r"(to) : "memory");
    }
    static inline int flag_set(const int *p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
    static inline void set_flag(int *p, int v) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }
    static inline int discard_device(int fd, uint64_t start, uint64_t length) {
        uint64_t range[2] = { start, length };
        return ioctl(fd, BLKDISCARD, range);
    }
    """
    struct blk_header:
        uint32_t type
        uint64_t sector
    struct blk_range:
        uint64_t sector
        uint32_t sectors
        uint32_t flags
    void copy_once(void *to, const void *source, size_t n) noexcept nogil
    bint flag_set(const int *p) noexcept nogil
    void set_flag(int *p, int value) noexcept nogil
    int discard_device(int fd, uint64_t start, uint64_t length) noexcept nogil
    const void *zeroes

cdef extern from "<sys/uio.h>" nogil:
    ssize_t preadv2(int fd, const iovec *iov, int count, long offset, int flags)
    ssize_t preadv(int fd, const iovec *iov, int count, long offset)
    ssize_t pwritev2(int fd, const iovec *iov, int count, long offset, int flags)
    enum: RWF_DSYNC, RWF_NOWAIT

cdef extern from "<unistd.h>" nogil:
    ssize_t pread(int fd, void *buf, size_t count, long offset)
    ssize_t pwrite(int fd, const void *buf, size_t count, long offset)
    int fdatasync(int fd)
    int dup3(int old, int new, int flags)
    int usleep(unsigned int microseconds)

cdef extern from "<sys/epoll.h>" nogil:
    enum: EPOLLIN

cdef extern from "<fcntl.h>" nogil:
    int fallocate(int fd, int mode, long offset, long length)
    enum: FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE, O_CLOEXEC

cdef extern from "<stdlib.h>" nogil:
    int posix_memalign(void **p, size_t alignment, size_t size)

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    int pthread_mutex_init(pthread_mutex_t *lock, void *attributes)
    int pthread_mutex_lock(pthread_mutex_t *lock)
    int pthread_mutex_unlock(pthread_mutex_t *lock)

cdef enum:
    T_IN = 0                # virtio 1.2 §5.2.6
    T_OUT = 1
    T_FLUSH = 4
    T_GET_ID = 8
    T_DISCARD = 11
    T_WRITE_ZEROES = 13
    S_OK = 0
    S_IOERR = 1
    S_UNSUPP = 2
    HEADER_BYTES = 16
    RANGE_BYTES = 16
    RANGE_UNMAP = 1
    SECTOR = 512
    ID_BYTES = 20
    TOKEN_RING = 1
    FILE_ENDS = 1 << 20     # beside the errnos: the file is shorter than the disk
    ZEROES = 1 << 16        # written at a time where the file system cannot zero
    BOUNCE = 1 << 20        # bytes moved at a time where direct I/O refuses the guest's buffers
    # The driver is interrupted after so many requests or bytes of a batch, and after the batch.
    BATCH = 32
    BATCH_BYTES = 1 << 18

    F_FLUSH = 1 << 9
    F_DISCARD = 1 << 13
    F_WRITE_ZEROES = 1 << 14
    NO_TYPE = 0xffff_ffff

# The longest range of one request, in sectors: a worker does nothing else meanwhile where the host cannot do it aside.
MAX_DISCARD_SECTORS = 1 << 22
MAX_WRITE_ZEROES_SECTORS = 1 << 17
cdef uint32_t max_discard = MAX_DISCARD_SECTORS, max_zeroes = MAX_WRITE_ZEROES_SECTORS

# One request. Its chain has room for the ring's size in iov, which judge() cuts down to the data.
cdef struct Request:
    DescChain chain
    uint32_t type
    uint8_t *status         # where the status byte goes; NULL: the driver left no place for it
    iovec *data             # into chain.iov
    uint32_t count
    uint64_t length         # bytes of data; of the range, for DISCARD and WRITE_ZEROES
    uint64_t offset         # bytes from the disk's start
    bint unmap              # WRITE_ZEROES may leave a hole
    uint64_t generation     # of the backend when it was handed over
    Request *next           # free ones

cdef struct Counters:
    uint64_t requests
    uint64_t bad_requests
    uint64_t bytes_read
    uint64_t bytes_written
    uint64_t flushes
    uint64_t discards
    uint64_t write_zeroes
    uint64_t io_errors


cdef class Backend:
    """What the workers of one disk share: the file, its size, how it is to be treated.

    :param fd: of the disk; not owned
    :param size: bytes
    :param serial: what GET_ID answers, at most 20 bytes
    :param limiter: shared by the queues
    :param block_device: it is one, not a regular file
    :param direct: opened with O_DIRECT
    :param unsafe: a flush does nothing
    :param use_uring: io_uring, not system calls
    """
    cdef int fd
    cdef uint64_t sectors
    cdef uint64_t generation
    cdef uint8_t[ID_BYTES] serial
    cdef bint read_only, block_device, direct, unsafe, use_uring
    cdef bint cached                    # a regular file by the host's page cache
    cdef readonly RateLimiter limiter
    cdef int changing                   # atomic: a worker that sees it lets change() go first
    cdef pthread_mutex_t gate           # held by change(), and by no one else for long
    cdef list workers

    def __init__(self, int fd, uint64_t size, bytes serial, RateLimiter limiter not None, *, bint read_only,
                 bint block_device, bint direct, bint unsafe, bint use_uring):
        cdef bytes padded = serial[:ID_BYTES].ljust(ID_BYTES, b"\0")
        self.fd = fd
        self.sectors = size // SECTOR
        memcpy(self.serial, <const char *>padded, ID_BYTES)
        self.limiter = limiter
        self.read_only = read_only
        self.block_device = block_device
        self.direct = direct
        self.unsafe = unsafe
        self.use_uring = use_uring
        self.cached = not block_device and not direct
        self.workers = []
        pthread_mutex_init(&self.gate, NULL)

    def change(self, uint64_t size, int fd=-1, bint block_device=False):
        """Between two requests, set `size` and, if given, put a duplicate of `fd` in the file's place."""
        cdef BlockWorker worker
        cdef int failed = 0
        with nogil:     # a worker may want the GIL for a warning
            pthread_mutex_lock(&self.gate)
            set_flag(&self.changing, 1)
        for worker in self.workers:
            with nogil:
                pthread_mutex_lock(&worker.lock)
        if fd >= 0 and dup3(fd, self.fd, O_CLOEXEC) < 0:
            failed = errno
        else:
            self.sectors = size // SECTOR
            self.generation += 1
            if fd >= 0:
                self.block_device = block_device
                self.cached = not block_device and not self.direct
        for worker in self.workers:
            pthread_mutex_unlock(&worker.lock)
        set_flag(&self.changing, 0)
        pthread_mutex_unlock(&self.gate)
        if failed:
            raise OSError(failed, "dup3")


def punch_hole(int fd, uint64_t offset, uint64_t length):
    """Give the blocks of a part of the file back, which then reads as zeroes: 0, or an error number."""
    return errno if fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length) < 0 else 0


# What the driver asks

cdef void gather(void *to, iovec **data, uint32_t *count, size_t size) noexcept nogil:
    # Copy the first `size` bytes of the buffers, which hold as many, and cut them off.
    cdef size_t piece
    cdef uint8_t *at = <uint8_t *>to
    while size:
        piece = min(size, data[0].iov_len)
        copy_once(at, data[0].iov_base, piece)
        at += piece
        size -= piece
        cut(data, count, piece)


cdef inline void cut(iovec **data, uint32_t *count, size_t size) noexcept nogil:
    # Leave out the first `size` bytes of the buffers, which hold as many.
    while count[0] and size >= data[0].iov_len:
        size -= data[0].iov_len
        data[0] += 1
        count[0] -= 1
    if size:
        data[0].iov_base = <uint8_t *>data[0].iov_base + size
        data[0].iov_len -= size


cdef int judge(Request *r, Backend disk, uint64_t features) noexcept nogil:
    # The status to answer at once, or S_OK: to be done. Sets all of `r` but its chain; total for every input (§5.2.6).
    cdef DescChain *chain = &r.chain
    cdef iovec *out = chain.iov
    cdef iovec *last
    cdef uint32_t n_out = chain.n_readable
    cdef uint64_t room, sectors
    cdef blk_header header
    cdef blk_range part
    r.type = NO_TYPE
    r.status = NULL
    r.offset = r.length = 0
    if chain.n_writable == 0:
        return S_IOERR
    # The last byte that the driver lets us write is the status, however the rest is framed (§2.7.4).
    last = &out[chain.n_readable + chain.n_writable - 1]
    last.iov_len -= 1
    r.status = <uint8_t *>last.iov_base + last.iov_len
    room = chain.writable_bytes - 1
    r.data = &chain.iov[chain.n_readable]
    r.count = chain.n_writable - (last.iov_len == 0)
    if chain.readable_bytes < HEADER_BYTES:
        return S_IOERR
    gather(&header, &out, &n_out, HEADER_BYTES)
    r.type = header.type
    if header.type == T_IN or header.type == T_OUT:
        r.length = room
        if header.type == T_OUT:
            r.data = out
            r.count = n_out
            r.length = chain.readable_bytes - HEADER_BYTES
            if room or disk.read_only:      # §5.2.6.2: a read-only device fails writes
                return S_IOERR
        elif n_out:
            return S_IOERR
        sectors = r.length // SECTOR
        if r.length % SECTOR:
            return S_IOERR
    elif header.type == T_FLUSH:
        return S_IOERR if n_out or room else S_OK
    elif header.type == T_GET_ID:
        return S_IOERR if n_out or room < ID_BYTES else S_OK
    elif (header.type == T_DISCARD and features & F_DISCARD) \
            or (header.type == T_WRITE_ZEROES and features & F_WRITE_ZEROES):
        if room or chain.readable_bytes != HEADER_BYTES + RANGE_BYTES:      # one segment, as the configuration says
            return S_IOERR
        gather(&part, &out, &n_out, RANGE_BYTES)
        r.unmap = part.flags & RANGE_UNMAP != 0
        if part.flags & ~<uint32_t>RANGE_UNMAP or (r.unmap and header.type == T_DISCARD):
            return S_UNSUPP                 # §5.2.6.2
        if disk.read_only or part.sectors > (max_discard if header.type == T_DISCARD else max_zeroes):
            return S_IOERR
        header.sector = part.sector
        sectors = part.sectors
        r.length = sectors * SECTOR
    else:
        return S_UNSUPP
    if sectors == 0 or header.sector > disk.sectors or sectors > disk.sectors - header.sector:
        return S_IOERR
    r.offset = header.sector * SECTOR
    return S_OK


# Doing it, by system calls. Each returns 0, an errno or FILE_ENDS; r.offset, r.length and r.data say what is left.

cdef inline void advance(Request *r, uint64_t done) noexcept nogil:
    r.offset += done
    r.length -= done
    cut(&r.data, &r.count, done)


cdef int transfer(Request *r, Backend disk, int flags) noexcept nogil:
    cdef ssize_t done
    while True:
        # No chain has more buffers than its queue is long, so never more than the 1024 of UIO_MAXIOV.
        if r.type == T_IN:
            if r.count == 1:
                done = pread(disk.fd, r.data.iov_base, r.data.iov_len, r.offset)
            else:
                done = preadv(disk.fd, r.data, r.count, r.offset)
        elif r.count == 1 and not flags:
            done = pwrite(disk.fd, r.data.iov_base, r.data.iov_len, r.offset)
        else:
            done = pwritev2(disk.fd, r.data, r.count, r.offset, flags)
        if <uint64_t>done == r.length:
            return 0
        if done > 0:
            advance(r, done)
        elif done == 0:
            return FILE_ENDS
        elif errno == EINVAL and disk.direct:
            return bounce(r, disk, flags)
        elif errno != EINTR:
            return errno


cdef int bounce(Request *r, Backend disk, int flags) noexcept nogil:
    # Direct I/O wants aligned memory, which a guest need not have.
    cdef void *buffer
    cdef ssize_t done = 1
    cdef int failed = 0
    cdef iovec one
    if posix_memalign(&buffer, 4096, BOUNCE):
        return ENOMEM
    while r.length and done > 0:
        one.iov_base = buffer
        one.iov_len = min(r.length, <uint64_t>BOUNCE)
        if r.type == T_IN:
            done = preadv(disk.fd, &one, 1, r.offset)
            if done > 0:
                copy(r, <uint8_t *>buffer, done)
        else:
            copy(r, <uint8_t *>buffer, one.iov_len)
            done = pwritev2(disk.fd, &one, 1, r.offset, flags)
        if done > 0:
            advance(r, done)
        else:
            failed = errno if done < 0 else FILE_ENDS
    free(buffer)
    return failed


cdef void copy(Request *r, uint8_t *buffer, size_t size) noexcept nogil:
    # Between `buffer` and the guest's first `size` bytes: to the guest for IN, from it otherwise.
    cdef iovec *v = r.data
    cdef size_t piece
    while size:
        piece = min(size, v.iov_len)
        if r.type == T_OUT:
            memcpy(buffer, v.iov_base, piece)
        else:
            memcpy(v.iov_base, buffer, piece)
        buffer += piece
        size -= piece
        v += 1


cdef int range_mode(const Request *r) noexcept nogil:
    if r.type == T_DISCARD or r.unmap:
        return FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
    return FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE


cdef int clear(Request *r, Backend disk, bint ask) noexcept nogil:
    # DISCARD and WRITE_ZEROES; `ask`: the file system was not asked yet.
    cdef ssize_t done
    if r.type == T_DISCARD and disk.block_device:
        return errno if discard_device(disk.fd, r.offset, r.length) < 0 else 0
    while ask:
        if fallocate(disk.fd, range_mode(r), r.offset, r.length) == 0:
            return 0
        if errno != EINTR:
            if errno != EOPNOTSUPP:
                return errno
            break
    if r.type == T_DISCARD:
        return EOPNOTSUPP
    while r.length:
        done = pwrite(disk.fd, zeroes, min(r.length, <uint64_t>ZEROES), r.offset)
        if done > 0:
            r.offset += done
            r.length -= done
        elif done == 0 or errno != EINTR:
            return EIO if done == 0 else errno
    return 0


cdef class BlockWorker(QueueWorker):
    """The thread of one queue of a block device.

    :param backend: of the device
    :param size: of the queue
    """
    cdef Backend disk
    cdef pthread_mutex_t lock           # held while requests are judged and handed over; Backend.change takes it
    cdef Uring ring                     # open while the thread runs, if the backend says so
    cdef Counters counters
    cdef uint64_t[256] failures         # by errno; [0]: FILE_ENDS
    cdef Request *requests
    cdef iovec *iov
    cdef Request *idle                  # those not under way
    cdef uint32_t n_requests
    cdef uint32_t flying                # with the kernel
    cdef uint32_t written               # to the submission ring, since it was handed over
    cdef uint32_t done                  # since the used ring was shown
    cdef uint64_t done_bytes
    cdef bint warm                      # the last reads were in the page cache
    cdef bint no_nowait                 # the file system has no RWF_NOWAIT
    cdef int dsync                      # RWF_DSYNC: the driver cannot flush, its writes are stable (§5.2.6.2)

    def __cinit__(self, *args, **kwargs):
        self.ring.fd = -1
        pthread_mutex_init(&self.lock, NULL)

    def __init__(self, device, indices, notify_fds, on_failure, name=None, *, Backend backend, uint32_t size):
        cdef uint32_t i
        super().__init__(device, indices, notify_fds, on_failure, name)
        self.disk = backend
        self.n_requests = size if backend.use_uring else 1
        self.requests = <Request *>PyMem_Calloc(self.n_requests, sizeof(Request))
        self.iov = <iovec *>PyMem_Calloc(<size_t>self.n_requests * size, sizeof(iovec))
        if self.requests == NULL or self.iov == NULL:
            raise MemoryError()
        for i in range(self.n_requests):
            self.requests[i].chain.iov = self.iov + <size_t>i * size
            self.requests[i].next = self.idle
            self.idle = &self.requests[i]
        backend.workers.append(self)

    def __dealloc__(self):
        PyMem_Free(self.requests)
        PyMem_Free(self.iov)

    @property
    def stats(self):
        """Counters of this queue by name."""
        return self.counters

    def begin(self):
        """Forget the driver before."""
        self.dsync = 0 if self.features & F_FLUSH or self.disk.unsafe else RWF_DSYNC

    cdef int serve(self, uint32_t place) noexcept nogil:
        cdef Ring *ring = self.rings[place]
        cdef Request *r
        cdef uint64_t wait
        cdef int status, refusal
        if self.disk.use_uring and self.ring.fd < 0:
            self.host_errno = -uring_open(&self.ring, self.n_requests)
            if self.host_errno or self.watch(self.ring.fd, TOKEN_RING, EPOLLIN) < 0:
                self.host_errno = self.host_errno or errno
                return WORKER_HOST
        pthread_mutex_lock(&self.lock)
        while True:
            status = SERVE_STALLED
            r = self.idle
            if r == NULL:
                break                   # all are under way: their completions come back here
            if flag_set(&self.disk.changing):
                self.give_way()
            status = queue_pop(ring, self.ram, &r.chain)
            if status != QUEUE_CHAIN:
                if status < 0:
                    self.chains[place].head = r.chain.head
                    self.chains[place].index = r.chain.index
                break
            refusal = judge(r, self.disk, self.features)
            if refusal == S_OK:
                wait = self.disk.limiter.take(r.length if r.type <= T_OUT else 0, 1)
                if wait:
                    queue_unpop(ring)
                    self.wake_after(wait)
                    status = SERVE_STALLED
                    break
            self.idle = r.next
            self.counters.requests += 1
            if refusal != S_OK:
                self.counters.bad_requests += 1
                self.answer(r, refusal)
            elif not self.disk.use_uring or not self.hand_over(r):
                self.complete(r, self.execute(r))
            if self.done + self.written >= BATCH or self.done_bytes >= BATCH_BYTES:
                self.settle()
            if self.stopping():
                break
        self.settle()
        pthread_mutex_unlock(&self.lock)
        return status

    cdef void settle(self) noexcept nogil:
        # Hand over what was prepared, take what is done, show it.
        if self.written:
            self.submit(0)
            self.warm = self.flying == 0 and not self.no_nowait
        elif self.flying:
            self.reap()
        self.show()

    cdef void give_way(self) noexcept nogil:
        # Backend.change waits for this lock, which this thread would take again before it gets it.
        if self.written:
            self.submit(0)
        pthread_mutex_unlock(&self.lock)
        pthread_mutex_lock(&self.disk.gate)
        pthread_mutex_unlock(&self.disk.gate)
        pthread_mutex_lock(&self.lock)

    cdef int event(self, uint32_t token) noexcept nogil:
        if token == TOKEN_RING:
            pthread_mutex_lock(&self.lock)
            self.settle()
            pthread_mutex_unlock(&self.lock)
        # set_rate_limit wakes the threads of queues that the driver does not use, too.
        return self.run_queue(0) if self.rings[0].size else 0

    cdef void finish(self) noexcept nogil:
        pthread_mutex_lock(&self.lock)
        while self.flying:
            self.submit(1)
        self.show()
        uring_close(&self.ring)
        pthread_mutex_unlock(&self.lock)

    # One request

    cdef int execute(self, Request *r) noexcept nogil:
        cdef int failed
        if r.type == T_IN or r.type == T_OUT:
            return transfer(r, self.disk, self.dsync)
        if r.type == T_GET_ID:
            copy(r, self.disk.serial, ID_BYTES)
            return 0
        if r.type == T_DISCARD or r.type == T_WRITE_ZEROES:
            failed = clear(r, self.disk, True)
            if failed or not self.dsync:
                return failed
        elif self.disk.unsafe:
            return 0
        return errno if fdatasync(self.disk.fd) < 0 else 0

    cdef void complete(self, Request *r, int failed) noexcept nogil:
        cdef uint64_t size
        if failed == EOPNOTSUPP and r.type == T_DISCARD:
            self.answer(r, S_UNSUPP)
            return
        if failed:
            self.counters.io_errors += 1
            self.report(failed, r.offset + r.length)
            self.answer(r, S_IOERR)
            return
        if r.type == T_IN:
            size = r.chain.writable_bytes - 1
            self.counters.bytes_read += size
            self.done_bytes += size
        elif r.type == T_OUT:
            size = r.chain.readable_bytes - HEADER_BYTES
            self.counters.bytes_written += size
            self.done_bytes += size
        elif r.type == T_FLUSH:
            self.counters.flushes += 1
        elif r.type == T_DISCARD:
            self.counters.discards += 1
        elif r.type == T_WRITE_ZEROES:
            self.counters.write_zeroes += 1
        self.answer(r, S_OK)

    cdef void answer(self, Request *r, int status) noexcept nogil:
        # The length is of a prefix (§2.7.8.2): unless all before the status byte was written, it does not count that.
        cdef Ring *ring = self.rings[0]
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
        # A driver that is awake sees it, before any interrupt; show() asks whether it wants one.
        store_release16(ring.used + 2, ring.next_used)
        self.done += 1
        r.next = self.idle
        self.idle = r

    cdef void show(self) noexcept nogil:
        if self.done:
            self.done = 0
            self.done_bytes = 0
            self.publish(0)

    cdef void report(self, int failed, uint64_t end) noexcept nogil:
        # The GIL for the 1st, 2nd, 4th, 8th, ... failure of a kind only.
        cdef uint64_t *seen = &self.failures[0 if failed == FILE_ENDS else failed & 255]
        seen[0] += 1
        if seen[0] & (seen[0] - 1) == 0:
            with gil:
                self.device.report(0 if failed == FILE_ENDS else failed, end, seen[0])

    # By io_uring

    cdef bint hand_over(self, Request *r) noexcept nogil:
        # False: it is to be done here and now. A write to the page cache is: io_uring would give it to a thread of the
        # kernel's, one at a time for a file, four times slower (measured; Linux 6.18, tmpfs and ext4).
        cdef io_uring_sqe *sqe
        if r.type == T_OUT and self.disk.cached and not self.dsync:
            return False
        if r.type == T_IN and self.warm and self.written == 0 \
                and load_relaxed16(self.rings[0].avail + 2) == self.rings[0].last_avail:
            # One alone is read at once if it is cached, as the last was: cheaper than by the ring.
            if preadv2(self.disk.fd, r.data, r.count, r.offset, RWF_NOWAIT) == <ssize_t>r.length:
                self.complete(r, 0)
                return True
            self.warm = False
            self.no_nowait = errno == EOPNOTSUPP
        if r.type == T_GET_ID or (r.type == T_FLUSH and self.disk.unsafe) \
                or (r.type == T_DISCARD and self.disk.block_device) \
                or (r.type == T_WRITE_ZEROES and self.dsync):
            return False
        sqe = uring_next(&self.ring)
        if sqe == NULL:
            return False
        sqe.fd = self.disk.fd
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
            # It covers the writes answered before, which are over: no need to wait for those under way (§5.2.6.2).
            sqe.opcode = IORING_OP_FSYNC
            sqe.off = 0
            sqe.fsync_flags = IORING_FSYNC_DATASYNC
        else:
            sqe.opcode = IORING_OP_FALLOCATE
            sqe.addr = r.length
            sqe.len = range_mode(r)
        r.generation = self.disk.generation
        self.flying += 1
        self.written += 1
        return True

    cdef void submit(self, unsigned int wait) noexcept nogil:
        while True:
            status = uring_submit(&self.ring, wait)
            self.reap()
            if status == 0:
                break
            usleep(100)                 # no memory, or completions that had to go first
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
            self.complete(r, self.landed(r, result))

    cdef int landed(self, Request *r, int32_t result) noexcept nogil:
        # What the kernel did not do whole is done here.
        cdef bint again = result == -EAGAIN or result == -EINTR
        if r.type == T_IN or r.type == T_OUT:
            if <int64_t>result == <int64_t>r.length:
                return 0
            if result > 0:
                advance(r, result)
            elif result == 0:
                return FILE_ENDS
            elif not again and not (result == -EINVAL and self.disk.direct):
                return -result
        elif not again and not (result == -EOPNOTSUPP and r.type != T_FLUSH):
            return -result
        if r.generation != self.disk.generation:
            return EIO                  # Backend.change has put another file in its place
        if result == -EOPNOTSUPP:
            return clear(r, self.disk, False)
        return self.execute(r)
