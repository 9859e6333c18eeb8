# SPDX-License-Identifier: Apache-2.0
# What a guest of a share may name: its nodes (files by O_PATH descriptor) and handles (files that it has open).
from libc.stdint cimport uint32_t, uint64_t

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    int pthread_mutex_init(pthread_mutex_t *mutex, void *attributes)
    int pthread_mutex_lock(pthread_mutex_t *mutex)
    int pthread_mutex_unlock(pthread_mutex_t *mutex)

cdef enum:
    ROOT = 1                    # FUSE_ROOT_ID: never forgotten

cdef struct Node:
    int fd                      # O_PATH; nothing is ever done to a path but through it
    uint32_t type               # its S_IFMT bits, which no inode ever changes
    uint64_t dev                # with ino and mnt, what it is; fd keeps the kernel from giving ino to another
    uint64_t ino
    uint64_t mnt
    uint64_t nlookup            # how often the guest was told of it and has not forgotten
    uint32_t refs               # requests that use fd at this moment: it is closed when both are 0
    uint32_t generation         # upper half of its node id: an id is used once
    uint32_t index
    uint32_t next               # in its hash chain, or in the free list
    bint foreign                # no directory, and on another file system than the one that it was found in
    bint live

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
    bint synchronous            # a write waits for the disk (O_SYNC, O_DSYNC)
    pthread_mutex_t lock        # of fd's place: a directory is read by one thread at a time
    bint locked_once            # lock was initialised

cdef class Table:
    cdef pthread_mutex_t lock   # of all below; held for table work only, never for a system call
    cdef Node **node_chunks
    cdef Handle **handle_chunks
    cdef uint32_t *buckets
    cdef uint32_t n_buckets
    cdef uint32_t node_slots    # slots handed out at least once
    cdef uint32_t handle_slots
    cdef uint32_t free_node
    cdef uint32_t free_handle
    cdef readonly uint64_t nodes
    cdef readonly uint64_t handles

    # A pinned node: its fd stays open until node_put. NULL: the guest was not told of this id, or forgot it.
    cdef Node *node_get(self, uint64_t nodeid) noexcept nogil
    cdef void node_put(self, Node *node) noexcept nogil
    # The id of a known inode, looked up once more; 0: not known.
    cdef uint64_t node_find(self, uint64_t dev, uint64_t ino, uint64_t mnt) noexcept nogil
    # A pinned node from slot `index` on, a file or a directory, of none of `count` devices; NULL: there is none more.
    cdef Node *node_elsewhere(self, uint32_t index, const uint64_t *devices, uint32_t count) noexcept nogil
    cdef bint node_known(self, uint64_t dev, uint64_t ino, uint64_t mnt) noexcept nogil
    # The id of the inode behind `fd`, looked up once more; takes fd. 0: no room.
    cdef uint64_t node_add(self, int fd, uint32_t type, uint64_t dev, uint64_t ino, uint64_t mnt,
                           bint foreign) noexcept nogil
    cdef bint node_forget(self, uint64_t nodeid, uint64_t count) noexcept nogil     # False: more than it was told
    # A handle's id for the open `fd`, which it takes; 0: no room.
    cdef uint64_t handle_add(self, int fd, Kind kind, Node *node, bint synchronous) noexcept nogil
    cdef Handle *handle_get(self, uint64_t fh, uint64_t nodeid, Kind kind) noexcept nogil
    cdef void handle_put(self, Handle *handle) noexcept nogil
    cdef bint handle_release(self, uint64_t fh, uint64_t nodeid, Kind kind) noexcept nogil
    cdef void clear(self) noexcept nogil        # as if the guest had forgotten and released everything
    cdef void close_root(self) noexcept nogil   # after clear: nothing is left

    cdef Node *_node(self, uint32_t index) noexcept nogil
    cdef Handle *_handle(self, uint32_t index) noexcept nogil
    cdef uint32_t _bucket(self, uint64_t dev, uint64_t ino, uint64_t mnt) noexcept nogil
    cdef Node *_find(self, uint64_t dev, uint64_t ino, uint64_t mnt) noexcept nogil
    cdef void _grow(self) noexcept nogil
    cdef int _drop_node(self, Node *node) noexcept nogil
    cdef int _drop_handle(self, Handle *handle) noexcept nogil
