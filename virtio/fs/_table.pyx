# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""The open files (handles) of a share, besides its nodes. A handle's id is an index and its slot's generation."""
from libc.stdint cimport uint32_t, uint64_t
from posix.fcntl cimport O_ACCMODE, O_DSYNC, O_RDWR, O_WRONLY, S_IFREG

from virtio.fs._inodes cimport (
    ROOT, Inodes, Node, id_of, node_at, slot_give, slot_of, slot_take, slots_begin, slots_keep, unlock_and_close,
)
from vmm._sys cimport close, counter_add, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock


cdef void join(Table self, Handle *handle) noexcept nogil:
    # Insert at the end of the ring. A writable handle becomes the first.
    cdef Handle *first
    if handle.node.opened == 0:
        handle.before = handle.after = handle.node.opened = handle.slot.index
        return
    first = handle_at(self, handle.node.opened)
    handle.before, handle.after = first.before, first.slot.index
    handle_at(self, first.before).after = handle.slot.index
    first.before = handle.slot.index
    if handle.writes:
        handle.node.opened = handle.slot.index

cdef void part(Table self, Handle *handle) noexcept nogil:
    if handle.after == 0:
        return
    handle_at(self, handle.before).after = handle.after
    handle_at(self, handle.after).before = handle.before
    if handle.node.opened == handle.slot.index:
        handle.node.opened = handle.after if handle.after != handle.slot.index else 0
    handle.after = handle.before = 0

cdef void release(Table self, Handle *handle) noexcept nogil:
    # A pinned handle: the guest uses it no more.
    pthread_mutex_lock(&self.lock)
    handle.open = False
    part(self, handle)
    pthread_mutex_unlock(&self.lock)
    self.handle_put(handle)


cdef class Table(Inodes):
    """Nodes and handles of one share; safe from any thread.

    :param root_fd: O_PATH descriptor of the shared directory; borrowed
    :param overlay: whether the directory is on an overlayfs
    """

    def __cinit__(self, int root_fd, bint overlay):
        if not slots_begin(&self.handle_slots, sizeof(Handle)):
            raise MemoryError()

    def __dealloc__(self):
        cdef uint32_t i
        for i in range(ROOT, self.handle_slots.count):
            if handle_at(self, i).slot.live:
                close(handle_at(self, i).fd)
        slots_keep(&self.handle_slots, 0)

    cdef uint64_t handle_add(self, int fd, Node *node, int flags) noexcept nogil:
        cdef uint64_t fh = 0
        cdef Handle *handle
        pthread_mutex_lock(&self.lock)
        handle = <Handle *>slot_take(&self.handle_slots)
        if handle != NULL:
            self.handle_open(handle, fd, node, flags)
            fh = id_of(&handle.slot)
            fd = -1
        unlock_and_close(&self.lock, fd)
        return fh

    cdef void handle_open(self, Handle *handle, int fd, Node *node, int flags) noexcept nogil:
        if not handle.locked_once:
            pthread_mutex_init(&handle.lock, NULL)
            handle.locked_once = True
        handle.fd = fd
        handle.node = node
        node.refs += 1
        handle.synchronous = flags & O_DSYNC
        handle.writes = flags & O_ACCMODE == O_RDWR
        handle.refs = 0
        handle.open = True
        handle.after = handle.before = 0
        if node.type == S_IFREG and flags & O_ACCMODE != O_WRONLY:
            join(self, handle)
        counter_add(&self.handles, 1)

    cdef Handle *handle_get(self, uint64_t fh, uint64_t nodeid, uint32_t type) noexcept nogil:
        cdef Handle *handle
        pthread_mutex_lock(&self.lock)
        handle = <Handle *>slot_of(&self.handle_slots, fh)
        if handle != NULL:
            if handle.open and id_of(&handle.node.slot) == nodeid and handle.node.type == type:
                handle.refs += 1
            else:
                handle = NULL
        pthread_mutex_unlock(&self.lock)
        return handle

    cdef Handle *handle_of(self, Node *node, bint writes) noexcept nogil:
        cdef Handle *handle = NULL
        pthread_mutex_lock(&self.lock)
        if node.opened:
            handle = handle_at(self, node.opened)
            if writes and not handle.writes:
                handle = NULL
            else:
                handle.refs += 1
        pthread_mutex_unlock(&self.lock)
        return handle

    cdef void shrink(self) noexcept nogil:
        slots_keep(&self.handle_slots, ROOT)
        Inodes.shrink(self)

    cdef void handle_put(self, Handle *handle) noexcept nogil:
        cdef int fd = -1
        cdef Node *node = handle.node
        pthread_mutex_lock(&self.lock)
        handle.refs -= 1
        if handle.refs == 0 and not handle.open:
            slot_give(&self.handle_slots, &handle.slot)
            counter_add(&self.handles, -1)
            fd = handle.fd
        pthread_mutex_unlock(&self.lock)
        if fd >= 0:
            close(fd)
            self.node_put(node)

    cdef bint handle_release(self, uint64_t fh, uint64_t nodeid, uint32_t type) noexcept nogil:
        cdef Handle *handle = self.handle_get(fh, nodeid, type)
        if handle != NULL:
            release(self, handle)
        return handle != NULL

    cdef void clear(self) noexcept nogil:
        cdef uint32_t i, slots
        cdef int fd
        cdef bint live
        cdef Node *node
        cdef Handle *handle
        pthread_mutex_lock(&self.lock)
        slots = self.handle_slots.count       # other threads may be opening files
        pthread_mutex_unlock(&self.lock)
        # Lock for each handle and each node, so that the lock is not held during a million closes.
        for i in range(ROOT, slots):
            pthread_mutex_lock(&self.lock)
            handle = handle_at(self, i)
            live = handle.slot.live
            handle.refs += live
            pthread_mutex_unlock(&self.lock)
            if live:
                release(self, handle)
        pthread_mutex_lock(&self.lock)
        slots = self.node_slots.count         # other threads may be looking files up
        pthread_mutex_unlock(&self.lock)
        for i in range(ROOT + 1, slots):
            pthread_mutex_lock(&self.lock)
            node = node_at(self, i)
            fd = -1
            if node.slot.live:
                node.nlookup = 0
                if node.refs == 0:
                    fd = self._drop(node)
            unlock_and_close(&self.lock, fd)
