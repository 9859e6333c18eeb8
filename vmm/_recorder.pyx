# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""Guest RAM that a thread brings from a file, page by page as it is first touched, and the order of these pages."""
import os

from libc.errno cimport EINTR, EIO, errno
from libc.stdint cimport uint8_t, uint32_t, uintptr_t
from libc.string cimport memset
from posix.unistd cimport pread

from vmm import _uffd, threads

from vmm._sys cimport eventfd_write, flag_read, flag_set, table_alloc, table_free

cdef extern from *:
    """
    #include <linux/userfaultfd.h>
    #include <poll.h>
    #include <sys/ioctl.h>
    #include <unistd.h>
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
    bint recorder_wait(int fd, int stop) nogil
    bint recorder_next(int fd, uintptr_t *start, uintptr_t *end) nogil
    void recorder_bring(int fd, uintptr_t address, const void *page) nogil
    int recorder_poison(int fd, uintptr_t address) nogil

cdef enum:
    PAGE = 4096
    MOST_REGIONS = 2
    NOTED = 1                           # of a page: it is in the order
    FREED = 2                           # it is zeros from now on

# For the seccomp filters.
IOCTLS = (0x8010AA02, 0xC028AA03, 0xC020AA08)   # UFFDIO_WAKE, UFFDIO_COPY, UFFDIO_POISON

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
            self._fd = _uffd.create(threads.guard is None)      # no filter allows the system call
            self._stop = os.eventfd(0, os.EFD_CLOEXEC)
            for address, size, _ in regions:
                _uffd.register(self._fd, address, size)
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
