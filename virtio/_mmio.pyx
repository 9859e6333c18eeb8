# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""The registers of virtio-mmio that a driver uses at every interrupt, answered without the GIL; and the interrupt."""
import mmap

from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memcpy

from vmm._bus cimport ACCESS_DONE, ACCESS_PYTHON, NativeDevice

cdef extern from *:
    """
    #include <stdint.h>
    typedef volatile uint32_t volatile_u32;
    static inline uint32_t load32(const uint32_t *p) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
    static inline void or32(uint32_t *p, uint32_t v) { __atomic_fetch_or(p, v, __ATOMIC_SEQ_CST); }
    static inline void and32(uint32_t *p, uint32_t v) { __atomic_fetch_and(p, v, __ATOMIC_SEQ_CST); }
    """
    ctypedef uint32_t volatile_u32
    uint32_t load32(const uint32_t *p) noexcept nogil
    void or32(uint32_t *p, uint32_t v) noexcept nogil
    void and32(uint32_t *p, uint32_t v) noexcept nogil

cdef extern from "sys/eventfd.h" nogil:
    int eventfd_write(int fd, uint64_t value)

cdef enum:
    INTERRUPT_USED = 1
    INTERRUPT_CONFIG = 2
    MMIO_QUEUE_NOTIFY = 0x050
    MMIO_INTERRUPT_STATUS = 0x060
    MMIO_INTERRUPT_ACK = 0x064
    MMIO_CONFIG = 0x100
    PAGE = 4096


cdef void interrupt_used(Line *line) noexcept nogil:
    # The bit before the edge: the handler that the edge starts sees it. An edge each time, though the bit may be set
    # still: a driver may acknowledge after it has looked at its rings.
    or32(line.status, INTERRUPT_USED)
    eventfd_write(line.irq, 1)


cdef class Interrupt:
    """The one interrupt of a virtio-mmio device: InterruptStatus and its line; safe from any thread.

    :param owner: a :class:`vmm.irq.IrqLine`; not owned
    """

    def __cinit__(self, owner):
        cdef int i
        cdef uint8_t[::1] view
        self.owner = owner
        self.line.irq = owner.fd
        self.mapping = mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        view = self.mapping
        self.page = &view[0]
        self.line.status = <uint32_t *>(self.page + MMIO_INTERRUPT_STATUS)
        for i in range(MAX_QUEUES):
            self.line.notify[i] = -1

    @property
    def page_address(self):
        """Host address of a page with the registers as the driver reads them; it lives as long as this object."""
        return <uintptr_t>self.page

    def show(self, uint32_t offset, uint32_t value):
        """Let the driver read `value` in the register at `offset`, which is not InterruptStatus."""
        if offset <= PAGE - 4 and not offset & 3 and offset != MMIO_INTERRUPT_STATUS:
            (<volatile_u32 *>(self.page + offset))[0] = value

    def show_config(self, const uint8_t[::1] config):
        """Let the driver read `config` as the configuration space."""
        if 0 < config.shape[0] <= PAGE - MMIO_CONFIG:
            memcpy(self.page + MMIO_CONFIG, &config[0], config.shape[0])

    def __call__(self):
        """Tell the driver that a used ring has changed."""
        interrupt_used(&self.line)

    def config(self):
        """Tell the driver that the configuration space, or DEVICE_NEEDS_RESET, has changed."""
        or32(self.line.status, INTERRUPT_CONFIG)
        eventfd_write(self.line.irq, 1)

    @property
    def status(self):
        """InterruptStatus as the driver reads it."""
        return load32(self.line.status)

    @property
    def notified(self):
        """Writes to QueueNotify that came by an exit to user space, not by KVM's ioeventfd; a statistic."""
        return self.line.notified

    def acknowledge(self, uint32_t bits):
        """The driver has seen `bits`."""
        and32(self.line.status, ~bits)

    def set_notify(self, int queue, int fd):
        """Let a write of `queue` to QueueNotify signal the eventfd `fd`; -1: leave it to Python, as a mistake."""
        if 0 <= queue < MAX_QUEUES:
            self.line.notify[queue] = fd


cdef int access(void *ctx, uint64_t offset, uint8_t *data, uint32_t size, int is_write) noexcept nogil:
    cdef Line *line = <Line *>ctx
    cdef uint32_t value
    if size != 4:
        return ACCESS_PYTHON
    if is_write:
        memcpy(&value, data, 4)
        if offset == MMIO_INTERRUPT_ACK:
            and32(line.status, ~value)
            return ACCESS_DONE
        if offset == MMIO_QUEUE_NOTIFY and value < MAX_QUEUES and line.notify[value] >= 0:
            line.notified += 1
            eventfd_write(line.notify[value], 1)
            return ACCESS_DONE
    elif offset == MMIO_INTERRUPT_STATUS:
        value = load32(line.status)
        memcpy(data, &value, 4)
        return ACCESS_DONE
    return ACCESS_PYTHON


cdef class MmioRegisters(NativeDevice):
    """Base of the transport: InterruptStatus, InterruptACK and QueueNotify in C, the rest by ``read`` and ``write``.

    :param owner: the device's :class:`vmm.irq.IrqLine`; not owned
    """

    def __init__(self, owner):
        self.interrupt = Interrupt(owner)
        self.ctx = &self.interrupt.line
        self.access = access
