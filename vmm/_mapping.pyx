# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""Mappings of guest RAM: map a file privately, find the pages written since, and copy those to a file."""
import os

from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport EINTR, EINVAL, ENOSYS, ENOTTY, ENXIO, EOPNOTSUPP, EXDEV, errno
from libc.stdint cimport int64_t, uint8_t, uint64_t, uintptr_t
from libc.stdlib cimport free, malloc
from posix.mman cimport (
    MAP_ANONYMOUS, MAP_FIXED, MAP_NORESERVE, MAP_PRIVATE, MAP_SHARED, PROT_NONE, PROT_READ, PROT_WRITE, madvise, mmap,
    munmap,
)
from posix.unistd cimport lseek, pread, pwrite

cdef extern from *:
    """
    #include <stdlib.h>
    #include <string.h>
    #include <sys/ioctl.h>
    #include <sys/mman.h>
    #include <unistd.h>
    #ifndef MADV_POPULATE_WRITE /* Linux 5.14 */
    #define MADV_POPULATE_WRITE 23
    #endif
    #ifndef MREMAP_DONTUNMAP /* Linux 5.7; of shared files 5.13 */
    #define MREMAP_DONTUNMAP 4
    #endif
    static inline int is_zero(const void *data, size_t size) {
        const unsigned char *p = data;
        return !p[0] && (size == 1 || !memcmp(p, p + 1, size - 1));
    }
    /* Bits of an entry of /proc/PID/pagemap */
    #define PAGEMAP_PRESENT (1ull << 63)
    #define PAGEMAP_SWAPPED (1ull << 62)
    #define PAGEMAP_FILE (1ull << 61)
    """
    int ioctl(int fd, unsigned long request, void *argument) nogil
    uint64_t PAGEMAP_PRESENT, PAGEMAP_SWAPPED, PAGEMAP_FILE
    void *mremap(void *address, size_t old, size_t size, int flags, void *target) nogil
    int is_zero(const void *data, size_t size) nogil
    enum: SEEK_DATA, SEEK_HOLE
    ssize_t copy_file_range(int source, int64_t *start, int target, int64_t *at, size_t size, unsigned flags) nogil
    void *aligned_alloc(size_t alignment, size_t size) nogil
    enum: MADV_POPULATE_WRITE
    enum: MREMAP_MAYMOVE, MREMAP_FIXED, MREMAP_DONTUNMAP

# <linux/fs.h> since Linux 6.7: PAGEMAP_SCAN, its flags, the categories of a page, and its structures.
cdef enum:
    PM_SCAN = 0xc0606610
    PM_WP_MATCHING = 1 << 0
    PM_CHECK_WPASYNC = 1 << 1
    PM_IS_WRITTEN = 1 << 1
    PM_IS_FILE = 1 << 2
    PM_IS_PRESENT = 1 << 3
    PM_IS_SWAPPED = 1 << 4

cdef struct pm_region:
    uint64_t start, end, categories

cdef struct pm_arg:
    uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages
    uint64_t category_inverted, category_mask, category_anyof_mask, return_mask

cdef enum:
    PAGE = 4096
    REGIONS = 512
    ENTRIES = 8192
    CHUNK = 1 << 20
    MOST = 1 << 30      # bytes that the kernel copies before a signal is heard
    TABLE = 2 << 20     # bytes that one page of page tables maps
    UNMAPPED = 8 << 20  # bytes at a time, so that nobody waits long for the address space


def map_over(uintptr_t address, size_t size, int fd, uint64_t offset, bint shared=False):
    """Replace [`address`, `address` + `size`), whole pages that this process has mapped, by a private mapping.

    :param fd: the file that the new mapping shows until it is written to, from `offset` (bytes) on; -1: zeros. The
        mapping stays valid after the descriptor is closed
    :param shared: make it a shared one
    :raises OSError: the kernel refused
    """
    cdef int kind = MAP_SHARED if shared else MAP_PRIVATE
    cdef int flags = kind | MAP_FIXED | MAP_NORESERVE | (MAP_ANONYMOUS if fd < 0 else 0)
    cdef void *got
    with nogil:
        got = mmap(<void *>address, size, PROT_READ | PROT_WRITE, flags, fd, <long>offset)
    if <long>got == -1:
        raise OSError(errno, os.strerror(errno))


def move_aside(uintptr_t address, size_t size):
    """Move the pages that a mapping has elsewhere, a page of page tables at a time. The mapping stays, without pages.

    It is for a shared mapping, which gets its pages again where it is touched. Unmapping 256 MiB of pages takes 10 to
    20 ms; this takes 0.1, and ``unmap`` can be called by a thread that has the time.

    :returns: where the pages are, for ``unmap``; 0: nothing was moved, as the kernel cannot do it (before Linux 5.13)
    """
    cdef size_t room = size + TABLE, before
    cdef uintptr_t start, target
    cdef void *got
    with nogil:
        got = mmap(NULL, room, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        if <long>got == -1:
            with gil:
                return 0
        start = <uintptr_t>got
        before = (address - start) % TABLE
        target = start + before
        got = mremap(<void *>address, size, size, MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP, <void *>target)
        if <long>got == -1:
            munmap(<void *>start, room)
            target = 0
        else:
            if before:
                munmap(<void *>start, before)
            munmap(<void *>(target + size), TABLE - before)
    return target


def unmap(uintptr_t address, size_t size):
    """Unmap [`address`, `address` + `size`), which is the caller's."""
    cdef size_t part
    with nogil:
        while size:
            part = min(size, <size_t>UNMAPPED)
            munmap(<void *>address, part)
            address += part
            size -= part


def advise(uintptr_t address, size_t size, int advice):
    """Call madvise(2) for [`address`, `address` + `size`).

    :raises OSError: the kernel refused
    """
    cdef int failed
    with nogil:
        failed = madvise(<void *>address, size, advice)
        while failed and errno == EINTR:
            failed = madvise(<void *>address, size, advice)
    if failed:
        raise OSError(errno, os.strerror(errno))


def populate(uintptr_t address, size_t size):
    """Allocate the pages of [`address`, `address` + `size`), as writes would. Before Linux 5.14 it does nothing."""
    with nogil:
        madvise(<void *>address, size, MADV_POPULATE_WRITE)


def private_runs(int pagemap, uintptr_t address, size_t size):
    """Find the pages of a private mapping that were written to since it was made.

    :param pagemap: a descriptor of /proc/self/pagemap; borrowed
    :returns: (offset from `address`, bytes) of each run, in order
    """
    runs = _scan(pagemap, address, size, 0, PM_IS_FILE)
    return walk_private_runs(pagemap, address, size) if runs is None else runs


def unmarked_runs(int pagemap, uintptr_t address, size_t size, bint mark):
    """Find the pages of a private mapping that were written to since they were last marked.

    A page that was never marked counts as written to. ``vmm._uffd.register`` must have been called for all of
    [`address`, `address` + `size`).

    :param mark: whether to mark the pages found
    :returns: as for ``private_runs``
    :raises OSError: the range is not registered, or the kernel is older than Linux 6.7
    """
    cdef uint64_t flags = PM_WP_MATCHING | PM_CHECK_WPASYNC if mark else 0
    runs = _scan(pagemap, address, size, flags, PM_IS_FILE, PM_IS_WRITTEN)
    if runs is None:
        raise OSError(ENOTTY, os.strerror(ENOTTY))
    return runs


cdef list _scan(int pagemap, uintptr_t address, size_t size, uint64_t flags, uint64_t without, uint64_t also=0):
    # PAGEMAP_SCAN for pages that lack the categories `without` and have `also`. None: the kernel is older than 6.7.
    cdef pm_region[REGIONS] regions
    cdef pm_arg arg
    cdef int count, i
    cdef list runs = []
    arg.size = sizeof(arg)
    arg.flags = flags
    arg.max_pages = 0
    arg.start = address
    arg.end = address + size
    arg.vec = <uintptr_t>regions
    arg.vec_len = REGIONS
    arg.category_inverted = without
    arg.category_mask = without | also
    arg.category_anyof_mask = PM_IS_PRESENT | PM_IS_SWAPPED
    arg.return_mask = PM_IS_FILE
    while arg.start < arg.end:
        arg.walk_end = 0
        with nogil:
            count = ioctl(pagemap, PM_SCAN, &arg)
        if count < 0:
            if errno == EINTR:
                continue
            if errno == ENOTTY or errno == EINVAL:
                return None
            raise OSError(errno, os.strerror(errno))
        for i in range(count):
            _add(runs, regions[i].start - address, regions[i].end - regions[i].start)
        arg.start = arg.walk_end
    return runs


def walk_private_runs(int pagemap, uintptr_t address, size_t size):
    """Find the same pages as ``private_runs``, page by page: for kernels older than Linux 6.7."""
    cdef uint64_t *entries = <uint64_t *>malloc(ENTRIES * sizeof(uint64_t))
    cdef size_t done = 0, want, i
    cdef ssize_t got
    cdef list runs = []
    if entries == NULL:
        raise MemoryError()
    try:
        while done < size:
            want = min(<size_t>ENTRIES, (size - done) // PAGE)
            with nogil:
                got = pread(pagemap, entries, want * 8, <long>((address + done) // PAGE * 8))
            if got < 8:
                raise OSError(errno if got < 0 else EINVAL, "read /proc/self/pagemap")
            for i in range(<size_t>got // 8):
                if entries[i] & (PAGEMAP_PRESENT | PAGEMAP_SWAPPED) and not entries[i] & PAGEMAP_FILE:
                    _add(runs, done + i * PAGE, PAGE)
            done += <size_t>got // 8 * PAGE
    finally:
        free(entries)
    return runs


cdef int _add(list runs, uint64_t offset, uint64_t size) except -1:
    cdef Py_ssize_t last = len(runs) - 1
    if last >= 0 and runs[last][0] + runs[last][1] == offset:
        runs[last] = (runs[last][0], runs[last][1] + size)
    else:
        runs.append((offset, size))
    return 0


def copy_sparse(int source, uint64_t start, uint64_t size, int target, uint64_t offset, bint by_kernel=False):
    """Copy [`start`, `start` + `size`) of one file to `offset` in another. Skip holes and pages of zeros.

    :param source: file descriptor to read, which may bypass the page cache; borrowed, and its offset moves
    :param target: file descriptor to write; borrowed. The file must read as zeros in the target range
    :param by_kernel: let the kernel copy, pages of zeros, too, where it can copy from this file to that one
    :raises OSError: a read or a write failed
    """
    cdef uint8_t *buffer = <uint8_t *>aligned_alloc(PAGE, CHUNK)
    cdef uint64_t end = start + size, at = start, data, hole
    cdef int64_t found, from_here, to_there
    cdef ssize_t got
    if buffer == NULL:
        raise MemoryError()
    try:
        while at < end:
            found = lseek(source, <long>at, SEEK_DATA)
            if found < 0 and errno == ENXIO:
                break
            data = <uint64_t>found if found >= 0 else at        # a file system without SEEK_DATA
            found = lseek(source, <long>data, SEEK_HOLE) if found >= 0 else <int64_t>end
            hole = min(<uint64_t>found if found > 0 else end, end)
            while data < hole:
                PyErr_CheckSignals()
                from_here, to_there = data, offset + (data - start)
                with nogil:
                    if by_kernel:
                        got = copy_file_range(source, &from_here, target, &to_there, min(hole - data, <size_t>MOST), 0)
                    else:   # whole pages, or a source that bypasses the page cache refuses
                        got = pread(source, buffer, min(<size_t>CHUNK, hole - data + PAGE - 1 & ~(PAGE - 1)), data)
                if got == 0:
                    return                                      # end of the source file: the rest is zeros
                if got < 0:
                    if by_kernel and errno in (EXDEV, EINVAL, EOPNOTSUPP, ENOSYS):
                        by_kernel = False
                    elif errno != EINTR:
                        raise OSError(errno, os.strerror(errno))
                    continue
                got = min(got, <ssize_t>(hole - data))
                if not by_kernel:
                    copy_pages(<uintptr_t>buffer, <size_t>got, target, offset + (data - start))
                data += <uint64_t>got
            at = max(hole, at + 1)
    finally:
        free(buffer)


def copy_pages(uintptr_t address, size_t size, int fd, uint64_t offset):
    """Write [`address`, `address` + `size`) to the file `fd` at `offset`. Skip pages of zeros.

    :param fd: borrowed; the file must read as zeros in the target range
    :raises OSError: a write failed
    """
    cdef uint8_t *data = <uint8_t *>address
    cdef size_t first, next = 0
    while next < size:
        with nogil:
            while next < size and is_zero(data + next, min(<size_t>PAGE, size - next)):
                next += min(<size_t>PAGE, size - next)
            first = next
            while next < size and not is_zero(data + next, min(<size_t>PAGE, size - next)):
                next += min(<size_t>PAGE, size - next)
        copy_out(address + first, next - first, fd, offset + first)


cdef int copy_out(uintptr_t address, size_t size, int fd, uint64_t offset) except -1:
    cdef ssize_t done
    while size:
        with nogil:
            done = pwrite(fd, <const void *>address, size, <long>offset)
        if done < 0:
            if errno == EINTR:
                continue
            raise OSError(errno, os.strerror(errno))
        address += <size_t>done
        offset += <size_t>done
        size -= <size_t>done
    return 0
