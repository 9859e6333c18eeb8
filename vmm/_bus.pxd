# SPDX-License-Identifier: Apache-2.0
# The C side of an address space: the interface of a device that handles an exit without the GIL.
from cpython.object cimport PyObject
from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef enum:
    ACCESS_DONE = 0     # the access is finished
    ACCESS_PYTHON = 1   # take the GIL and call the device's read() or write()

# One access of `size` bytes (1, 2, 4 or 8) at `offset` from the device's first address. `data` is little endian,
# borrowed for the call; a read fills it. Called from any vCPU thread, without the GIL, several at once.
ctypedef int (*access_fn)(void *ctx, uint64_t offset, uint8_t *data, uint32_t size, int is_write) noexcept nogil

cdef extern from *:
    """
    static inline void *bus_load(void *const *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
    static inline void bus_store(void **p, void *v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
    """
    void *bus_load(void **p) noexcept nogil
    void bus_store(void **p, void *v) noexcept nogil

cdef class NativeDevice:
    cdef access_fn access       # NULL: the device is Python only
    cdef void *ctx              # handed to access; must live as long as this object

cdef struct Range:
    uint64_t start              # first address
    uint64_t size               # in bytes, never 0
    access_fn access            # copied from NativeDevice, or NULL
    void *ctx
    PyObject *device            # borrowed from Bus._claims
    uint64_t hits               # accesses; vCPUs write it without a lock, so it is not exact

cdef struct Table:
    size_t count
    Range *ranges               # sorted by start, disjoint

cdef class Bus:
    cdef Table *table           # replaced whole by add and remove; readers have it by bus_table()
    cdef readonly str name      # "pio" or "mmio"
    cdef readonly uint64_t limit  # first address past the space
    cdef uint64_t _unclaimed    # accesses outside every range, or across the end of one; not exact, as `hits`
    cdef list _claims           # (start, size, device, name), sorted; owns the devices
    cdef list _tables           # bytearrays: `table`, behind those that it replaced and a vCPU may still be reading
    cdef list _left             # removed devices that a vCPU may still be in
    cdef object _publish(self)

# The table of this moment: what a reader loads once.
cdef inline Table *bus_table(Bus bus) noexcept nogil:
    return <Table *>bus_load(<void **>&bus.table)

cdef Range *bus_find(Table *table, uint64_t address, uint32_t size) noexcept nogil
