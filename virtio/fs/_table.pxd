# SPDX-License-Identifier: Apache-2.0
# What a guest of a share may name: its nodes (files that it knows) and handles (files that it has open).
from libc.stdint cimport uint32_t, uint64_t

from virtio.fs._inodes cimport Inodes, Node, pthread_mutex_t

cdef enum Kind:
    FILE = 1
    DIRECTORY = 2

cdef struct Handle:
    int fd
    Kind kind
    uint64_t nodeid             # the node that was opened,
    Node *node                  # which this pins
    uint32_t refs
    uint32_t generation
    uint32_t index
    uint32_t next
    bint live
    bint open                   # the guest has not released it
    bint writes                 # fd may be read and written
    uint32_t before             # ring of a node's handles that can be read, those that write first; 0: of none
    uint32_t after
    bint synchronous            # a write waits for the disk (O_SYNC, O_DSYNC)
    pthread_mutex_t lock        # of fd's place: a directory is read by one thread at a time
    bint locked_once            # lock was initialised

cdef class Table(Inodes):
    cdef Handle **handle_chunks
    cdef uint32_t handle_slots  # handed out at least once
    cdef uint32_t free_handle
    cdef readonly uint64_t handles

    # A handle's id for the open `fd`, which it takes; 0: no room.
    cdef uint64_t handle_add(self, int fd, Kind kind, Node *node, int flags) noexcept nogil
    # A pinned handle of the node that can be read, and written if asked so; NULL: there is none.
    cdef Handle *handle_of(self, Node *node, bint writes) noexcept nogil
    cdef Handle *handle_get(self, uint64_t fh, uint64_t nodeid, Kind kind) noexcept nogil
    cdef void handle_put(self, Handle *handle) noexcept nogil
    cdef bint handle_release(self, uint64_t fh, uint64_t nodeid, Kind kind) noexcept nogil
    cdef void clear(self) noexcept nogil        # as if the guest had forgotten and released everything

    cdef Handle *_handle(self, uint32_t index) noexcept nogil
    cdef void _join(self, Handle *handle) noexcept nogil
    cdef void _part(self, Handle *handle) noexcept nogil
    cdef int _drop_handle(self, Handle *handle) noexcept nogil
