# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""One address space (port I/O or MMIO): which device handles which address.

A reader (a vCPU thread without the GIL) loads the table's pointer once, and a table never changes. `add` and `remove`
build a new table. The old one is freed by `reclaim`, which is called while no vCPU runs, or with the bus.
"""
from cpython.bytearray cimport PyByteArray_AS_STRING
from cpython.object cimport PyObject
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from vmm._sys cimport counter_add, counter_read
from vmm.errors import ConfigError


cdef class NativeDevice:
    """Base class of bus devices written in C; a subclass sets `access` and `ctx` before it is added to a bus."""


cdef Range *bus_find(Table *table, uint64_t address, uint32_t size) noexcept nogil:
    """Return the range that contains all of [address, address+size), or NULL."""
    cdef size_t low = 0, high = table.count, middle
    cdef Range *r
    while low < high:
        middle = (low + high) >> 1
        r = &table.ranges[middle]
        if address < r.start:
            high = middle
        elif address - r.start >= r.size:
            low = middle + 1
        elif size <= r.size - (address - r.start):
            return r
        else:
            return NULL     # straddles the end of a device
    return NULL


cdef str _where(uint64_t start, uint64_t size):
    return f"{start:#x}-{start + size - 1:#x}" if size else f"{start:#x}"


cdef class Bus:
    """An address space of disjoint ranges, each with one device.

    :param name: ``"pio"`` or ``"mmio"``, used in messages
    :param limit: first address past the end, e.g. ``0x10000`` for port I/O

    A device has ``read(offset, data)`` and ``write(offset, data)`` (``vmm.bus.BusDevice``) and does not know its own
    address. Safe to change while vCPUs run.
    """

    def __cinit__(self, str name, uint64_t limit):
        self.name = name
        self.limit = limit
        self._claims = []
        self._tables = []
        self._left = []
        self._publish()

    def add(self, uint64_t start, uint64_t size, device, str name):
        """Give [start, start+size) to `device`.

        :param start: first address
        :param size: bytes, at least 1
        :param device: has ``read(offset, data)`` and ``write(offset, data)``
        :param name: the device's name, for messages and statistics
        :raises ConfigError: the range is empty, exceeds the address space, or overlaps one that is already claimed
        :raises TypeError: `device` lacks a method, or is a class
        """
        if not isinstance(device, NativeDevice):
            for method in ("read", "write"):
                if isinstance(device, type) or not callable(getattr(device, method, None)):
                    raise TypeError(
                        f"{self.name} {name}: the device must be an object with read(offset, data) and "
                        f"write(offset, data), not {device!r:.60}")
        if size == 0 or start >= self.limit or size > self.limit - start:
            raise ConfigError(
                f"{self.name} range", _where(start, size), f"{name} must lie within 0-{self.limit - 1:#x}")
        for other_start, other_size, _, other in self._claims:
            if start < other_start + other_size and other_start < start + size:
                raise ConfigError(
                    f"{self.name} range", _where(start, size),
                    f"wanted by {name}, claimed by {other} at {other_start:#x}-{other_start + other_size - 1:#x}")
        self._claims.append((start, size, device, name))
        self._claims.sort()  # start addresses differ, so the sort compares nothing else
        self._publish()

    def remove(self, device):
        """Remove every range of `device`. A vCPU that is inside the device still finishes its access."""
        self._left.append(device)
        self._claims = [claim for claim in self._claims if claim[2] is not device]
        self._publish()

    def reclaim(self):
        """Free the replaced tables. No vCPU may be inside an access: either none has started, or all are paused."""
        self._tables = [self._tables.pop()]
        self._left = []

    @property
    def claims(self):
        """The claimed ranges: a tuple of (start, size, device, name), sorted by address."""
        return tuple(self._claims)

    @property
    def unclaimed(self):
        """Accesses that met no device, or straddled two; a statistic, as ``hits``."""
        return counter_read(&self._unclaimed)

    def hits(self, device):
        """Number of accesses to `device` since the bus last changed; not exact."""
        cdef size_t i
        cdef uint64_t total = 0
        for i in range(self.table.count):
            if self.table.ranges[i].device == <PyObject *>device:
                total += counter_read(&self.table.ranges[i].hits)
        return total

    cdef object _publish(self):
        cdef size_t count = len(self._claims), i
        cdef bytearray memory = bytearray(sizeof(Table) + count * sizeof(Range))    # zeros; it is never resized
        cdef Table *table = <Table *>PyByteArray_AS_STRING(memory)
        table.count = count
        table.ranges = <Range *>(table + 1)
        for i in range(count):
            start, size, device, _ = self._claims[i]
            table.ranges[i].start = start
            table.ranges[i].size = size
            table.ranges[i].device = <PyObject *>device
            if isinstance(device, NativeDevice):
                table.ranges[i].access = (<NativeDevice>device).access
                table.ranges[i].ctx = (<NativeDevice>device).ctx
        self._tables.append(memory)
        bus_store(<void **>&self.table, table)      # a reader has the old table or the new one, never half

    def access(self, uint64_t address, data, bint is_write):
        """Do one access as a vCPU would; for tests and tools.

        :param data: writable buffer of 1, 2, 4 or 8 bytes, little endian
        :returns: whether a device handled it; if not, a read fills `data` with ones
        """
        cdef uint8_t[::1] view = data
        cdef uint32_t size = <uint32_t>view.shape[0]
        cdef Range *r = bus_find(self.table, address, size)
        if r == NULL:
            counter_add(&self._unclaimed, 1)
            if not is_write:
                view[:] = 0xff
            return False
        counter_add(&r.hits, 1)
        if r.access != NULL and r.access(r.ctx, address - r.start, &view[0], size, is_write) == ACCESS_DONE:
            return True
        device = <object>r.device
        if is_write:
            device.write(address - r.start, memoryview(data))
        else:
            device.read(address - r.start, memoryview(data))
        return True
