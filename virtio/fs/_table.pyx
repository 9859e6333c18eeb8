# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""The open files (handles) of a share, besides its nodes. A handle's id is an index and its slot's generation."""
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from virtio.fs._host cimport O_ACCMODE, O_DSYNC, O_RDWR, O_WRONLY
from virtio.fs._inodes cimport CHUNK, CHUNK_BITS, CHUNKS, ROOT, Inodes, Node, unlock_and_close
from vmm._sys cimport close, counter_add, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock


cdef class Table(Inodes):
    """Nodes and handles of one share; safe from any thread.

    :param root_fd: O_PATH descriptor of the shared directory; borrowed
    :param overlay: whether the directory is on an overlayfs
    """

    def __cinit__(self, int root_fd, bint overlay):
        self.handle_slots = ROOT        # no id is 0
        self.handle_chunks = <Handle **>calloc(CHUNKS, sizeof(Handle *))
        if self.handle_chunks == NULL:
            raise MemoryError()

    def __dealloc__(self):
        cdef uint32_t i
        if self.handle_chunks != NULL:
            for i in range(ROOT, self.handle_slots):
                if self._handle(i).live:
                    close(self._handle(i).fd)
            for i in range(<uint32_t>CHUNKS):
                free(self.handle_chunks[i])
        free(self.handle_chunks)

    cdef Handle *_handle(self, uint32_t index) noexcept nogil:
        return &self.handle_chunks[index >> CHUNK_BITS][index & (CHUNK - 1)]

    cdef Handle *handle_slot(self, uint32_t index) noexcept nogil:
        cdef Handle **chunk
        if index >= <uint32_t>CHUNK * CHUNKS:
            return NULL
        chunk = &self.handle_chunks[index >> CHUNK_BITS]
        if chunk[0] == NULL:
            chunk[0] = <Handle *>calloc(CHUNK, sizeof(Handle))
        return self._handle(index) if chunk[0] != NULL else NULL

    cdef uint64_t handle_add(self, int fd, Kind kind, Node *node, int flags) noexcept nogil:
        cdef uint64_t fh = 0
        cdef Handle *handle
        pthread_mutex_lock(&self.lock)
        if self.free_handle:
            handle = self._handle(self.free_handle)
            self.free_handle = handle.next
        else:
            handle = self.handle_slot(self.handle_slots)
            if handle != NULL:
                handle.index = self.handle_slots
                self.handle_slots += 1
        if handle != NULL:
            handle.generation += 1
            self.handle_open(handle, fd, kind, node, flags)
            fh = <uint64_t>handle.generation << 32 | handle.index
            fd = -1
        unlock_and_close(&self.lock, fd)
        return fh

    cdef void handle_open(self, Handle *handle, int fd, Kind kind, Node *node, int flags) noexcept nogil:
        if not handle.locked_once:
            pthread_mutex_init(&handle.lock, NULL)
            handle.locked_once = True
        handle.fd = fd
        handle.kind = kind
        handle.node = node
        handle.nodeid = <uint64_t>node.generation << 32 | node.index
        node.refs += 1
        handle.synchronous = flags & O_DSYNC
        handle.writes = flags & O_ACCMODE == O_RDWR
        handle.refs = 0
        handle.live = handle.open = True
        handle.after = handle.before = 0
        if kind == FILE and flags & O_ACCMODE != O_WRONLY:
            self._join(handle)
        counter_add(&self.handles, 1)

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

    cdef Handle *handle_of(self, Node *node, bint writes) noexcept nogil:
        cdef Handle *handle = NULL
        pthread_mutex_lock(&self.lock)
        if node.opened:
            handle = self._handle(node.opened)
            if writes and not handle.writes:
                handle = NULL
            else:
                handle.refs += 1
        pthread_mutex_unlock(&self.lock)
        return handle

    cdef void shrink(self) noexcept nogil:
        cdef uint32_t i
        self.handle_slots, self.free_handle = ROOT, 0
        for i in range(<uint32_t>CHUNKS):
            free(self.handle_chunks[i])
            self.handle_chunks[i] = NULL
        Inodes.shrink(self)

    cdef void _join(self, Handle *handle) noexcept nogil:
        # Insert at the end of the ring. A writable handle becomes the first.
        cdef Handle *first
        if handle.node.opened == 0:
            handle.before = handle.after = handle.node.opened = handle.index
            return
        first = self._handle(handle.node.opened)
        handle.before, handle.after = first.before, first.index
        self._handle(first.before).after = handle.index
        first.before = handle.index
        if handle.writes:
            handle.node.opened = handle.index

    cdef void _part(self, Handle *handle) noexcept nogil:
        if handle.after == 0:
            return
        self._handle(handle.before).after = handle.after
        self._handle(handle.after).before = handle.before
        if handle.node.opened == handle.index:
            handle.node.opened = handle.after if handle.after != handle.index else 0
        handle.after = handle.before = 0

    cdef void handle_put(self, Handle *handle) noexcept nogil:
        cdef int fd = -1
        cdef Node *node = handle.node
        pthread_mutex_lock(&self.lock)
        handle.refs -= 1
        if handle.refs == 0 and not handle.open:
            handle.live = False
            handle.next = self.free_handle
            self.free_handle = handle.index
            counter_add(&self.handles, -1)
            fd = handle.fd
        pthread_mutex_unlock(&self.lock)
        if fd >= 0:
            close(fd)
            self.node_put(node)

    cdef void _release(self, Handle *handle) noexcept nogil:
        # A pinned handle: the guest uses it no more.
        pthread_mutex_lock(&self.lock)
        handle.open = False
        self._part(handle)
        pthread_mutex_unlock(&self.lock)
        self.handle_put(handle)

    cdef bint handle_release(self, uint64_t fh, uint64_t nodeid, Kind kind) noexcept nogil:
        cdef Handle *handle = self.handle_get(fh, nodeid, kind)
        if handle != NULL:
            self._release(handle)
        return handle != NULL

    cdef void clear(self) noexcept nogil:
        cdef uint32_t i, slots
        cdef int fd
        cdef bint live
        cdef Node *node
        cdef Handle *handle
        pthread_mutex_lock(&self.lock)
        slots = self.handle_slots       # other threads may be opening files
        pthread_mutex_unlock(&self.lock)
        # Lock for each handle and each node, so that the lock is not held during a million closes.
        for i in range(ROOT, slots):
            pthread_mutex_lock(&self.lock)
            handle = self._handle(i)
            live = handle.live
            handle.refs += live
            pthread_mutex_unlock(&self.lock)
            if live:
                self._release(handle)
        pthread_mutex_lock(&self.lock)
        slots = self.node_slots         # other threads may be looking files up
        pthread_mutex_unlock(&self.lock)
        for i in range(ROOT + 1, slots):
            pthread_mutex_lock(&self.lock)
            node = self._node(i)
            fd = -1
            if node.live:
                node.nlookup = 0
                if node.refs == 0:
                    fd = self._drop(node)
            unlock_and_close(&self.lock, fd)
