# SPDX-License-Identifier: Apache-2.0
# FUSE operations on nodes.
from libc.stdint cimport int64_t, uint32_t, uint64_t

from virtio.fs._share cimport FuseThread
from virtio.fs._inodes cimport Node
from virtio.fs._table cimport Kind
from virtio.fs._fuse cimport fuse_in_header, fuse_open_out

cdef class NodeOperations(FuseThread):
    cdef int64_t open_node(self, Node *node, uint32_t wanted, bint kill, fuse_open_out *out) noexcept nogil
    cdef int64_t give_handle(self, fuse_open_out *out, int fd, Kind kind, Node *node, int flags,
                             uint32_t open_flags) noexcept nogil
    cdef int host_flags(self, uint32_t wanted) noexcept nogil
    cdef int64_t op_lookup(self, Node *node) noexcept nogil
    cdef int opened(self, Node *node, int flags) noexcept nogil
    cdef void changed(self, Node *node) noexcept nogil
    cdef void moved(self, Node *parent, const char *name) noexcept nogil
    cdef int64_t op_again(self, uint64_t nodeid, bint above) noexcept nogil
    cdef int64_t op_getattr(self, Node *node) noexcept nogil
    cdef int64_t op_setattr(self, Node *node, uint64_t nodeid) noexcept nogil
    cdef int64_t op_readlink(self, Node *node) noexcept nogil
    cdef bint has_descriptor(self, Node *node) noexcept nogil
    cdef int64_t op_make(self, Node *node, const fuse_in_header *h) noexcept nogil
    cdef bint victim(self, Node *parent, const char *name, Node **node) noexcept nogil
    cdef int64_t op_remove(self, Node *node, int flags) noexcept nogil
    cdef int64_t op_rename(self, Node *node, const fuse_in_header *h) noexcept nogil
    cdef int64_t op_link(self, Node *node) noexcept nogil
    cdef int64_t op_opendir(self, Node *node) noexcept nogil
    cdef int64_t op_create(self, Node *node, const fuse_in_header *h) noexcept nogil
    cdef int64_t op_statfs(self, Node *node) noexcept nogil
    cdef int64_t op_access(self, Node *node, const fuse_in_header *h) noexcept nogil
    cdef int64_t op_xattr(self, Node *node, uint32_t opcode) noexcept nogil
    cdef int64_t op_setupmapping(self, Node *node) noexcept nogil
    cdef int64_t op_syncfs(self, Node *node) noexcept nogil
    cdef int64_t sync_of(self, Node *node) noexcept nogil
    cdef int64_t on_node(self, const fuse_in_header *h) noexcept nogil
