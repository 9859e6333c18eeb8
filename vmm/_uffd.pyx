# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""userfaultfd(2): memory whose missing pages another process supplies, or a thread of ours that notes their order; and
memory whose writes are tracked."""
import os

from libc.errno cimport EINTR, EIO, errno
from libc.stdint cimport uint8_t, uint32_t, uintptr_t
from libc.string cimport memset

from vmm import threads

from vmm._sys cimport eventfd_write, flag_read, flag_set, table_alloc, table_free

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <fcntl.h>
    #include <linux/userfaultfd.h>
    #include <poll.h>
    #include <sys/ioctl.h>
    #include <sys/syscall.h>
    #include <unistd.h>
    #ifndef USERFAULTFD_IOC_NEW /* Linux 6.1 */
    #define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
    #endif
    #define UFFD_FLAGS (O_CLOEXEC | O_NONBLOCK)
    static int uffd_device(void) {
        int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC), fd, error;
        if (device < 0)
            return -1;
        fd = ioctl(device, USERFAULTFD_IOC_NEW, UFFD_FLAGS);
        error = errno;
        close(device);
        errno = error;
        return fd;
    }
    static int uffd_call(int flags) { return (int)syscall(SYS_userfaultfd, UFFD_FLAGS | flags); }
    static int uffd_api(int fd, unsigned long features) {
        struct uffdio_api api = { .api = UFFD_API, .features = features };
        return ioctl(fd, UFFDIO_API, &api);
    }
    #define UFFD_USER_ONLY 1        /* UFFD_USER_MODE_ONLY: needs no privilege */
    #define UFFD_ASYNC (1 << 15)    /* UFFD_FEATURE_WP_ASYNC, in <linux/userfaultfd.h> since Linux 6.7 */
    static int uffd_register(int fd, unsigned long address, unsigned long size, unsigned long mode) {
        struct uffdio_register range = { .range = { address, size }, .mode = mode };
        return ioctl(fd, UFFDIO_REGISTER, &range);
    }
    /* The handler is dead when both its connection and its process are gone: it may close its connection and go on, or
       leave the work to a child process. */
    static int uffd_watch(int peer, int process, int stop) {
        static const char last[] =
            "pyvmm: the page fault handler has ended: guest memory is incomplete, so the VM ends\\n";
        struct pollfd fds[3] = { { stop, POLLIN, 0 }, { peer, POLLRDHUP, 0 }, { process, POLLIN, 0 } };
        while (fds[1].fd >= 0 || fds[2].fd >= 0) {
            if (poll(fds, 3, -1) < 0)
                continue;
            if (fds[0].revents)
                return 0;
            for (int i = 1; i < 3; i++)
                if (fds[i].revents)
                    fds[i].fd = -1;
        }
        if (write(2, last, sizeof last - 1) < 0) {}
        _exit(1);
    }
    /* For _UFFDIO_POISON of Linux 6.6. */
    struct uffd_range_mode { struct uffdio_range range; unsigned long long mode; long long updated; };
    static int recorder_wait(int fd, int stop) {
        struct pollfd fds[2] = { { fd, POLLIN, 0 }, { stop, POLLIN, 0 } };
        return poll(fds, 2, -1) < 0 || !fds[1].revents;
    }
    /* The address of a page for which somebody waits, or a range that was freed: `end` is 0, or its end. */
    static int recorder_next(int fd, uintptr_t *start, uintptr_t *end) {
        struct uffd_msg message;
        if (read(fd, &message, sizeof message) != sizeof message)
            return 0;
        if (message.event == UFFD_EVENT_REMOVE) {
            *start = message.arg.remove.start;
            *end = message.arg.remove.end;
        } else {
            *start = message.arg.pagefault.address & ~4095ull;
            *end = 0;
        }
        return 1;
    }
    /* If the page is there already, or memory was freed meanwhile, whoever waits for it looks again. */
    static void recorder_bring(int fd, uintptr_t address, const void *page) {
        struct uffdio_copy copy = { .dst = address, .src = (uintptr_t)page, .len = 4096 };
        struct uffdio_range range = { address, 4096 };
        if (ioctl(fd, UFFDIO_COPY, &copy) < 0)
            ioctl(fd, UFFDIO_WAKE, &range);
    }
    /* Whoever touches the page gets SIGBUS, or EFAULT in the kernel. */
    static int recorder_poison(int fd, uintptr_t address) {
        struct uffd_range_mode poison = { { address, 4096 }, 0, 0 };
        return ioctl(fd, _IOWR(0xAA, 0x08, struct uffd_range_mode), &poison);
    }
    """
    int uffd_device() nogil
    int uffd_call(int flags) nogil
    int uffd_api(int fd, unsigned long features) nogil
    int UFFD_USER_ONLY
    unsigned long UFFD_ASYNC, UFFD_FEATURE_EVENT_REMOVE
    int uffd_register(int fd, unsigned long address, unsigned long size, unsigned long mode) nogil
    unsigned long UFFDIO_REGISTER_MODE_MISSING, UFFDIO_REGISTER_MODE_WP
    int uffd_watch(int peer, int process, int stop) nogil
    bint recorder_wait(int fd, int stop) nogil
    bint recorder_next(int fd, uintptr_t *start, uintptr_t *end) nogil
    void recorder_bring(int fd, uintptr_t address, const void *page) nogil
    int recorder_poison(int fd, uintptr_t address) nogil
    ssize_t pread(int fd, void *buf, size_t count, long offset) nogil

cdef enum:
    PAGE = 4096
    MOST_REGIONS = 2
    NOTED = 1                           # of a page: it is in the order
    FREED = 2                           # it is zeros from now on


def create():
    """Create a userfaultfd that also reports faults inside the kernel, and freed pages (UFFD_EVENT_REMOVE).

    :returns: a non-blocking descriptor, owned by the caller
    :raises OSError: the host has no userfaultfd, or this process may not use it
    """
    cdef int fd = uffd_device()         # missing before Linux 6.1; and a filter may be here, which allows no call
    if fd < 0 and threads.guard is None:
        fd = uffd_call(0)
    return _agreed(fd, UFFD_FEATURE_EVENT_REMOVE)


cdef int _agreed(int fd, unsigned long features) except -1:
    # `fd` with these features, owned by the caller; closed where the kernel has them not. -1: it could not be made.
    if fd < 0 or uffd_api(fd, features) < 0:
        error = errno
        if fd >= 0:
            os.close(fd)
        raise OSError(error, os.strerror(error))
    return fd


def register(int fd, uintptr_t address, size_t size, bint marks=False):
    """Make `fd` report every access to a missing page of [`address`, `address` + `size`).

    :param marks: instead, allow ``vmm._mapping.unmarked_runs`` to mark these pages
    :raises OSError: the kernel refused
    """
    if uffd_register(fd, address, size, UFFDIO_REGISTER_MODE_WP if marks else UFFDIO_REGISTER_MODE_MISSING) < 0:
        raise OSError(errno, os.strerror(errno))


def create_marks():
    """Create a userfaultfd for tracking writes: the kernel removes a page's write protection at the first write.

    :returns: a descriptor, owned by the caller; closing it removes all marks
    :raises OSError: the kernel is older than Linux 6.7, or this process may not use userfaultfd
    """
    # With UFFD_ASYNC the kernel reports no fault to user space, so UFFD_USER_ONLY is enough.
    return _agreed(uffd_call(UFFD_USER_ONLY), UFFD_ASYNC)


def watch(int peer, int process, int stop):
    """Wait until `stop` is readable. If the page fault handler dies first, write one line and exit with status 1.

    Without a handler, a thread that touches a missing page waits for ever. It may hold the GIL, so only this thread
    can end the process. All three descriptors are borrowed.

    :param peer: the connection to the handler
    :param process: a pidfd of the process that listened for the connection
    :param stop: an eventfd
    """
    with nogil:
        uffd_watch(peer, process, stop)


cdef struct Span:
    uintptr_t address
    size_t size, offset


cdef class Recorder:
    """A thread that brings the missing pages of guest RAM from a file, and notes in which order they are first touched.

    :param file: the file, a ``vmm.memory.MemoryFile``
    :param regions: host address, bytes and offset in the file of each region; mapped private, and untouched
    :raises OSError: the host has no userfaultfd for this process, or no memory or thread left

    A page that cannot be read ends the machine that touches it (before Linux 6.6: it is zeros), and ``order`` raises.
    """

    cdef Span[MOST_REGIONS] _spans
    cdef int _count, _fd, _file, _stop
    cdef int _error, _noting, _noted    # flags that the thread and others share: errno, whether, how many pages
    cdef size_t _pages
    cdef uint8_t *_state                # a byte a page of the file
    cdef uint32_t *_order               # numbers of pages
    cdef object _thread, _source

    def __cinit__(self, *args, **kwargs):
        self._fd = self._stop = -1

    def __init__(self, file, regions):
        cdef int count = 0
        self._source = file
        self._file = file.fd
        for address, size, offset in regions:
            self._spans[count] = Span(address, size, offset)
            self._pages = max(self._pages, (offset + size) // PAGE)
            count += 1
        self._count = count
        self._state = <uint8_t *>table_alloc(self._pages)
        self._order = <uint32_t *>table_alloc(self._pages * sizeof(uint32_t))
        if self._state == NULL or self._order == NULL:
            raise MemoryError
        flag_set(&self._noting, True)
        try:
            self._fd = create()
            self._stop = os.eventfd(0, os.EFD_CLOEXEC)
            for address, size, _ in regions:
                register(self._fd, address, size)
            self._thread = threads.spawn("recorder", "page recorder", self._run)
        except BaseException:
            self.release()
            raise

    def __dealloc__(self):
        table_free(self._state, self._pages)
        table_free(self._order, self._pages * sizeof(uint32_t))

    def stop_noting(self):
        """Go on bringing pages, and note none of them."""
        flag_set(&self._noting, False)

    def order(self):
        """(offset in the file, bytes) of each run of pages, in the order in which they were first touched.

        :raises OSError: a page could not be read
        """
        cdef size_t i, start = 0, count = flag_read(&self._noted)
        cdef int error = flag_read(&self._error)
        cdef list runs = []
        if error:
            raise OSError(error, os.strerror(error))
        for i in range(1, count + 1):
            if i == count or self._order[i] != self._order[i - 1] + 1:
                runs.append((<size_t>self._order[start] * PAGE, (i - start) * PAGE))
                start = i
        return runs

    def release(self):
        """End the thread. Pages that are still missing are zeros. Idempotent."""
        if self._thread is not None:
            eventfd_write(self._stop, 1)
            self._thread.join()
            self._thread = None
        for fd in (self._stop, self._fd):
            if fd >= 0:
                os.close(fd)
        self._stop = self._fd = -1

    def close(self):
        """The same."""
        self.release()

    def _run(self):
        cdef uintptr_t start, end
        with nogil:
            while recorder_wait(self._fd, self._stop):
                while recorder_next(self._fd, &start, &end):
                    if end:
                        self._free(start, end)
                    else:
                        self._bring(start)

    cdef Span *_span(self, uintptr_t address) noexcept nogil:
        cdef int i
        for i in range(self._count):
            if self._spans[i].address <= address < self._spans[i].address + self._spans[i].size:
                return &self._spans[i]
        return NULL

    cdef void _free(self, uintptr_t start, uintptr_t end) noexcept nogil:
        cdef Span *span = self._span(start)
        cdef size_t first, page
        if span == NULL:
            return
        first = (span.offset + start - span.address) // PAGE
        for page in range(first, first + (end - start) // PAGE):
            self._state[page] |= FREED

    cdef void _bring(self, uintptr_t address) noexcept nogil:
        cdef char[PAGE] data
        cdef Span *span = self._span(address)
        cdef size_t page, got = 0
        cdef ssize_t count
        if span == NULL:
            return
        page = (span.offset + address - span.address) // PAGE
        if flag_read(&self._noting) and not self._state[page]:
            self._order[self._noted] = <uint32_t>page
            flag_set(&self._noted, self._noted + 1)
        self._state[page] |= NOTED
        while got < PAGE and not self._state[page] & FREED:
            count = pread(self._file, data + got, PAGE - got, page * PAGE + got)
            if count < 0 and errno == EINTR:
                continue
            if count <= 0:
                flag_set(&self._error, errno if count < 0 else EIO)     # EIO: somebody has cut the file
                if recorder_poison(self._fd, address) == 0:
                    return
                break
            got += count
        memset(data + got, 0, PAGE - got)
        recorder_bring(self._fd, address, data)
