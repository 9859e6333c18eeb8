# SPDX-License-Identifier: Apache-2.0
# Which of a guest's frames may leave it: judged by a copy of their first bytes, without the GIL and without a lock.
from libc.stdint cimport uint8_t, uint64_t

cdef enum:
    HEAD = 74       # as much of a frame as is judged: Ethernet, IPv6 and TCP headers

# What becomes of a frame; those from DROPPED on are dropped, for a reason of `REASONS`.
cdef enum:
    ALLOWED = 0
    TO_RESOLVER = 1     # it is for the resolver's address, which is in this process
    DROPPED = 2
    MALFORMED = 2
    PROTOCOL = 3
    OPTIONS = 4
    FRAGMENT = 5
    SOURCE = 6
    SPECIAL = 7
    NAMESERVER = 8
    ADDRESS = 9
    VERDICTS = 10

# What the device's thread, the reader, calls with `policy` first. The object lives as long as its device.
cdef struct Judge:
    void *policy
    int (*judge)(void *policy, const uint8_t *head, uint64_t size) noexcept nogil
    void (*count)(void *policy, int verdict, uint64_t size) noexcept nogil
    bint (*may_tell)(void *policy) noexcept nogil
