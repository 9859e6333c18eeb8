# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""userfaultfd(2): memory of ours whose missing pages another program brings, or whose pages tell of their writes."""
import os

from libc.errno cimport EINTR, ENOENT, errno
from libc.stdint cimport uintptr_t

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <fcntl.h>
    #include <linux/userfaultfd.h>
    #include <poll.h>
    #include <sys/ioctl.h>
    #include <sys/mman.h>
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
    static int uffd_call(void) { return (int)syscall(SYS_userfaultfd, UFFD_FLAGS); }
    static int uffd_api(int fd) {
        struct uffdio_api api = { .api = UFFD_API, .features = UFFD_FEATURE_EVENT_REMOVE };
        return ioctl(fd, UFFDIO_API, &api);
    }
    /* <linux/userfaultfd.h> since Linux 6.7. No fault is ever told, so one that the kernel cannot wait for will do. */
    static int uffd_marks(void) {
        struct uffdio_api api = { .api = UFFD_API, .features = 1 << 15 /* UFFD_FEATURE_WP_ASYNC */ };
        int fd = (int)syscall(SYS_userfaultfd, UFFD_FLAGS | 1 /* UFFD_USER_MODE_ONLY */), error;
        if (fd < 0 || !ioctl(fd, UFFDIO_API, &api))
            return fd;
        error = errno;
        close(fd);
        errno = error;
        return -1;
    }
    static int uffd_register(int fd, unsigned long address, unsigned long size, unsigned long mode) {
        struct uffdio_register range = { .range = { address, size }, .mode = mode };
        return ioctl(fd, UFFDIO_REGISTER, &range);
    }
    /* Not one of the two alone: a handler may close its connection and serve on, or serve from a child. */
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
    static void uffd_touch(unsigned long address, size_t size) {
        for (size_t at = 0; at < size; at += 4096)
            (void)*(const volatile char *)(address + at);
    }
    """
    int uffd_device() nogil
    int uffd_call() nogil
    int uffd_api(int fd) nogil
    int uffd_marks() nogil
    int uffd_register(int fd, unsigned long address, unsigned long size, unsigned long mode) nogil
    unsigned long UFFDIO_REGISTER_MODE_MISSING, UFFDIO_REGISTER_MODE_WP
    int uffd_watch(int peer, int process, int stop) nogil
    void uffd_touch(unsigned long address, size_t size) nogil
    int madvise(void *address, size_t size, int advice) nogil
    int MADV_DONTNEED

# As they are in the filters.
IOCTLS = (0xAA00, 0xC018AA3F, 0xC020AA00)       # USERFAULTFD_IOC_NEW, UFFDIO_API, UFFDIO_REGISTER


def create(bint by_call):
    """A userfaultfd for the faults of the kernel, too, which also tells of pages that are given back (EVENT_REMOVE).

    :param by_call: by the system call, where there is no /dev/userfaultfd (before Linux 6.1)
    :returns: its descriptor, not blocking
    :raises OSError: the host has none for us
    """
    cdef int fd = uffd_device()
    if fd < 0 and errno == ENOENT and by_call:
        fd = uffd_call()
    if fd < 0:
        raise OSError(errno, os.strerror(errno))
    if uffd_api(fd) < 0:
        error = errno
        os.close(fd)
        raise OSError(error, os.strerror(error))
    return fd


def register(int fd, uintptr_t address, size_t size):
    """Let `fd` tell of each page of [`address`, `address` + `size`) that is missing when it is touched.

    :raises OSError: the kernel refused
    """
    if uffd_register(fd, address, size, UFFDIO_REGISTER_MODE_MISSING) < 0:
        raise OSError(errno, os.strerror(errno))


def create_marks():
    """A userfaultfd whose write protection goes at the first write by itself, and tells of it so.

    :returns: its descriptor; the marks go with it
    :raises OSError: the host has none for us (before Linux 6.7)
    """
    cdef int fd = uffd_marks()
    if fd < 0:
        raise OSError(errno, os.strerror(errno))
    return fd


def register_marks(int fd, uintptr_t address, size_t size):
    """Let pages of [`address`, `address` + `size`) be marked by ``vmm._mapping.unmarked_runs``.

    :raises OSError: the kernel refused
    """
    if uffd_register(fd, address, size, UFFDIO_REGISTER_MODE_WP) < 0:
        raise OSError(errno, os.strerror(errno))


def drop(uintptr_t address, size_t size):
    """Give the pages back. Returns once the handler has heard of it.

    :raises OSError: the kernel refused
    """
    cdef int failed
    with nogil:
        failed = madvise(<void *>address, size, MADV_DONTNEED)
        while failed and errno == EINTR:
            failed = madvise(<void *>address, size, MADV_DONTNEED)
    if failed:
        raise OSError(errno, os.strerror(errno))


def watch(int peer, int process, int stop):
    """Return when `stop` can be read. Before that, end this process by one line and status 1 if the handler dies.

    Whoever touches a page that is missing waits for ever then, and may hold the GIL: nothing else would end it.

    :param peer: the connection to the handler
    :param process: a pidfd of who listened
    :param stop: an eventfd
    """
    with nogil:
        uffd_watch(peer, process, stop)


def touch(uintptr_t address, size_t size):
    """Have all pages brought that are missing."""
    with nogil:
        uffd_touch(address, size)
