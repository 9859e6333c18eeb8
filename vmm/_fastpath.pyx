# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""Guest memory and the split virtqueue, for every hot path.

This has the one checked translation from a guest address to a host address, and the device's side of virtio 1.2 §2.7:
C functions that run without the GIL (``queue_*``), and ``VirtQueue``, which wraps them for Python.
"""
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.long cimport PyLong_AsLongLongAndOverflow
from cpython.mem cimport PyMem_Calloc, PyMem_Free, PyMem_Malloc
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memcpy
from posix.mman cimport MADV_REMOVE

from vmm._iov cimport copy_once, iov_gather, iov_scatter
from vmm._mapping import advise
from vmm.errors import BadChain, GuestMemoryError

cdef enum:
    PAGE_SIZE = 4096


cdef inline uint8_t *find(const RamRegion *region, int count, uint64_t gpa, uint64_t size) noexcept nogil:
    cdef uint64_t offset
    while count:
        offset = gpa - region.gpa       # if gpa is below the region, this wraps to more than any region's size
        if offset <= region.size and size <= region.size - offset:
            return region.host + offset
        region += 1
        count -= 1
    return NULL


cdef uint8_t *checked(GuestRam ram, gpa, size) except NULL:
    cdef uint8_t *host = ram.host(gpa, size) if 0 <= gpa < 1 << 64 and 0 <= size < 1 << 64 else NULL
    if host == NULL:
        raise GuestMemoryError(gpa, size)
    return host


cdef class GuestRam:
    """The guest's RAM: up to 8 mapped regions. ``vmm.memory.GuestMemory`` creates the mappings.

    Every method that takes a guest address raises ``GuestMemoryError`` unless [gpa, gpa + size) is inside one region.
    """

    def __cinit__(self):
        self._count = 0
        self._maps = []

    cdef uint8_t *host(self, uint64_t gpa, uint64_t size) noexcept nogil:
        return find(self._regions, self._count, gpa, size)

    def map_region(self, uint64_t gpa, mapping):
        """Use `mapping` (writable, page aligned; kept until ``unmap_all``) as guest RAM at `gpa`. Call it in address
        order.

        :raises ValueError: there are 8 regions already, or `gpa` is not above the regions added before
        """
        cdef uint8_t[::1] view = mapping
        cdef RamRegion *last
        if self._count == MAX_REGIONS:
            raise ValueError("a guest has at most 8 memory regions")
        if self._count:
            last = &self._regions[self._count - 1]
            if gpa < last.gpa + last.size:
                raise ValueError("memory regions overlap or are out of order")
        self._regions[self._count].gpa = gpa
        self._regions[self._count].size = <uint64_t>view.shape[0]
        self._regions[self._count].host = &view[0]
        self._maps.append((mapping, memoryview(mapping)))
        self._count += 1

    def unmap_all(self):
        """Remove every region. A mapping stays in memory until its last slice is released.

        :returns: the mappings
        """
        mappings = [mapping for mapping, _ in self._maps]
        self._count = 0
        self._maps = []
        return mappings

    def host_address(self, gpa, size):
        """Host virtual address of [gpa, gpa + size), for ``KVM_SET_USER_MEMORY_REGION``."""
        return <uintptr_t>checked(self, gpa, size)

    def slice(self, gpa, size):
        """A writable memoryview over [gpa, gpa + size): no copy, and it keeps the mapping alive."""
        cdef int i
        cdef uint64_t offset
        if 0 <= gpa < 1 << 64 and 0 <= size < 1 << 64:
            for i in range(self._count):
                if find(&self._regions[i], 1, gpa, size) != NULL:
                    offset = <uint64_t>gpa - self._regions[i].gpa
                    return self._maps[i][1][offset:offset + size]
        raise GuestMemoryError(gpa, size)

    def write(self, gpa, data):
        """Copy `data` (bytes-like) to guest memory at `gpa`."""
        cdef const uint8_t[::1] source
        if not len(data):
            return
        source = memoryview(data).cast("B")
        memcpy(checked(self, gpa, source.shape[0]), &source[0], <size_t>source.shape[0])

    def read(self, gpa, size):
        """The `size` bytes of guest memory at `gpa`, copied."""
        return (<char *>checked(self, gpa, size))[:<Py_ssize_t>size]

    def whole_pages(self, part):
        """The whole pages inside `part`, a slice of this RAM, as (guest address, bytes).

        :raises ValueError: `part` is not a slice of this RAM
        """
        cdef uint8_t[::1] view = part
        cdef uintptr_t first, start, end
        cdef int i
        if not view.shape[0]:
            return 0, 0
        first = <uintptr_t>&view[0]
        for i in range(self._count):
            if first - <uintptr_t>self._regions[i].host < self._regions[i].size:
                break
        else:
            raise ValueError("not a slice of this guest's memory")
        start = (first + PAGE_SIZE - 1) & ~<uintptr_t>(PAGE_SIZE - 1)
        end = (first + <size_t>view.shape[0]) & ~<uintptr_t>(PAGE_SIZE - 1)
        return self._regions[i].gpa + (start - <uintptr_t>self._regions[i].host), end - start if start < end else 0

    def discard(self, part):
        """Free the whole pages inside `part`: they become holes in the memfd and read as zeros.

        :param part: a view from ``slice`` or from a chain, of any alignment
        :returns: bytes freed
        :raises ValueError: `part` is not a slice of this RAM
        :raises OSError: the host refused, for instance because the RAM is not shared memory

        Runs without the GIL. Source: Linux madvise(2), MADV_REMOVE.
        """
        gpa, size = self.whole_pages(part)
        if size:
            advise(self.host_address(gpa, size), size, MADV_REMOVE)
        return size


RULES = {
    QUEUE_NOT_READY: "the queue is not ready (§4.2.2.2)",
    QUEUE_AVAIL_IDX: "avail.idx is further ahead than the queue is long (§2.7.13.3)",
    QUEUE_HEAD: "the head is not below the queue size (§2.7.6)",
    QUEUE_NEXT: "next is not below the size of its table (§2.7.5)",
    QUEUE_TOO_LONG: "the chain loops or is longer than the queue (§2.7.5.2, §2.7.5.3.1)",
    QUEUE_ADDRESS: "the buffer is not inside guest memory (§2.7.5)",
    QUEUE_ORDER: "a device-readable buffer follows a device-writable one (§2.7.4.2)",
    QUEUE_TOTAL: "the chain holds more than 2^32 bytes (§2.7.5.2)",
    QUEUE_INDIRECT_OFF: "INDIRECT without VIRTIO_F_INDIRECT_DESC (§2.7.5.3.1)",
    QUEUE_INDIRECT_NESTED: "INDIRECT inside an indirect table (§2.7.5.3.1)",
    QUEUE_INDIRECT_NEXT: "INDIRECT together with NEXT (§2.7.5.3.1)",
    QUEUE_INDIRECT_LENGTH: "the indirect table is empty, not whole descriptors or longer than the queue "
                           "(§2.7.5.3.1)",
    QUEUE_INDIRECT_ADDRESS: "the indirect table is not inside guest memory (§2.7.5.3)",
}


cdef int queue_pop(Ring *ring, GuestRam ram, DescChain *chain) noexcept nogil:
    """Take the next available chain. Returns QUEUE_CHAIN, QUEUE_EMPTY, or the rule that the driver broke."""
    cdef vring_desc d
    cdef uint8_t *table = ring.desc
    cdef uint8_t *host
    cdef iovec *iov = chain.iov
    cdef const RamRegion *regions = ram._regions
    cdef int n_regions = ram._count
    cdef uint32_t size = ring.size, table_size = size, seen = 0, n = 0, n_readable = 0
    cdef uint64_t readable = 0, total = 0
    cdef uint16_t index, ahead
    cdef bint inside_indirect = False
    chain.head = 0
    chain.index = 0
    chain.in_window = False
    if size == 0:
        return QUEUE_NOT_READY
    # pairs with the driver's write barrier between avail.ring[] and avail.idx (§2.7.13.3.1)
    ahead = <uint16_t>(load_acquire16(ring.avail + 2) - ring.last_avail)
    if ahead == 0:
        return QUEUE_EMPTY
    if ahead > size:
        return QUEUE_AVAIL_IDX
    index = load_relaxed16(ring.avail + 4 + 2 * (ring.last_avail & (size - 1)))
    chain.head = index
    chain.index = index
    if index >= size:
        return QUEUE_HEAD
    while True:
        copy_once(&d, table + 16 * <size_t>index, sizeof(vring_desc))
        if d.flags & VRING_DESC_F_INDIRECT:
            chain.index = index
            # §2.7.5.3.2: direct descriptors may come first, and the device ignores WRITE here.
            if not ring.indirect:
                return QUEUE_INDIRECT_OFF
            if inside_indirect:
                return QUEUE_INDIRECT_NESTED
            if d.flags & VRING_DESC_F_NEXT:
                return QUEUE_INDIRECT_NEXT
            if d.len == 0 or d.len & 15 or d.len >> 4 > size:
                return QUEUE_INDIRECT_LENGTH
            table = find(regions, n_regions, d.addr, d.len)
            if table == NULL:
                return QUEUE_INDIRECT_ADDRESS
            table_size = d.len >> 4
            inside_indirect = True
            index = 0
            continue
        chain.index = index
        seen += 1
        if seen > size:
            return QUEUE_TOO_LONG
        host = find(regions, n_regions, d.addr, d.len)
        if host == NULL:
            if chain.window != NULL:
                host = find(chain.window, 1, d.addr, d.len)
            if host == NULL:
                return QUEUE_ADDRESS
            chain.in_window = True
        total += d.len
        if total > <uint64_t>1 << 32:
            return QUEUE_TOTAL
        if not d.flags & VRING_DESC_F_WRITE and n != n_readable:
            return QUEUE_ORDER
        if d.len:       # an empty buffer is valid and is skipped
            if not d.flags & VRING_DESC_F_WRITE:
                readable = total
                n_readable += 1
            iov[n].iov_base = host
            iov[n].iov_len = d.len
            n += 1
        if not d.flags & VRING_DESC_F_NEXT:
            break
        index = d.next
        if index >= table_size:
            return QUEUE_NEXT
    chain.n_readable = n_readable
    chain.n_writable = n - n_readable
    chain.readable_bytes = readable
    chain.writable_bytes = total - readable
    store_relaxed16(&ring.last_avail, <uint16_t>(ring.last_avail + 1))
    return QUEUE_CHAIN


cdef bint queue_enable_notify(Ring *ring) noexcept nogil:
    """Enable notifications. Returns whether chains are already available; the driver does not notify for those."""
    if ring.size == 0:
        return False
    if ring.event_idx:
        store_release16(ring.used + 4 + 8 * <size_t>ring.size, ring.last_avail)
    else:
        store_release16(ring.used, 0)
    # pairs with the driver's full barrier between writing avail.idx and reading avail_event or flags: either the
    # driver notifies, or this load sees its new index (§2.7.13.4.1)
    fence_seq_cst()
    return load_acquire16(ring.avail + 2) != ring.last_avail


cdef void queue_disable_notify(Ring *ring) noexcept nogil:
    """Tell the driver not to notify; only a hint. With EVENT_IDX, an avail_event that stays behind does the same."""
    if not ring.event_idx:
        queue_mute(ring)


cdef void queue_mute(Ring *ring) noexcept nogil:
    """Tell the driver not to notify until queue_enable_notify, as firmly as avail_event or the flag allows."""
    if ring.size == 0:
        return
    if ring.event_idx:
        store_release16(ring.used + 4 + 8 * <size_t>ring.size, <uint16_t>(ring.last_avail + 0x8000))
    else:
        store_release16(ring.used, VRING_USED_F_NO_NOTIFY)


cdef void queue_unpop(Ring *ring) noexcept nogil:
    """Undo the last queue_pop; its chain must not have been returned. The next pop reads the chain again."""
    store_relaxed16(&ring.last_avail, <uint16_t>(ring.last_avail - 1))


cdef bint queue_flush_call(Ring *ring) noexcept nogil:
    return queue_flush(ring)


cdef class Chain:
    """One request from the driver. Its buffers are guest memory, borrowed until ``VirtQueue.add_used``.

    :ivar readable_bytes: size of the buffers that the device reads
    :ivar writable_bytes: size of the buffers that the device writes
    """

    def __dealloc__(self):
        PyMem_Free(self.iov)

    cdef list _views(self, uint32_t first, uint32_t count):
        cdef list views = []
        cdef uint32_t i
        cdef int r
        cdef uintptr_t start
        cdef RamRegion *region
        for i in range(first, first + count):
            for r in range(self.memory._count):
                region = &self.memory._regions[r]
                start = <uintptr_t>self.iov[i].iov_base - <uintptr_t>region.host
                if start < region.size:
                    views.append(self.memory._maps[r][1][start:start + self.iov[i].iov_len])
                    break
        return views

    def gather(self, uint64_t limit, uint64_t start=0):
        """Copy the readable bytes from `start` on, once: at most `limit` bytes.

        Check ``readable_bytes`` first: a driver can describe gigabytes with a few descriptors.
        """
        cdef uint64_t size = min(limit, self.readable_bytes - start) if start < self.readable_bytes else 0
        cdef bytes copy = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>size)
        iov_gather(self.iov, self.n_readable, start, PyBytes_AS_STRING(copy), size)
        return copy

    def scatter(self, data):
        """Copy `data` to the writable buffers, from their first byte on. Returns the number of bytes that fitted."""
        cdef const uint8_t[::1] view = data
        if not view.shape[0]:
            return 0
        return iov_scatter(self.iov + self.n_readable, self.n_writable, 0, &view[0], <size_t>view.shape[0])

    @property
    def readable(self):
        """Views of the readable buffers, in order; none is empty. Each access builds a new list."""
        return self._views(0, self.n_readable)

    @property
    def writable(self):
        """Views of the writable buffers, in order; none is empty. Each access builds a new list."""
        return self._views(self.n_readable, self.n_writable)


cdef class VirtQueue:
    """The device's side of one split virtqueue (virtio 1.2 §2.7). Only one thread may use it at a time. The loop::

        while True:
            queue.disable_notify()
            while (chain := queue.pop()) is not None:
                queue.add_used(chain, serve(chain))
                if queue.flush():
                    interrupt()
            if not queue.enable_notify():
                break                       # now wait for the notification

    :param memory: guest RAM that holds the rings and the buffers
    :param max_size: a power of two up to 32768
    :param index: the queue's number in its device, for messages
    """

    def __cinit__(self, GuestRam memory, int max_size, int index=0):
        if not 0 < max_size <= 32768 or max_size & (max_size - 1):
            raise ValueError("a queue's maximum size is a power of two up to 32768")
        self.memory = memory
        self.index = index
        self.max_size = max_size
        self.scratch.iov = <iovec *>PyMem_Calloc(max_size, sizeof(iovec))
        if self.scratch.iov == NULL:
            raise MemoryError()
        self.reset()

    def __dealloc__(self):
        PyMem_Free(self.scratch.iov)

    def reset(self):
        """Make the queue not ready, with ``size`` set to ``max_size`` and all addresses to 0."""
        self.ring = Ring(NULL, NULL, NULL, 0, 0, 0, 0, False, False)
        self.size = self.max_size
        self.desc = self.avail = self.used = 0

    @property
    def ready(self):
        """Whether ``enable`` has succeeded since the last ``reset``."""
        return self.ring.size != 0

    @property
    def last_avail(self):
        """Chains taken so far, mod 65536; any thread may ask."""
        return load_relaxed16(&self.ring.last_avail)

    @property
    def next_used(self):
        """Chains returned so far, mod 65536."""
        return self.ring.next_used

    @property
    def all_seen(self):
        """Whether the driver waits for the next chain to be returned, so it has seen all earlier ones. False: unknown.

        Without EVENT_IDX the rings do not tell.
        """
        cdef Ring *ring = &self.ring
        return bool(ring.size and ring.event_idx
                    and load_acquire16(ring.avail + 4 + 2 * <size_t>ring.size) == ring.next_used)

    def enable(self, *, bint event_idx, bint indirect, uint16_t last_avail=0, uint16_t next_used=0):
        """Check ``size`` and the guest addresses ``desc``, ``avail`` and ``used``, and make the queue ready.

        :param event_idx: VIRTIO_F_EVENT_IDX was negotiated
        :param indirect: VIRTIO_F_INDIRECT_DESC was negotiated
        :param last_avail: for a restored device, the chains taken so far, mod 65536
        :param next_used: for a restored device, the chains returned so far, mod 65536
        :raises BadChain: the size is not a power of two or too large, or an address is misaligned or outside RAM
        """
        if not 0 < self.size <= <uint32_t>self.max_size or self.size & (self.size - 1):
            raise BadChain(self.index, -1, -1, f"the queue size {self.size} is not a power of two up to "
                           f"{self.max_size} (§2.7, §4.2.3.2)")
        parts = (("descriptor table", self.desc, 16, 16 * self.size),
                 ("available ring", self.avail, 2, 6 + 2 * self.size),
                 ("used ring", self.used, 4, 6 + 8 * self.size))
        for name, gpa, alignment, length in parts:
            if gpa % alignment:
                raise BadChain(
                    self.index, -1, -1, f"the {name} at {gpa:#x} is not aligned to {alignment} (§2.7)")
            if self.memory.host(gpa, length) == NULL:
                raise BadChain(
                    self.index, -1, -1, f"the {name} at {gpa:#x} is not inside guest memory (§2.7)")
        self.ring.desc = self.memory.host(self.desc, 16 * <uint64_t>self.size)
        self.ring.avail = self.memory.host(self.avail, 6 + 2 * <uint64_t>self.size)
        self.ring.used = self.memory.host(self.used, 6 + 8 * <uint64_t>self.size)
        self.ring.last_avail = last_avail
        self.ring.next_used = self.ring.published = next_used
        self.ring.event_idx = event_idx
        self.ring.indirect = indirect
        self.ring.size = <uint16_t>self.size

    def pop(self):
        """Take the next chain; None: the queue is empty. Each descriptor is copied once and then checked.

        :raises BadChain: the driver broke a rule; every further call raises it again until ``reset``
        """
        cdef int status = queue_pop(&self.ring, self.memory, &self.scratch)
        cdef uint32_t count
        cdef Chain chain
        if status == QUEUE_EMPTY:
            return None
        if status < 0:
            raise self.failure(status)
        chain = Chain.__new__(Chain)
        count = self.scratch.n_readable + self.scratch.n_writable
        chain.iov = <iovec *>PyMem_Malloc(count * sizeof(iovec))
        if chain.iov == NULL:
            raise MemoryError()
        memcpy(chain.iov, self.scratch.iov, count * sizeof(iovec))
        chain.memory = self.memory
        chain.head = self.scratch.head
        chain.n_readable = self.scratch.n_readable
        chain.n_writable = self.scratch.n_writable
        chain.readable_bytes = self.scratch.readable_bytes
        chain.writable_bytes = self.scratch.writable_bytes
        return chain

    def failure(self, int status):
        """The exception for `status`, the negative result of this queue's last ``queue_pop``."""
        if status == QUEUE_NOT_READY or status == QUEUE_AVAIL_IDX:
            return BadChain(self.index, -1, -1, RULES[status])
        return BadChain(self.index, self.scratch.head, self.scratch.index, RULES[status])

    def add_used(self, Chain chain not None, written):
        """Return `chain`, with its first `written` writable bytes filled. The driver sees it after ``flush``.

        :raises TypeError: `written` is not a number
        :raises ValueError: the chain was returned before, `written` exceeds its ``writable_bytes``, or the queue is not
            ready
        """
        cdef int too_large = 0
        cdef int64_t size
        if not isinstance(written, int) and not hasattr(written, "__index__"):
            raise TypeError(
                f"the number of bytes written to a chain must be a whole number, not {written!r:.60}: "
                "what serves a chain returns it, 0 if it wrote nothing")
        if chain.returned:
            raise ValueError("the chain was returned before")
        size = PyLong_AsLongLongAndOverflow(written, &too_large)
        if too_large or size < 0 or <uint64_t>size > min(chain.writable_bytes, <uint64_t>0xFFFF_FFFF):
            raise ValueError(f"a chain with room for {chain.writable_bytes} bytes cannot have {written} bytes written")
        if self.ring.size == 0:
            raise ValueError("the queue is not ready")
        chain.returned = True
        queue_add_used(&self.ring, chain.head, <uint32_t>size)

    def flush(self):
        """Show the driver the chains returned since the last call. Returns whether it wants an interrupt for them."""
        return queue_flush(&self.ring)

    def enable_notify(self):
        """Enable notifications. Returns True if more chains are already available: take those first."""
        return queue_enable_notify(&self.ring)

    def disable_notify(self):
        """Tell the driver that it need not notify, because the device is reading the queue."""
        queue_disable_notify(&self.ring)
