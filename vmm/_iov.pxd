# SPDX-License-Identifier: Apache-2.0
# Copies between a chain's buffers and this process's memory, for all devices. A driver may split a request into buffers
# in any way (virtio 1.2 §2.7.4).
from libc.stdint cimport uint8_t, uint32_t
from libc.string cimport memcpy

from vmm._fastpath cimport iovec

cdef extern from *:
    """
    #include <stddef.h>
    /* Copy guest memory exactly once. The guest may change it at any time, so the compiler must not read it again. */
    static inline void copy_once(void *to, const void *from, size_t n) {
        __builtin_memcpy(to, from, n);
        __asm__ __volatile__("" : "+r"(to) : : "memory");
    }
    """
    void copy_once(void *to, const void *source, size_t n) noexcept nogil


cdef inline size_t iov_copy(const iovec *iov, uint32_t count, size_t skip, uint8_t *ours, size_t size,
                            bint inward) noexcept nogil:
    cdef size_t done = 0, n
    cdef uint32_t i
    for i in range(count):
        if done == size:
            break
        if skip >= iov[i].iov_len:
            skip -= iov[i].iov_len
            continue
        n = min(iov[i].iov_len - skip, size - done)
        if inward:
            memcpy(<uint8_t *>iov[i].iov_base + skip, ours + done, n)
        else:
            copy_once(ours + done, <uint8_t *>iov[i].iov_base + skip, n)
        done += n
        skip = 0
    return done


cdef inline size_t iov_gather(const iovec *iov, uint32_t count, size_t skip, void *to, size_t size) noexcept nogil:
    # Copy up to `size` bytes out of the buffers, from byte `skip` on. Returns the number of bytes copied.
    return iov_copy(iov, count, skip, <uint8_t *>to, size, False)


cdef inline size_t iov_scatter(const iovec *iov, uint32_t count, size_t skip, const void *source,
                               size_t size) noexcept nogil:
    # Copy up to `size` bytes into the buffers, from byte `skip` on. Returns the number of bytes copied.
    return iov_copy(iov, count, skip, <uint8_t *>source, size, True)


cdef inline uint32_t iov_part(const iovec *iov, uint32_t count, size_t skip, size_t size, iovec *into,
                              uint32_t room) noexcept nogil:
    # Write the iovecs that cover `size` bytes from byte `skip` on to `into`, at most `room` iovecs. `into` may be
    # `iov`. Returns the number of iovecs written.
    cdef uint32_t i, n = 0
    cdef size_t length
    for i in range(count):
        if size == 0 or n == room:
            break
        length = iov[i].iov_len
        if skip >= length:
            skip -= length
            continue
        length = min(length - skip, size)
        into[n].iov_base = <uint8_t *>iov[i].iov_base + skip
        into[n].iov_len = length
        n += 1
        size -= length
        skip = 0
    return n


cdef inline void iov_cut(iovec **iov, uint32_t *count, size_t size) noexcept nogil:
    # Remove the first `size` bytes of the buffers, which must hold that many.
    while count[0] and size >= iov[0].iov_len:
        size -= iov[0].iov_len
        iov[0] += 1
        count[0] -= 1
    if size:
        iov[0].iov_base = <uint8_t *>iov[0].iov_base + size
        iov[0].iov_len -= size


cdef inline void iov_take(void *to, iovec **iov, uint32_t *count, size_t size) noexcept nogil:
    # Copy the first `size` bytes of the buffers and remove them. The buffers must hold that many.
    iov_gather(iov[0], count[0], 0, to, size)
    iov_cut(iov, count, size)
