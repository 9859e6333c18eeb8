# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""Packets of the socket device out of a chain's buffers and into them, however a driver cut them."""

from libc.string cimport memcpy

cdef extern from *:
    """
    /* Guest memory into a local, once: the compiler may not look there again. */
    static inline void copy_once(void *to, const void *from, size_t n) {
        __builtin_memcpy(to, from, n);
        __asm__ __volatile__("" : "+r"(to) : : "memory");
    }
    """
    void copy_once(void *to, const void *source, size_t n) noexcept nogil

cdef int64_t PORT_ANY = 4294967295      # VMADDR_PORT_ANY: nobody can listen there


cdef size_t gather(DescChain *chain, uint8_t *to, size_t size) noexcept nogil:
    cdef size_t done = 0, n
    cdef uint32_t i
    for i in range(chain.n_readable):
        n = min(chain.iov[i].iov_len, size - done)
        copy_once(to + done, chain.iov[i].iov_base, n)
        done += n
        if done == size:
            break
    return done


cdef uint32_t skip(iovec *iov, uint32_t count, size_t offset, size_t length) noexcept nogil:
    cdef uint32_t i = 0, kept = 0
    cdef uint8_t *base
    cdef size_t n
    while i < count and length:
        n = iov[i].iov_len
        if offset >= n:
            offset -= n
        else:
            base = <uint8_t *>iov[i].iov_base
            n = min(n - offset, length)
            iov[kept].iov_base = base + offset
            iov[kept].iov_len = n
            length -= n
            offset = 0
            kept += 1
        i += 1
    return kept


cdef void scatter(iovec *iov, const void *source, size_t size) noexcept nogil:
    cdef const uint8_t *p = <const uint8_t *>source
    cdef size_t n
    while size:
        n = min(iov.iov_len, size)
        memcpy(iov.iov_base, p, n)
        p += n
        size -= n
        iov += 1


cdef int64_t parse_line(const char *line, size_t length) noexcept nogil:
    cdef const char *verb = b"connect"
    cdef size_t i
    cdef int64_t port = 0
    for i in range(7):
        if i >= length or (line[i] | 0x20) != verb[i]:
            return -1
    i = 7
    while i < length and line[i] == c" ":
        i += 1
    if i == 7 or i == length or not c"0" <= line[i] <= c"9":
        return -1
    while i < length and c"0" <= line[i] <= c"9":
        if port < PORT_ANY:             # or enough digits would overflow it
            port = port * 10 + (line[i] - c"0")
        i += 1
    if i < length and line[i] == c"\r":
        i += 1
    if i < length or port >= PORT_ANY:
        return -1
    return port
