# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""The threads of a share: one for each worker's queues, and helpers for requests that may wait for the host's disk."""
import os

from libc.errno cimport errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset
from posix.unistd cimport read

from virtio.fs._ops cimport HAND_OVER, answer, cost, is_counted, is_slow
from virtio.fs._share cimport IN_HEADER, OUT_HEADER, Counters, FuseThread, Share
from virtio.fs._fuse cimport FUSE_READ, FUSE_WRITE, fuse_in_header, fuse_write_in
from virtio._interrupt cimport MAX_QUEUES, interrupt_used
from virtio._worker cimport EPOLLIN, SERVE_EMPTY, SERVE_STALLED, WORKER_HOST, QueueWorker
from vmm._fastpath cimport (
    QUEUE_ADDRESS, QUEUE_CHAIN, DescChain, RamRegion, Ring, iovec, queue_add_used, queue_flush, queue_pop, queue_unpop,
)
from vmm._iov cimport iov_gather
from vmm._sys cimport (
    EFD_CLOEXEC, EFD_NONBLOCK, EFD_SEMAPHORE, close, counter_add, counters_read, eventfd, eventfd_write, flag_set,
    pthread_mutex_init, pthread_mutex_lock, pthread_mutex_t, pthread_mutex_unlock, table_alloc, table_free,
)

cdef enum:
    JOBS = 64                   # most slow requests for helpers; the queue's thread executes further ones
    TOKEN_JOB = 1

# A request for a helper.
cdef struct Job:
    fuse_in_header header
    DescChain chain             # its iov is owned by the job
    Ring *ring
    uint32_t queue              # number in the device
    uint64_t paid               # as in FuseThread
    Job *next


cdef class Backlog:
    """The queue of requests from the threads of a share to its helpers.

    :param queue_size: the queues' maximum size, and so the most buffers of a request
    :raises OSError: no file descriptor is left
    """

    cdef pthread_mutex_t lock
    cdef pthread_mutex_t[MAX_QUEUES] used_locks   # one for each queue's used ring
    cdef Job *jobs
    cdef iovec *iovs
    cdef size_t iovs_bytes
    cdef Job *idle
    cdef Job *first
    cdef Job *last
    cdef int wake               # eventfd as a semaphore: one count for each job
    cdef int ending             # atomic: the device stops, so waiting jobs are dropped

    def __cinit__(self, uint32_t queue_size):
        cdef int i
        self.wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK | EFD_SEMAPHORE)
        if self.wake < 0:
            raise OSError(errno, os.strerror(errno))
        pthread_mutex_init(&self.lock, NULL)
        for i in range(MAX_QUEUES):
            pthread_mutex_init(&self.used_locks[i], NULL)
        self.jobs = <Job *>calloc(JOBS, sizeof(Job))
        self.iovs_bytes = <size_t>JOBS * queue_size * sizeof(iovec)
        self.iovs = <iovec *>table_alloc(self.iovs_bytes)
        if self.jobs == NULL or self.iovs == NULL:
            raise MemoryError()
        for i in range(JOBS):
            self.jobs[i].chain.iov = self.iovs + <size_t>i * queue_size
            self.jobs[i].next = self.idle
            self.idle = &self.jobs[i]

    def __dealloc__(self):
        if self.wake >= 0:
            close(self.wake)
        free(self.jobs)
        table_free(self.iovs, self.iovs_bytes)

    cdef bint put(self, const fuse_in_header *header, const DescChain *chain, Ring *ring, uint32_t queue,
                  uint64_t paid) noexcept nogil:
        cdef Job *job
        cdef iovec *iov
        pthread_mutex_lock(&self.lock)
        job = self.idle
        if job != NULL:
            self.idle = job.next
            iov = job.chain.iov
            memcpy(iov, chain.iov, (chain.n_readable + chain.n_writable) * sizeof(iovec))
            job.chain = chain[0]
            job.chain.iov = iov
            job.header = header[0]
            job.ring = ring
            job.queue = queue
            job.paid = paid
            job.next = NULL
            if self.last != NULL:
                self.last.next = job
            else:
                self.first = job
            self.last = job
        pthread_mutex_unlock(&self.lock)
        if job != NULL:
            eventfd_write(self.wake, 1)
        return job != NULL

    cdef void end(self) noexcept nogil:
        # Drop the waiting jobs: their driver is gone or will be.
        cdef Job *job
        flag_set(&self.ending, 1)
        while True:
            job = self.take()
            if job == NULL:
                return
            self.done(job)

    cdef Job *take(self) noexcept nogil:
        cdef Job *job
        pthread_mutex_lock(&self.lock)
        job = self.first
        if job != NULL:
            self.first = job.next
            if self.first == NULL:
                self.last = NULL
        pthread_mutex_unlock(&self.lock)
        return job

    cdef void done(self, Job *job) noexcept nogil:
        pthread_mutex_lock(&self.lock)
        job.next = self.idle
        self.idle = job
        pthread_mutex_unlock(&self.lock)


cdef class FsThread(QueueWorker):
    """Base class of a share's threads: sets up the thread's credentials and returns replies to the driver."""

    cdef FuseThread server
    cdef Backlog backlog

    def __init__(self, device, indices, notify_fds, on_failure, name=None):
        super().__init__(device, indices, notify_fds, on_failure, name)
        self.backlog = device.backlog
        self.server = FuseThread(device.share)
        self.server.limiter = device.limiter
        self.server.ending = &self.backlog.ending

    @property
    def stats(self):
        """Counters of this thread, by name."""
        cdef Counters now
        counters_read(&now, &self.server.counters, sizeof(Counters))
        return now

    cdef int _loop(self) noexcept nogil:
        cdef int error = self.server.enter()
        if error:
            self.host_errno = error
            return WORKER_HOST
        return QueueWorker._loop(self)

    cdef void finish(self) noexcept nogil:
        # A queue's thread that has failed did not drop what it had put there, so each thread does it.
        if self.leaving():
            self.backlog.end()

    cdef void give_back(self, Ring *ring, uint32_t queue, uint32_t head, uint32_t written) noexcept nogil:
        cdef bint wanted
        pthread_mutex_lock(&self.backlog.used_locks[queue])
        queue_add_used(ring, head, written)
        wanted = queue_flush(ring)
        pthread_mutex_unlock(&self.backlog.used_locks[queue])
        if wanted:
            interrupt_used(self.call, queue)


cdef class FsWorker(FsThread):
    """A thread for some queues of a share."""
    cdef RamRegion window       # the share's own, whose pages may be the data of a READ or WRITE; size 0: none

    cdef int serve(self, uint32_t slot) noexcept nogil:
        cdef Ring *ring = self.rings[slot]
        cdef DescChain *chain = self.chains[slot]
        cdef fuse_in_header header
        cdef uint64_t wait
        cdef uint32_t written
        cdef int status
        while not self.stopping():
            status = queue_pop(ring, self.ram, chain)
            if status != QUEUE_CHAIN:
                return status
            memset(&header, 0, sizeof(header))
            if not chain.in_window:
                iov_gather(chain.iov, chain.n_readable, 0, &header, IN_HEADER)
            elif not self.is_data_in_window(chain, &header):
                return QUEUE_ADDRESS
            self.server.paid = 0
            if self.server.limiter.limited() and is_counted(header.opcode):
                self.server.paid = cost(header.opcode, chain)
                wait = self.server.limiter.take(self.server.paid, 1)
                if wait:
                    queue_unpop(ring)
                    self.wake_after(wait)
                    return SERVE_STALLED
            self.server.may_wait = False
            written = HAND_OVER if is_slow(header.opcode) else answer(self.server, &header, chain)
            if written == HAND_OVER:
                counter_add(&self.server.counters.handed_over, 1)
                if self.backlog.put(&header, chain, ring, self.numbers[slot], self.server.paid):
                    continue
                counter_add(&self.server.counters.handed_over, -1)
                self.server.may_wait = True
                written = answer(self.server, &header, chain)
            self.give_back(ring, self.numbers[slot], chain.head, written)
        return SERVE_EMPTY

    cdef bint is_data_in_window(self, DescChain *chain, fuse_in_header *header) noexcept nogil:
        # A program of the guest may give a mapped file's pages to read() or write(). They may be gone by now: a system
        # call says so, where a copy of our own would die. So they are the data of a READ or WRITE, or refused.
        cdef uint64_t given = self.before_window(chain.iov, chain.n_readable)
        cdef uint64_t room = self.before_window(chain.iov + chain.n_readable, chain.n_writable)
        if given < IN_HEADER:
            return False
        iov_gather(chain.iov, chain.n_readable, 0, header, IN_HEADER)
        if given < chain.readable_bytes:
            return header.opcode == FUSE_WRITE and given >= IN_HEADER + sizeof(fuse_write_in) \
                and room == chain.writable_bytes
        return header.opcode == FUSE_READ and room >= OUT_HEADER

    cdef uint64_t before_window(self, const iovec *iov, uint32_t count) noexcept nogil:
        # Bytes before the first buffer that is in the window; of all, if none is.
        cdef uint64_t size = 0
        cdef uint32_t i
        for i in range(count):
            if <uint64_t>(<uint8_t *>iov[i].iov_base - self.window.host) < self.window.size:
                break
            size += iov[i].iov_len
        return size

    def begin(self):
        """Let helpers accept requests again; know where the window is."""
        cdef Share share = self.server.share
        cdef uint32_t slot
        flag_set(&self.backlog.ending, 0)
        if share.window is not None and 0 in self.device.shm_regions:
            gpa, size = self.device.shm_regions[0]
            self.window = RamRegion(gpa, size, share.window.base)
            for slot in range(self.n_queues):
                self.chains[slot].window = &self.window

    cdef int event(self, uint32_t token) noexcept nogil:
        return self.run_waiting()       # there are tokens again, or wake() was called


cdef class FsHelper(FsThread):
    """A thread for requests that may wait long: fsync, syncfs, fallocate, copies, uncached reads."""

    def begin(self):
        """Wait for requests from the queues' threads. A helper has no queue of its own, and so no busy polling."""
        self.poll_ns = 0
        self.server.may_wait = True
        self._must_watch(self.backlog.wake, TOKEN_JOB, EPOLLIN)

    cdef int event(self, uint32_t token) noexcept nogil:
        cdef uint64_t one
        if token == TOKEN_JOB and read(self.backlog.wake, &one, 8) == 8:
            self.run_one()
        return 0

    cdef void finish(self) noexcept nogil:
        # Whoever is only held leaves nothing in flight. Queue threads are stopped before helpers.
        while not self.leaving() and self.run_one():
            pass
        FsThread.finish(self)

    cdef bint run_one(self) noexcept nogil:
        cdef Job *job = self.backlog.take()
        if job == NULL:
            return False
        self.server.paid = job.paid
        self.give_back(job.ring, job.queue, job.chain.head, answer(self.server, &job.header, &job.chain))
        self.backlog.done(job)
        return True
