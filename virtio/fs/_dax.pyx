# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""The DAX window of a share: host memory with files mapped into it, which KVM maps into the guest.

Source: virtio 1.2 §5.11.6.4. To the devices the window is not guest RAM: they refuse a descriptor that points into it.
So no thread of this process touches a page that disappears when a file is truncated; of the share itself, only system
calls do, for the data of a READ or WRITE. Unused parts are anonymous memory, which the guest may use. A read-only
mapping is private, so that a guest's write changes only its own copy.
"""
import os

from libc.errno cimport EINVAL, errno
from libc.stdint cimport INT64_MAX, int64_t, uint8_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free

from posix.fcntl cimport F_DUPFD_CLOEXEC, fcntl
from posix.mman cimport (
    MAP_ANONYMOUS, MAP_FAILED, MAP_FIXED, MAP_NORESERVE, MAP_PRIVATE, MAP_SHARED, PROT_NONE, PROT_READ, PROT_WRITE,
    mmap, munmap,
)
from posix.stat cimport fstat, struct_stat

from vmm._budget cimport FOR_OPEN, granted
from vmm._sys cimport (
    close, counter_add, counter_read, flag_read, flag_set, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock,
)

cdef enum:
    PAGE = 4096
    SLOT = 1 << DAX_SHIFT


cdef bint is_aligned(Window self, uint64_t where, uint64_t length) noexcept nogil:
    # The start is slot aligned, the end page aligned, and the range is inside the window. No sum can overflow.
    return not where & (SLOT - 1) and length and not length & (PAGE - 1) and where < self.size \
        and length <= self.size - where

cdef bint blank(Window self, uint64_t where, uint64_t length) noexcept nogil:
    return mmap(self.base + where, length, PROT_READ | PROT_WRITE,
                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) != MAP_FAILED

cdef void drop(Window self, Slot *slot) noexcept nogil:
    if slot.fd >= 0:
        close(slot.fd)
        slot.fd = -1
        counter_add(&self.mapped, -1)
    slot.length = slot.backed = 0

cdef int put(Window self, uint64_t where, Slot *slot, uint64_t at) noexcept nogil:
    # Map the slot's file from byte `at` of the slot on. KVM's MMU notifier unmaps the old pages from the guest.
    if mmap(self.base + where + at, slot.length - at, PROT_READ | PROT_WRITE,
            MAP_FIXED | (MAP_SHARED if slot.writable else MAP_PRIVATE | MAP_NORESERVE), slot.fd,
            slot.offset + at) == MAP_FAILED:
        return -errno
    slot.backed = slot.length
    return 0


cdef class Window:
    """A window for file mappings; safe from any thread.

    :param size: bytes, a multiple of 2 MiB
    :raises OSError: no address space is left
    """

    def __cinit__(self, uint64_t size):
        cdef void *p
        cdef uint64_t i
        pthread_mutex_init(&self.lock, NULL)
        self.size = size
        self.slots = <Slot *>calloc(size >> DAX_SHIFT, sizeof(Slot))
        if self.slots == NULL:
            raise MemoryError()
        for i in range(size >> DAX_SHIFT):
            self.slots[i].fd = -1
        p = mmap(NULL, size + SLOT, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        if p == MAP_FAILED:
            raise OSError(errno, os.strerror(errno))
        self.reserved = <uint8_t *>p
        self.base = <uint8_t *>((<uintptr_t>p + SLOT - 1) & ~<uintptr_t>(SLOT - 1))
        if not blank(self, 0, size):
            raise OSError(errno, os.strerror(errno))

    def __dealloc__(self):
        if self.reserved != NULL:
            self.clear()
            munmap(self.reserved, self.size + SLOT)
        free(self.slots)

    @property
    def address(self):
        """Host address of the window, for ``KVM_SET_USER_MEMORY_REGION``."""
        return <uintptr_t>self.base

    @property
    def repairs(self):
        """Times that files had lost their ends."""
        return counter_read(&self._repairs)

    cdef int64_t map(self, int fd, uint64_t offset, uint64_t length, uint64_t where, bint writable) noexcept nogil:
        cdef uint64_t at = 0
        cdef int64_t result = 0
        cdef Slot *slot
        if not is_aligned(self, where, length) or offset & (SLOT - 1) or offset > <uint64_t>INT64_MAX - length:
            return -EINVAL
        pthread_mutex_lock(&self.lock)
        while at < length and result == 0:
            slot = &self.slots[(where + at) >> DAX_SHIFT]
            drop(self, slot)
            slot.fd = granted(fcntl(fd, F_DUPFD_CLOEXEC, 0), FOR_OPEN)
            if slot.fd < 0:
                result = -errno
            else:
                counter_add(&self.mapped, 1)
                slot.writable, slot.offset, slot.length = writable, offset + at, min(length - at, <uint64_t>SLOT)
                result = put(self, where + at, slot, 0)
            if result < 0:
                drop(self, slot)
            if slot.length < SLOT:
                blank(self, where + at + slot.length, SLOT - slot.length)
            at += SLOT
        pthread_mutex_unlock(&self.lock)
        return result

    cdef int64_t unmap(self, uint64_t where, uint64_t length) noexcept nogil:
        cdef uint64_t at = 0
        cdef int64_t result = 0
        if not is_aligned(self, where, length):
            return -EINVAL
        length = (length + SLOT - 1) & ~<uint64_t>(SLOT - 1)
        pthread_mutex_lock(&self.lock)
        if not blank(self, where, length):
            result = -errno
        else:
            while at < length:
                drop(self, &self.slots[(where + at) >> DAX_SHIFT])
                at += SLOT
        pthread_mutex_unlock(&self.lock)
        return result

    cdef void clear(self) noexcept nogil:
        self.unmap(0, self.size)

    def repair(self):
        """Replace pages beyond the end of truncated files by anonymous memory, which the guest reads as zeros.

        :returns: whether any page was replaced: then a vCPU whose KVM_RUN failed with EFAULT may run again
        """
        cdef uint64_t i, end, left
        cdef struct_stat st
        cdef bint found = False
        cdef Slot *slot
        with nogil:
            pthread_mutex_lock(&self.lock)
            for i in range(self.size >> DAX_SHIFT):
                slot = &self.slots[i]
                if slot.fd < 0 or fstat(slot.fd, &st) < 0:
                    continue
                end = (<uint64_t>st.st_size + PAGE - 1) & ~<uint64_t>(PAGE - 1)
                left = end - slot.offset if end > slot.offset else 0
                if left < slot.backed and blank(self, (i << DAX_SHIFT) + left, slot.backed - left):
                    slot.backed = left
                    found = True
            if found:
                counter_add(&self._repairs, 1)
                flag_set(&self.patched, 1)
            pthread_mutex_unlock(&self.lock)
        return found

    cdef void map_regrown(self) noexcept nogil:
        # The reply to this request may report a larger file size, after which the guest touches those pages.
        cdef uint64_t i
        cdef Slot *slot
        if not flag_read(&self.patched):
            return
        pthread_mutex_lock(&self.lock)
        flag_set(&self.patched, 0)
        for i in range(self.size >> DAX_SHIFT):
            slot = &self.slots[i]
            if slot.fd >= 0 and slot.backed < slot.length:
                put(self, i << DAX_SHIFT, slot, slot.backed)
        pthread_mutex_unlock(&self.lock)
