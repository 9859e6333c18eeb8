# SPDX-License-Identifier: Apache-2.0
# Guest memory and memory ordering for the hot path; every device's Cython loop cimports this file.
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from *:
    """
    #include <stdint.h>
    /* Every access to memory that the guest writes at the same time goes through one of these: the compiler may
       neither tear it nor load it twice. x86 needs no instruction for acquire and release, only for the full fence. */
    static inline uint16_t load_acquire16(const void *p) { return __atomic_load_n((const uint16_t *)p, __ATOMIC_ACQUIRE); }
    static inline uint16_t load_relaxed16(const void *p) { return __atomic_load_n((const uint16_t *)p, __ATOMIC_RELAXED); }
    static inline void store_release16(void *p, uint16_t v) { __atomic_store_n((uint16_t *)p, v, __ATOMIC_RELEASE); }
    static inline void fence_seq_cst(void) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
    """
    uint16_t load_acquire16(const void *p) noexcept nogil
    uint16_t load_relaxed16(const void *p) noexcept nogil
    void store_release16(void *p, uint16_t v) noexcept nogil
    void fence_seq_cst() noexcept nogil

cdef enum:
    MAX_REGIONS = 8

cdef struct RamRegion:
    uint64_t gpa                # first guest physical address
    uint64_t size               # bytes
    uint8_t *host               # where this process has it mapped; owned by GuestRam._maps

cdef class GuestRam:
    cdef RamRegion _regions[MAX_REGIONS]    # by address, disjoint; fixed once the VM runs
    cdef int _count
    cdef list _maps                         # (mmap, memoryview) a region: keep the mappings alive
    # Host address of [gpa, gpa+size), or NULL where it is not all inside one region. Overflow-safe; size 0 is legal
    # at every address inside a region and at its end.
    cdef uint8_t *host(self, uint64_t gpa, uint64_t size) noexcept nogil
