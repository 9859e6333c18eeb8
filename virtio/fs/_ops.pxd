# SPDX-License-Identifier: Apache-2.0
# Executes the requests of a share.
from libc.stdint cimport uint32_t, uint64_t

from virtio.fs._fuse cimport fuse_in_header
from virtio.fs._share cimport FuseThread
from vmm._fastpath cimport DescChain

cdef enum:
    HAND_OVER = 0xffff_ffff

# Execute one request and write its reply. Returns the bytes written to the guest, for the used ring. HAND_OVER: nothing
# was done, because the request would wait for the disk and may_wait is False.
cdef uint32_t answer(FuseThread self, const fuse_in_header *header, DescChain *chain) noexcept nogil
cdef bint is_slow(uint32_t opcode) noexcept nogil
cdef bint is_counted(uint32_t opcode) noexcept nogil
cdef uint64_t cost(uint32_t opcode, DescChain *chain) noexcept nogil
