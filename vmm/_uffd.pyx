# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""userfaultfd(2): memory whose missing pages another process supplies, and memory whose writes are tracked."""
import os

from libc.errno cimport EINTR, errno
from libc.stdint cimport uintptr_t
from posix.mman cimport MADV_DONTNEED, madvise

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
    static void uffd_touch(unsigned long address, size_t size) {
        for (size_t at = 0; at < size; at += 4096)
            (void)*(const volatile char *)(address + at);
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
    void uffd_touch(unsigned long address, size_t size) nogil

# For the seccomp filters.
IOCTLS = (0xAA00, 0xC018AA3F, 0xC020AA00)       # USERFAULTFD_IOC_NEW, UFFDIO_API, UFFDIO_REGISTER


def create(bint by_call):
    """Create a userfaultfd that also reports faults inside the kernel, and freed pages (UFFD_EVENT_REMOVE).

    :param by_call: use the system call if /dev/userfaultfd is missing (before Linux 6.1) or may not be used
    :returns: a non-blocking descriptor, owned by the caller
    :raises OSError: the host has no userfaultfd, or this process may not use it
    """
    cdef int fd = uffd_device()
    if fd < 0 and by_call:
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


def register(int fd, uintptr_t address, size_t size):
    """Make `fd` report every access to a missing page of [`address`, `address` + `size`).

    :raises OSError: the kernel refused
    """
    if uffd_register(fd, address, size, UFFDIO_REGISTER_MODE_MISSING) < 0:
        raise OSError(errno, os.strerror(errno))


def create_marks():
    """Create a userfaultfd for tracking writes: the kernel removes a page's write protection at the first write.

    :returns: a descriptor, owned by the caller; closing it removes all marks
    :raises OSError: the kernel is older than Linux 6.7, or this process may not use userfaultfd
    """
    # With UFFD_ASYNC the kernel reports no fault to user space, so UFFD_USER_ONLY is enough.
    return _agreed(uffd_call(UFFD_USER_ONLY), UFFD_ASYNC)


def register_marks(int fd, uintptr_t address, size_t size):
    """Allow ``vmm._mapping.unmarked_runs`` to mark the pages of [`address`, `address` + `size`).

    :raises OSError: the kernel refused
    """
    if uffd_register(fd, address, size, UFFDIO_REGISTER_MODE_WP) < 0:
        raise OSError(errno, os.strerror(errno))


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


def touch(uintptr_t address, size_t size):
    """Read one byte of each page of [`address`, `address` + `size`), so that the handler supplies the missing ones."""
    with nogil:
        uffd_touch(address, size)
