# SPDX-License-Identifier: Apache-2.0
# The inode table of a share: what the guest knows of, by O_PATH descriptor, or by directory and name.
from libc.stdint cimport uint32_t, uint64_t

from virtio.fs._host cimport statx
from vmm._budget cimport Budget

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    int pthread_mutex_init(pthread_mutex_t *mutex, void *attributes)
    int pthread_mutex_lock(pthread_mutex_t *mutex)
    int pthread_mutex_unlock(pthread_mutex_t *mutex)

cdef enum:
    ROOT = 1                    # FUSE_ROOT_ID: never forgotten
    MASK = 0x1fff               # of statx: STATX_BASIC_STATS | STATX_BTIME | STATX_MNT_ID

cdef struct Node:
    int fd                      # O_PATH; nothing is ever done to a path but through it. -1: closed, to be opened again
    uint32_t type               # its S_IFMT bits, which no inode ever changes
    uint64_t dev                # with ino and mnt, what it is; fd keeps the kernel from giving ino to another,
    uint64_t ino
    uint64_t mnt
    uint64_t btime              # and without fd the time when it was made tells; 0: the host does not know that
    uint64_t parent             # id of the directory where it was found last,
    char *name                  # and its name there, by which it is opened again; NULL: it has none
    uint64_t nlookup            # how often the guest was told of it and has not forgotten
    uint32_t refs               # requests that use fd at this moment, and open handles: fd stays
    uint32_t generation         # upper half of its node id: an id is used once
    uint32_t index
    uint32_t next               # in its hash chain, or in the free list
    uint32_t opened             # the first of its open handles that can be read, 0: there is none
    bint hashed                 # it is in a chain: a look-up may find it
    bint recent                 # it was used since the clock's hand came by
    bint ghost                  # the guest has forgotten it, but may have a file handle (knfsd's) with its id
    bint overlay                # it is on an overlayfs, whose inodes change what they are at copy-up
    bint foreign                # no directory, and on another file system than the one that it was found in
    bint live

# Of all shares of the process those that descriptors may be taken from: a table's own fields, for any thread.
cdef struct Clock:
    pthread_mutex_t *lock
    Node **chunks
    uint32_t *slots
    uint32_t hand               # the node that is looked at next
    Clock *next

cdef class Inodes:
    cdef pthread_mutex_t lock   # of all below; held for table work only, never for a system call
    cdef Node **node_chunks
    cdef uint32_t *buckets
    cdef uint32_t n_buckets
    cdef uint32_t node_slots    # slots handed out at least once
    cdef uint32_t free_node
    cdef Clock clock
    cdef uint32_t ghost_hand    # the node that is looked at next when ghosts are too many
    cdef uint32_t ghosts
    cdef Budget memory          # of the process, for nodes and their names
    cdef uint64_t charged       # bytes of it that are this table's
    cdef readonly uint64_t nodes
    cdef readonly uint64_t reopened     # times that a descriptor had to be opened again

    # A pinned node: it has fd until node_put. NULL, errno ESTALE: the guest was not told of this id, or forgot it, or
    # it is no longer where it was; ENFILE: no descriptor is left to open it again.
    cdef Node *node_get(self, uint64_t nodeid) noexcept nogil
    cdef Node *node_recall(self, uint64_t nodeid) noexcept nogil       # the same of one that is only in a file handle
    cdef void node_put(self, Node *node) noexcept nogil
    # The id of what `st` is, found as `name` of `parent`, looked up once more; 0: not known.
    cdef uint64_t node_find(self, const statx *st, const Node *parent, const char *name) noexcept nogil
    # The same of what is behind `fd`, which this takes; `name` NULL: it has none. `alone`: a new one in any case. 0: no
    # room.
    cdef uint64_t node_add(self, int fd, const statx *st, const Node *parent, const char *name,
                           bint overlay, bint alone) noexcept nogil
    # The next pinned node that says it is what `st` says, after the pinned `before`, which this puts; NULL: none more.
    cdef Node *node_twin(self, const statx *st, Node *before) noexcept nogil
    # The id of a pinned node, looked up once more.
    cdef uint64_t node_told(self, Node *node) noexcept nogil
    # A pinned node is what `st` says now: it was copied up.
    cdef void node_became(self, Node *node, const statx *st) noexcept nogil
    cdef bint node_known(self, uint64_t dev, uint64_t ino, uint64_t mnt) noexcept nogil
    # A pinned node from slot `index` on, a file or a directory, of none of `count` devices; NULL: there is none more.
    cdef Node *node_elsewhere(self, uint32_t index, const uint64_t *devices, uint32_t count) noexcept nogil
    # What `st` is is `name` of `parent` now: the guest has renamed it.
    cdef void node_moved(self, const statx *st, const Node *parent, const char *name) noexcept nogil
    # The id of what `st` is, if the guest knows it; 0: it does not.
    cdef uint64_t node_id(self, const statx *st) noexcept nogil
    # It has lost its name: while the guest knows it, its descriptor is the only way to it.
    cdef void node_unnamed(self, Node *node) noexcept nogil
    cdef bint node_forget(self, uint64_t nodeid, uint64_t count) noexcept nogil     # False: more than it was told
    cdef void clear_nodes(self) noexcept nogil
    cdef void close_root(self) noexcept nogil   # after clear: nothing is left

    cdef void _enter_ring(self) noexcept nogil
    cdef void _leave_ring(self) noexcept nogil
    cdef Node *_node(self, uint32_t index) noexcept nogil
    cdef Node *_new(self) noexcept nogil
    cdef uint32_t _bucket(self, uint64_t dev, uint64_t ino, uint64_t mnt) noexcept nogil
    cdef Node *_find(self, uint64_t dev, uint64_t ino, uint64_t mnt) noexcept nogil
    cdef Node *_same(self, const statx *st) noexcept nogil
    cdef void _hash(self, Node *node) noexcept nogil
    cdef void _unhash(self, Node *node) noexcept nogil
    cdef void _grow(self) noexcept nogil
    cdef void _rename(self, Node *node, const Node *parent, const char *name) noexcept nogil
    cdef void _forget_name(self, Node *node) noexcept nogil
    cdef uint64_t _told(self, Node *node) noexcept nogil
    cdef int _let_go(self, Node *node) noexcept nogil
    cdef int _drop(self, Node *node) noexcept nogil
    cdef void _lay_ghosts(self) noexcept nogil
    cdef Node *_pin(self, uint64_t nodeid, bint ghosts) noexcept nogil
    cdef int _open_again(self, Node *node) noexcept nogil
    cdef int _open_child(self, Node *parent, Node *node) noexcept nogil

cdef uint64_t device_of(const statx *st) noexcept nogil
# Close descriptors of nodes of any share that are not in use; False: none could be.
cdef bint make_room() noexcept nogil
