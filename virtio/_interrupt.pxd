# SPDX-License-Identifier: Apache-2.0
# Interrupts from a device to its driver, for every transport: from any thread, without the GIL.
from libc.stdint cimport uint32_t

cdef enum:
    MAX_QUEUES = 64

cdef struct Call:
    uint32_t *status            # InterruptStatus (§4.2.2); atomic: the device's threads set bits, vCPUs clear them
    int config                  # eventfd for configuration changes; borrowed
    int[MAX_QUEUES] queue       # eventfd of each queue; virtio-mmio uses one for all; borrowed

# Interrupt the driver because the used ring of `queue` has changed. Any thread.
cdef void interrupt_used(Call *call, uint32_t queue) noexcept nogil


cdef class Interrupt:
    cdef Call call
    cdef uint32_t no_status     # the target of `call.status` while the transport has no such register
    cdef object owner           # the IrqLine: keeps the eventfd open
    cdef object page            # keeps the memory behind `call.status` alive
