# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""One vCPU's run loop: KVM_RUN, and the exits that need no Python, all without the GIL.

A vCPU's thread calls ``attach`` once, then ``run`` again and again. ``run`` returns only for exits that the caller must
handle: a kick, a shutdown of the guest, an error. An access to a Python device takes the GIL for that access only.
While its ``Gate`` is shut, a vCPU waits inside ``run``, also without the GIL.
"""
from cpython.exc cimport PyErr_CheckSignals
from cpython.buffer cimport PyBUF_WRITE
from cpython.memoryview cimport PyMemoryView_FromMemory
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memset
from posix.mman cimport MAP_SHARED, PROT_READ, PROT_WRITE, mmap, munmap

from vmm._bus cimport ACCESS_DONE, ACCESS_PYTHON, Bus, Range, bus_find, bus_table
from vmm._gate cimport gate_await, gate_destroy, gate_init, gate_is_shut, gate_pass, gate_set, gate_t
from vmm._sys cimport counter_add, counter_read, counters_read, name_thread

from vmm.errors import KvmError


cdef extern from "<linux/kvm.h>" nogil:
    struct kvm_run_io "":           # these have no names there
        uint8_t direction
        uint8_t size
        uint16_t port
        uint32_t count
        uint64_t data_offset
    struct kvm_run_mmio "":
        uint64_t phys_addr
        uint8_t[8] data
        uint32_t len
        uint8_t is_write
    struct kvm_run_fail_entry "":
        uint64_t hardware_entry_failure_reason
    struct kvm_run_internal "":
        uint32_t suberror
        uint32_t ndata
        uint64_t[16] data
    struct kvm_run:
        uint8_t immediate_exit
        uint32_t exit_reason
        kvm_run_io io
        kvm_run_mmio mmio
        kvm_run_fail_entry fail_entry
        kvm_run_internal internal
    enum: KVM_EXIT_IO, KVM_EXIT_IO_OUT, KVM_EXIT_MMIO, KVM_EXIT_INTR

cdef extern from *:
    """
    #include <linux/kvm.h>
    #include <pthread.h>
    #include <signal.h>
    #include <sys/ioctl.h>
    #include <sys/mman.h>
    #include <time.h>

    static inline void set_immediate_exit(struct kvm_run *r, uint8_t v)
    { __atomic_store_n(&r->immediate_exit, v, __ATOMIC_SEQ_CST); }
    static inline uint8_t take_immediate_exit(struct kvm_run *r)
    { return __atomic_exchange_n(&r->immediate_exit, 0, __ATOMIC_SEQ_CST); }

    #define KICK_SIGNAL SIGRTMIN
    static void on_kick(int signal) { (void)signal; }
    /* No SA_RESTART: the kick must interrupt KVM_RUN. */
    static int arm_kick(void)
    {
        struct sigaction action = { .sa_handler = on_kick };
        sigset_t kick;
        if (sigaction(KICK_SIGNAL, &action, NULL)) return -1;
        sigemptyset(&kick);
        sigaddset(&kick, KICK_SIGNAL);
        return pthread_sigmask(SIG_UNBLOCK, &kick, NULL);
    }
    static void send_kick(pthread_t thread) { pthread_kill(thread, KICK_SIGNAL); }
    static int enter_guest(int fd) { return ioctl(fd, KVM_RUN, 0); }
    /* Fails where the guest has no kvm-clock. */
    static void tell_pause(int fd) { ioctl(fd, KVM_KVMCLOCK_CTRL, 0); }
    """
    ctypedef unsigned long pthread_t
    void set_immediate_exit(kvm_run *r, uint8_t v) nogil
    uint8_t take_immediate_exit(kvm_run *r) nogil
    int arm_kick() nogil
    void send_kick(pthread_t thread) nogil
    int enter_guest(int fd) nogil
    void tell_pause(int fd) nogil
    pthread_t pthread_self() nogil


KICKED = -1     # run() returned because of kick(); all other results are KVM_EXIT_* numbers

cdef enum:
    NEEDS_PYTHON = -2
    FAILED = -3
    AGAIN_MAX = 1000                # attempts at the boot processor's first KVM_RUN


cdef class Gate:
    """Where a machine's vCPUs wait while they are paused. Kick them after ``shut``, so that they reach it soon."""
    cdef gate_t _gate

    def __cinit__(self):
        if gate_init(&self._gate):
            raise MemoryError

    def __dealloc__(self):
        gate_destroy(&self._gate)

    def shut(self):
        """Pause the vCPUs. A vCPU runs on until it is kicked."""
        gate_set(&self._gate, True, False)

    def open(self):
        """Let the vCPUs run again."""
        gate_set(&self._gate, False, False)

    def end(self):
        """Make ``run`` return ``KICKED`` to every vCPU that waits here, now and later."""
        gate_set(&self._gate, False, True)

    def wait(self, int count):
        """Wait until `count` vCPUs wait here, or until ``end``. In the main thread, signal handlers run meanwhile."""
        cdef bint there = False
        while not there:
            with nogil:
                there = gate_await(&self._gate, count)
            PyErr_CheckSignals()


cdef class VcpuLoop:
    """The run loop of one vCPU.

    :param fd: the vCPU's file descriptor; borrowed, must outlive the loop
    :param mmap_size: what ``KVM_GET_VCPU_MMAP_SIZE`` returned
    :param pio: port address space
    :param mmio: memory-mapped address space
    """
    cdef Gate _gate                 # None: the vCPU cannot be paused
    cdef int _fd
    cdef kvm_run *_run              # shared with KVM, mapped until __dealloc__
    cdef size_t _run_size
    cdef Bus _pio
    cdef Bus _mmio
    cdef uint32_t _done             # finished items of the current string I/O
    cdef pthread_t _thread          # valid while _attached
    cdef bint _attached
    cdef bint _boots                # this is the boot processor, which does not wait for an INIT
    cdef int _errno                 # errno of the KVM_RUN that failed
    cdef uint64_t _exits            # times that KVM_RUN returned an exit
    cdef uint64_t[4] _accesses      # exits for port reads, port writes, MMIO reads, MMIO writes
    cdef readonly uint64_t python_exits  # exits that took the GIL

    def __cinit__(self, int fd, size_t mmap_size, Bus pio not None, Bus mmio not None):
        cdef void *p = mmap(NULL, mmap_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0)
        if <long>p == -1:
            raise KvmError(errno, "mmap of a vCPU")
        self._run = <kvm_run *>p
        self._run_size = mmap_size
        self._fd = fd
        self._pio = pio
        self._mmio = mmio

    def __dealloc__(self):
        if self._run != NULL:
            munmap(self._run, self._run_size)

    def attach(self, str name, bint boots=False, Gate gate=None):
        """Make the calling thread this vCPU's thread. It blocks no kick from here on.

        :param name: the thread's name; truncated to 15 bytes
        :param boots: whether this is the boot processor, which does not wait for an INIT
        :param gate: where it waits while it is paused; None: it cannot be paused
        :raises KvmError: the kick's signal handler cannot be installed
        """
        if arm_kick() != 0:
            raise KvmError(errno, "sigaction of the kick signal")
        name_thread(name.encode())
        self._boots = boots
        self._gate = gate
        self._thread = pthread_self()
        self._attached = True

    def detach(self):
        """End what ``attach`` began. A kick no longer sends a signal; the next ``run`` still returns ``KICKED``."""
        self._attached = False

    def kick(self):
        """Make ``run`` return ``KICKED``, or wait if the gate is shut. Any thread. Kicks before a run count as one."""
        set_immediate_exit(self._run, 1)
        if self._attached:
            send_kick(self._thread)

    def run(self):
        """Run the guest until an exit that the caller must handle.

        :returns: ``KICKED`` or a ``KVM_EXIT_*`` number
        :raises KvmError: KVM_RUN failed
        :raises Exception: an exception from a Python device's ``read`` or ``write``, such as ``vmm.exits.Stop``
        """
        cdef int reason
        while True:
            with nogil:
                reason = self._spin()
            if reason == NEEDS_PYTHON:
                self.python_exits += 1
                self._python_access()
            elif reason == FAILED:
                raise KvmError(self._errno, "KVM_RUN")
            else:
                return reason

    cdef int _spin(self) noexcept nogil:
        cdef kvm_run *run = self._run
        cdef gate_t *gate = NULL if self._gate is None else &self._gate._gate
        cdef uint32_t again = 0
        if gate != NULL and gate_is_shut(gate):
            # It waits below: the access that Python has just answered is not over before the next KVM_RUN.
            set_immediate_exit(run, 1)
        while True:
            if enter_guest(self._fd) < 0:
                # EAGAIN: an application processor just got its INIT. Or, at a VM's first run, the host could not start
                # KVM's worker thread; KVM reports that before it checks for a kick.
                if (errno == EINTR or errno == EAGAIN) and take_immediate_exit(run):
                    if gate == NULL or not gate_is_shut(gate) or gate_pass(gate):
                        return -1       # KICKED
                    tell_pause(self._fd)        # or the guest's watchdog takes it for a CPU that hangs
                    continue
                if errno == EINTR:
                    continue            # a stray signal
                if errno == EAGAIN:
                    again += 1
                    if self._exits or not self._boots or again < AGAIN_MAX:
                        continue
                self._errno = errno
                return FAILED
            counter_add(&self._exits, 1)
            if run.exit_reason == KVM_EXIT_IO:
                self._done = 0
                counter_add(&self._accesses[run.io.direction == KVM_EXIT_IO_OUT], 1)
                if self._port_access() != ACCESS_DONE:
                    return NEEDS_PYTHON
            elif run.exit_reason == KVM_EXIT_MMIO:
                counter_add(&self._accesses[2 + run.mmio.is_write], 1)
                if self._access(self._mmio, run.mmio.phys_addr, run.mmio.data, run.mmio.len,
                                run.mmio.is_write) != ACCESS_DONE:
                    return NEEDS_PYTHON
            elif run.exit_reason != KVM_EXIT_INTR:
                return run.exit_reason

    cdef inline int _access(self, Bus bus, uint64_t address, uint8_t *data, uint32_t size,
                            int is_write) noexcept nogil:
        cdef Range *r = bus_find(bus_table(bus), address, size)
        if r == NULL:
            counter_add(&bus._unclaimed, 1)
            if not is_write:
                memset(data, 0xff, size)
            return ACCESS_DONE
        counter_add(&r.hits, 1)
        if r.access == NULL:
            return ACCESS_PYTHON
        return r.access(r.ctx, address - r.start, data, size, is_write)

    cdef int _port_access(self) noexcept nogil:
        # One exit of string I/O has several items for the same port, packed one after the other.
        cdef kvm_run *run = self._run
        cdef uint32_t size = run.io.size
        while self._done < run.io.count:
            if self._access(self._pio, run.io.port, <uint8_t *>run + run.io.data_offset + self._done * size, size,
                            run.io.direction == KVM_EXIT_IO_OUT) != ACCESS_DONE:
                return ACCESS_PYTHON
            self._done += 1
        return ACCESS_DONE

    cdef _python_access(self):
        cdef kvm_run *run = self._run
        cdef uint32_t size = run.io.size
        if run.exit_reason == KVM_EXIT_MMIO:
            self._call(self._mmio, run.mmio.phys_addr, run.mmio.data, run.mmio.len, run.mmio.is_write)
            return
        while self._done < run.io.count:
            self._call(self._pio, run.io.port, <uint8_t *>run + run.io.data_offset + self._done * size, size,
                       run.io.direction == KVM_EXIT_IO_OUT)
            self._done += 1

    cdef _call(self, Bus bus, uint64_t address, uint8_t *data, uint32_t size, int is_write):
        cdef Range *r = bus_find(bus_table(bus), address, size)
        if r == NULL:   # removed since the exit
            if not is_write:
                memset(data, 0xff, size)
            return
        device = <object>r.device
        view = PyMemoryView_FromMemory(<char *>data, size, PyBUF_WRITE)
        try:
            if is_write:
                device.write(address - r.start, view)
            else:
                device.read(address - r.start, view)
        finally:
            view.release()  # a device that kept the view must not read kvm_run later: KVM reuses it

    @property
    def exits(self):
        """Times that KVM_RUN came back with an exit."""
        return counter_read(&self._exits)

    @property
    def accesses(self):
        """Number of exits for port and MMIO accesses, by kind of access."""
        cdef uint64_t[4] now
        counters_read(now, self._accesses, sizeof(now))
        return dict(zip(("io_in", "io_out", "mmio_read", "mmio_write"), now))

    @property
    def internal_error(self):
        """After ``KVM_EXIT_INTERNAL_ERROR``: a ``KVM_INTERNAL_ERROR_*``, and at most 16 64-bit integers about it."""
        data = [self._run.internal.data[i] for i in range(min(<int>self._run.internal.ndata, 16))]
        return self._run.internal.suberror, data

    @property
    def fail_entry_reason(self):
        """After ``KVM_EXIT_FAIL_ENTRY``: the hardware's reason code."""
        return self._run.fail_entry.hardware_entry_failure_reason
