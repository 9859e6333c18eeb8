# SPDX-License-Identifier: Apache-2.0
# One request of a block device: judged without the disk, and done by system calls. virtio 1.2 §5.2.6.
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from vmm._fastpath cimport DescChain, iovec

cdef enum:
    T_IN = 0
    T_OUT = 1
    T_FLUSH = 4
    T_GET_ID = 8
    T_DISCARD = 11
    T_WRITE_ZEROES = 13
    S_OK = 0
    S_IOERR = 1
    S_UNSUPP = 2
    F_FLUSH = 1 << 9
    F_DISCARD = 1 << 13
    F_WRITE_ZEROES = 1 << 14
    HEADER_BYTES = 16
    SECTOR = 512
    ID_BYTES = 20
    MAX_DISCARD = 1 << 22           # sectors of one request
    MAX_WRITE_ZEROES = 1 << 17      # fewer: where the file system cannot zero, the worker does nothing else meanwhile
    PIECE = 1 << 22                 # bytes; a longer request is done in pieces, and given up between two of them
    DISCARD_PIECE = 1 << 26         # of DISCARD, which costs little; the pieces begin at multiples of it
    FILE_ENDS = 1 << 20             # beside the errnos: the file is shorter than the disk

# The file behind a disk, and how it is to be treated.
cdef struct BlockFile:
    int fd
    uint64_t sectors
    uint8_t[ID_BYTES] serial
    bint read_only
    bint block_device
    bint direct             # opened with O_DIRECT
    bint unsafe             # a flush does nothing

# Its chain has room for the ring's size in iov, which judge() cuts down to the data.
cdef struct Request:
    DescChain chain
    uint32_t type
    uint8_t *status         # where the status byte goes; NULL: the driver left no place for it
    iovec *data             # into chain.iov
    uint32_t count
    uint64_t length         # bytes of data; of the range, for DISCARD and WRITE_ZEROES
    uint64_t offset         # bytes from the disk's start
    bint unmap              # WRITE_ZEROES may leave a hole
    uint64_t generation     # of the backend when it was handed over
    Request *next           # free ones

# The status to answer at once, or S_OK: to be done. Sets all of `r` but its chain; total for every input.
cdef int judge(Request *r, const BlockFile *disk, uint64_t features) noexcept nogil
# Do it, or what is left of it: 0, an errno or FILE_ENDS. `dsync`: 0, or RWF_DSYNC for writes that are stable at once.
cdef int execute(Request *r, const BlockFile *disk, int dsync) noexcept nogil
# Do a piece of a long one, with `room` for as many buffers as it has: 0, an errno or FILE_ENDS. Nothing is left to do
# once r.length is 0; until then it may be left as it is, and be done again from its beginning.
cdef int execute_piece(Request *r, const BlockFile *disk, int dsync, iovec *room) noexcept nogil
# The same for DISCARD and WRITE_ZEROES, `ask`: the file system was not asked yet whether it can.
cdef int clear(Request *r, const BlockFile *disk, bint ask) noexcept nogil
cdef int range_mode(const Request *r) noexcept nogil        # FALLOC_FL_*
cdef void advance(Request *r, uint64_t done) noexcept nogil
