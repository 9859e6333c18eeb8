# SPDX-License-Identifier: Apache-2.0
# virtio-mmio registers that vCPUs reach without the GIL, and the page in which a guest reads all of them.
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from virtio._interrupt cimport MAX_QUEUES, Call, Interrupt
from vmm._bus cimport NativeDevice

cdef struct Registers:
    Call *call
    uint64_t notified           # writes to QueueNotify that met us, not KVM's ioeventfd; written without a lock
    int[MAX_QUEUES] notify      # eventfd by queue; -1: not ready, or no such queue


cdef class MmioRegisters(NativeDevice):
    cdef readonly Interrupt interrupt
    cdef Registers registers
    cdef object mapping         # an mmap of one page: the registers as the driver reads them
    cdef uint8_t *page
