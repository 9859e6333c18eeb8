# SPDX-License-Identifier: Apache-2.0
# How a device tells its driver, whatever the transport: one call a queue, from any thread, without the GIL.
from libc.stdint cimport uint32_t

cdef enum:
    MAX_QUEUES = 64

cdef struct Call:
    uint32_t *status            # InterruptStatus (§4.2.2); atomic: the device's threads set bits, vCPUs clear them
    int config                  # eventfd for a change of the configuration space; not owned
    int[MAX_QUEUES] queue       # eventfd by queue; virtio-mmio has one for all; not owned

# Tell the driver that the used ring of `queue` has changed; any thread.
cdef void interrupt_used(Call *call, uint32_t queue) noexcept nogil


cdef class Interrupt:
    cdef Call call
    cdef uint32_t no_status     # what `call.status` points at until a transport has a register for it
    cdef object owner           # the IrqLine: keeps the eventfd open
    cdef object page            # what `call.status` points into
