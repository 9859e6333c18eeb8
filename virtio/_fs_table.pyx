# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""The inode table and the open files of a share: the only way from a number of the guest's to a host file.

A node is an O_PATH descriptor, so what it names stays what it is, whatever is renamed, mounted or put in its place
meanwhile. An id is an index and the generation of its slot: a stale or invented one finds nothing.
"""
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free


cdef extern from "<unistd.h>" nogil:
    int close(int fd)

cdef enum:
    CHUNK_BITS = 9
    CHUNK = 1 << CHUNK_BITS
    CHUNKS = 8192               # of 512: 4 million nodes, and as many handles


cdef class Table:
    """Nodes and handles of one share; safe from any thread.

    :param root_fd: O_PATH descriptor of the shared directory; owned from here on
    :param dev: with `ino` and `mnt`, what it is
    """

    def __cinit__(self, int root_fd, uint64_t dev, uint64_t ino, uint64_t mnt):
        pthread_mutex_init(&self.lock, NULL)
        self.n_buckets = 1024
        self.node_slots = self.handle_slots = ROOT      # no id is 0
        self.node_chunks = <Node **>calloc(CHUNKS, sizeof(Node *))
        self.handle_chunks = <Handle **>calloc(CHUNKS, sizeof(Handle *))
        self.buckets = <uint32_t *>calloc(self.n_buckets, sizeof(uint32_t))
        if self.node_chunks == NULL or self.handle_chunks == NULL or self.buckets == NULL:
            raise MemoryError()
        # In no hash chain, so that lookup never finds it: entering a file system's root from below is entering it anew.
        if self.node_add(root_fd, 0o040000, dev, ino, mnt, False) != ROOT:
            raise MemoryError()

    def __dealloc__(self):
        cdef uint32_t i
        cdef Handle *handle
        if self.node_chunks != NULL and self.handle_chunks != NULL:
            for i in range(ROOT, self.node_slots):
                if self._node(i).live:
                    close(self._node(i).fd)
            for i in range(ROOT, self.handle_slots):
                handle = self._handle(i)
                if handle.live:
                    close(handle.fd)
            for i in range(<uint32_t>CHUNKS):
                free(self.node_chunks[i])
                free(self.handle_chunks[i])
        free(self.node_chunks)
        free(self.handle_chunks)
        free(self.buckets)

    cdef Node *_node(self, uint32_t index) noexcept nogil:
        return &self.node_chunks[index >> CHUNK_BITS][index & (CHUNK - 1)]

    cdef Handle *_handle(self, uint32_t index) noexcept nogil:
        return &self.handle_chunks[index >> CHUNK_BITS][index & (CHUNK - 1)]

    # Nodes

    cdef uint32_t _bucket(self, uint64_t dev, uint64_t ino, uint64_t mnt) noexcept nogil:
        cdef uint64_t mixed = (ino ^ (dev << 32 | dev >> 32) ^ mnt << 17) * <uint64_t>0x9e3779b97f4a7c15
        return <uint32_t>(mixed >> 32) & (self.n_buckets - 1)

    cdef Node *_find(self, uint64_t dev, uint64_t ino, uint64_t mnt) noexcept nogil:
        cdef uint32_t index = self.buckets[self._bucket(dev, ino, mnt)]
        cdef Node *node
        while index:
            node = self._node(index)
            if node.ino == ino and node.dev == dev and node.mnt == mnt:
                return node
            index = node.next
        return NULL

    cdef void _grow(self) noexcept nogil:
        # Twice as many buckets; where there is no memory for them, longer chains do.
        cdef uint32_t i, bucket, old = self.n_buckets
        cdef Node *node
        cdef uint32_t *buckets = <uint32_t *>calloc(2 * <size_t>old, sizeof(uint32_t))
        if buckets == NULL:
            return
        free(self.buckets)
        self.buckets = buckets
        self.n_buckets = 2 * old
        for i in range(ROOT + 1, self.node_slots):
            node = self._node(i)
            if node.live:
                bucket = self._bucket(node.dev, node.ino, node.mnt)
                node.next = buckets[bucket]
                buckets[bucket] = i

    cdef Node *node_get(self, uint64_t nodeid) noexcept nogil:
        cdef uint32_t index = <uint32_t>nodeid
        cdef Node *node = NULL
        pthread_mutex_lock(&self.lock)
        if 0 < index < self.node_slots:
            node = self._node(index)
            if node.live and node.generation == nodeid >> 32 and node.nlookup:
                node.refs += 1
            else:
                node = NULL
        pthread_mutex_unlock(&self.lock)
        return node

    cdef void node_put(self, Node *node) noexcept nogil:
        cdef int fd = -1
        pthread_mutex_lock(&self.lock)
        node.refs -= 1
        if node.refs == 0 and node.nlookup == 0:
            fd = self._drop_node(node)
        pthread_mutex_unlock(&self.lock)
        if fd >= 0:
            close(fd)

    cdef int _drop_node(self, Node *node) noexcept nogil:
        cdef uint32_t *link = &self.buckets[self._bucket(node.dev, node.ino, node.mnt)]
        while link[0] != node.index:
            link = &self._node(link[0]).next
        link[0] = node.next
        node.live = False
        node.next = self.free_node
        self.free_node = node.index
        self.nodes -= 1
        return node.fd

    cdef Node *node_elsewhere(self, uint32_t index, const uint64_t *devices, uint32_t count) noexcept nogil:
        cdef Node *node = NULL
        cdef uint32_t i
        cdef bint known
        while node == NULL:
            pthread_mutex_lock(&self.lock)
            if index >= self.node_slots:
                pthread_mutex_unlock(&self.lock)
                return NULL
            node = self._node(index)
            known = not node.live or not node.nlookup or (node.type != 0o040000 and node.type != 0o100000)
            for i in range(count):
                known = known or node.dev == devices[i]
            if known:
                node = NULL
            else:
                node.refs += 1
            pthread_mutex_unlock(&self.lock)
            index += 1
        return node

    cdef bint node_known(self, uint64_t dev, uint64_t ino, uint64_t mnt) noexcept nogil:
        cdef bint known
        pthread_mutex_lock(&self.lock)
        known = self._find(dev, ino, mnt) != NULL
        pthread_mutex_unlock(&self.lock)
        return known

    cdef uint64_t node_find(self, uint64_t dev, uint64_t ino, uint64_t mnt) noexcept nogil:
        cdef uint64_t nodeid = 0
        cdef Node *node
        pthread_mutex_lock(&self.lock)
        node = self._find(dev, ino, mnt)
        if node != NULL:
            node.nlookup += 1
            nodeid = <uint64_t>node.generation << 32 | node.index
        pthread_mutex_unlock(&self.lock)
        return nodeid

    cdef uint64_t node_add(self, int fd, uint32_t type, uint64_t dev, uint64_t ino, uint64_t mnt,
                           bint foreign) noexcept nogil:
        cdef uint64_t nodeid = 0
        cdef uint32_t index, bucket
        cdef Node *node
        pthread_mutex_lock(&self.lock)
        node = self._find(dev, ino, mnt)
        if node == NULL:
            index = self.free_node
            if index:
                node = self._node(index)
                self.free_node = node.next
            elif self.node_slots < <uint32_t>CHUNK * CHUNKS:
                index = self.node_slots
                if self.node_chunks[index >> CHUNK_BITS] == NULL:
                    self.node_chunks[index >> CHUNK_BITS] = <Node *>calloc(CHUNK, sizeof(Node))
                if self.node_chunks[index >> CHUNK_BITS] != NULL:
                    self.node_slots += 1
                    node = self._node(index)
                    node.generation = <uint32_t>-1      # so that the root's becomes 0
            if node != NULL:
                node.generation += 1
                node.index = index
                node.fd = fd
                node.type = type
                node.dev, node.ino, node.mnt = dev, ino, mnt
                node.nlookup = node.refs = 0
                node.foreign = foreign
                node.live = True
                self.nodes += 1
                if self.nodes > self.n_buckets:
                    self._grow()
                if index != ROOT and self._find(dev, ino, mnt) == NULL:     # _grow may have put it in already
                    bucket = self._bucket(dev, ino, mnt)
                    node.next = self.buckets[bucket]
                    self.buckets[bucket] = index
                fd = -1
        if node != NULL:
            node.nlookup += 1
            nodeid = <uint64_t>node.generation << 32 | node.index
        pthread_mutex_unlock(&self.lock)
        if fd >= 0:
            close(fd)
        return nodeid

    cdef bint node_forget(self, uint64_t nodeid, uint64_t count) noexcept nogil:
        cdef uint32_t index = <uint32_t>nodeid
        cdef Node *node
        cdef int fd = -1
        cdef bint told = False
        if nodeid == ROOT:
            return True
        pthread_mutex_lock(&self.lock)
        if 0 < index < self.node_slots:
            node = self._node(index)
            if node.live and node.generation == nodeid >> 32:
                told = count <= node.nlookup
                node.nlookup -= min(count, node.nlookup)
                if node.nlookup == 0 and node.refs == 0:
                    fd = self._drop_node(node)
        pthread_mutex_unlock(&self.lock)
        if fd >= 0:
            close(fd)
        return told

    # Handles

    cdef uint64_t handle_add(self, int fd, Kind kind, Node *node, bint synchronous) noexcept nogil:
        cdef uint64_t fh = 0
        cdef uint32_t index
        cdef Handle *handle = NULL
        pthread_mutex_lock(&self.lock)
        index = self.free_handle
        if index:
            handle = self._handle(index)
            self.free_handle = handle.next
        elif self.handle_slots < <uint32_t>CHUNK * CHUNKS:
            index = self.handle_slots
            if self.handle_chunks[index >> CHUNK_BITS] == NULL:
                self.handle_chunks[index >> CHUNK_BITS] = <Handle *>calloc(CHUNK, sizeof(Handle))
            if self.handle_chunks[index >> CHUNK_BITS] != NULL:
                self.handle_slots += 1
                handle = self._handle(index)
        if handle != NULL:
            if not handle.locked_once:
                pthread_mutex_init(&handle.lock, NULL)
                handle.locked_once = True
            handle.generation += 1
            handle.index = index
            handle.fd = fd
            handle.kind = kind
            handle.node = node
            handle.nodeid = <uint64_t>node.generation << 32 | node.index
            node.refs += 1
            handle.synchronous = synchronous
            handle.refs = 0
            handle.live = handle.open = True
            self.handles += 1
            fh = <uint64_t>handle.generation << 32 | index
            fd = -1
        pthread_mutex_unlock(&self.lock)
        if fd >= 0:
            close(fd)
        return fh

    cdef Handle *handle_get(self, uint64_t fh, uint64_t nodeid, Kind kind) noexcept nogil:
        cdef uint32_t index = <uint32_t>fh
        cdef Handle *handle = NULL
        pthread_mutex_lock(&self.lock)
        if 0 < index < self.handle_slots:
            handle = self._handle(index)
            if handle.live and handle.open and handle.generation == fh >> 32 and handle.nodeid == nodeid \
                    and handle.kind == kind:
                handle.refs += 1
            else:
                handle = NULL
        pthread_mutex_unlock(&self.lock)
        return handle

    cdef void handle_put(self, Handle *handle) noexcept nogil:
        cdef int fd = -1
        cdef Node *node = handle.node
        pthread_mutex_lock(&self.lock)
        handle.refs -= 1
        if handle.refs == 0 and not handle.open:
            fd = self._drop_handle(handle)
        pthread_mutex_unlock(&self.lock)
        if fd >= 0:
            close(fd)
            self.node_put(node)

    cdef int _drop_handle(self, Handle *handle) noexcept nogil:
        handle.live = False
        handle.next = self.free_handle
        self.free_handle = handle.index
        self.handles -= 1
        return handle.fd

    cdef bint handle_release(self, uint64_t fh, uint64_t nodeid, Kind kind) noexcept nogil:
        cdef Handle *handle = self.handle_get(fh, nodeid, kind)
        if handle == NULL:
            return False
        pthread_mutex_lock(&self.lock)
        handle.open = False
        pthread_mutex_unlock(&self.lock)
        self.handle_put(handle)
        return True

    cdef void close_root(self) noexcept nogil:
        cdef Node *root
        cdef int fd = -1
        pthread_mutex_lock(&self.lock)
        root = self._node(ROOT)
        if root.live:
            fd = root.fd
            root.live = False
            self.nodes -= 1
        pthread_mutex_unlock(&self.lock)
        if fd >= 0:
            close(fd)

    cdef void clear(self) noexcept nogil:
        cdef uint32_t i
        cdef int fd
        cdef Node *node
        cdef Handle *handle
        # One at a time, so that the lock is not held for a million closes.
        for i in range(ROOT, self.handle_slots):
            pthread_mutex_lock(&self.lock)
            handle = self._handle(i)
            fd = -1
            if handle.live:
                handle.open = False
                node = handle.node
                if handle.refs == 0:
                    fd = self._drop_handle(handle)
            pthread_mutex_unlock(&self.lock)
            if fd >= 0:
                close(fd)
                self.node_put(node)
        for i in range(ROOT + 1, self.node_slots):
            pthread_mutex_lock(&self.lock)
            node = self._node(i)
            fd = -1
            if node.live:
                node.nlookup = 0
                if node.refs == 0:
                    fd = self._drop_node(node)
            pthread_mutex_unlock(&self.lock)
            if fd >= 0:
                close(fd)
