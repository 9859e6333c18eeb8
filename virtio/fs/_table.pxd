# SPDX-License-Identifier: Apache-2.0
# The table of a share: nodes (files that the guest knows) and handles (files that it has open).
from libc.stdint cimport uint32_t, uint64_t

from virtio.fs._inodes cimport Inodes, Node
from vmm._sys cimport pthread_mutex_t

cdef enum Kind:
    FILE = 1
    DIRECTORY = 2

cdef struct Handle:
    int fd
    Kind kind
    uint64_t nodeid             # id of the node that was opened
    Node *node                  # that node, pinned by this handle
    uint32_t refs
    uint32_t generation
    uint32_t index
    uint32_t next
    bint live
    bint open                   # the guest has not released it
    bint writes                 # fd is open for reading and writing
    uint32_t before             # ring of the node's readable handles, writable ones first; 0: in no ring
    uint32_t after
    bint synchronous            # writes wait for the disk (O_SYNC, O_DSYNC)
    pthread_mutex_t lock        # guards fd's offset: one thread at a time reads a directory
    bint locked_once            # `lock` is initialised

cdef class Table(Inodes):
    cdef Handle **handle_chunks
    cdef uint32_t handle_slots  # number of slots used at least once
    cdef uint32_t free_handle
    cdef uint64_t handles       # a counter

    # Add a handle for `fd`, which this takes over. Returns its id, or 0 if there is no room.
    cdef uint64_t handle_add(self, int fd, Kind kind, Node *node, int flags) noexcept nogil
    # The memory of slot `index`, whether it is in use or not; NULL: there is none for it.
    cdef Handle *handle_slot(self, uint32_t index) noexcept nogil
    # Open a handle whose index and generation are set, for `fd`, which this takes over.
    cdef void handle_open(self, Handle *handle, int fd, Kind kind, Node *node, int flags) noexcept nogil
    # Return, pinned, a readable handle of the node, also writable if `writes`; or NULL.
    cdef Handle *handle_of(self, Node *node, bint writes) noexcept nogil
    cdef Handle *handle_get(self, uint64_t fh, uint64_t nodeid, Kind kind) noexcept nogil
    cdef void handle_put(self, Handle *handle) noexcept nogil
    cdef bint handle_release(self, uint64_t fh, uint64_t nodeid, Kind kind) noexcept nogil
    cdef void clear(self) noexcept nogil        # drop all handles and nodes

    cdef Handle *_handle(self, uint32_t index) noexcept nogil
    cdef void _join(self, Handle *handle) noexcept nogil
    cdef void _part(self, Handle *handle) noexcept nogil
    cdef void _release(self, Handle *handle) noexcept nogil
