# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""The nodes and handles of a share as bytes, which another share of the same directory takes over.

A node is saved by its directory, its name there and its identity. The other share opens it when it is used first, as
one that was closed to make room (see ``_inodes``): the guest gets ESTALE for a file that is not there any more, and
looks it up again. Handles are opened at once. One that cannot be opened answers EBADF.
"""
import os

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.errno cimport ENOMEM, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdio cimport snprintf
from libc.string cimport memchr, memcpy, memset, strlen

from virtio.fs._host cimport *
from virtio.fs._inodes cimport ROOT, Node, Slots, id_of, node_at, open_granted, slot_added, slot_at, slots_skip
from virtio.fs._share cimport ANNOUNCES, CHECKS_SGID, INITIALISED, NO_OPEN, Share, agreed, is_component
from virtio.fs._table cimport Handle, Table, handle_at
from vmm._budget cimport FOR_OPEN
from vmm._sys cimport counter_add, flag_read, flag_set, pthread_mutex_lock, pthread_mutex_unlock

cdef struct saved_node:
    uint64_t dev
    uint64_t ino
    uint64_t mnt
    uint64_t btime
    uint64_t parent
    uint64_t nlookup
    uint32_t index
    uint32_t generation
    uint32_t type
    uint32_t flags
    uint32_t name_length
    uint32_t zero

cdef struct saved_handle:
    uint64_t nodeid
    uint32_t index
    uint32_t generation
    uint32_t kind
    uint32_t flags

cdef enum:
    GHOST = 1
    OVERLAY = 2
    FOREIGN = 4
    HASHED = 8
    FILE = 1                    # saved_handle.kind
    DIRECTORY = 2
    SESSION = INITIALISED | NO_OPEN | CHECKS_SGID | ANNOUNCES

cdef int OPEN_FLAGS = O_ACCMODE | O_APPEND | O_SYNC | O_DSYNC | O_NONBLOCK


cdef bint is_kept(const Node *node) noexcept nogil:
    return node.slot.live and (node.slot.index == <uint32_t>ROOT or node.nlookup or node.ghost)


def nameless(Share share not None):
    """The inode number of a file that the guest has open and that has no name any more; 0: every open file has a name.

    Another share could not open it. Any thread.
    """
    cdef Table table = share.table
    cdef uint64_t found = 0
    cdef uint32_t i
    cdef Handle *handle
    cdef Node *node
    cdef struct_stat st
    cdef bint pinned, named
    for i in range(ROOT, table.handle_slots.count):
        pthread_mutex_lock(&table.lock)
        handle = handle_at(table, i)
        pinned = handle.slot.live and handle.open
        if pinned:
            handle.refs += 1
            named = handle.node.name != NULL or handle.node.slot.index == <uint32_t>ROOT
        pthread_mutex_unlock(&table.lock)
        if pinned:
            # Not statx, which the API's thread may not call.
            if fstat(handle.fd, &st) == 0 and (not named or st.st_nlink == 0):
                found = st.st_ino
            table.handle_put(handle)
        if found:
            return found
    if agreed(share, NO_OPEN):          # then any node may be an open file
        pthread_mutex_lock(&table.lock)
        for i in range(ROOT + 1, table.node_slots.count):
            node = node_at(table, i)
            if node.slot.live and node.nlookup and node.name == NULL and node.type == S_IFREG:
                found = node.ino
        pthread_mutex_unlock(&table.lock)
    return found


# Save


def save(Share share not None):
    """What the guest knows of the share, for ``restore``. The device's threads are held."""
    return {
        "session": flag_read(&share.session),
        "nodes": save_nodes(share.table),
        "handles": save_handles(share.table),
        "slots": slots(&share.table.node_slots) + slots(&share.table.handle_slots),
    }


cdef bytes save_nodes(Table table):
    cdef size_t room = 0
    cdef uint32_t i
    cdef Node *node
    cdef saved_node one
    cdef bytes made
    cdef char *to
    for i in range(ROOT, table.node_slots.count):
        node = node_at(table, i)
        if is_kept(node):
            room += sizeof(saved_node) + (0 if node.name == NULL else strlen(node.name))
    made = PyBytes_FromStringAndSize(NULL, room)
    to = PyBytes_AS_STRING(made)
    for i in range(ROOT, table.node_slots.count):
        node = node_at(table, i)
        if not is_kept(node):
            continue
        one.dev, one.ino, one.mnt, one.btime = node.dev, node.ino, node.mnt, node.btime
        one.parent, one.nlookup = node.parent, node.nlookup
        one.index, one.generation, one.type = node.slot.index, node.slot.generation, node.type
        one.flags = (GHOST if node.ghost else 0) | (OVERLAY if node.overlay else 0) \
            | (FOREIGN if node.foreign else 0) | (HASHED if node.hashed else 0)
        one.name_length = 0 if node.name == NULL else <uint32_t>strlen(node.name)
        one.zero = 0
        memcpy(to, &one, sizeof(one))
        to += sizeof(one)
        if one.name_length:
            memcpy(to, node.name, one.name_length)
        to += one.name_length
    return made

cdef bytes save_handles(Table table):
    cdef uint32_t i
    cdef Handle *handle
    cdef saved_handle one
    parts = []
    for i in range(ROOT, table.handle_slots.count):
        handle = handle_at(table, i)
        if not handle.slot.live or not handle.open or not is_kept(handle.node):
            continue
        one.nodeid = id_of(&handle.node.slot)
        one.index, one.generation, one.kind = handle.slot.index, handle.slot.generation, kind_of(handle.node)
        one.flags = <uint32_t>(fcntl(handle.fd, F_GETFL) & OPEN_FLAGS)
        parts.append((<char *>&one)[:sizeof(one)])
    return b"".join(parts)

cdef tuple slots(const Slots *table):
    # The number of slots, and the highest generation in them: an id is never used again.
    cdef uint32_t i, newest = 0
    for i in range(ROOT, table.count):
        newest = max(newest, slot_at(table, i).generation)
    return table.count, newest


# Restore

def restore(Share share not None, dict state not None):
    """Take over what ``save`` told of another share. What a guest knew of this one is dropped; no thread of it runs.

    :raises ValueError: the state is invalid
    :raises OSError: the host has no memory left for it
    """
    cdef int session = state["session"]
    cdef Table table = share.table
    cdef uint32_t n_nodes, newest_node, n_handles, newest_handle
    n_nodes, newest_node, n_handles, newest_handle = state["slots"]
    share.clear()
    table.shrink()
    try:
        restore_nodes(table, state["nodes"], newest_node)
        skip(table, &table.node_slots, n_nodes, newest_node)
        restore_handles(share, state["handles"], newest_handle)
        skip(table, &table.handle_slots, n_handles, newest_handle)
    except BaseException:
        share.clear()
        table.shrink()
        raise
    flag_set(&share.session, session & SESSION)


cdef int restore_nodes(Table table, bytes saved, uint32_t newest) except -1:
    cdef const uint8_t *at = <const uint8_t *>PyBytes_AS_STRING(saved)
    cdef const uint8_t *end = at + len(saved)
    cdef Node *root = node_at(table, ROOT)
    cdef Node *node
    cdef saved_node one, before
    cdef bint first = True
    memset(&before, 0, sizeof(before))
    while at < end:
        if <size_t>(end - at) < sizeof(one):
            raise ValueError("nodes are cut short")
        memcpy(&one, at, sizeof(one))
        at += sizeof(one)
        if one.name_length > <size_t>(end - at) or (one.name_length and (
                not is_component(at, one.name_length, False) or memchr(at, 0, one.name_length) != NULL)):
            raise ValueError("a node's name")
        if first:
            if one.index != <uint32_t>ROOT:
                raise ValueError("no node of the directory itself")
            before, first = one, False
            continue
        if one.index < table.node_slots.count or one.type & ~<uint32_t>S_IFMT or not (one.nlookup or one.flags & GHOST):
            raise ValueError(f"node {one.index}")
        skip(table, &table.node_slots, one.index, newest)
        pthread_mutex_lock(&table.lock)         # other shares' threads look for descriptors that can be closed
        node = <Node *>slot_added(&table.node_slots, one.generation)
        if node == NULL:
            pthread_mutex_unlock(&table.lock)
            raise OSError(ENOMEM, os.strerror(ENOMEM))
        # Device and mount may have other numbers by now.
        node.dev = root.dev if one.dev == before.dev else one.dev
        node.mnt = root.mnt if one.mnt == before.mnt else one.mnt
        node.ino, node.btime, node.parent = one.ino, one.btime, one.parent
        node.type, node.nlookup = one.type, one.nlookup
        node.ghost = one.nlookup == 0
        node.overlay, node.foreign = bool(one.flags & OVERLAY), bool(one.flags & FOREIGN)
        node.fd = -1
        node.slot.live = True
        if one.name_length:
            table.set_name(node, <const char *>at, one.name_length)
        at += one.name_length
        if node.ghost:
            table.ghosts += 1
        else:
            counter_add(&table.nodes, 1)
        if one.flags & HASHED:
            if table.nodes + table.ghosts > table.n_buckets:
                table._grow()
            table._hash(node)
        pthread_mutex_unlock(&table.lock)
    return 0

cdef int skip(Table table, Slots *slots, uint32_t until, uint32_t newest) except -1:
    cdef bint done
    pthread_mutex_lock(&table.lock)
    done = slots_skip(slots, until, newest)
    pthread_mutex_unlock(&table.lock)
    if not done:
        raise OSError(ENOMEM, os.strerror(ENOMEM))
    return 0

cdef uint32_t kind_of(const Node *node) noexcept nogil:
    return DIRECTORY if node.type == S_IFDIR else FILE if node.type == S_IFREG else 0

cdef int restore_handles(Share share, bytes saved, uint32_t newest) except -1:
    cdef const uint8_t *at = <const uint8_t *>PyBytes_AS_STRING(saved)
    cdef const uint8_t *end = at + len(saved)
    cdef Table table = share.table
    cdef Handle *handle
    cdef Node *node
    cdef saved_handle one
    cdef int fd, flags
    while at < end:
        if <size_t>(end - at) < sizeof(one):
            raise ValueError("handles are cut short")
        memcpy(&one, at, sizeof(one))
        at += sizeof(one)
        node = table._pin(one.nodeid, True)
        if node == NULL or one.index < table.handle_slots.count or kind_of(node) == 0 or one.kind != kind_of(node):
            if node != NULL:
                table.node_put(node)
            raise ValueError(f"handle {one.index}")
        try:
            skip(table, &table.handle_slots, one.index, newest)
            handle = <Handle *>slot_added(&table.handle_slots, one.generation)
            if handle == NULL:
                raise OSError(ENOMEM, os.strerror(ENOMEM))
        except BaseException:
            table.node_put(node)
            raise
        flags = <int>one.flags & OPEN_FLAGS
        fd = opened(share, node, flags)
        if fd < 0:                      # of this descriptor nothing can be read, and no other operation uses it
            fd = fcntl(node_at(table, ROOT).fd, F_DUPFD_CLOEXEC, 0)
            flags = O_WRONLY
        if fd < 0:
            table.node_put(node)
            raise OSError(errno, os.strerror(errno))
        handle.slot.live = True
        table.handle_open(handle, fd, node, flags)
        table.node_put(node)
    return 0

cdef int opened(Share share, Node *node, int flags) noexcept nogil:
    # A descriptor of a pinned node's file, by its name; -1: it is not there any more, or is not what it was.
    cdef char[16] number
    if share.read_only and flags & O_ACCMODE != O_RDONLY:
        return -1
    if flag_read(&node.fd) < 0 and share.table._open_again(node):
        return -1
    snprintf(number, sizeof(number), b"%d", node.fd)
    flags |= O_CLOEXEC | O_NOCTTY | (O_DIRECTORY if node.type == S_IFDIR else 0)
    return open_granted(share.proc_fd, number, flags, FOR_OPEN)
