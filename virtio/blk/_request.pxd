# SPDX-License-Identifier: Apache-2.0
# One request of a block device: validated without access to the disk, then executed by system calls (§5.2.6).
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from vmm._fastpath cimport DescChain, iovec

cdef extern from "<linux/virtio_blk.h>" nogil:
    enum:
        T_IN "VIRTIO_BLK_T_IN"
        T_OUT "VIRTIO_BLK_T_OUT"
        T_FLUSH "VIRTIO_BLK_T_FLUSH"
        T_GET_ID "VIRTIO_BLK_T_GET_ID"
        T_DISCARD "VIRTIO_BLK_T_DISCARD"
        T_WRITE_ZEROES "VIRTIO_BLK_T_WRITE_ZEROES"
        S_OK "VIRTIO_BLK_S_OK"
        S_IOERR "VIRTIO_BLK_S_IOERR"
        S_UNSUPP "VIRTIO_BLK_S_UNSUPP"
        ID_BYTES "VIRTIO_BLK_ID_BYTES"
        VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES
        RANGE_UNMAP "VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP"
    struct virtio_blk_outhdr:
        uint32_t type
        uint64_t sector
    struct virtio_blk_discard_write_zeroes:
        uint64_t sector
        uint32_t num_sectors
        uint32_t flags

cdef enum:
    F_FLUSH = 1 << VIRTIO_BLK_F_FLUSH
    F_DISCARD = 1 << VIRTIO_BLK_F_DISCARD
    F_WRITE_ZEROES = 1 << VIRTIO_BLK_F_WRITE_ZEROES
    HEADER_BYTES = sizeof(virtio_blk_outhdr)
    RANGE_BYTES = sizeof(virtio_blk_discard_write_zeroes)
    SECTOR = 512
    MAX_DISCARD = 1 << 22           # sectors of one request
    MAX_WRITE_ZEROES = 1 << 17      # sectors of one request; fewer: writing zeroes may block the worker
    PIECE = 1 << 22                 # bytes; a longer request is done in pieces and can be stopped between two
    DISCARD_PIECE = 1 << 26         # bytes; for DISCARD, which is cheap. Pieces begin at multiples of this
    FILE_ENDS = 1 << 20             # not an errno: the file is shorter than the disk

# The file behind a disk, and its options.
cdef struct BlockFile:
    int fd
    uint64_t sectors
    uint8_t[ID_BYTES] serial
    bint read_only
    bint block_device
    uint64_t discard_block  # bytes, a power of two: the file gives back only whole blocks; 0: any range
    bint direct             # opened with O_DIRECT
    bint unsafe             # a flush does nothing

# One request. chain.iov has as many entries as the ring; validate() narrows it to the data buffers.
cdef struct Request:
    DescChain chain
    uint32_t slot           # of its queue, in the worker
    uint32_t type
    uint8_t *status         # the status byte in guest memory; NULL: the chain has none
    iovec *data             # points into chain.iov
    uint32_t count
    uint64_t length         # bytes of data; for DISCARD and WRITE_ZEROES, of the range
    uint64_t offset         # bytes from the disk's start
    bint unmap              # WRITE_ZEROES may leave a hole
    uint64_t generation     # the backend's generation when the request was submitted
    Request *next           # in the list of free requests

# Validate the request in r.chain and set all other fields of `r`. Returns S_OK if it is to be executed, otherwise the
# status to complete it with. Any input is allowed.
cdef int validate(Request *r, const BlockFile *disk, uint64_t features) noexcept nogil
# Execute the request, or the rest of it. Returns 0, an errno or FILE_ENDS. `dsync`: 0, or RWF_DSYNC to make each write
# durable before it completes.
cdef int execute(Request *r, const BlockFile *disk, int dsync) noexcept nogil
# Execute one piece of a long request. `room` has as many entries as the request has buffers. Returns 0, an errno or
# FILE_ENDS. The request is done when r.length is 0. It may be abandoned before that and later executed from its start.
cdef int execute_piece(Request *r, const BlockFile *disk, int dsync, iovec *room) noexcept nogil
# Execute DISCARD or WRITE_ZEROES. `ask`: try fallocate first; False: the file system has already refused it.
cdef int clear(Request *r, const BlockFile *disk, bint ask) noexcept nogil
cdef int range_mode(const Request *r) noexcept nogil        # FALLOC_FL_*
cdef void advance(Request *r, uint64_t done) noexcept nogil
