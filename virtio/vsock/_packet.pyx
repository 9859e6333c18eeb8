# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""The line with which a host program asks for a port of the guest. Source: Firecracker docs/vsock.md."""

cdef int64_t PORT_ANY = 4294967295      # VMADDR_PORT_ANY: nobody can listen there


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
        if port < PORT_ANY:             # stop adding digits, which would overflow
            port = port * 10 + (line[i] - c"0")
        i += 1
    if i < length and line[i] == c"\r":
        i += 1
    if i < length or port >= PORT_ANY:
        return -1
    return port
