# SPDX-License-Identifier: Apache-2.0
# The packets of the socket device (virtio 1.2 §5.10.6), and the line with which a host program asks for a port.
from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t

# <linux/virtio_vsock.h>, §5.10.6
cdef enum:
    OP_REQUEST = 1
    OP_RESPONSE = 2
    OP_RST = 3
    OP_SHUTDOWN = 4
    OP_RW = 5
    OP_CREDIT_UPDATE = 6
    OP_CREDIT_REQUEST = 7
    TYPE_STREAM = 1
    SHUT_RCV = 1                # SHUTDOWN flag: the sender will receive no more
    SHUT_SEND = 2               # SHUTDOWN flag: the sender will send no more
    SHUT_BOTH = 3
    HOST_CID = 2
    HEADER = 44

cdef packed struct Header:
    uint64_t src_cid
    uint64_t dst_cid
    uint32_t src_port
    uint32_t dst_port
    uint32_t len
    uint16_t type
    uint16_t op
    uint32_t flags
    uint32_t buf_alloc
    uint32_t fwd_cnt

cdef enum:
    LINE = 32                   # longest line; "CONNECT 4294967294\r\n" has 20 bytes

# The port in "CONNECT port" (any letter case), or a negative number if `line` is not valid.
cdef int64_t parse_line(const char *line, size_t length) noexcept nogil
