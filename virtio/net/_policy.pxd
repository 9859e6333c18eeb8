# SPDX-License-Identifier: Apache-2.0
from libc.stdint cimport uint8_t, uint64_t

cdef extern from "<linux/if_ether.h>" nogil:
    enum: ETH_HEADER "ETH_HLEN"

cdef enum:
    HEAD = 74       # bytes of a frame that are checked: Ethernet, IPv6 and TCP headers

# Verdicts. A frame with a verdict from DROPPED on is dropped; `REASONS` has the names.
cdef enum:
    ALLOWED = 0
    TO_RESOLVER = 1     # for the DNS resolver, which is in this process
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

# The functions that the device's thread calls, with `policy` as the first argument. The Policy object outlives the
# device's thread.
cdef struct PolicyCalls:
    void *policy
    int (*check)(void *policy, const uint8_t *head, uint64_t size) noexcept nogil
    void (*count)(void *policy, int verdict, uint64_t size) noexcept nogil
