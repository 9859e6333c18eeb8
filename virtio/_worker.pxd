# SPDX-License-Identifier: Apache-2.0
# The thread of a device's queues, without the GIL: what a device's Cython loop is a subclass of.
from libc.stdint cimport uint32_t, uint64_t

from virtio._interrupt cimport Call
from vmm._fastpath cimport DescChain, GuestRam, Ring

cdef enum:
    MAX_WORKER_QUEUES = 8

# What serve() and event() return; a negative one is a QUEUE_* rule that the driver broke, or WORKER_HOST.
cdef enum:
    SERVE_EMPTY = 0             # the queue is drained: ask the driver to notify, look once more, sleep
    SERVE_STALLED = 1           # it cannot go on now (no tokens, no space, nothing to give): an event() will
    SERVE_MORE = 2              # its turn is over, not its work: the others next, then this one again
    WORKER_HOST = -100          # the host failed for good; self.host_errno says how

# Tokens of event(); a device's own are those below TOKEN_OWN_END.
cdef enum:
    TOKEN_OWN_END = 0xffff_0000
    TOKEN_TIMER = 0xffff_0001   # the time that wake_after() set is over

cdef class QueueWorker:
    # Valid in the thread, from begin() to the end of finish():
    cdef GuestRam ram
    cdef Call *call                             # for interrupt_used()
    cdef uint32_t[MAX_WORKER_QUEUES] numbers    # of the queues in the device, by place
    cdef uint64_t features                      # as negotiated
    cdef (Ring *)[MAX_WORKER_QUEUES] rings    # by place in this worker, not by number in the device
    cdef (DescChain *)[MAX_WORKER_QUEUES] chains  # scratch of each queue
    cdef uint32_t n_queues
    cdef uint32_t broken                        # place of the queue whose negative status serve() or event() returned
    cdef int host_errno
    cdef uint32_t events                        # EPOLL* of the event() under way
    cdef bint leaving                           # finish(): the driver goes for good, nothing is served again for it
    cdef bint in_flight                         # an event of its own is due: no busy polling until then
    cdef uint64_t poll_ns                       # busy polling: look for so long before sleeping; 0: never

    # For a subclass to override; all run on the thread, without the GIL.
    cdef int serve(self, uint32_t place) noexcept nogil         # drain rings[place]
    cdef int event(self, uint32_t token) noexcept nogil         # one of its own descriptors, or TOKEN_TIMER
    cdef void finish(self) noexcept nogil       # wait for what is in flight: after it guest memory is not touched

    # For a subclass to call.
    cdef int run_queue(self, uint32_t place) noexcept nogil     # serve() until empty, with the notification dance
    cdef void publish(self, uint32_t place) noexcept nogil      # show the used ring; interrupt if the driver wants one
    cdef int watch(self, int fd, uint32_t token, uint32_t events) noexcept nogil    # add or change; -1 and errno
    cdef void unwatch(self, int fd) noexcept nogil
    cdef void wake_after(self, uint64_t nanoseconds) noexcept nogil     # one TOKEN_TIMER; 0: none
    cdef bint stopping(self) noexcept nogil     # a loop that may last returns when true

    cdef readonly object device
    cdef readonly str name
    cdef readonly tuple indices                 # numbers of its queues in the device
    cdef object _on_failure
    cdef object _context
    cdef object _thread
    cdef int _epoll
    cdef int _stop_fd
    cdef int _timer
    cdef int _stop                              # atomic
    cdef bint[MAX_WORKER_QUEUES] _stalled
    cdef uint64_t[MAX_WORKER_QUEUES] _notified  # by place
    cdef uint32_t _again                        # places that returned SERVE_MORE, as bits
    cdef uint64_t _poll_now                     # adaptive: how long the next look lasts
    cdef void _close_fds(self) noexcept
    cdef int _must_watch(self, int fd, uint32_t token, uint32_t events) except -1
    cdef int _loop(self) noexcept nogil
    cdef int _kicked(self, uint32_t place) noexcept nogil
    cdef bint _look(self) noexcept nogil
