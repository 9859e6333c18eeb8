# SPDX-License-Identifier: Apache-2.0
# What the transport, a vCPU and a device's own thread share without the GIL: the interrupt and the notifications.
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from vmm._bus cimport NativeDevice

cdef enum:
    MAX_QUEUES = 64

cdef struct Line:
    uint32_t *status            # InterruptStatus (§4.2.2); atomic: the device's threads set bits, vCPUs clear them
    int irq                     # eventfd of the interrupt line; not owned
    uint64_t notified           # writes to QueueNotify that met us, not KVM's ioeventfd; written without a lock
    int[MAX_QUEUES] notify      # eventfd by queue; -1: not ready, or no such queue

# Tell the driver that a used ring has changed; any thread.
cdef void interrupt_used(Line *line) noexcept nogil


cdef class Interrupt:
    cdef Line line
    cdef object owner           # the IrqLine: keeps the eventfd open
    cdef object mapping         # an mmap of one page: the registers as the driver reads them
    cdef uint8_t *page


cdef class MmioRegisters(NativeDevice):
    cdef readonly Interrupt interrupt
