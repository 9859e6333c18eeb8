# SPDX-License-Identifier: Apache-2.0
# The table of a share: nodes (files that the guest knows) and handles (files that it has open).
from libc.stdint cimport uint32_t, uint64_t

from virtio.fs._inodes cimport Inodes, Node, Slot, Slots, slot_at
from vmm._sys cimport pthread_mutex_t

cdef struct Handle:
    Slot slot
    int fd
    Node *node                  # a regular file or a directory, pinned by this handle
    uint32_t refs
    bint open                   # the guest has not released it
    bint writes                 # fd is open for reading and writing
    uint32_t before             # ring of the node's readable handles, writable ones first; 0: in no ring
    uint32_t after
    bint synchronous            # writes wait for the disk (O_SYNC, O_DSYNC)
    pthread_mutex_t lock        # guards fd's offset: one thread at a time reads a directory
    bint locked_once            # `lock` is initialised

cdef class Table(Inodes):
    cdef Slots handle_slots
    cdef uint64_t handles       # a counter

    # Add a handle for `fd`, which this takes over. Returns its id, or 0 if there is no room.
    cdef uint64_t handle_add(self, int fd, Node *node, int flags) noexcept nogil
    # Open a handle whose slot is set, for `fd`, which this takes over.
    cdef void handle_open(self, Handle *handle, int fd, Node *node, int flags) noexcept nogil
    # Return, pinned, a readable handle of the node, also writable if `writes`; or NULL.
    cdef Handle *handle_of(self, Node *node, bint writes) noexcept nogil
    # Return the guest's handle, pinned, if it is of that node and of a file of that type (S_IFREG, S_IFDIR); or NULL.
    cdef Handle *handle_get(self, uint64_t fh, uint64_t nodeid, uint32_t type) noexcept nogil
    cdef void handle_put(self, Handle *handle) noexcept nogil
    cdef bint handle_release(self, uint64_t fh, uint64_t nodeid, uint32_t type) noexcept nogil
    cdef void clear(self) noexcept nogil        # drop all handles and nodes

cdef inline Handle *handle_at(Table table, uint32_t index) noexcept nogil:
    return <Handle *>slot_at(&table.handle_slots, index)
