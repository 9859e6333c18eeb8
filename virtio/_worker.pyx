# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""The thread of a device's queues: it sleeps in epoll and runs the device's loop, without the GIL."""
import os
from threading import current_thread

from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport EEXIST, EINTR, errno
from libc.stdint cimport uint32_t, uint64_t
from posix.unistd cimport read

from virtio._interrupt cimport MAX_QUEUES, Interrupt, interrupt_used
from vmm._fastpath cimport (
    Ring, VirtQueue, load_relaxed16, queue_disable_notify, queue_enable_notify, queue_flush, queue_mute,
)
from vmm._gate cimport gate_await, gate_destroy, gate_init, gate_pass, gate_set
from vmm._sys cimport (
    CLOCK_MONOTONIC, EFD_CLOEXEC, EFD_NONBLOCK, clock_ns, close, counter_add, counter_read, eventfd, eventfd_write,
    flag_read, flag_set, name_thread, nap_ns,
)
from vmm.errors import HostError
from vmm.threads import spawn

cdef extern from *:
    """
    #include <stdint.h>
    #include <sys/epoll.h>
    #include <sys/timerfd.h>
    #include <unistd.h>
    static inline void worker_pause(void) { __builtin_ia32_pause(); }
    static inline int worker_ctl(int epoll, int op, int fd, uint32_t events, uint32_t token) {
        struct epoll_event e = { .events = events, .data = { .u32 = token } };
        return epoll_ctl(epoll, op, fd, &e);
    }
    static inline void worker_arm(int timer, uint64_t ns) {
        struct itimerspec t = { .it_value = { (time_t)(ns / 1000000000u), (long)(ns % 1000000000u) } };
        timerfd_settime(timer, 0, &t, NULL);
    }
    """
    void worker_pause() noexcept nogil
    int worker_ctl(int epoll, int op, int fd, uint32_t events, uint32_t token) noexcept nogil
    void worker_arm(int timer, uint64_t ns) noexcept nogil

cdef extern from "<sys/epoll.h>" nogil:
    ctypedef union epoll_data_t:
        uint32_t u32
    struct epoll_event:
        uint32_t events
        epoll_data_t data
    int epoll_create1(int flags)
    int epoll_wait(int epfd, epoll_event *events, int maxevents, int timeout)
    enum: EPOLL_CTL_ADD, EPOLL_CTL_DEL, EPOLL_CTL_MOD, EPOLL_CLOEXEC

cdef extern from "<sys/timerfd.h>" nogil:
    int timerfd_create(int clockid, int flags)
    enum: TFD_CLOEXEC, TFD_NONBLOCK

cdef enum:
    EVENTS = 32
    NAP_NS = 1_000_000              # of who waits for a thread that Python takes for ended
    TOKEN_QUEUE = 0xffff_0100       # plus the queue's slot
    TOKEN_STOP = 0xffff_0000        # of stop() or wake()
    POLL_LEAST_NS = 2000
    POLL_SKIP_MOST = 64             # sleeps without polling before the next try, after many tries in vain


cdef class QueueWorker:
    """A thread for some of a device's queues: base class of the devices' Cython loops. The transport uses it.

    :param device: its ``name`` names the thread; its ``poll_us`` is the longest busy polling before a sleep
    :param indices: the queues' numbers in the device, at most 64
    :param notify_fds: an eventfd for each queue; borrowed
    :param on_failure: called on the thread with ``BadChain`` or ``HostError``; the thread ends after it
    :param name: the thread's name, instead of the device's
    :raises OSError: no file descriptor is left

    ``start`` takes the ``ActivateContext`` of a driver. ``stop`` returns once no request is in flight.
    """

    def __cinit__(self, *args, **kwargs):
        self._epoll = self._stop_fd = self._timer = -1
        if gate_init(&self._gate):
            raise MemoryError

    def __init__(self, device, indices, notify_fds, on_failure, str name=None):
        cdef uint32_t slot
        self.device = device
        self.name = name or device.name
        self.indices = tuple(indices)
        self._on_failure = on_failure
        self.n_queues = len(self.indices)
        if self.n_queues > MAX_QUEUES:
            raise ValueError(f"a worker serves at most {MAX_QUEUES} queues")
        self._epoll = epoll_create1(EPOLL_CLOEXEC)
        self._stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        self._timer = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK)
        if self._epoll < 0 or self._stop_fd < 0 or self._timer < 0:
            raise OSError(errno, os.strerror(errno))
        # Edge-triggered, so the eventfds need not be read: this saves a system call for each notification.
        for slot, fd in enumerate(notify_fds):
            self._must_watch(fd, TOKEN_QUEUE + slot, EPOLLIN | EPOLLET)
        self._must_watch(self._stop_fd, TOKEN_STOP, EPOLLIN | EPOLLET)
        self._must_watch(self._timer, TOKEN_TIMER, EPOLLIN)

    def __dealloc__(self):
        self._close_fds()
        gate_destroy(&self._gate)

    cdef void _close_fds(self) noexcept:
        cdef int fd
        for fd in (self._epoll, self._stop_fd, self._timer):
            if fd >= 0:
                close(fd)
        self._epoll = self._stop_fd = self._timer = -1

    cdef int _must_watch(self, int fd, uint32_t token, uint32_t events) except -1:
        if self.watch(fd, token, events) < 0:
            raise OSError(errno, os.strerror(errno))

    # Called by the transport

    def start(self, context):
        """Serve the driver of `context`: by the thread that waits since ``stop``, or else by a new one."""
        cdef Interrupt interrupt = context.interrupt
        cdef VirtQueue queue
        cdef uint32_t slot
        self._context = context         # keeps the queues, the memory and the interrupt
        self.ram = context.memory
        self.call = &interrupt.call
        self.features = context.features
        for slot, index in enumerate(self.indices):
            queue = context.queues[index]
            self.numbers[slot] = index
            self.rings[slot] = &queue.ring
            self.chains[slot] = &queue.scratch
            self._stalled[slot] = False
        self.poll_ns = <uint64_t>int(self.device.poll_us * 1000)
        self._polling[0] = self._polling[1] = Polling(self.poll_ns, 0, 0)
        self._again = ~<uint64_t>0      # none is notified of what came before DRIVER_OK or while the thread was stopped
        self.in_flight = False
        context.stopping = False
        flag_set(&self._stop, 0)
        flag_set(&self._gone, 0)
        self.begin()
        if self._thread is not None:
            gate_set(&self._gate, False, False)
            return
        gate_destroy(&self._gate)       # the thread before this one ended it
        if gate_init(&self._gate):
            raise MemoryError
        self._thread = spawn(
            self.device.thread_kind, self.name, self._run, below=self.device.below, unconfined=self._unconfined)

    def begin(self):
        """Prepare for a new driver, before the thread starts. A subclass may override this."""

    def stop(self, bint leaving=False):
        """Serve nobody from here on; returns once no request is in flight. Idempotent.

        :param leaving: the driver is gone for good, so its pending work is done or dropped now, and the thread ends.
            False: the thread waits for ``start``
        """
        cdef bint there = False
        if self._thread is None:
            return
        self._context.stopping = True
        gate_set(&self._gate, not leaving, leaving)
        flag_set(&self._stop, 1 + leaving)
        eventfd_write(self._stop_fd, 1)
        while not leaving and not there:
            with nogil:
                there = gate_await(&self._gate, 1)
            PyErr_CheckSignals()
        if self._gate.ended:            # by us, or because it failed
            self._join()

    cdef _join(self):
        # Returns only once the thread has ended: what it uses may be closed next. Before Python 3.13, join() takes it
        # for ended when the handler of a signal raises.
        try:
            self._thread.join()
        except BaseException:
            while not flag_read(&self._gone) and not self.is_here():
                with nogil:
                    nap_ns(NAP_NS)
                try:
                    PyErr_CheckSignals()
                except BaseException:
                    pass                # an earlier one is raised
            raise
        finally:
            self._thread = None

    def is_here(self):
        """Whether this is the calling thread."""
        return self._thread is current_thread()

    def forget(self):
        """Drop the state of the driver, which is gone. The thread has stopped. A subclass may override this."""

    def close(self):
        """End the thread and close its file descriptors. Idempotent."""
        try:
            self.stop(True)
        finally:
            self._close_fds()

    @property
    def notified(self):
        """How often a notification from the driver woke this thread, by queue number."""
        return {index: counter_read(&self._notified[slot]) for slot, index in enumerate(self.indices)}

    def wake(self):
        """Make the thread call ``event(TOKEN_TIMER)`` soon. Any thread."""
        eventfd_write(self._stop_fd, 1)     # not by the timer, which the thread may be about to set

    def _run(self):
        cdef int status
        cdef bytes name = self.name.encode()[:15]
        self._thread = current_thread()     # it may be asked for before start() has it
        name_thread(name)
        try:
            with nogil:
                while True:
                    status = self._loop()
                    self.finish()
                    if status < 0 or self.leaving() or gate_pass(&self._gate):
                        break
            if status < 0:
                self.forget()           # tells waiters that no answer will come
                self._on_failure(self._failure(status))
        finally:
            self._end()

    def _unconfined(self, error):
        self._on_failure(error)
        self._end()

    cdef _end(self):
        gate_set(&self._gate, False, True)
        flag_set(&self._gone, 1)

    def _failure(self, int status):
        cdef VirtQueue queue
        if status == WORKER_RAISED:
            raised, self._raised = self._raised, None
            return raised
        if status == WORKER_HOST:
            return HostError(self.host_errno, self.name)
        queue = self._context.queues[self.indices[self.broken]]
        return queue.failure(status)

    # The thread

    cdef int _loop(self) noexcept nogil:
        cdef epoll_event[EVENTS] events
        cdef uint32_t token, slot
        cdef uint64_t again, expired
        cdef int count, i, status
        while not self.stopping():
            if not self._again and self.poll_ns and not self.in_flight and self._look(
                    &self._polling[self._host_first]):
                self._host_first = False
                for slot in range(self.n_queues):
                    self._again |= <uint64_t>(not self._stalled[slot]) << slot
            again, self._again = self._again, 0
            for slot in range(self.n_queues):
                status = self._kicked(slot) if again >> slot & 1 else 0
                if status < 0:
                    return status
            count = epoll_wait(self._epoll, events, EVENTS, 0 if again else -1)
            if count < 0:
                if errno == EINTR:
                    continue
                self.host_errno = errno
                return WORKER_HOST
            for i in range(count):
                token = events[i].data.u32
                if token == TOKEN_STOP and self.stopping():
                    continue            # the others' edges come only once
                if token >= TOKEN_QUEUE:
                    counter_add(&self._notified[token - TOKEN_QUEUE], 1)
                    self._host_first = False
                    status = self._kicked(token - TOKEN_QUEUE)
                else:
                    if token == TOKEN_TIMER and read(self._timer, &expired, 8) < 0:
                        continue        # the timer was set again in the meantime
                    self.events = events[i].events
                    self._host_first = True
                    status = self.event(TOKEN_TIMER if token == TOKEN_STOP else token)
                if status < 0:
                    return status
        return 0

    cdef int _kicked(self, uint32_t slot) noexcept nogil:
        # KVM's ioeventfd also fires for queues that are not ready.
        if self.rings[slot].size == 0:
            return 0
        return self.run_queue(slot)

    cdef bint _look(self, Polling *how) noexcept nogil:
        # Poll the available rings for a while before sleeping, with notifications off. The next polling is longer if
        # this one found a chain, and shorter and later if it did not.
        cdef uint64_t end
        cdef uint32_t slot
        cdef Ring *ring
        cdef bint found = False
        if how.skipped < how.skip:
            how.skipped += 1
            return False
        how.skipped = 0
        for slot in range(self.n_queues):
            queue_mute(self.rings[slot])
        end = clock_ns(CLOCK_MONOTONIC) + how.time
        while not found and not self.stopping() and clock_ns(CLOCK_MONOTONIC) < end:
            worker_pause()
            for slot in range(self.n_queues):
                ring = self.rings[slot]
                if ring.size and not self._stalled[slot] and load_relaxed16(ring.avail + 2) != ring.last_avail:
                    found = True
        for slot in range(self.n_queues):
            if not found and not self._stalled[slot] and queue_enable_notify(self.rings[slot]):
                found = True
        if found:
            how.time = min(how.time * 2, self.poll_ns)
            how.skip = 0
        else:
            how.time = max(how.time // 2, <uint64_t>POLL_LEAST_NS)
            how.skip = min(how.skip * 2 + 1, <uint32_t>POLL_SKIP_MOST)
        return found

    cdef int run_queue(self, uint32_t slot) noexcept nogil:
        cdef Ring *ring = self.rings[slot]
        cdef int status
        while True:
            queue_disable_notify(ring)
            self.broken = slot          # set before serve(), which may run another queue and find that one broken
            status = self.serve(slot)
            if status < 0:
                return status
            self._stalled[slot] = status != SERVE_EMPTY
            if status == SERVE_MORE:
                self._again |= <uint64_t>1 << slot
            if status != SERVE_EMPTY or self.stopping() or not queue_enable_notify(ring):
                return status

    cdef int run_waiting(self) noexcept nogil:
        # Another queue is the first each time, as it may take all that is free.
        cdef uint32_t i, slot
        cdef Ring *ring
        cdef int status
        self._first += 1
        for i in range(self.n_queues):
            slot = (self._first + i) % self.n_queues
            ring = self.rings[slot]
            # set_rate_limit also wakes the threads of queues that the driver does not use: those have no size.
            if ring.size and (self._stalled[slot] or load_relaxed16(ring.avail + 2) != ring.last_avail):
                status = self.run_queue(slot)
                if status < 0:
                    return status
        return 0

    cdef void publish(self, uint32_t slot) noexcept nogil:
        if queue_flush(self.rings[slot]):
            interrupt_used(self.call, self.numbers[slot])

    cdef int watch(self, int fd, uint32_t token, uint32_t events) noexcept nogil:
        if worker_ctl(self._epoll, EPOLL_CTL_ADD, fd, events, token) == 0:
            return 0
        return worker_ctl(self._epoll, EPOLL_CTL_MOD, fd, events, token) if errno == EEXIST else -1

    cdef void unwatch(self, int fd) noexcept nogil:
        worker_ctl(self._epoll, EPOLL_CTL_DEL, fd, 0, 0)

    cdef void wake_after(self, uint64_t nanoseconds) noexcept nogil:
        worker_arm(self._timer, nanoseconds)

    cdef bint stopping(self) noexcept nogil:
        return flag_read(&self._stop)

    cdef bint leaving(self) noexcept nogil:
        return flag_read(&self._stop) > 1

    cdef int process(self, uint32_t slot) noexcept nogil:
        # KVM's ioeventfd also fires for queues that are not ready.
        if self.rings[slot].size:
            with gil:
                try:
                    self.device.process(self.numbers[slot])
                except BaseException as failure:    # the thread's boundary: this device stops, the VM lives
                    self._raised = failure
                    return WORKER_RAISED
        return 0

    # Overridden by devices

    cdef int serve(self, uint32_t slot) noexcept nogil:
        return SERVE_EMPTY

    cdef int event(self, uint32_t token) noexcept nogil:
        return 0

    cdef void finish(self) noexcept nogil:
        pass


cdef class Worker(QueueWorker):
    """A thread that calls ``process(index)`` of a device in Python when there may be work in queue `index`.

    What ``process`` raises is for ``on_failure``, and ends the thread.
    """

    def begin(self):
        self.poll_ns = 0            # for loops without the GIL

    cdef int _kicked(self, uint32_t slot) noexcept nogil:
        return self.process(slot)
