# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""The state that all threads of a share have in common, and the state of each thread."""
import os

from libc.errno cimport ENFILE, EXDEV, errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdio cimport snprintf
from libc.stdlib cimport calloc, free

from virtio.fs._dax cimport Window
from virtio.fs._host cimport *
from virtio.fs._inodes cimport MASK, Node, device_of, open_granted
from virtio.fs._table cimport Table
from virtio.fs._types cimport FS_REMOTE, fs_is_overlay, fs_kind
from virtio.fs._fuse cimport *
from vmm._budget cimport FOR_LOOKUP
from vmm._sys cimport counter_add, counter_read, flag_set


cdef uint64_t foreign_ino(const statx *st) noexcept nogil:
    # An inode number for a file of another file system (mounted on a file), unlike the numbers of its directory's own.
    return (st.stx_ino ^ device_of(st) * <uint64_t>0x9e3779b97f4a7c15) | <uint64_t>1 << 63


def file_system(int fd):
    """The type of the file system that `fd` is on: ``f_type`` of statfs(2).

    :raises OSError: fstatfs failed
    """
    cdef host_statfs fs
    if fstatfs(fd, &fs) < 0:
        raise OSError(errno, os.strerror(errno))
    return <uint32_t>fs.f_type


def stores_files(uint32_t f_type):
    """Whether file systems of this type store files, unlike procfs and its kin."""
    return fs_kind(f_type) != 0


cdef class Share:
    """The state that all threads of one share have in common. The other parameters are ``ShareDevice``'s.

    :param root_fd: O_PATH descriptor of the directory; borrowed
    :param f_type: the type of the file system that it is on
    :param proc_fd: descriptor of /proc/self/fd; borrowed
    :raises OSError: no address space is left for the window
    """

    def __init__(self, int root_fd, uint32_t f_type, int proc_fd, *, bint read_only, str cache, squash,
                 bint submounts, uint64_t dax):
        self.flush_matters = submounts or fs_kind(f_type) == FS_REMOTE
        self.submounts = submounts
        self.table = Table(root_fd, fs_is_overlay(f_type))
        self.proc_fd = proc_fd
        self.read_only = read_only
        self.writeback = cache == "always" and not read_only
        if cache == "none":
            self.open_flags = FOPEN_DIRECT_IO | FOPEN_PARALLEL_DIRECT_WRITES
        elif cache == "always":
            self.valid = 86400
            self.open_flags, self.dir_flags = FOPEN_KEEP_CACHE, FOPEN_KEEP_CACHE | FOPEN_CACHE_DIR
        else:
            self.valid = 1
        self.window = Window(dax) if dax else None
        self.may_not_open = cache == "always" and not self.flush_matters
        self.squash = squash is not None
        self.uid, self.gid = squash or (os.geteuid(), os.getegid())

    def clear(self):
        """Drop all nodes, handles and mappings: the driver is gone."""
        flag_set(&self.session, 0)
        if self.window is not None:
            self.window.clear()
        self.table.clear()

    @property
    def mounted(self):
        """Whether the guest uses the share: since INIT, until it has unmounted it (DESTROY) or resets the device."""
        return agreed(self, INITIALISED)

    @property
    def stats(self):
        """What the guest holds now, and counters, by name."""
        cdef Window window = self.window
        return {
            "nodes": counter_read(&self.table.nodes),           # files that it knows, with the shared directory
            "handles": counter_read(&self.table.handles),       # files and directories that it has open
            "reopened": counter_read(&self.table.reopened),     # descriptors that had been closed to make room
            "dax_mapped": 0 if window is None else counter_read(&window.mapped),
            "dax_repairs": 0 if window is None else counter_read(&window._repairs),
        }


cdef bint may_read(FuseThread self, const statx *st) noexcept nogil:
    # Checked by the mode only: supplementary groups and ACLs are not considered.
    cdef uint32_t mode = st.stx_mode
    if st.stx_uid == self.share.uid:
        mode >>= 6
    elif st.stx_gid == self.share.gid:
        mode >>= 3
    return self.credentials.reads_all or mode & 4

cdef bint enters(FuseThread self, const Node *parent, int fd, const statx *st, bint *overlay) noexcept nogil:
    # Whether the guest may see `fd`, which was found in `parent`. Checks the descriptor, not the path, so a mount
    # made in the meantime makes no difference.
    cdef host_statfs fs
    overlay[0] = parent.overlay
    if device_of(st) == parent.dev and st.stx_mnt_id == parent.mnt:
        return True
    # The same mount with another device number: a file in an overlayfs layer, or a btrfs subvolume. Its inode
    # numbers may repeat, so a directory is shown only if the guest supports FUSE_ATTR_SUBMOUNT. Before Linux 5.8
    # mnt_id is 0.
    if st.stx_mnt_id == parent.mnt and parent.mnt:
        return agreed(self.share, ANNOUNCES) or st.stx_mode & S_IFMT != S_IFDIR
    if not self.share.submounts or not agreed(self.share, ANNOUNCES) or fstatfs(fd, &fs) < 0:
        return False
    overlay[0] = fs_is_overlay(<uint32_t>fs.f_type)
    return fs_kind(<uint32_t>fs.f_type) != 0

cdef bint same_inode(FuseThread self, int one, int other) noexcept nogil:
    # Ask the kernel if stat is not enough: two inotify watches on the same inode get the same number.
    cdef char[4096] events
    cdef int a, b
    if self.inotify < 0:
        self.inotify = inotify_init1(IN_NONBLOCK | IN_CLOEXEC)
    a = inotify_add_watch(self.inotify, self.path_of(one), IN_MOVE_SELF)
    b = inotify_add_watch(self.inotify, self.path_of(other), IN_MOVE_SELF)
    if a >= 0:
        inotify_rm_watch(self.inotify, a)
    if b >= 0 and a != b:
        inotify_rm_watch(self.inotify, b)
    while self.inotify >= 0 and read(self.inotify, events, sizeof(events)) > 0:
        pass                    # discard the IN_IGNORED events
    return a >= 0 and a == b

cdef uint64_t add_linked(FuseThread self, int fd, const statx *st, const Node *parent, const char *name) noexcept nogil:
    # On an overlayfs two hard links in a lower layer have the same stat, but they are two inodes: a write to one
    # copies only that one up.
    cdef uint64_t nodeid
    cdef Node *node = self.table.node_twin(st, NULL)
    while node != NULL and not same_inode(self, node.fd, fd):
        node = self.table.node_twin(st, node)
    if node == NULL:
        return self.table.node_add(fd, st, parent, name, True, True)
    nodeid = self.table.count_lookup(node, parent, name)
    self.table.node_put(node)
    close(fd)
    return nodeid

cdef void fill_found(FuseThread self, const Node *parent, fuse_entry_out *entry, uint64_t nodeid,
                     const statx *st) noexcept nogil:
    cdef bint directory = st.stx_mode & S_IFMT == S_IFDIR
    cdef uint64_t dev = device_of(st)
    self.fill_entry(entry, nodeid, st, dev != parent.dev and not directory)
    if directory and (dev != parent.dev or st.stx_mnt_id != parent.mnt):
        entry.attr.flags |= FUSE_ATTR_SUBMOUNT


cdef class FuseThread:
    """The state of one thread: buffers and credentials. It also turns descriptors into FUSE entries and attributes."""

    def __cinit__(self, Share share):
        self.inotify = -1
        self.share = share
        self.table = share.table
        self.request = <uint8_t *>calloc(1, REQUEST_MAX + 1)
        self.out = <uint8_t *>calloc(1, OUT_MAX)
        self.entries = <uint8_t *>calloc(1, DIRENTS)
        if self.request == NULL or self.out == NULL or self.entries == NULL:
            raise MemoryError()

    def __dealloc__(self):
        free(self.request)
        free(self.out)
        free(self.entries)
        if self.inotify >= 0:
            close(self.inotify)

    cdef int enter(self) noexcept nogil:
        cdef int error = 0
        self.path_format = b"%d" if fs_own(self.share.proc_fd) else b"/proc/self/fd/%d"
        if self.share.squash:
            error = fs_squash(self.share.uid, self.share.gid)
        else:
            self.credentials.switches = fs_prepare(self.credentials.full)
        self.credentials.reads_all = fs_may_all(True)
        self.credentials.writes_all = fs_may_all(False)
        return error

    cdef int become(self, uint32_t uid, uint32_t gid) noexcept nogil:
        # Act as that user while creating a file; fs_return() ends it. Returns 0 or an errno.
        cdef uint64_t kept = CAPS_CREATE_SGID if agreed(self.share, CHECKS_SGID) else CAPS_CREATE
        return fs_become(uid, gid, self.credentials.full, kept)

    cdef int64_t bad_request(self, int64_t result) noexcept nogil:
        # Count a malformed request. Returns `result`, the answer to it.
        counter_add(&self.counters.bad_requests, 1)
        return result

    cdef const char *path_of(self, int fd) noexcept nogil:
        # The magic link of `fd`, which leads to exactly that inode. Callers check the node's type first.
        snprintf(self.path, sizeof(self.path), self.path_format, fd)
        return self.path

    cdef void fill_attr(self, fuse_attr *attr, const statx *st, bint foreign) noexcept nogil:
        attr.ino = foreign_ino(st) if foreign else st.stx_ino
        attr.size = st.stx_size
        attr.blocks = st.stx_blocks
        attr.atime = st.stx_atime.tv_sec
        attr.mtime = st.stx_mtime.tv_sec
        attr.ctime = st.stx_ctime.tv_sec
        attr.atimensec = st.stx_atime.tv_nsec
        attr.mtimensec = st.stx_mtime.tv_nsec
        attr.ctimensec = st.stx_ctime.tv_nsec
        attr.mode = st.stx_mode
        attr.nlink = st.stx_nlink
        attr.uid = st.stx_uid
        attr.gid = st.stx_gid
        # as Linux's new_encode_dev()
        attr.rdev = (st.stx_rdev_minor & 0xff) | st.stx_rdev_major << 8 | (st.stx_rdev_minor & ~<uint32_t>0xff) << 12
        attr.blksize = st.stx_blksize
        # Mappings are always readable, so DAX needs a readable file.
        attr.flags = FUSE_ATTR_DAX if agreed(self.share, DAX_INODES) and st.stx_mode & S_IFMT == S_IFREG \
            and may_read(self, st) else 0

    cdef void fill_entry(self, fuse_entry_out *entry, uint64_t nodeid, const statx *st, bint foreign) noexcept nogil:
        entry.nodeid = nodeid
        entry.generation = 0            # node ids are never used again
        entry.entry_valid = entry.attr_valid = self.share.valid
        entry.entry_valid_nsec = entry.attr_valid_nsec = 0
        self.fill_attr(&entry.attr, st, foreign)

    cdef int64_t lookup(self, const Node *parent, int dirfd, const char *name, fuse_entry_out *entry,
                        bint likely) noexcept nogil:
        # Look up `name` in `parent`, open as `dirfd`. `likely`: the guest probably knows the file, so try without
        # opening a descriptor. Returns the entry's size or -errno.
        cdef statx st
        cdef uint64_t nodeid
        cdef int fd
        if likely:
            if statx_call(dirfd, name, AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT, MASK, &st) < 0:
                return -errno
            nodeid = 0
            if not parent.overlay or st.stx_nlink == 1 or st.stx_mode & S_IFMT == S_IFDIR:
                nodeid = self.table.node_find(&st, parent, name)
            if nodeid:
                fill_found(self, parent, entry, nodeid, &st)
                return sizeof(fuse_entry_out)
        fd = open_granted(dirfd, name, O_PATH | O_NOFOLLOW | O_CLOEXEC, FOR_LOOKUP)
        if fd < 0:
            return -errno
        return self.adopt(parent, name, fd, entry)

    cdef int64_t adopt(self, const Node *parent, const char *name, int fd, fuse_entry_out *entry) noexcept nogil:
        # Make a node and an entry for the O_PATH descriptor `fd`, which this takes over. The file is `name` in
        # `parent`, or has no name (NULL). Returns the entry's size or -errno.
        cdef statx st
        cdef uint64_t nodeid
        cdef int error = 0
        cdef bint overlay = False
        if statx_call(fd, b"", AT_EMPTY_PATH, MASK, &st) < 0:
            error = errno
        elif not enters(self, parent, fd, &st, &overlay):
            error = EXDEV
        if error:
            close(fd)
            return -error
        if overlay and st.stx_nlink > 1 and st.stx_mode & S_IFMT != S_IFDIR:
            nodeid = add_linked(self, fd, &st, parent, name)
        else:
            nodeid = self.table.node_add(fd, &st, parent, name, overlay, False)
        if nodeid == 0:
            return -ENFILE
        fill_found(self, parent, entry, nodeid, &st)
        return sizeof(fuse_entry_out)
