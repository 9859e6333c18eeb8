# SPDX-License-Identifier: Apache-2.0
# Guest memory and memory ordering for the hot path; every device's Cython loop cimports this file.
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from posix.uio cimport iovec

cdef extern from *:
    """
    #include <linux/virtio_ring.h>
    #include <stdint.h>
    /* The guest may write its memory at any time. Access it only through these functions: they keep the compiler
       from tearing an access or loading twice. On x86 only the full fence costs an instruction. */
    static inline uint16_t load_acquire16(const void *p) {
        return __atomic_load_n((const uint16_t *)p, __ATOMIC_ACQUIRE);
    }
    static inline uint16_t load_relaxed16(const void *p) {
        return __atomic_load_n((const uint16_t *)p, __ATOMIC_RELAXED);
    }
    static inline void store_relaxed16(void *p, uint16_t v) {
        __atomic_store_n((uint16_t *)p, v, __ATOMIC_RELAXED);
    }
    static inline void store_release16(void *p, uint16_t v) {
        __atomic_store_n((uint16_t *)p, v, __ATOMIC_RELEASE);
    }
    static inline void fence_seq_cst(void) {
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
    }
    """
    uint16_t load_acquire16(const void *p) noexcept nogil
    uint16_t load_relaxed16(const void *p) noexcept nogil
    void store_relaxed16(void *p, uint16_t v) noexcept nogil
    void store_release16(void *p, uint16_t v) noexcept nogil
    void fence_seq_cst() noexcept nogil
    struct vring_desc:          # virtio 1.2 §2.7.5
        uint64_t addr
        uint32_t len
        uint16_t flags
        uint16_t next
    enum: VRING_DESC_F_NEXT, VRING_DESC_F_WRITE, VRING_DESC_F_INDIRECT, VRING_USED_F_NO_NOTIFY
    enum: VRING_AVAIL_F_NO_INTERRUPT

cdef enum:
    MAX_REGIONS = 8

cdef struct RamRegion:
    uint64_t gpa                # first guest physical address
    uint64_t size               # bytes
    uint8_t *host               # where this process has it mapped; owned by GuestRam._maps

cdef class GuestRam:
    cdef RamRegion _regions[MAX_REGIONS]    # by address, disjoint; fixed once the VM runs
    cdef int _count
    cdef list _maps                         # (mmap, memoryview) of each region; keeps the mappings alive
    # Host address of [gpa, gpa+size), or NULL if the range is not inside one region. Overflow-safe. Size 0 is valid
    # at every address inside a region and at its end.
    cdef uint8_t *host(self, uint64_t gpa, uint64_t size) noexcept nogil

# Results of queue_pop. A negative one names the rule of virtio 1.2 that the driver broke (RULES in the .pyx).
cdef enum:
    QUEUE_CHAIN = 1
    QUEUE_EMPTY = 0
    QUEUE_NOT_READY = -1
    QUEUE_AVAIL_IDX = -2
    QUEUE_HEAD = -3
    QUEUE_NEXT = -4
    QUEUE_TOO_LONG = -5
    QUEUE_ADDRESS = -6
    QUEUE_ORDER = -7
    QUEUE_TOTAL = -8
    QUEUE_INDIRECT_OFF = -9
    QUEUE_INDIRECT_NESTED = -10
    QUEUE_INDIRECT_NEXT = -11
    QUEUE_INDIRECT_LENGTH = -12
    QUEUE_INDIRECT_ADDRESS = -13

# One split virtqueue. Only the device's thread uses it; the guest shares the memory at the three host addresses.
cdef struct Ring:
    uint8_t *desc               # size descriptors of 16 bytes
    uint8_t *avail              # u16 flags, u16 idx, u16 ring[size], u16 used_event
    uint8_t *used               # u16 flags, u16 idx, {u32 id, u32 len} ring[size], u16 avail_event
    uint16_t size               # a power of two, at most 32768; 0: the queue is not ready
    uint16_t last_avail         # avail entries taken so far, mod 65536; atomic: any thread may read it
    uint16_t next_used          # used entries written so far, mod 65536
    uint16_t published          # used.idx as the driver sees it
    bint event_idx              # VIRTIO_F_EVENT_IDX was negotiated
    bint indirect               # VIRTIO_F_INDIRECT_DESC was negotiated

# One request: n_readable iovecs, then n_writable iovecs, all pointing into guest RAM.
cdef struct DescChain:
    iovec *iov                  # has as many entries as the ring; owned by the caller
    uint32_t n_readable
    uint32_t n_writable
    uint64_t readable_bytes     # readable + writable is at most 2^32
    uint64_t writable_bytes
    uint16_t head
    uint16_t index              # the last descriptor read; if a rule was broken, the one that broke it
    const RamRegion *window     # memory beside RAM that buffers may be in, the caller's; NULL: none
    bint in_window              # whether one is. Its pages may be gone: only a system call may touch them

# The queue protocol without the GIL and without exceptions. VirtQueue's docstring shows the loop that calls them.
cdef int queue_pop(Ring *ring, GuestRam ram, DescChain *chain) noexcept nogil
cdef bint queue_enable_notify(Ring *ring) noexcept nogil
cdef void queue_disable_notify(Ring *ring) noexcept nogil
cdef void queue_mute(Ring *ring) noexcept nogil
cdef void queue_unpop(Ring *ring) noexcept nogil
cdef bint queue_flush_call(Ring *ring) noexcept nogil   # queue_flush as a function with an address

# Defined here so that they are inlined into every device's loop.

# Return the chain `head`, with its first `written` writable bytes filled. The driver sees it after queue_flush.
cdef inline void queue_add_used(Ring *ring, uint16_t head, uint32_t written) noexcept nogil:
    cdef uint32_t *element = <uint32_t *>(ring.used + 4 + 8 * <size_t>(ring.next_used & (ring.size - 1)))
    element[0] = head
    element[1] = written
    ring.next_used += 1

# Show the driver the chains returned by queue_add_used. Returns whether the driver wants an interrupt for them.
cdef inline bint queue_flush(Ring *ring) noexcept nogil:
    cdef uint16_t old = ring.published, new = ring.next_used, event
    if new == old:
        return False
    # pairs with the driver's read barrier between used.idx and used.ring[] (§2.7.14)
    store_release16(ring.used + 2, new)
    ring.published = new
    # pairs with the driver's full barrier between writing used_event or flags and reading used.idx again: either
    # the driver sees the new index, or this load sees the driver's new used_event or flags (§2.7.7.2)
    fence_seq_cst()
    if ring.event_idx:
        event = load_relaxed16(ring.avail + 4 + 2 * <size_t>ring.size)
        return <uint16_t>(new - event - 1) < <uint16_t>(new - old)
    return not load_relaxed16(ring.avail) & VRING_AVAIL_F_NO_INTERRUPT

cdef class VirtQueue:
    cdef Ring ring
    cdef DescChain scratch          # what pop fills; its iov has max_size entries
    cdef readonly GuestRam memory
    cdef readonly int index         # in its device
    cdef readonly int max_size
    cdef public uint32_t size       # as set by the driver; checked by enable()
    cdef public uint64_t desc
    cdef public uint64_t avail
    cdef public uint64_t used

cdef class Chain:
    cdef readonly uint16_t head     # index of its first descriptor, which identifies the chain to the driver
    cdef readonly uint64_t readable_bytes
    cdef readonly uint64_t writable_bytes
    cdef GuestRam memory
    cdef iovec *iov
    cdef uint32_t n_readable
    cdef uint32_t n_writable
    cdef bint returned
    cdef list _views(self, uint32_t first, uint32_t count)
