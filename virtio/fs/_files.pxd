# SPDX-License-Identifier: Apache-2.0
# FUSE operations on open files and directories.
from libc.stdint cimport int64_t, uint32_t, uint64_t

from virtio.fs._nodes cimport NodeOperations
from virtio.fs._table cimport Handle, Kind
from virtio.fs._fuse cimport fuse_in_header
from vmm._fastpath cimport DescChain

cdef class FileOperations(NodeOperations):
    cdef int64_t op_read(self, Handle *handle, DescChain *chain) noexcept nogil
    cdef int64_t op_write(self, Handle *handle, DescChain *chain) noexcept nogil
    cdef int64_t read_ahead(self, Handle *handle) noexcept nogil
    cdef int64_t op_readdir(self, Handle *handle, uint64_t nodeid, bint plus) noexcept nogil
    cdef Handle *handle_of(self, uint64_t fh, uint64_t nodeid, Kind kind, int access,
                           Handle *passing) noexcept nogil
    cdef void done_with(self, Handle *handle, Handle *passing) noexcept nogil
    cdef int write_flags(self, uint32_t wanted) noexcept nogil
    cdef int64_t op_copy(self, Handle *handle) noexcept nogil
    cdef int64_t op_fallocate(self, Handle *handle) noexcept nogil
    cdef int64_t op_file(self, Handle *handle, const fuse_in_header *h) noexcept nogil
    cdef int64_t on_handle(self, const fuse_in_header *h, DescChain *chain) noexcept nogil
