# SPDX-License-Identifier: Apache-2.0
# io_uring by its system calls: the submissions and completions of one thread.
from libc.stdint cimport int32_t, uint32_t, uint64_t

cdef extern from "<linux/io_uring.h>" nogil:
    struct io_uring_sqe:
        unsigned char opcode
        int fd
        uint64_t off
        uint64_t addr
        uint32_t len
        uint32_t rw_flags
        uint32_t fsync_flags
        uint64_t user_data
    struct io_uring_cqe:
        uint64_t user_data
        int32_t res                 # as the system call would have returned, or -errno
    enum:
        IORING_OP_READV, IORING_OP_WRITEV, IORING_OP_READ, IORING_OP_WRITE, IORING_OP_FSYNC, IORING_OP_FALLOCATE
        IORING_FSYNC_DATASYNC

cdef struct Uring:
    int fd                          # -1: not open; readable where a completion is to be had
    unsigned int *sq_head           # the kernel's
    unsigned int *sq_tail           # ours
    unsigned int sq_mask
    unsigned int tail               # submissions written so far; sq_tail is what the kernel may see
    unsigned int *cq_head           # ours
    unsigned int *cq_tail           # the kernel's
    unsigned int cq_mask
    io_uring_sqe *sqes
    io_uring_cqe *cqes
    void *rings                     # both rings in one mapping
    size_t rings_size
    size_t sqes_size

cdef enum:
    RING_ENTRIES = 256

# Room for RING_ENTRIES submissions and twice the completions, for any thread, but one at a time. 0 or -errno.
cdef int uring_open(Uring *ring) noexcept
# With nothing under way.
cdef void uring_close(Uring *ring) noexcept
# The next submission, all zero, or NULL: no room. The kernel sees it after uring_submit.
cdef io_uring_sqe *uring_next(Uring *ring) noexcept nogil
# Hand over what was written, and wait for `wait` completions. 0 or -errno; EINTR is tried again.
cdef int uring_submit(Uring *ring, unsigned int wait) noexcept nogil
# The oldest completion not yet taken, or NULL; it is taken by uring_seen.
cdef io_uring_cqe *uring_peek(Uring *ring) noexcept nogil
cdef void uring_seen(Uring *ring) noexcept nogil
