# SPDX-License-Identifier: Apache-2.0
# The virtio-mmio registers that vCPUs access without the GIL, and the page from which a guest reads all registers.
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from virtio._interrupt cimport MAX_QUEUES, Call, Interrupt
from vmm._bus cimport NativeDevice

cdef struct Registers:
    Call *call
    uint64_t notified           # QueueNotify writes that KVM's ioeventfd did not take; not exact (no lock)
    int[MAX_QUEUES] notify      # eventfd of each queue; borrowed; -1: the queue is not ready or does not exist; atomic


cdef class MmioRegisters(NativeDevice):
    cdef readonly Interrupt interrupt
    cdef Registers registers
    cdef object mapping         # an mmap of one page: the registers as the driver reads them
    cdef uint8_t *page
