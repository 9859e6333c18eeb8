# SPDX-License-Identifier: Apache-2.0
# The packets of the socket device (virtio 1.2 §5.10.6), and the line with which a host program asks for a port.
from libc.stdint cimport uint16_t, uint32_t, uint64_t

cdef extern from "<linux/virtio_vsock.h>" nogil:
    enum:
        OP_REQUEST "VIRTIO_VSOCK_OP_REQUEST"
        OP_RESPONSE "VIRTIO_VSOCK_OP_RESPONSE"
        OP_RST "VIRTIO_VSOCK_OP_RST"
        OP_SHUTDOWN "VIRTIO_VSOCK_OP_SHUTDOWN"
        OP_RW "VIRTIO_VSOCK_OP_RW"
        OP_CREDIT_UPDATE "VIRTIO_VSOCK_OP_CREDIT_UPDATE"
        OP_CREDIT_REQUEST "VIRTIO_VSOCK_OP_CREDIT_REQUEST"
        TYPE_STREAM "VIRTIO_VSOCK_TYPE_STREAM"
        SHUT_RCV "VIRTIO_VSOCK_SHUTDOWN_RCV"        # the sender will receive no more
        SHUT_SEND "VIRTIO_VSOCK_SHUTDOWN_SEND"      # the sender will send no more
    struct Header "virtio_vsock_hdr":
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

cdef extern from "<linux/vm_sockets.h>" nogil:
    enum: HOST_CID "VMADDR_CID_HOST"

cdef enum:
    SHUT_BOTH = SHUT_RCV | SHUT_SEND
    HEADER = sizeof(Header)
    LINE = 32                   # longest line; "CONNECT 4294967294\r\n" has 20 bytes
