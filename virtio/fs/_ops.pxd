# SPDX-License-Identifier: Apache-2.0
# Executes the requests of a share. Every thread has its own Server.
from libc.stdint cimport int64_t, uint32_t, uint64_t

from virtio.fs._nodes cimport NodeOperations
from virtio.fs._table cimport Handle, Kind
from virtio.fs._fuse cimport fuse_in_header
from vmm._fastpath cimport DescChain

cdef enum:
    HAND_OVER = 0xffff_ffff

cdef class Server(NodeOperations):
    # Execute one request and write its reply. Returns the bytes written to the guest, for the used ring. HAND_OVER:
    # nothing was done, because the request would wait for the disk and may_wait is False.
    cdef uint32_t answer(self, const fuse_in_header *header, DescChain *chain) noexcept nogil
    cdef int64_t execute(self, const fuse_in_header *header, DescChain *chain) noexcept nogil
    cdef int64_t dispatch(self, const fuse_in_header *h, DescChain *chain) noexcept nogil
    cdef int64_t op_init(self) noexcept nogil
    cdef int64_t op_forget(self, uint64_t nodeid) noexcept nogil
    cdef int64_t op_batch_forget(self) noexcept nogil
    cdef int64_t op_removemapping(self) noexcept nogil
    cdef int64_t op_read(self, Handle *handle, DescChain *chain) noexcept nogil
    cdef int64_t op_write(self, Handle *handle, DescChain *chain) noexcept nogil
    cdef int64_t read_ahead(self, Handle *handle) noexcept nogil
    cdef int64_t op_readdir(self, Handle *handle, uint64_t nodeid, bint plus) noexcept nogil
    cdef Handle *handle_of(self, uint64_t fh, uint64_t nodeid, Kind kind, int access,
                           Handle *passing) noexcept nogil
    cdef void done_with(self, Handle *handle, Handle *passing) noexcept nogil
    cdef int write_flags(self, uint32_t wanted) noexcept nogil
    cdef void pay(self, uint64_t size) noexcept nogil
    cdef int64_t op_copy(self, Handle *handle) noexcept nogil
    cdef int64_t op_fallocate(self, Handle *handle) noexcept nogil
    cdef int64_t op_file(self, Handle *handle, const fuse_in_header *h) noexcept nogil
    cdef int64_t on_handle(self, const fuse_in_header *h, DescChain *chain) noexcept nogil

cdef bint is_slow(uint32_t opcode) noexcept nogil
cdef bint is_counted(uint32_t opcode) noexcept nogil
cdef uint64_t cost(uint32_t opcode, DescChain *chain) noexcept nogil
