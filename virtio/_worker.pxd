# SPDX-License-Identifier: Apache-2.0
# The thread of a device's queues, without the GIL: base class of every device's Cython loop.
from libc.stdint cimport uint32_t, uint64_t

from virtio._interrupt cimport MAX_QUEUES, Call
from vmm._fastpath cimport DescChain, GuestRam, Ring
from vmm._gate cimport gate_t

cdef extern from "<sys/epoll.h>" nogil:
    enum: EPOLLIN, EPOLLOUT, EPOLLERR, EPOLLHUP, EPOLLRDHUP, EPOLLET     # for watch()

# Results of serve() and event(). A negative one is a QUEUE_* rule that the driver broke, or WORKER_HOST.
cdef enum:
    SERVE_EMPTY = 0             # the queue is empty: enable notifications, check it once more, sleep
    SERVE_STALLED = 1           # it must wait (for tokens, space or input); an event() will serve it again
    SERVE_MORE = 2              # its turn is over but there is more work: serve the others, then this one again
    WORKER_HOST = -100          # the host failed permanently; the error is self.host_errno
    WORKER_RAISED = -101        # the device raised an exception, which the worker keeps

# Tokens of event(). A device's own tokens are below TOKEN_OWN_END.
cdef enum:
    TOKEN_OWN_END = 0xffff_0000
    TOKEN_TIMER = 0xffff_0001   # the time set by wake_after() has passed

# Busy polling adapts to what it finds.
cdef struct Polling:
    uint64_t time               # of the next one, in ns
    uint32_t skip               # sleeps without polling before it
    uint32_t skipped            # of these so far

cdef class QueueWorker:
    # Valid on the thread, from begin() to the end of finish():
    cdef GuestRam ram
    cdef Call *call                             # for interrupt_used()
    cdef uint32_t[MAX_QUEUES] numbers    # each queue's number in the device, by slot in this worker
    cdef uint64_t features                      # as negotiated
    cdef (Ring *)[MAX_QUEUES] rings    # by slot in this worker, not by number in the device
    cdef (DescChain *)[MAX_QUEUES] chains  # scratch chain of each queue
    cdef uint32_t n_queues
    cdef uint32_t broken                        # slot of the queue whose negative status serve() or event() returned
    cdef int host_errno
    cdef uint32_t events                        # EPOLL* bits of the current event()
    cdef bint in_flight                         # a device event will come: no busy polling until then
    cdef uint64_t poll_ns                       # longest busy polling before a sleep; 0: none

    # A subclass overrides these; all run on the thread, without the GIL.
    cdef int serve(self, uint32_t slot) noexcept nogil         # drain rings[slot]
    cdef int event(self, uint32_t token) noexcept nogil         # for one of its descriptors, or TOKEN_TIMER
    cdef void finish(self) noexcept nogil       # wait for requests in flight; no access to guest memory after it

    # A subclass calls these.
    cdef int run_queue(self, uint32_t slot) noexcept nogil     # serve() until empty; handles notifications
    cdef int run_waiting(self) noexcept nogil   # run_queue() of those that wait for an event, or have new chains
    cdef void publish(self, uint32_t slot) noexcept nogil      # show the used ring; interrupt if the driver wants one
    cdef int watch(self, int fd, uint32_t token, uint32_t events) noexcept nogil    # add or change; -1 and errno
    cdef void unwatch(self, int fd) noexcept nogil
    cdef void wake_after(self, uint64_t nanoseconds) noexcept nogil     # one TOKEN_TIMER; 0: cancel it
    cdef bint stopping(self) noexcept nogil     # every long loop must return when this is true
    cdef int process(self, uint32_t slot) noexcept nogil       # device.process() in Python, which handles notifications
    cdef bint leaving(self) noexcept nogil      # for finish(): the driver is gone for good and is not served again

    cdef readonly object device
    cdef readonly str name
    cdef readonly tuple indices                 # its queues' numbers in the device
    cdef object _on_failure
    cdef object _context
    cdef object _raised
    cdef object _thread
    cdef gate_t _gate                           # where the thread waits between `stop` and `start`
    cdef int _epoll
    cdef int _stop_fd
    cdef int _timer
    cdef int _stop                              # atomic: 1: to stop, 2: the driver leaves, too
    cdef int _gone                              # atomic: the thread does nothing any more
    cdef bint[MAX_QUEUES] _stalled
    cdef uint64_t[MAX_QUEUES] _notified  # by slot
    cdef uint64_t _again                        # bit mask of the slots to serve without a notification
    cdef uint32_t _first                        # slot of the queue that run_waiting() serves first
    cdef Polling[2] _polling                    # after the driver's work; after an event of the host's
    cdef bint _host_first                       # which of them is next
    cdef void _close_fds(self) noexcept
    cdef _join(self)
    cdef _end(self)
    cdef int _must_watch(self, int fd, uint32_t token, uint32_t events) except -1
    cdef int _loop(self) noexcept nogil
    cdef int _kicked(self, uint32_t slot) noexcept nogil
    cdef bint _look(self, Polling *how) noexcept nogil
