# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""Interrupts from a device to its driver: an edge for each queue, and virtio-mmio's InterruptStatus."""
from libc.stdint cimport uint32_t

from vmm._sys cimport and32, eventfd_write, load32, or32, store32

cdef extern from "<linux/virtio_mmio.h>" nogil:
    enum: VIRTIO_MMIO_INT_VRING, VIRTIO_MMIO_INT_CONFIG


cdef void interrupt_used(Call *call, uint32_t queue) noexcept nogil:
    # Set the bit before the edge, so that the handler sees it. Send the edge even if the bit was already set: the
    # driver may acknowledge that bit after it has read its rings.
    or32(call.status, VIRTIO_MMIO_INT_VRING)
    eventfd_write(call.queue[queue], 1)


cdef class Interrupt:
    """Interrupts the driver of one device; safe from any thread.

    :param owner: a :class:`vmm.irq.IrqLine`, for every queue and for configuration changes; borrowed
    """

    def __cinit__(self, owner):
        cdef int queue
        self.owner = owner
        self.call.status = &self.no_status
        self.call.config = owner.fd
        for queue in range(MAX_QUEUES):
            self.call.queue[queue] = owner.fd

    def __call__(self, uint32_t queue=0):
        """Interrupt the driver because the used ring of `queue` has changed."""
        if queue < MAX_QUEUES:
            interrupt_used(&self.call, queue)

    def config(self):
        """Interrupt the driver because the configuration space or DEVICE_NEEDS_RESET has changed."""
        or32(self.call.status, VIRTIO_MMIO_INT_CONFIG)
        eventfd_write(self.call.config, 1)

    @property
    def status(self):
        """InterruptStatus as the driver reads it."""
        return load32(self.call.status)

    def acknowledge(self, uint32_t bits):
        """Clear `bits` of InterruptStatus, which the driver has acknowledged."""
        and32(self.call.status, ~bits)

    def restore(self, uint32_t status):
        """Set InterruptStatus to a saved value, without an interrupt."""
        store32(self.call.status, status & (VIRTIO_MMIO_INT_VRING | VIRTIO_MMIO_INT_CONFIG))
