# SPDX-License-Identifier: Apache-2.0
# io_uring through its system calls: the submissions and completions of one thread.
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
        int32_t res                 # what the system call would have returned, or -errno
    struct io_sqring_offsets:
        uint32_t head
        uint32_t tail
        uint32_t ring_mask
        uint32_t array
    struct io_cqring_offsets:
        uint32_t head
        uint32_t tail
        uint32_t ring_mask
        uint32_t cqes
    struct io_uring_params:
        uint32_t sq_entries
        uint32_t cq_entries
        uint32_t flags
        uint32_t features
        io_sqring_offsets sq_off
        io_cqring_offsets cq_off
    enum:
        IORING_OP_READV, IORING_OP_WRITEV, IORING_OP_READ, IORING_OP_WRITE, IORING_OP_FSYNC, IORING_OP_FALLOCATE
        IORING_FSYNC_DATASYNC

cdef struct Uring:
    int fd                          # -1: not open; readable when there is a completion
    io_uring_params made            # what the kernel said of it
    unsigned int *sq_head           # written by the kernel
    unsigned int *sq_tail           # written by us
    unsigned int sq_mask
    unsigned int tail               # submissions prepared so far; the kernel sees those up to sq_tail
    unsigned int *cq_head           # written by us
    unsigned int *cq_tail           # written by the kernel
    unsigned int cq_mask
    io_uring_sqe *sqes
    io_uring_cqe *cqes
    void *rings                     # both rings in one mapping
    size_t rings_size
    size_t sqes_size

cdef enum:
    RING_ENTRIES = 256

# Open a ring for RING_ENTRIES submissions and twice as many completions. Any thread may use it, one at a time. Returns
# 0 or -errno.
cdef int uring_open(Uring *ring) noexcept
# Close the ring, or return it to the stock. No request may be in flight.
cdef void uring_close(Uring *ring) noexcept
# Return the next free submission, zeroed, or NULL if the ring is full. The kernel sees it after uring_submit.
cdef io_uring_sqe *uring_next(Uring *ring) noexcept nogil
# Submit the prepared entries, and wait for `wait` completions. Returns 0 or -errno; retries after EINTR.
cdef int uring_submit(Uring *ring, unsigned int wait) noexcept nogil
# Return the oldest completion, or NULL. It stays the oldest until uring_seen.
cdef io_uring_cqe *uring_peek(Uring *ring) noexcept nogil
cdef void uring_seen(Uring *ring) noexcept nogil
