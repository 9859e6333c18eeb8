# SPDX-License-Identifier: Apache-2.0
# FUSE operations on nodes.
from libc.stdint cimport int64_t

from virtio.fs._fuse cimport fuse_in_header
from virtio.fs._inodes cimport Node
from virtio.fs._share cimport FuseThread

# Execute the request in `self`, an operation on the node `h.nodeid`. Returns the reply's size or -errno.
cdef int64_t on_node(FuseThread self, const fuse_in_header *h) noexcept nogil
# Open the node for reading or writing. Returns the descriptor, owned by the caller, or -1 and errno.
cdef int open_fd(FuseThread self, Node *node, int flags) noexcept nogil
