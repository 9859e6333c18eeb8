# SPDX-License-Identifier: Apache-2.0
# The inode table of a share: the files that the guest knows, each by an O_PATH descriptor or by directory and name.
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from virtio.fs._host cimport statx
from vmm._budget cimport Purpose
from vmm._sys cimport pthread_mutex_t

cdef enum:
    ROOT = 1                    # FUSE_ROOT_ID; this node is never forgotten
    MASK = 0x1fff               # for statx: STATX_BASIC_STATS | STATX_BTIME | STATX_MNT_ID
    CHUNK_BITS = 9              # slots are in chunks of 512
    CHUNK = 1 << CHUNK_BITS
    CHUNKS = 8192               # most of them: 4 million nodes

# What a node and a handle begin with. Index and generation are its id, so that an id is never used again.
cdef struct Slot:
    uint32_t index
    uint32_t generation
    uint32_t next               # next slot in the free list; of a node, also next one in its hash chain
    bint live

# Slots of one kind. They never move.
cdef struct Slots:
    uint8_t **chunks
    size_t size                 # bytes of a slot
    uint32_t count              # number of slots used at least once, and 1: no index, and so no id, is 0
    uint32_t free

cdef struct Node:
    Slot slot
    int fd                      # O_PATH; every operation goes through it. -1: closed, opened again when needed
    uint32_t type               # S_IFMT bits; an inode's type never changes
    uint64_t dev                # dev, ino and mnt identify the inode. An open fd keeps the kernel from reusing ino
    uint64_t ino
    uint64_t mnt
    uint64_t btime              # creation time, which detects a reused ino while fd is closed; 0: unknown
    uint64_t parent             # id of the directory in which it was last found
    char *name                  # its name there, for opening it again; owned; NULL: it cannot be opened again
    uint64_t nlookup            # FUSE look-up count: replies that named it, less FORGETs
    uint32_t refs               # requests that use fd now, and open handles; fd stays open while not 0
    uint32_t opened             # its first open handle that can be read; 0: none
    uint32_t listings           # atomic: how often a listing of this directory was begun
    bint hashed                 # it is in a hash chain, so a look-up can find it
    bint recent                 # it was used since the clock hand last passed it
    bint ghost                  # the guest has forgotten it, but may have a file handle (as knfsd) with its id
    bint overlay                # it is on an overlayfs, where copy-up changes an inode's identity
    bint foreign                # not a directory, and on another file system than its parent

cdef class Inodes:
    cdef pthread_mutex_t lock   # guards all fields below; never held during a system call
    cdef Slots node_slots
    cdef uint32_t *buckets
    cdef uint32_t n_buckets
    cdef uint32_t clock_hand    # the node to check next when descriptors run out
    cdef void *after            # the next table of the process, whose unused descriptors any thread may close: a ring
    cdef uint32_t ghost_hand    # the node to check next when there are too many ghosts
    cdef uint32_t ghosts
    cdef uint64_t nodes         # a counter
    cdef uint64_t reopened      # number of descriptors opened again

    # Return the node, pinned: its fd stays open until node_put. Otherwise NULL and errno. ESTALE: the guest never knew
    # this id or has forgotten it, or the file is no longer where it was. ENFILE: no descriptor is left to open it
    # again.
    cdef Node *node_get(self, uint64_t nodeid) noexcept nogil
    # The same, and also for a forgotten node whose id is in a file handle. Counts as a look-up.
    cdef Node *node_recall(self, uint64_t nodeid) noexcept nogil
    cdef void node_put(self, Node *node) noexcept nogil
    # Look up the node that `st` describes, found as `name` in `parent`, and count the look-up. Returns its id; 0:
    # unknown.
    cdef uint64_t node_find(self, const statx *st, const Node *parent, const char *name) noexcept nogil
    # The same, but add the node if it is unknown. Takes over `fd`. `name` NULL: the file has no name. `alone`: always
    # add a new node. Returns 0 if there is no room.
    cdef uint64_t node_add(self, int fd, const statx *st, const Node *parent, const char *name,
                           bint overlay, bint alone) noexcept nogil
    # Iterate over the nodes with the identity in `st`: returns the next one after `before`, pinned, or NULL. Unpins
    # `before`; NULL: start.
    cdef Node *node_twin(self, const statx *st, Node *before) noexcept nogil
    # Count a look-up of a pinned node, which is `name` in `parent` now; NULL: its name stays. Returns its id.
    cdef uint64_t count_lookup(self, Node *node, const Node *parent, const char *name) noexcept nogil
    # Give a pinned node the identity in `st`, after an overlayfs copy-up.
    cdef void set_identity(self, Node *node, const statx *st) noexcept nogil
    cdef bint node_known(self, uint64_t dev, uint64_t ino, uint64_t mnt) noexcept nogil
    # Return, pinned, the first file or directory from slot `index` on that is on none of the `count` devices; or NULL.
    cdef Node *node_on_other_device(self, uint32_t index, const uint64_t *devices, uint32_t count) noexcept nogil
    # The guest has renamed the file that `st` describes: it is `name` in `parent` now.
    cdef void node_moved(self, const statx *st, const Node *parent, const char *name) noexcept nogil
    # Return the id of the node that `st` describes; 0: the guest does not know it.
    cdef uint64_t node_id(self, const statx *st) noexcept nogil
    # The file has lost this name. Was it the one that the node has, its descriptor stays open while the guest knows it.
    cdef void node_unnamed(self, Node *node, const Node *parent, const char *name) noexcept nogil
    cdef bint node_forget(self, uint64_t nodeid, uint64_t count) noexcept nogil     # False: more than its look-up count
    # Free the memory of slots. No node but the root is live.
    cdef void shrink(self) noexcept nogil
    # Remember the node's name in its directory, of `length` bytes.
    cdef void set_name(self, Node *node, const char *name, uint64_t length) noexcept nogil

    cdef void _hash(self, Node *node) noexcept nogil
    cdef void _grow(self) noexcept nogil
    cdef int _drop(self, Node *node) noexcept nogil
    cdef Node *_pin(self, uint64_t nodeid, bint ghosts) noexcept nogil
    cdef int _open_again(self, Node *node) noexcept nogil

cdef inline Slot *slot_at(const Slots *slots, uint32_t index) noexcept nogil:
    return <Slot *>(slots.chunks[index >> CHUNK_BITS] + (index & (CHUNK - 1)) * slots.size)

cdef inline Slot *slot_of(const Slots *slots, uint64_t number) noexcept nogil:
    # The live slot with this id; NULL: there is none any more.
    cdef Slot *slot
    if not 0 < <uint32_t>number < slots.count:
        return NULL
    slot = slot_at(slots, <uint32_t>number)
    return slot if slot.live and slot.generation == number >> 32 else NULL

cdef inline uint64_t id_of(const Slot *slot) noexcept nogil:
    return <uint64_t>slot.generation << 32 | slot.index

cdef inline Node *node_at(Inodes table, uint32_t index) noexcept nogil:
    return <Node *>slot_at(&table.node_slots, index)

# The table's lock is held for these, or no thread has it yet.
cdef bint slots_begin(Slots *slots, size_t size) noexcept nogil     # False: there is no memory
cdef Slot *slot_take(Slots *slots) noexcept nogil       # a free one, live from here on; NULL: there is no memory
cdef void slot_give(Slots *slots, Slot *slot) noexcept nogil
# Add free slots of this generation up to `until`. False: there is no memory for them.
cdef bint slots_skip(Slots *slots, uint32_t until, uint32_t generation) noexcept nogil
# The slot after all that were used, with this generation; not live yet. NULL: there is no memory.
cdef Slot *slot_added(Slots *slots, uint32_t generation) noexcept nogil
# Forget all slots but the first ones. 0: free the rest, too.
cdef void slots_keep(Slots *slots, uint32_t count) noexcept nogil
# Unlock, and then close the descriptor, if it is one: no lock is held during a close.
cdef void unlock_and_close(pthread_mutex_t *lock, int fd) noexcept nogil
cdef uint64_t device_of(const statx *st) noexcept nogil
# Close some unused node descriptors, in any share. Returns False if there were none.
cdef bint make_room() noexcept nogil
# openat(2) on behalf of a guest, with room made if no descriptor is left. Returns -1 and errno; ENFILE: still none.
cdef int open_granted(int dirfd, const char *path, int flags, Purpose purpose) noexcept nogil
