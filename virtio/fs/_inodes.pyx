# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""The inode table of a share: the only way from a guest's node id to a host file.

A node is an O_PATH descriptor, so it refers to the same file whatever is renamed, mounted or put in its place. A node
id is an index and the generation of its slot, so a stale or invented id finds nothing.

A Linux guest keeps the nodes that it has looked up as long as it has memory, but the host's descriptors are few. When
they run out, descriptors that were not used recently are closed, and opened again when needed: by the same name in the
same directory, never through a symbolic link. The inode must be the same by device, mount, number and creation time. If
it is not, the guest gets ESTALE and looks the path up again. File handles (open_by_handle_at) would need no name, but
CAP_DAC_READ_SEARCH, which ordinary users lack and which would defeat a jail.
"""
from libc.errno cimport ENFILE, ESTALE, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, strcmp, strlen

from virtio.fs._host cimport *
from vmm._budget cimport FOR_LOOKUP, Budget, Purpose, granted
from vmm._sys cimport (
    counter_add, flag_read, flag_set, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock, set_errno,
)

from vmm.budget import memory

cdef Budget heap = memory       # for slots and names, bytes

cdef enum:
    BATCH = 64                  # descriptors closed at once
    STEPS = 1 << 17             # most nodes checked to find them
    DEPTH = 512                 # most closed directories above a node that is opened again
    GHOSTS = 1 << 16
    NAME_SIZE = 256             # bytes of a name with its NUL; longer names (on some file systems) are not kept


cdef uint64_t device_of(const statx *st) noexcept nogil:
    return <uint64_t>st.stx_dev_major << 32 | st.stx_dev_minor

cdef uint64_t btime_of(const statx *st) noexcept nogil:
    return <uint64_t>st.stx_btime.tv_sec * 1000000000 + st.stx_btime.tv_nsec if st.stx_mask & STATX_BTIME else 0

cdef bint other_time(const Node *node, const statx *st) noexcept nogil:
    # Whether the inode was made at another time than the node's. A directory of an overlayfs gets another time when it
    # is copied up, as by a change of any file below it.
    return node.btime != btime_of(st) and not (node.overlay and node.type == S_IFDIR)

# Slots

cdef bint slots_begin(Slots *slots, size_t size) noexcept nogil:
    slots.size, slots.count = size, 1
    slots.chunks = <uint8_t **>calloc(CHUNKS, sizeof(uint8_t *))
    return slots.chunks != NULL

cdef Slot *slot_added(Slots *slots, uint32_t generation) noexcept nogil:
    cdef uint64_t size = CHUNK * slots.size
    cdef uint8_t **chunk = &slots.chunks[slots.count >> CHUNK_BITS]
    cdef Slot *slot
    if slots.count >= <uint32_t>CHUNK * CHUNKS:
        return NULL                 # by then the guest's own caches are a hundred times as large
    if chunk[0] == NULL:
        if not heap.take(size):
            return NULL
        chunk[0] = <uint8_t *>calloc(CHUNK, slots.size)
        if chunk[0] == NULL:
            heap.give(size)
            return NULL
    slot = slot_at(slots, slots.count)
    slot.index, slot.generation = slots.count, generation
    slots.count += 1
    return slot

cdef Slot *slot_take(Slots *slots) noexcept nogil:
    cdef Slot *slot
    if slots.free:
        slot = slot_at(slots, slots.free)
        slots.free = slot.next
        slot.generation += 1
    else:
        slot = slot_added(slots, 0)
    if slot != NULL:
        slot.live = True
    return slot

cdef void slot_give(Slots *slots, Slot *slot) noexcept nogil:
    slot.live = False
    slot.next = slots.free
    slots.free = slot.index

cdef bint slots_skip(Slots *slots, uint32_t until, uint32_t generation) noexcept nogil:
    cdef Slot *slot
    while slots.count < until:
        slot = slot_added(slots, generation)
        if slot == NULL:
            return False
        slot_give(slots, slot)
    return True

cdef void slots_keep(Slots *slots, uint32_t count) noexcept nogil:
    cdef uint32_t i
    if slots.chunks == NULL:
        return
    for i in range(count != 0, <uint32_t>CHUNKS):
        if slots.chunks[i] != NULL:
            free(slots.chunks[i])
            slots.chunks[i] = NULL
            heap.give(CHUNK * slots.size)
    slots.count, slots.free = count, 0
    if count == 0:
        free(slots.chunks)
        slots.chunks = NULL

cdef void unlock_and_close(pthread_mutex_t *lock, int fd) noexcept nogil:
    pthread_mutex_unlock(lock)
    if fd >= 0:
        close(fd)

cdef pthread_mutex_t ring_lock
cdef void *ring = NULL          # the Inodes that gives up descriptors next; all of the process are in a ring
pthread_mutex_init(&ring_lock, NULL)

cdef void enter_ring(Inodes self) noexcept nogil:
    global ring
    pthread_mutex_lock(&ring_lock)
    if ring == NULL:
        ring = self.after = <void *>self
    self.after, (<Inodes>ring).after = (<Inodes>ring).after, <void *>self
    pthread_mutex_unlock(&ring_lock)

cdef void leave_ring(Inodes self) noexcept nogil:
    global ring
    cdef void *before = <void *>self
    pthread_mutex_lock(&ring_lock)
    if self.after != NULL:
        while (<Inodes>before).after != <void *>self:
            before = (<Inodes>before).after
        (<Inodes>before).after = self.after
        if ring == <void *>self:
            ring = before if before != <void *>self else NULL
    pthread_mutex_unlock(&ring_lock)

cdef bint make_room() noexcept nogil:
    global ring
    cdef uint32_t count = 0
    cdef void *first
    pthread_mutex_lock(&ring_lock)
    first = ring
    while first != NULL:
        count = close_some(<Inodes>ring)
        ring = (<Inodes>ring).after
        if count or ring == first:
            break
    pthread_mutex_unlock(&ring_lock)
    return count != 0

cdef int open_granted(int dirfd, const char *path, int flags, Purpose purpose) noexcept nogil:
    cdef int fd = granted(openat(dirfd, path, flags), purpose)
    if fd < 0 and errno == ENFILE and make_room():
        fd = granted(openat(dirfd, path, flags), purpose)
    return fd


cdef uint32_t bucket_of(Inodes self, uint64_t dev, uint64_t ino, uint64_t mnt) noexcept nogil:
    cdef uint64_t mixed = (ino ^ (dev << 32 | dev >> 32) ^ mnt << 17) * <uint64_t>0x9e3779b97f4a7c15
    return <uint32_t>(mixed >> 32) & (self.n_buckets - 1)

cdef Node *find(Inodes self, uint64_t dev, uint64_t ino, uint64_t mnt, const Node *before) noexcept nogil:
    # The node with this identity, or the next one after `before`, which is in a hash chain.
    cdef uint32_t index = self.buckets[bucket_of(self, dev, ino, mnt)] if before == NULL else before.slot.next
    cdef Node *node
    while index:
        node = node_at(self, index)
        if node.ino == ino and node.dev == dev and node.mnt == mnt:
            return node
        index = node.slot.next
    return NULL

cdef Node *find_same(Inodes self, const statx *st) noexcept nogil:
    cdef Node *node = find(self, device_of(st), st.stx_ino, st.stx_mnt_id, NULL)
    if node != NULL and node.fd < 0 and other_time(node, st):
        unhash(self, node)      # the inode number was reused: this node's file is gone
        return NULL
    if node != NULL:
        node.btime = btime_of(st)       # on an overlayfs it may have been copied up since
    return node

cdef void unhash(Inodes self, Node *node) noexcept nogil:
    cdef uint32_t *link = &self.buckets[bucket_of(self, node.dev, node.ino, node.mnt)]
    if not node.hashed:
        return
    while link[0] != node.slot.index:
        link = &node_at(self, link[0]).slot.next
    link[0] = node.slot.next
    node.hashed = False

cdef uint64_t counted(Inodes self, Node *node) noexcept nogil:
    # Count a look-up. Returns the node's id.
    if node.ghost:
        node.ghost = False
        self.ghosts -= 1
        counter_add(&self.nodes, 1)
    node.nlookup += 1
    node.recent = True
    return id_of(&node.slot)

cdef void rename(Inodes self, Node *node, const Node *parent, const char *name) noexcept nogil:
    # Remember the node's directory and name. Without memory for the name its descriptor stays open.
    if parent == NULL or name == NULL:
        return
    node.parent = id_of(&parent.slot)
    if node.name == NULL or strcmp(node.name, name) != 0:
        self.set_name(node, name, strlen(name))

cdef void forget_name(Node *node) noexcept nogil:
    if node.name != NULL:
        heap.give(strlen(node.name) + 1)
        free(node.name)
        node.name = NULL

cdef Node *opened(Inodes self, Node *node) noexcept nogil:
    # The pinned node with its descriptor, opened again if it was closed. NULL if it is NULL, or cannot be opened.
    cdef int error = ESTALE
    if node != NULL:
        error = self._open_again(node) if flag_read(&node.fd) < 0 else 0
        if error:
            self.node_put(node)
            node = NULL
    if node == NULL:
        set_errno(error)
    return node

cdef int open_child(Inodes self, Node *parent, Node *node) noexcept nogil:
    cdef char[NAME_SIZE] name
    cdef statx st
    cdef int fd
    pthread_mutex_lock(&self.lock)
    name[0] = 0
    if node.name != NULL:
        memcpy(name, node.name, strlen(node.name) + 1)
    pthread_mutex_unlock(&self.lock)
    if name[0] == 0:
        return ESTALE
    fd = open_granted(parent.fd, name, O_PATH | O_NOFOLLOW | O_CLOEXEC, FOR_LOOKUP)
    if fd < 0:
        return ENFILE if errno == ENFILE else ESTALE
    if statx_call(fd, b"", AT_EMPTY_PATH, MASK, &st) < 0 or device_of(&st) != node.dev or st.stx_ino != node.ino \
            or st.stx_mode & S_IFMT != node.type or st.stx_mnt_id != node.mnt or other_time(node, &st):
        close(fd)
        return ESTALE
    pthread_mutex_lock(&self.lock)
    counter_add(&self.reopened, 1)
    if node.fd < 0:
        flag_set(&node.fd, fd)
        fd = -1
    unlock_and_close(&self.lock, fd)
    return 0

cdef uint32_t close_some(Inodes self) noexcept nogil:
    # Close descriptors that were not used since the clock hand last passed them. Returns their number.
    cdef int[BATCH] fds
    cdef uint32_t count = 0, steps = 0, i
    cdef Node *node
    pthread_mutex_lock(&self.lock)
    while count < BATCH and steps < STEPS and steps < 2 * self.node_slots.count:
        steps += 1
        self.clock_hand += 1
        if self.clock_hand >= self.node_slots.count:
            self.clock_hand = ROOT
        node = node_at(self, self.clock_hand)
        if not node.slot.live or node.fd < 0 or node.refs or node.name == NULL or node.btime == 0:
            continue
        if node.recent:
            node.recent = False
            continue
        fds[count] = node.fd
        node.fd = -1
        count += 1
    pthread_mutex_unlock(&self.lock)
    for i in range(count):
        close(fds[i])
    return count

cdef int let_go(Inodes self, Node *node) noexcept nogil:
    # The guest has forgotten the node. Returns its descriptor, for the caller to close. The latest GHOSTS such
    # nodes are kept, for file handles.
    cdef int fd = node.fd
    if node.name == NULL or node.btime == 0 or not node.hashed:
        return self._drop(node)
    node.fd = -1
    if not node.ghost:
        node.ghost = True
        self.ghosts += 1
        counter_add(&self.nodes, -1)
        if self.ghosts > GHOSTS:
            drop_a_ghost(self)
    return fd

cdef void drop_a_ghost(Inodes self) noexcept nogil:
    cdef uint32_t _step
    cdef Node *node
    for _step in range(self.node_slots.count):
        self.ghost_hand += 1
        if self.ghost_hand >= self.node_slots.count:
            self.ghost_hand = ROOT
        node = node_at(self, self.ghost_hand)
        if node.slot.live and node.ghost and node.refs == 0:
            self._drop(node)
            return


cdef class Inodes:
    """The nodes of one share; safe from any thread.

    :param root_fd: O_PATH descriptor of the shared directory; borrowed
    :param overlay: whether the directory is on an overlayfs
    """

    def __cinit__(self, int root_fd, bint overlay):
        cdef statx st
        pthread_mutex_init(&self.lock, NULL)
        self.n_buckets = 1024
        self.clock_hand = self.ghost_hand = ROOT
        self.buckets = <uint32_t *>calloc(self.n_buckets, sizeof(uint32_t))
        if not slots_begin(&self.node_slots, sizeof(Node)) or self.buckets == NULL:
            raise MemoryError()
        if statx_call(root_fd, b"", AT_EMPTY_PATH, MASK, &st) < 0 or \
                self.node_add(-1, &st, NULL, NULL, overlay, True) != ROOT:
            raise MemoryError()
        node_at(self, ROOT).fd = root_fd
        # A look-up must not find the root: a mount below that shows the same directory gets a node of its own.
        unhash(self, node_at(self, ROOT))
        enter_ring(self)

    def __dealloc__(self):
        cdef uint32_t i
        leave_ring(self)
        for i in range(ROOT + 1, self.node_slots.count):
            if node_at(self, i).slot.live and node_at(self, i).fd >= 0:
                close(node_at(self, i).fd)
            forget_name(node_at(self, i))
        slots_keep(&self.node_slots, 0)
        free(self.buckets)

    # Look-up by identity

    cdef void _hash(self, Node *node) noexcept nogil:
        cdef uint32_t bucket = bucket_of(self, node.dev, node.ino, node.mnt)
        node.slot.next = self.buckets[bucket]
        self.buckets[bucket] = node.slot.index
        node.hashed = True

    cdef void _grow(self) noexcept nogil:
        # Double the number of buckets. Without memory for that the chains just get longer.
        cdef uint32_t i
        cdef uint32_t *buckets = <uint32_t *>calloc(2 * <size_t>self.n_buckets, sizeof(uint32_t))
        if buckets == NULL:
            return
        free(self.buckets)
        self.buckets = buckets
        self.n_buckets *= 2
        for i in range(ROOT + 1, self.node_slots.count):
            if node_at(self, i).hashed:
                self._hash(node_at(self, i))

    cdef bint node_known(self, uint64_t dev, uint64_t ino, uint64_t mnt) noexcept nogil:
        cdef bint known
        pthread_mutex_lock(&self.lock)
        known = find(self, dev, ino, mnt, NULL) != NULL
        pthread_mutex_unlock(&self.lock)
        return known

    cdef uint64_t count_lookup(self, Node *node, const Node *parent, const char *name) noexcept nogil:
        cdef uint64_t nodeid
        pthread_mutex_lock(&self.lock)
        nodeid = counted(self, node)
        rename(self, node, parent, name)
        pthread_mutex_unlock(&self.lock)
        return nodeid

    cdef uint64_t node_find(self, const statx *st, const Node *parent, const char *name) noexcept nogil:
        cdef uint64_t nodeid = 0
        cdef Node *node
        pthread_mutex_lock(&self.lock)
        node = find_same(self, st)
        if node != NULL:
            nodeid = counted(self, node)
            if node.fd < 0 or node.name == NULL:
                rename(self, node, parent, name)
        pthread_mutex_unlock(&self.lock)
        return nodeid

    cdef uint64_t node_add(self, int fd, const statx *st, const Node *parent, const char *name,
                           bint overlay, bint alone) noexcept nogil:
        cdef uint64_t nodeid = 0
        cdef Node *node
        pthread_mutex_lock(&self.lock)
        node = NULL if alone else find_same(self, st)
        if node == NULL:
            node = <Node *>slot_take(&self.node_slots)
            if node != NULL:
                node.fd = -1
                node.parent = 0
                node.type = st.stx_mode & S_IFMT
                node.dev, node.ino, node.mnt = device_of(st), st.stx_ino, st.stx_mnt_id
                node.btime = btime_of(st)
                node.overlay = overlay
                node.foreign = parent != NULL and node.dev != parent.dev and node.type != S_IFDIR
                counter_add(&self.nodes, 1)
                if self.nodes + self.ghosts > self.n_buckets:
                    self._grow()
                self._hash(node)
        if node != NULL:
            nodeid = counted(self, node)
            rename(self, node, parent, name)
            if node.fd < 0:
                flag_set(&node.fd, fd)
                fd = -1
        unlock_and_close(&self.lock, fd)
        return nodeid

    cdef Node *node_twin(self, const statx *st, Node *before) noexcept nogil:
        cdef Node *node = before
        while True:
            pthread_mutex_lock(&self.lock)
            if node == NULL or node.hashed:
                node = find(self, device_of(st), st.stx_ino, st.stx_mnt_id, node)
            else:
                node = NULL
            if node != NULL:
                node.refs += 1
            pthread_mutex_unlock(&self.lock)
            if before != NULL:
                self.node_put(before)
            if node == NULL or flag_read(&node.fd) >= 0 or self._open_again(node) == 0:
                return node
            before = node           # its file is gone: go on to the next

    cdef void set_identity(self, Node *node, const statx *st) noexcept nogil:
        pthread_mutex_lock(&self.lock)
        if node.hashed:
            if node.ino != st.stx_ino or node.dev != device_of(st):
                unhash(self, node)
                node.dev, node.ino, node.mnt = device_of(st), st.stx_ino, st.stx_mnt_id
                self._hash(node)
            node.btime = btime_of(st)
        pthread_mutex_unlock(&self.lock)

    cdef void shrink(self) noexcept nogil:
        pthread_mutex_lock(&self.lock)
        slots_keep(&self.node_slots, ROOT + 1)
        pthread_mutex_unlock(&self.lock)

    # Names and opening again

    cdef void set_name(self, Node *node, const char *name, uint64_t length) noexcept nogil:
        cdef uint64_t size = length + 1
        cdef char *copy = NULL
        if size <= <uint64_t>NAME_SIZE and heap.take(size):
            copy = <char *>calloc(1, size)
            if copy == NULL:
                heap.give(size)
            else:
                memcpy(copy, name, length)
        forget_name(node)
        node.name = copy

    cdef void node_moved(self, const statx *st, const Node *parent, const char *name) noexcept nogil:
        cdef Node *node
        pthread_mutex_lock(&self.lock)
        node = find_same(self, st)
        if node != NULL:
            rename(self, node, parent, name)
        pthread_mutex_unlock(&self.lock)

    cdef uint64_t node_id(self, const statx *st) noexcept nogil:
        cdef Node *node
        cdef uint64_t nodeid = 0
        pthread_mutex_lock(&self.lock)
        node = find_same(self, st)
        if node != NULL and node.nlookup:
            nodeid = id_of(&node.slot)
        pthread_mutex_unlock(&self.lock)
        return nodeid

    cdef void node_unnamed(self, Node *node, const Node *parent, const char *name) noexcept nogil:
        pthread_mutex_lock(&self.lock)
        if node.name != NULL and node.parent == id_of(&parent.slot) and strcmp(node.name, name) == 0:
            forget_name(node)
        pthread_mutex_unlock(&self.lock)

    cdef Node *_pin(self, uint64_t nodeid, bint ghosts) noexcept nogil:
        cdef Node *node
        pthread_mutex_lock(&self.lock)
        node = <Node *>slot_of(&self.node_slots, nodeid)
        if node != NULL and not node.nlookup and not (ghosts and node.ghost):
            node = NULL
        if node != NULL:
            node.refs += 1
            node.recent = True
        pthread_mutex_unlock(&self.lock)
        return node

    cdef Node *node_get(self, uint64_t nodeid) noexcept nogil:
        return opened(self, self._pin(nodeid, False))

    cdef Node *node_recall(self, uint64_t nodeid) noexcept nogil:
        cdef Node *node = opened(self, self._pin(nodeid, True))
        if node != NULL:
            self.count_lookup(node, NULL, NULL)
        return node

    cdef int _open_again(self, Node *node) noexcept nogil:
        # Open a pinned node again, after any closed directories above it. Returns 0 or an errno.
        cdef (Node *)[DEPTH] way
        cdef Node *at = node
        cdef uint32_t n = 0, i
        cdef int error = 0
        while at != NULL and flag_read(&at.fd) < 0 and n < DEPTH:
            way[n] = at
            n += 1
            at = self._pin(at.parent, True)
        if at == NULL or flag_read(&at.fd) < 0:
            error = ESTALE
        else:
            while n and error == 0:
                n -= 1
                error = open_child(self, at, way[n])
                self.node_put(at)
                at = way[n]
        if at != NULL and n:
            self.node_put(at)
        for i in range(1, n):           # the caller unpins way[0]
            self.node_put(way[i])
        return error

    # Release

    cdef void node_put(self, Node *node) noexcept nogil:
        cdef int fd = -1
        pthread_mutex_lock(&self.lock)
        node.refs -= 1
        if node.refs == 0 and node.nlookup == 0:
            fd = let_go(self, node)
        unlock_and_close(&self.lock, fd)

    cdef int _drop(self, Node *node) noexcept nogil:
        cdef int fd = node.fd
        unhash(self, node)
        forget_name(node)
        if node.ghost:
            self.ghosts -= 1
        else:
            counter_add(&self.nodes, -1)
        node.ghost = False
        node.fd = -1
        slot_give(&self.node_slots, &node.slot)
        return fd

    cdef bint node_forget(self, uint64_t nodeid, uint64_t count) noexcept nogil:
        cdef Node *node
        cdef int fd = -1
        cdef bint told = False
        if nodeid == ROOT:
            return True
        pthread_mutex_lock(&self.lock)
        node = <Node *>slot_of(&self.node_slots, nodeid)
        if node != NULL and not node.ghost:
            told = count <= node.nlookup
            node.nlookup -= min(count, node.nlookup)
            if node.nlookup == 0 and node.refs == 0:
                fd = let_go(self, node)
        unlock_and_close(&self.lock, fd)
        return told

    cdef Node *node_on_other_device(self, uint32_t index, const uint64_t *devices, uint32_t count) noexcept nogil:
        cdef Node *node = NULL
        cdef uint64_t nodeid
        cdef uint32_t i
        cdef bint known
        while node == NULL:
            pthread_mutex_lock(&self.lock)
            if index >= self.node_slots.count:
                pthread_mutex_unlock(&self.lock)
                return NULL
            node = node_at(self, index)
            known = not node.slot.live or not node.nlookup or (node.type != S_IFDIR and node.type != S_IFREG)
            for i in range(count):
                known = known or node.dev == devices[i]
            nodeid = id_of(&node.slot)
            pthread_mutex_unlock(&self.lock)
            node = NULL if known else self.node_get(nodeid)
            index += 1
        return node
