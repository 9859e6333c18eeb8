# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""io_uring through its three system calls and two shared rings; one thread uses a ring. Source: Linux io_uring(7).

A seccomp filter does not see submissions, so a ring could do what its thread may not. Therefore each ring is
restricted, for good, to the operations that disks need, and ``stock`` makes all rings before the filters are installed.
"""
from libc.errno cimport EINTR, EINVAL, EMFILE, errno
from libc.string cimport memset
from posix.mman cimport munmap

from vmm._sys cimport close

cdef extern from *:
    """
    #include <errno.h>
    #include <linux/io_uring.h>
    #include <sys/mman.h>
    #include <sys/syscall.h>
    #include <unistd.h>
    static inline int uring_setup(unsigned entries, struct io_uring_params *p) {
        return (int)syscall(__NR_io_uring_setup, entries, p);
    }
    static inline int uring_enter(int fd, unsigned submit, unsigned wait, unsigned flags) {
        return (int)syscall(__NR_io_uring_enter, fd, submit, wait, flags, NULL, 0);
    }
    /* Restrict a ring made with IORING_SETUP_R_DISABLED, for good: only these operations, no flags, no registration. */
    static inline int uring_restrict(int fd) {
        static const unsigned char allowed[] = {
            IORING_OP_READV, IORING_OP_WRITEV, IORING_OP_READ, IORING_OP_WRITE, IORING_OP_FSYNC, IORING_OP_FALLOCATE,
        };
        struct io_uring_restriction rules[sizeof(allowed)] = { { 0 } };
        for (unsigned i = 0; i < sizeof(allowed); i++) {
            rules[i].opcode = IORING_RESTRICTION_SQE_OP;
            rules[i].sqe_op = allowed[i];
        }
        if (syscall(__NR_io_uring_register, fd, IORING_REGISTER_RESTRICTIONS, rules, sizeof(allowed)))
            return -errno;
        return syscall(__NR_io_uring_register, fd, IORING_REGISTER_ENABLE_RINGS, NULL, 0) ? -errno : 0;
    }
    static inline void *uring_map(int fd, size_t size, off_t what) {
        void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, what);
        return p == MAP_FAILED ? NULL : p;
    }
    static inline unsigned load_acquire(const unsigned *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
    static inline void store_release(unsigned *p, unsigned v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
    """
    enum:
        IORING_SETUP_CLAMP, IORING_SETUP_COOP_TASKRUN, IORING_SETUP_R_DISABLED, IORING_ENTER_GETEVENTS
        IORING_OFF_SQ_RING, IORING_OFF_SQES
    int uring_setup(unsigned int entries, io_uring_params *p) noexcept nogil
    int uring_restrict(int fd) noexcept nogil
    int uring_enter(int fd, unsigned int submit, unsigned int wait, unsigned int flags) noexcept nogil
    void *uring_map(int fd, size_t size, long what) noexcept nogil
    unsigned int load_acquire(const unsigned int *p) noexcept nogil
    void store_release(unsigned int *p, unsigned int v) noexcept nogil


cdef Uring[64] _stock
cdef int _stocked = -1                  # rings in _stock; -1: there is no stock, uring_open makes rings
cdef int _refusal = 0                   # errno of the failure if stock() could make no ring


cdef int uring_open(Uring *ring) noexcept:
    global _stocked
    cdef int status
    if _stocked < 0:
        status = _make(ring)
        if status < 0:
            return status
    elif _stocked == 0:
        ring.fd = -1
        return -EMFILE
    else:
        _stocked -= 1
        ring[0] = _stock[_stocked]
    status = _map(ring)
    if status < 0:
        uring_close(ring)
    return status


cdef int _make(Uring *ring) noexcept nogil:
    # A ring that is not mapped yet.
    cdef io_uring_params *p = &ring.made
    cdef int status
    memset(ring, 0, sizeof(Uring))
    # COOP_TASKRUN (Linux 5.19): a completion does not interrupt this thread, which polls the ring anyway. DEFER_TASKRUN
    # would save more, but does not wake a thread that sleeps in epoll on the ring.
    p.flags = IORING_SETUP_CLAMP | IORING_SETUP_COOP_TASKRUN | IORING_SETUP_R_DISABLED
    ring.fd = uring_setup(RING_ENTRIES, p)
    if ring.fd < 0 and errno == EINVAL:
        memset(p, 0, sizeof(io_uring_params))
        p.flags = IORING_SETUP_CLAMP | IORING_SETUP_R_DISABLED      # Linux 5.10
        ring.fd = uring_setup(RING_ENTRIES, p)
    if ring.fd < 0:
        return -errno
    status = uring_restrict(ring.fd)
    if status < 0:
        close(ring.fd)
        ring.fd = -1
    return status


cdef int _map(Uring *ring) noexcept nogil:
    cdef io_uring_params *p = &ring.made
    cdef unsigned int *array
    cdef unsigned int i
    cdef char *base
    ring.rings_size = max(p.sq_off.array + p.sq_entries * sizeof(unsigned int),
                          p.cq_off.cqes + p.cq_entries * sizeof(io_uring_cqe))
    ring.sqes_size = p.sq_entries * sizeof(io_uring_sqe)
    ring.rings = uring_map(ring.fd, ring.rings_size, IORING_OFF_SQ_RING)
    ring.sqes = <io_uring_sqe *>uring_map(ring.fd, ring.sqes_size, IORING_OFF_SQES)
    if ring.rings == NULL or ring.sqes == NULL:
        return -errno
    base = <char *>ring.rings
    ring.sq_head = <unsigned int *>(base + p.sq_off.head)
    ring.sq_tail = <unsigned int *>(base + p.sq_off.tail)
    ring.tail = ring.sq_tail[0]
    ring.sq_mask = (<unsigned int *>(base + p.sq_off.ring_mask))[0]
    ring.cq_head = <unsigned int *>(base + p.cq_off.head)
    ring.cq_tail = <unsigned int *>(base + p.cq_off.tail)
    ring.cq_mask = (<unsigned int *>(base + p.cq_off.ring_mask))[0]
    ring.cqes = <io_uring_cqe *>(base + p.cq_off.cqes)
    array = <unsigned int *>(base + p.sq_off.array)
    for i in range(p.sq_entries):
        array[i] = i
    return 0


cdef void uring_close(Uring *ring) noexcept:
    global _stocked
    if ring.fd < 0:
        return
    if ring.rings != NULL:
        munmap(ring.rings, ring.rings_size)
    if ring.sqes != NULL:
        munmap(ring.sqes, ring.sqes_size)
    if 0 <= _stocked < 64:
        _stock[_stocked] = ring[0]
        _stocked += 1
    else:
        close(ring.fd)
    ring.fd = -1


cdef io_uring_sqe *uring_next(Uring *ring) noexcept nogil:
    cdef io_uring_sqe *sqe
    if ring.tail - load_acquire(ring.sq_head) > ring.sq_mask:
        return NULL
    sqe = &ring.sqes[ring.tail & ring.sq_mask]
    memset(sqe, 0, sizeof(io_uring_sqe))
    ring.tail += 1
    return sqe


cdef int uring_submit(Uring *ring, unsigned int wait) noexcept nogil:
    cdef unsigned int flags, left
    store_release(ring.sq_tail, ring.tail)
    flags = IORING_ENTER_GETEVENTS if wait else 0
    while True:
        left = ring.tail - load_acquire(ring.sq_head)
        if uring_enter(ring.fd, left, wait, flags) < 0:
            if errno != EINTR:
                return -errno
        elif ring.tail == load_acquire(ring.sq_head):
            return 0


cdef io_uring_cqe *uring_peek(Uring *ring) noexcept nogil:
    # pairs with the kernel's store-release of cq_tail, which follows its writes of the completions
    if ring.cq_head[0] == load_acquire(ring.cq_tail):
        return NULL
    return &ring.cqes[ring.cq_head[0] & ring.cq_mask]


cdef void uring_seen(Uring *ring) noexcept nogil:
    store_release(ring.cq_head, ring.cq_head[0] + 1)


def probe():
    """Check whether io_uring is usable. Returns 0, or an error number that says why not."""
    cdef Uring ring
    cdef int status
    if _stocked >= 0:
        return _refusal
    status = uring_open(&ring)
    if status == 0:
        uring_close(&ring)
    return -status


def stock(int count):
    """Make up to `count` rings, at most 64. After this the process makes no others: closed rings are used again. A ring
    is mapped while it is open.

    :returns: the number of rings made
    """
    global _refusal, _stocked
    cdef int status = 0
    if _stocked < 0:
        _stocked = 0
        while status == 0 and _stocked < min(count, 64):
            status = _make(&_stock[_stocked])
            _stocked += status == 0
        _refusal = 0 if _stocked else -status
    return _stocked
