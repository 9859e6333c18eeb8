# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""FUSE operations on nodes: names, attributes, opening.

A name from the guest is a single path component. It is validated and used relative to the descriptor of a node. A node
is opened through /proc/self/fd, and only as its known type of file. No path is ever built from guest data.

`self` is the thread that executes the operation, with a copy of the request.
"""
from libc.errno cimport (
    EACCES, EBADF, EEXIST, EINVAL, EIO, EISDIR, ELOOP, ENFILE, ENOENT, ENOSYS, ENOTDIR, ENXIO, EOPNOTSUPP, EPERM,
    ERANGE, EROFS, ESTALE, errno,
)
from libc.stdint cimport INT64_MAX, int64_t, uint32_t, uint64_t
from libc.string cimport memchr, memmove, memset, strcmp, strlen

from virtio.fs._host cimport *
from virtio.fs._inodes cimport MASK, ROOT, Node, device_of, make_room, node_at, open_granted
from virtio.fs._share cimport NAME_MAX, NO_OPEN, PATH_MAX, XATTR_MAX, FuseThread, agreed
from virtio.fs._table cimport Handle
from virtio.fs._fuse cimport *
from vmm._budget cimport FOR_LOOKUP, FOR_OPEN, granted


cdef enum:
    MAX_SYNCED = 64             # most file systems that one SYNCFS syncs

cdef bint is_acl(const char *name) noexcept nogil:
    return strcmp(name, b"system.posix_acl_access") == 0 or strcmp(name, b"system.posix_acl_default") == 0

cdef int64_t on_node(FuseThread self, const fuse_in_header *h) noexcept nogil:
    cdef uint32_t opcode = h.opcode
    cdef int64_t result
    cdef Node *node
    if opcode == FUSE_LOOKUP and self.name[0] == c'.' and (self.name[1] == 0 or strcmp(self.name, b"..") == 0):
        return op_again(self, h.nodeid, self.name[1] == c'.')
    node = self.table.node_get(h.nodeid)
    if node == NULL:
        return -errno
    if opcode == FUSE_LOOKUP:
        result = op_lookup(self, node)
    elif opcode == FUSE_GETATTR:
        result = op_getattr(self, node)
    elif opcode == FUSE_SETATTR:
        result = op_setattr(self, node, h.nodeid)
    elif opcode == FUSE_READLINK:
        result = op_readlink(self, node)
    elif opcode == FUSE_SYMLINK or opcode == FUSE_MKNOD or opcode == FUSE_MKDIR:
        result = op_make(self, node, h)
    elif opcode == FUSE_UNLINK:
        result = op_remove(self, node, 0)
    elif opcode == FUSE_RMDIR:
        result = op_remove(self, node, AT_REMOVEDIR)
    elif opcode == FUSE_RENAME or opcode == FUSE_RENAME2:
        result = op_rename(self, node, h)
    elif opcode == FUSE_LINK:
        result = op_link(self, node)
    elif opcode == FUSE_OPEN:
        result = open_node(
            self, node, (<fuse_open_in *>self.request).flags,
            (<fuse_open_in *>self.request).open_flags & FUSE_OPEN_KILL_SUIDGID, <fuse_open_out *>self.out)
    elif opcode == FUSE_OPENDIR:
        result = op_opendir(self, node)
    elif opcode == FUSE_CREATE or opcode == FUSE_TMPFILE:
        result = op_create(self, node, h)
    elif opcode == FUSE_STATFS:
        result = op_statfs(self, node)
    elif opcode == FUSE_ACCESS:
        result = op_access(self, node, h)
    elif opcode == FUSE_SYNCFS:
        result = op_syncfs(self, node)
    elif opcode == FUSE_SETUPMAPPING:
        result = op_setupmapping(self, node)
    else:
        result = op_xattr(self, node, opcode)
    self.table.node_put(node)
    return result

cdef int64_t op_lookup(FuseThread self, Node *node) noexcept nogil:
    cdef fuse_entry_out *entry = <fuse_entry_out *>self.out
    cdef int64_t result = self.lookup(node, node.fd, self.name, entry, True)
    if result == -ENOENT and self.share.dir_flags:
        memset(entry, 0, sizeof(fuse_entry_out))        # node 0: no such file; the guest may cache that
        entry.entry_valid = self.share.valid
        return sizeof(fuse_entry_out)
    return result

cdef int64_t op_again(FuseThread self, uint64_t nodeid, bint above) noexcept nogil:
    # LOOKUP of "." and "..". The guest sends these for a file handle (knfsd, open_by_handle_at): it asks for the
    # handle's node and for the directory above, both of which it may have forgotten. Nothing above the root is
    # found, and no node that the guest never knew.
    cdef fuse_entry_out *entry = <fuse_entry_out *>self.out
    cdef Node *node = self.table.node_recall(nodeid)
    cdef Node *root
    cdef statx st
    cdef int64_t result = sizeof(fuse_entry_out)
    if node == NULL:
        return -errno
    if statx_call(node.fd, b".." if above and nodeid != ROOT else b"", AT_EMPTY_PATH, MASK, &st) < 0:
        result = -errno
    elif not above or nodeid == ROOT:
        self.fill_entry(entry, nodeid, &st, node.foreign)
    else:
        root = node_at(self.table, ROOT)
        if root.dev == device_of(&st) and root.ino == st.stx_ino and root.mnt == st.stx_mnt_id:
            self.fill_entry(entry, ROOT, &st, False)
        else:
            self.fill_entry(entry, self.table.node_find(&st, NULL, NULL), &st, False)
            if entry.nodeid == 0:
                result = -ESTALE
    if above or result < 0:
        self.table.node_forget(nodeid, 1)
    self.table.node_put(node)
    return result

cdef int open_fd(FuseThread self, Node *node, int flags) noexcept nogil:
    cdef int fd = open_granted(AT_FDCWD, self.path_of(node.fd), flags, FOR_OPEN)
    if fd >= 0 and flags & (O_ACCMODE | O_TRUNC):
        changed(self, node)
    return fd

cdef void changed(FuseThread self, Node *node) noexcept nogil:
    # On an overlayfs the first change copies a file up, and may give it another identity.
    cdef statx st
    if node.overlay and statx_call(node.fd, b"", AT_EMPTY_PATH, MASK, &st) == 0:
        self.table.set_identity(node, &st)

cdef int64_t op_getattr(FuseThread self, Node *node) noexcept nogil:
    cdef fuse_attr_out *out = <fuse_attr_out *>self.out
    cdef statx st
    if statx_call(node.fd, b"", AT_EMPTY_PATH, MASK, &st) < 0:
        return -errno
    if node.overlay:
        self.table.set_identity(node, &st)
    memset(out, 0, sizeof(fuse_attr_out))
    out.attr_valid = self.share.valid
    self.fill_attr(&out.attr, &st, node.foreign)
    return sizeof(fuse_attr_out)

cdef int64_t op_setattr(FuseThread self, Node *node, uint64_t nodeid) noexcept nogil:
    cdef const fuse_setattr_in *arg = <const fuse_setattr_in *>self.request
    cdef uint32_t valid = arg.valid
    cdef Handle *handle = NULL
    cdef timespec[2] times
    cdef int status = 0, error = 0
    cdef bint kill
    if valid & FATTR_SIZE and (node.type != S_IFREG or arg.size > <uint64_t>INT64_MAX):
        return -EISDIR if node.type == S_IFDIR else -EINVAL
    if valid & FATTR_MODE and node.type == S_IFLNK:
        return -EOPNOTSUPP
    if (valid & FATTR_UID and arg.uid == <uint32_t>-1) or (valid & FATTR_GID and arg.gid == <uint32_t>-1):
        return -EINVAL      # -1 means "no change" to the host
    if valid & FATTR_FH and not agreed(self.share, NO_OPEN):
        handle = self.table.handle_get(arg.fh, nodeid, S_IFREG)
        if handle == NULL:
            return -EBADF
    if valid & FATTR_MODE:
        status = fchmod(handle.fd, arg.mode & 0o7777) if handle != NULL \
            else fchmodat(AT_FDCWD, self.path_of(node.fd), arg.mode & 0o7777, 0)
    if status == 0 and valid & (FATTR_UID | FATTR_GID):
        status = fchownat(node.fd, b"", arg.uid if valid & FATTR_UID else <uint32_t>-1,
                          arg.gid if valid & FATTR_GID else <uint32_t>-1, AT_EMPTY_PATH | AT_SYMLINK_NOFOLLOW)
    if status == 0 and valid & FATTR_SIZE:
        kill = valid & FATTR_KILL_SUIDGID and self.credentials.switches
        if kill:
            fs_capset(self.credentials.full, CAPS_NO_FSETID)
        status = ftruncate(handle.fd, arg.size) if handle != NULL \
            else truncate(self.path_of(node.fd), arg.size)
        if status < 0:
            error = errno
        if kill:
            fs_capset(self.credentials.full, CAPS_ALL)
    if status == 0 and valid & (FATTR_ATIME | FATTR_MTIME):
        times[0].tv_sec, times[0].tv_nsec = arg.atime, arg.atimensec
        times[1].tv_sec, times[1].tv_nsec = arg.mtime, arg.mtimensec
        if not valid & FATTR_ATIME:
            times[0].tv_nsec = UTIME_OMIT
        elif valid & FATTR_ATIME_NOW:
            times[0].tv_nsec = UTIME_NOW
        if not valid & FATTR_MTIME:
            times[1].tv_nsec = UTIME_OMIT
        elif valid & FATTR_MTIME_NOW:
            times[1].tv_nsec = UTIME_NOW
        status = utimensat(AT_FDCWD, self.path_of(node.fd), times, 0)
        if status < 0 and errno == EPERM and valid & FATTR_FH and valid & FATTR_CTIME and not valid & FATTR_ATIME:
            # A guest with a writeback cache sends the time at which its pages were written, for a file that it has
            # open for writing. It need not own the file, so if the host refuses, the time of the host's write
            # stays.
            status = 0
    if status < 0 and error == 0:
        error = errno
    if handle != NULL:
        self.table.handle_put(handle)
    return -error if status < 0 else op_getattr(self, node)

cdef int64_t op_readlink(FuseThread self, Node *node) noexcept nogil:
    cdef ssize_t size
    if node.type != S_IFLNK:
        return -EINVAL
    size = readlinkat(node.fd, b"", <char *>self.out, PATH_MAX)
    if size < 0:
        return -errno
    return size if <uint64_t>size <= self.room else -EIO

cdef bint has_descriptor(const Node *node) noexcept nogil:
    # Whether a descriptor is free for a file: asked before one is made, or it would be there in spite of the error.
    cdef int fd = granted(dup(node.fd), FOR_LOOKUP)
    if fd < 0 and make_room():
        fd = granted(dup(node.fd), FOR_LOOKUP)
    if fd >= 0:
        close(fd)
    return fd >= 0

cdef int64_t op_make(FuseThread self, Node *node, const fuse_in_header *h) noexcept nogil:
    # SYMLINK, MKNOD, MKDIR
    cdef const fuse_mknod_in *arg = <const fuse_mknod_in *>self.request
    cdef int status, error
    cdef bint switch = self.credentials.switches and (h.uid or h.gid)
    cdef uint64_t target = 0
    if h.opcode == FUSE_SYMLINK:
        target = self.name2 - <const char *>self.request
        if target >= self.length or memchr(self.name2, 0, self.length - target) == NULL or self.name2[0] == 0:
            return self.bad_request(-EINVAL)
    if not has_descriptor(node):
        return -ENFILE
    if switch:
        error = self.become(h.uid, h.gid)
        if error:
            return -error
    if h.opcode == FUSE_SYMLINK:
        status = symlinkat(self.name2, node.fd, self.name)
    elif h.opcode == FUSE_MKDIR:
        status = mkdirat(node.fd, self.name, (<const fuse_mkdir_in *>arg).mode & 0o7777)
    else:
        # as Linux's new_decode_dev()
        status = mknodat(node.fd, self.name, arg.mode, makedev(
            (arg.rdev & 0xfff00) >> 8, (arg.rdev & 0xff) | (arg.rdev >> 12 & 0xfff00)))
    error = errno
    if switch:
        fs_return(h.uid)
    if status < 0:
        return -error
    return self.lookup(node, node.fd, self.name, <fuse_entry_out *>self.out, False)

cdef int64_t op_remove(FuseThread self, Node *node, int flags) noexcept nogil:
    cdef Node *victim
    cdef int status
    if not pin_victim(self, node, self.name, &victim):
        return -errno
    status = -errno if unlinkat(node.fd, self.name, flags) < 0 else 0
    if victim != NULL:
        if status == 0:
            self.table.node_unnamed(victim, node, self.name)
        self.table.node_put(victim)
    return status

cdef bint pin_victim(FuseThread self, Node *parent, const char *name, Node **node) noexcept nogil:
    # Pin the node of the file that is about to lose `name`: it must not be opened, or saved, by that name any more,
    # and its descriptor may soon be the only way to it, as to a FIFO that the guest has open. *node NULL: the guest
    # does not know it. Returns False, and errno, if it cannot be pinned and may be in use without a handle.
    cdef statx st
    cdef uint64_t nodeid
    node[0] = NULL
    if statx_call(parent.fd, name, AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT, MASK, &st) == 0:
        nodeid = self.table.node_id(&st)
        if nodeid:
            node[0] = self.table.node_get(nodeid)
            return node[0] != NULL or not agreed(self.share, NO_OPEN)
    return True

cdef int64_t op_rename(FuseThread self, Node *node, const fuse_in_header *h) noexcept nogil:
    cdef const fuse_rename2_in *arg = <const fuse_rename2_in *>self.request
    cdef uint32_t flags = arg.flags if h.opcode == FUSE_RENAME2 else 0
    cdef Node *newdir
    cdef Node *victim = NULL
    cdef int status = 0
    # The host creates the whiteout, so it must belong to the user. The guest's kernel has checked everything else.
    cdef bint switch = flags & RENAME_WHITEOUT and self.credentials.switches and (h.uid or h.gid)
    if flags & ~<uint32_t>(RENAME_NOREPLACE | RENAME_EXCHANGE | RENAME_WHITEOUT):
        return -EINVAL
    newdir = self.table.node_get(arg.newdir)
    if newdir == NULL:
        return -errno
    if not flags & RENAME_EXCHANGE and not pin_victim(self, newdir, self.name2, &victim):
        status = -errno
    if switch and status == 0:
        status = -fs_become(h.uid, h.gid, self.credentials.full, CAPS_ALL)
    if status == 0:
        status = -errno if renameat2(node.fd, self.name, newdir.fd, self.name2, flags) < 0 else 0
        if switch:
            fs_return(h.uid)
    if victim != NULL:
        if status == 0:
            self.table.node_unnamed(victim, newdir, self.name2)
        self.table.node_put(victim)
    if status == 0:             # after the victim, which may be the same file: then it keeps both names
        moved(self, newdir, self.name2)
        if flags & RENAME_EXCHANGE:
            moved(self, node, self.name)
    self.table.node_put(newdir)
    return status

cdef void moved(FuseThread self, Node *parent, const char *name) noexcept nogil:
    cdef statx st
    if statx_call(parent.fd, name, AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT, MASK, &st) == 0:
        self.table.node_moved(&st, parent, name)

cdef int64_t op_link(FuseThread self, Node *node) noexcept nogil:
    cdef Node *old = self.table.node_get((<const fuse_link_in *>self.request).oldnodeid)
    cdef fuse_entry_out *entry = <fuse_entry_out *>self.out
    cdef statx st
    cdef int64_t result
    if old == NULL:
        return -errno
    # AT_SYMLINK_FOLLOW follows only the magic link, to the inode itself, even if that is a symbolic link.
    if linkat(AT_FDCWD, self.path_of(old.fd), node.fd, self.name, AT_SYMLINK_FOLLOW) < 0 \
            or statx_call(old.fd, b"", AT_EMPTY_PATH, MASK, &st) < 0:
        result = -errno
    else:
        if old.overlay:
            self.table.set_identity(old, &st)
        # It is known by this name from here on: often the name before goes next, as git's of a new object.
        self.fill_entry(entry, self.table.count_lookup(old, node, self.name), &st, old.foreign)
        result = sizeof(fuse_entry_out)
    self.table.node_put(old)
    return result

cdef int64_t op_access(FuseThread self, Node *node, const fuse_in_header *h) noexcept nogil:
    # Virtiofs mounts with default_permissions, so Linux checks permissions itself and does not send this.
    cdef uint32_t mask = (<const fuse_access_in *>self.request).mask, mode
    cdef statx st
    if statx_call(node.fd, b"", AT_EMPTY_PATH, STATX_BASIC_STATS, &st) < 0:
        return -errno
    mode = st.stx_mode
    if h.uid == 0:
        # Root may execute a file that has any execute bit.
        return -EACCES if mask & 1 and node.type != S_IFDIR and not mode & 0o111 else 0
    mode = mode >> 6 if h.uid == st.stx_uid else mode >> 3 if h.gid == st.stx_gid else mode
    return -EACCES if mask & 7 & ~mode else 0

cdef int64_t op_statfs(FuseThread self, Node *node) noexcept nogil:
    cdef fuse_statfs_out *out = <fuse_statfs_out *>self.out
    cdef host_statfs st
    if fstatfs(node.fd, &st) < 0:
        return -errno
    memset(out, 0, sizeof(fuse_statfs_out))
    out.st.blocks, out.st.bfree, out.st.bavail = st.f_blocks, st.f_bfree, st.f_bavail
    out.st.files, out.st.ffree = st.f_files, st.f_ffree
    out.st.bsize, out.st.frsize, out.st.namelen = st.f_bsize, st.f_frsize, st.f_namelen
    return sizeof(fuse_statfs_out)

cdef int64_t op_syncfs(FuseThread self, Node *node) noexcept nogil:
    # Sync the file system of `node`. For the root, sync every file system on which the guest knows a file.
    cdef uint64_t[MAX_SYNCED] devices
    cdef uint32_t index = ROOT
    cdef uint32_t count = 0
    cdef int64_t result, worst
    cdef Node *other
    if node.type != S_IFDIR:
        return -EINVAL
    worst = sync_of(self, node)
    if node.slot.index == ROOT and self.share.submounts:
        devices[0] = node.dev
        count = 1
        while count < MAX_SYNCED:
            other = self.table.node_on_other_device(index, devices, count)
            if other == NULL:
                break
            index = other.slot.index + 1
            result = sync_of(self, other)
            if result == 0:
                devices[count] = other.dev
                count += 1
            elif result != -EACCES:     # EACCES: this user may not open the file; try another on that file system
                worst = result
            self.table.node_put(other)
    return worst

cdef int64_t sync_of(FuseThread self, Node *node) noexcept nogil:
    cdef int fd, status
    fd = open_fd(self, node, O_RDONLY | O_CLOEXEC)
    if fd < 0:
        return -errno
    status = -errno if syncfs(fd) < 0 else 0
    close(fd)
    return status

# The DAX window

cdef int64_t op_setupmapping(FuseThread self, Node *node) noexcept nogil:
    # Linux sends no handle here: the node identifies the file, and the mapping outlives all its handles.
    cdef const fuse_setupmapping_in *arg = <const fuse_setupmapping_in *>self.request
    cdef bint writable = arg.flags & FUSE_SETUPMAPPING_FLAG_WRITE
    cdef int64_t result
    cdef int fd
    cdef Handle *handle
    if self.share.window is None:
        return -ENOSYS
    if arg.flags & ~<uint64_t>(FUSE_SETUPMAPPING_FLAG_WRITE | FUSE_SETUPMAPPING_FLAG_READ) \
            or node.type != S_IFREG:
        return -EINVAL
    if writable and self.share.read_only:
        return -EROFS
    # Use a file that the guest already has open: opening it again might be refused.
    handle = self.table.handle_of(node, writable)
    fd = handle.fd if handle != NULL else open_fd(self, node, (O_RDWR if writable else O_RDONLY) | O_CLOEXEC)
    if fd < 0:
        return -errno
    result = self.share.window.map(fd, arg.foffset, arg.len, arg.moffset, writable)
    if result == -ENFILE and make_room():
        result = self.share.window.map(fd, arg.foffset, arg.len, arg.moffset, writable)
    if handle != NULL:
        self.table.handle_put(handle)
    else:
        close(fd)
    return result

cdef int64_t op_xattr(FuseThread self, Node *node, uint32_t opcode) noexcept nogil:
    # GETXATTR, LISTXATTR, SETXATTR, REMOVEXATTR. ACLs are hidden: FUSE_POSIX_ACL is not negotiated, so the guest
    # does not obey them and must not set them.
    cdef uint64_t fixed = fuse_ops[opcode].size, at, kept, size, room
    cdef char *name = <char *>self.request + fixed
    cdef const char *end = <const char *>memchr(name, 0, self.length - fixed)
    cdef char *names = <char *>self.out
    cdef const char *path = self.path_of(node.fd)
    cdef ssize_t result
    if opcode != FUSE_LISTXATTR:
        if end == NULL or end == name:
            return self.bad_request(-EINVAL)
        if end - name > NAME_MAX:
            return -ERANGE
        if is_acl(name):
            return -EOPNOTSUPP
    if opcode == FUSE_SETXATTR:
        at = end + 1 - <const char *>self.request
        size = (<const fuse_setxattr_in *>self.request).size
        if size > self.length - at:
            return self.bad_request(-EINVAL)
        result = setxattr(path, name, end + 1, size, (<const fuse_setxattr_in *>self.request).flags)
    elif opcode == FUSE_REMOVEXATTR:
        result = removexattr(path, name)
    if opcode == FUSE_SETXATTR or opcode == FUSE_REMOVEXATTR:
        if result < 0:
            return -errno
        changed(self, node)
        return 0
    room = (<const fuse_getxattr_in *>self.request).size
    if room > self.room or (room == 0 and self.room < sizeof(fuse_getxattr_out)):
        return self.bad_request(-EIO)
    if opcode == FUSE_GETXATTR:
        result = getxattr(path, name, self.out if room else NULL, min(room, <uint64_t>XATTR_MAX))
        if result < 0:
            return -errno
    else:
        result = listxattr(path, names, XATTR_MAX)
        if result < 0:
            return -errno
        at = kept = 0
        while at < <uint64_t>result:
            size = strlen(names + at) + 1       # the kernel ends each name with a NUL
            if not is_acl(names + at):
                if at != kept:
                    memmove(names + kept, names + at, size)
                kept += size
            at += size
        result = kept
        if room and kept > room:
            return -ERANGE
    if room == 0:
        memset(self.out, 0, sizeof(fuse_getxattr_out))
        (<fuse_getxattr_out *>self.out).size = <uint32_t>result
        return sizeof(fuse_getxattr_out)
    return result

# Opening

cdef int host_flags(FuseThread self, uint32_t wanted) noexcept nogil:
    # The host's open flags for the guest's. O_DIRECT concerns only the guest's cache. O_APPEND may change while the
    # file is open, so each WRITE carries it.
    cdef int flags = <int>wanted & (O_ACCMODE | O_TRUNC | O_SYNC | O_DSYNC)
    if (self.share.writeback or self.share.window is not None) and flags & O_ACCMODE == O_WRONLY:
        flags = flags & ~O_ACCMODE | O_RDWR     # the guest's cache and its mappings also read the file
    return flags | O_CLOEXEC | O_NOCTTY

cdef int64_t open_node(FuseThread self, Node *node, uint32_t wanted, bint kill, fuse_open_out *out) noexcept nogil:
    cdef int flags = host_flags(self, wanted), fd, error
    cdef uint32_t open_flags = self.share.open_flags
    if node.type != S_IFREG:
        return -EISDIR if node.type == S_IFDIR else -ELOOP if node.type == S_IFLNK else -ENXIO
    if self.share.read_only and (wanted & O_ACCMODE != O_RDONLY or wanted & (O_TRUNC | O_CREAT)):
        return -EROFS
    kill = kill and flags & O_TRUNC and self.credentials.switches
    if kill:
        fs_capset(self.credentials.full, CAPS_NO_FSETID)
    fd = open_fd(self, node, flags)
    if fd < 0 and wanted & O_ACCMODE == O_WRONLY and (errno == EACCES or (errno == EPERM and wanted & O_APPEND)):
        # The user may not read it, or one can only append to it (chattr +a): bypass the guest's cache.
        flags = flags & ~O_ACCMODE | O_WRONLY | (O_APPEND if errno == EPERM else 0)
        open_flags |= FOPEN_DIRECT_IO
        fd = open_fd(self, node, flags)
    error = errno
    if kill:
        fs_capset(self.credentials.full, CAPS_ALL)
    if fd < 0:
        return -error
    return give_handle(self, out, fd, node, flags, open_flags)

cdef int64_t give_handle(FuseThread self, fuse_open_out *out, int fd, Node *node, int flags,
                         uint32_t open_flags) noexcept nogil:
    # Answer with a handle for `fd`, which this takes over.
    memset(out, 0, sizeof(fuse_open_out))
    out.fh = self.table.handle_add(fd, node, flags)
    out.open_flags = open_flags
    return sizeof(fuse_open_out) if out.fh else -ENFILE

cdef int64_t op_opendir(FuseThread self, Node *node) noexcept nogil:
    cdef int fd
    if node.type != S_IFDIR:
        return -ENOTDIR
    fd = open_fd(self, node, O_RDONLY | O_DIRECTORY | O_CLOEXEC)
    if fd < 0:
        return -errno
    return give_handle(self, <fuse_open_out *>self.out, fd, node, O_RDONLY, self.share.dir_flags)

cdef int64_t op_create(FuseThread self, Node *node, const fuse_in_header *h) noexcept nogil:
    # CREATE and TMPFILE. Without O_EXCL the host could open an existing device or FIFO. So the file is created with
    # O_EXCL, and an existing one is opened like any other node.
    cdef const fuse_create_in *arg = <const fuse_create_in *>self.request
    cdef fuse_entry_out *entry = <fuse_entry_out *>self.out
    cdef fuse_open_out *opened = <fuse_open_out *>(self.out + sizeof(fuse_entry_out))
    cdef int flags = host_flags(self, arg.flags) & ~O_TRUNC, fd, path_fd, error
    cdef bint switch = self.credentials.switches and (h.uid or h.gid)
    cdef const char *name = self.name
    cdef int64_t result
    cdef Node *made = NULL
    if h.opcode == FUSE_TMPFILE:
        name = NULL
    if not has_descriptor(node):
        return -ENFILE
    if name == NULL and (node.type != S_IFDIR or flags & O_ACCMODE == O_RDONLY):
        return -EINVAL
    if switch:
        error = self.become(h.uid, h.gid)
        if error:
            return -error
    if name == NULL:
        fd = openat(AT_FDCWD, self.path_of(node.fd), flags | O_TMPFILE, arg.mode & 0o7777)
    else:
        fd = openat(node.fd, name, flags | O_CREAT | O_EXCL | O_NOFOLLOW, arg.mode & 0o7777)
    error = errno
    if switch:
        fs_return(h.uid)
    if fd >= 0:
        path_fd = openat(AT_FDCWD, self.path_of(fd), O_PATH | O_CLOEXEC)
        result = self.adopt(node, name, path_fd, entry) if path_fd >= 0 else -errno
    elif name == NULL or error != EEXIST or arg.flags & O_EXCL:
        return -error
    else:
        result = self.lookup(node, node.fd, name, entry, True)
    if result >= 0:
        made = self.table.node_get(entry.nodeid)
        if made == NULL:
            self.table.node_forget(entry.nodeid, 1)
            result = -ESTALE
    if made == NULL:
        if fd >= 0:
            close(fd)
        return result
    if fd < 0:
        result = open_node(self, made, arg.flags, arg.open_flags & FUSE_OPEN_KILL_SUIDGID, opened)
    elif agreed(self.share, NO_OPEN):
        close(fd)               # TMPFILE: its node is enough, as for any other file
        memset(opened, 0, sizeof(fuse_open_out))
        opened.open_flags = self.share.open_flags
    else:
        result = give_handle(self, opened, fd, made, flags, self.share.open_flags)
    self.table.node_put(made)
    if result < 0:
        self.table.node_forget(entry.nodeid, 1)
        return result
    return sizeof(fuse_entry_out) + sizeof(fuse_open_out)
