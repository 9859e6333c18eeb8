# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""virtio-mmio registers (virtio 1.2 §4.2.2): the frequently used ones without the GIL, and a page that shows all."""
import mmap

from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memcpy

from vmm._bus cimport ACCESS_DONE, ACCESS_PYTHON, NativeDevice

from virtio._interrupt cimport MAX_QUEUES, Call, Interrupt
from vmm._sys cimport and32, counter_add, counter_read, eventfd_write, flag_read, flag_set, load32, store32

cdef extern from "<linux/virtio_mmio.h>" nogil:
    enum: VIRTIO_MMIO_QUEUE_NOTIFY, VIRTIO_MMIO_INTERRUPT_STATUS, VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_CONFIG

cdef enum:
    PAGE = 4096

# The registers that vCPUs access without the GIL.
cdef struct Registers:
    Call *call
    uint64_t notified           # QueueNotify writes that KVM's ioeventfd did not take; not exact (no lock)
    int[MAX_QUEUES] notify      # eventfd of each queue; borrowed; -1: the queue is not ready or does not exist; atomic


cdef int access(void *ctx, uint64_t offset, uint8_t *data, uint32_t size, int is_write) noexcept nogil:
    cdef Registers *registers = <Registers *>ctx
    cdef uint32_t value
    cdef int fd
    if size != 4:
        return ACCESS_PYTHON
    if is_write:
        memcpy(&value, data, 4)
        if offset == VIRTIO_MMIO_INTERRUPT_ACK:
            and32(registers.call.status, ~value)
            return ACCESS_DONE
        if offset == VIRTIO_MMIO_QUEUE_NOTIFY and value < MAX_QUEUES:
            fd = flag_read(&registers.notify[value])
            if fd >= 0:
                counter_add(&registers.notified, 1)
                eventfd_write(fd, 1)
                return ACCESS_DONE
    elif offset == VIRTIO_MMIO_INTERRUPT_STATUS:
        value = load32(registers.call.status)
        memcpy(data, &value, 4)
        return ACCESS_DONE
    return ACCESS_PYTHON


cdef class MmioRegisters(NativeDevice):
    """InterruptStatus, InterruptACK and QueueNotify in C. A subclass handles the others in ``read`` and ``write``.

    :param owner: the device's :class:`vmm.irq.IrqLine`; borrowed
    """
    cdef readonly Interrupt interrupt
    cdef Registers registers
    cdef readonly object mapping    # an mmap of one page: the registers as the driver reads them
    cdef uint8_t *page

    def __init__(self, owner):
        cdef int queue
        cdef uint8_t[::1] view
        self.mapping = mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        view = self.mapping
        self.page = &view[0]
        self.interrupt = Interrupt(owner)
        self.interrupt.page = self.mapping      # a device's thread may outlive this object
        self.interrupt.call.status = <uint32_t *>(self.page + VIRTIO_MMIO_INTERRUPT_STATUS)
        self.registers.call = &self.interrupt.call
        for queue in range(MAX_QUEUES):
            self.registers.notify[queue] = -1
        self.ctx = &self.registers
        self.access = access

    @property
    def page_address(self):
        """Host address of the page with the registers as the driver reads them; valid as long as this object."""
        return <uintptr_t>self.page

    @property
    def notified(self):
        """Number of QueueNotify writes that exited to user space because no ioeventfd took them; not exact."""
        return counter_read(&self.registers.notified)

    def show(self, uint32_t offset, uint32_t value):
        """Show `value` in the register at `offset` (bytes); InterruptStatus is ignored."""
        if offset <= PAGE - 4 and not offset & 3 and offset != VIRTIO_MMIO_INTERRUPT_STATUS:
            store32(<uint32_t *>(self.page + offset), value)

    def show_config(self, const uint8_t[::1] config):
        """Show `config` as the configuration space."""
        if 0 < config.shape[0] <= PAGE - VIRTIO_MMIO_CONFIG:
            memcpy(self.page + VIRTIO_MMIO_CONFIG, &config[0], config.shape[0])

    def queue_is(self, int index, int notify_fd):
        """Make a QueueNotify write for queue `index` signal that eventfd (borrowed); -1: Python handles the write."""
        if 0 <= index < MAX_QUEUES:
            flag_set(&self.registers.notify[index], notify_fd)
