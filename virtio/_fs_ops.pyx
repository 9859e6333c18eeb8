# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""The FUSE operations of a share, done on the host as the guest asks, and never outside the shared directory.

A name from the guest is one component, judged, and used at a descriptor that the guest's node stands for; a descriptor
is opened anew through /proc/self/fd, and only as the type of file that it is known to be. No path is ever put together.
Source: linux/fuse.h, and fs/fuse/ of Linux for what a kernel expects of each operation.
"""
import resource

from libc.errno cimport (
    EACCES, EBADF, EEXIST, EINVAL, EIO, EISDIR, ELOOP, ENAMETOOLONG, ENFILE, ENOENT, ENOMEM, ENOSYS, ENOTDIR,
    ENOTTY, ENXIO, EOPNOTSUPP, EPROTO, ERANGE, EROFS, ESTALE, errno,
)
from libc.stdint cimport INT64_MAX, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memchr, memcpy, memmove, memset, strcmp, strlen

from virtio._fs_dax cimport DAX_SHIFT, Window
from virtio._fs_host cimport *
from virtio._fs_table cimport (
    DIRECTORY, DIRENTS, FILE, ROOT, Handle, Node, Table, pthread_mutex_lock, pthread_mutex_unlock,
)
from virtio._fuse cimport *
from vmm._fastpath cimport DescChain, iovec

cdef enum:
    IN_HEADER = 40
    OUT_HEADER = 16
    MAX_WRITE = 1 << 20             # bytes of a WRITE; 256 pages, the most that Linux sends
    REQUEST_MAX = 65536 + 8192      # an extended attribute's value, its name, and what is around them
    OUT_MAX = 65536 + 8192          # the same in a reply
    NAME_MAX = 255
    PATH_MAX = 4096
    XATTR_MAX = 65536
    MINOR_LEAST = 31                # Linux 5.4, the first with virtiofs
    MASK = STATX_BASIC_STATS | STATX_MNT_ID

_NETWORK_FS = {0x6969, 0xFF534D42, 0xFE534D42, 0x65735546, 0x01021997, 0x00C36400}     # NFS, CIFS, SMB2, FUSE, 9p, Ceph


cdef bint is_slow(uint32_t opcode) noexcept nogil:
    """Whether an operation may wait long for the host's disk, and is better done beside the queue's own thread."""
    return opcode <= FUSE_TMPFILE and fuse_ops[opcode].flags & OP_SLOW


cdef uint64_t chain_gather(DescChain *chain, uint64_t skip, void *to, uint64_t size) noexcept nogil:
    """Copy `size` readable bytes from offset `skip`; the bytes that there were."""
    cdef uint64_t done = 0, take
    cdef uint32_t i
    cdef iovec *v
    for i in range(chain.n_readable):
        v = &chain.iov[i]
        if skip >= v.iov_len:
            skip -= v.iov_len
            continue
        take = min(v.iov_len - skip, size - done)
        memcpy(<uint8_t *>to + done, <uint8_t *>v.iov_base + skip, take)
        done += take
        skip = 0
        if done == size:
            break
    return done


cdef void chain_scatter(DescChain *chain, uint64_t skip, const void *source, uint64_t size) noexcept nogil:
    # Into the writable buffers from offset `skip`; there is room.
    cdef uint64_t done = 0, take
    cdef uint32_t i
    cdef iovec *v
    for i in range(chain.n_readable, chain.n_readable + chain.n_writable):
        if done == size:
            return
        v = &chain.iov[i]
        if skip >= v.iov_len:
            skip -= v.iov_len
            continue
        take = min(v.iov_len - skip, size - done)
        memcpy(<uint8_t *>v.iov_base + skip, <const uint8_t *>source + done, take)
        done += take
        skip = 0


cdef uint32_t iov_window(iovec **iov, uint32_t count, uint64_t skip, uint64_t size) noexcept nogil:
    # Narrow *iov to `size` bytes from offset `skip`, in place; the number of buffers left.
    cdef uint32_t n = 0
    cdef iovec *v
    while count and skip >= iov[0].iov_len:
        skip -= iov[0].iov_len
        iov[0] += 1
        count -= 1
    if count:
        iov[0].iov_base = <uint8_t *>iov[0].iov_base + skip
        iov[0].iov_len -= skip
    while n < count and size:
        v = &iov[0][n]
        v.iov_len = min(v.iov_len, size)
        size -= v.iov_len
        n += 1
    return n


cdef int64_t component(const uint8_t *p, uint64_t room) noexcept nogil:
    # The length of the name at `p`, one component of a path that goes down, or an errno.
    cdef const uint8_t *end = <const uint8_t *>memchr(p, 0, room)
    cdef uint64_t length
    if end == NULL:
        return -EINVAL
    length = end - p
    if length > NAME_MAX:
        return -ENAMETOOLONG
    if length == 0 or memchr(p, c'/', length) != NULL:
        return -EINVAL
    if p[0] == c'.' and (length == 1 or (length == 2 and p[1] == c'.')):
        return -EINVAL
    return length


cdef bint is_acl(const char *name) noexcept nogil:
    return strcmp(name, b"system.posix_acl_access") == 0 or strcmp(name, b"system.posix_acl_default") == 0


def raise_descriptor_limit():
    """Let this process have as many descriptors as the host allows it; how many that are."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        with open("/proc/sys/fs/nr_open") as limit:
            most = int(limit.read())
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        return most
    except (OSError, ValueError):
        pass        # not root, or no /proc
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


cdef class Share:
    """What all threads of one share have in common.

    :param root_fd: O_PATH descriptor of the directory; owned from here on
    :param proc_fd: of /proc/self/fd; borrowed
    :param budget: descriptors that the guest may make this process hold
    :param valid: seconds that the guest may believe names and attributes
    :param squash: ``(uid, gid)`` of every access, or None: root acts as the user that the guest names
    :param dax: bytes of the DAX window, a multiple of 2 MiB; 0: none
    :raises OSError: no address space left for the window
    """

    def __init__(self, int root_fd, int proc_fd, uint64_t budget, *, bint read_only, bint writeback, uint64_t valid,
                 bint direct_io, bint keep_cache, squash, uint64_t dax=0):
        cdef host_statfs st
        self.flush_matters = fstatfs(root_fd, &st) == 0 and <uint32_t>st.f_type in _NETWORK_FS
        self.table = Table(root_fd, budget)
        self.proc_fd = proc_fd
        self.read_only = read_only
        self.writeback = writeback and not read_only
        self.valid = valid
        if direct_io:
            self.open_flags = FOPEN_DIRECT_IO | FOPEN_PARALLEL_DIRECT_WRITES
        if keep_cache:
            self.open_flags, self.dir_flags = FOPEN_KEEP_CACHE, FOPEN_KEEP_CACHE | FOPEN_CACHE_DIR
        self.window = Window(dax) if dax else None
        if squash is not None:
            self.squash = True
            self.uid, self.gid = squash

    def clear(self):
        """Forget what the guest was told: its driver is gone."""
        fs_store(&self.initialised, 0)
        if self.window is not None:
            self.window.clear()
        self.table.clear()

    @property
    def nodes(self):
        """Files that the guest knows of, the directory itself included."""
        return self.table.nodes

    @property
    def handles(self):
        """Files and directories that the guest has open."""
        return self.table.handles


cdef class Server:
    """Answers requests, one at a time; every thread has one of its own."""

    def __cinit__(self, Share share):
        self.share = share
        self.table = share.table
        self.request = <uint8_t *>calloc(1, REQUEST_MAX + 1)
        self.out = <uint8_t *>calloc(1, OUT_MAX)
        if self.request == NULL or self.out == NULL:
            raise MemoryError()

    def __dealloc__(self):
        free(self.request)
        free(self.out)

    cdef int enter(self) noexcept nogil:
        cdef int error
        cdef const char *prefix = b"/proc/self/fd/"
        self.path_start = 0
        if not fs_own(self.share.proc_fd):
            self.path_start = <uint32_t>strlen(prefix)
            memcpy(self.path, prefix, self.path_start)
        self.credentials.switches = False
        if self.share.squash:
            error = fs_squash(self.share.uid, self.share.gid)
            if error:
                return error
        else:
            self.credentials.switches = fs_prepare(
                self.credentials.full, self.credentials.create, self.credentials.no_fsetid)
        return 0

    cdef const char *path_of(self, int fd) noexcept nogil:
        # The magic link to `fd`, which leads to its very inode; what is done by it was judged by the node's type.
        cdef char[12] digits
        cdef uint32_t n = 0, i
        while True:
            digits[n] = <char>(c'0' + fd % 10)
            n += 1
            fd //= 10
            if fd == 0:
                break
        for i in range(n):
            self.path[self.path_start + i] = digits[n - 1 - i]
        self.path[self.path_start + n] = 0
        return self.path

    # One request

    cdef uint32_t answer(self, const fuse_in_header *header, DescChain *chain) noexcept nogil:
        cdef fuse_out_header out
        cdef int64_t result
        self.counters.requests += 1
        self.direct = False
        if self.share.window is not None:
            self.share.window.heal()
        result = self.judge(header, chain)
        if result == NO_REPLY:
            return 0
        if chain.writable_bytes < OUT_HEADER:
            self.counters.bad_requests += 1
            return 0
        out.unique = header.unique
        out.error = <int>result if result < 0 else 0
        out.len = OUT_HEADER + (<uint32_t>result if result > 0 else 0)
        if self.direct:
            self.narrowed[0] = self.before          # the header goes before the payload, maybe in the same buffer
        elif result > 0:
            chain_scatter(chain, OUT_HEADER, self.out, result)
        chain_scatter(chain, 0, &out, OUT_HEADER)
        return out.len

    cdef int64_t judge(self, const fuse_in_header *header, DescChain *chain) noexcept nogil:
        # What can be said of a request before anything is done for it; then it is done.
        cdef uint32_t opcode = header.opcode
        cdef uint64_t taken
        cdef int64_t length
        cdef const fuse_op *op
        cdef bint silent = False
        self.length = 0
        if opcode <= FUSE_TMPFILE:
            silent = fuse_ops[opcode].flags & OP_SILENT
        if chain.readable_bytes < IN_HEADER or header.len != chain.readable_bytes:
            self.counters.bad_requests += 1
            return NO_REPLY if silent else -EIO
        if opcode > FUSE_TMPFILE or not fuse_ops[opcode].flags & OP_KNOWN:
            return -ENOSYS
        op = &fuse_ops[opcode]
        taken = chain.readable_bytes - IN_HEADER
        self.room = chain.writable_bytes - OUT_HEADER if chain.writable_bytes >= OUT_HEADER else 0
        if not silent and (chain.writable_bytes < OUT_HEADER or self.room < op.out):
            self.counters.bad_requests += 1
            return -EIO
        if not fs_load(&self.share.initialised) and opcode != FUSE_INIT:
            self.counters.bad_requests += 1
            return NO_REPLY if silent else -EIO
        if op.flags & OP_CHANGES and self.share.read_only:
            return -EROFS
        if taken < op.size or (opcode != FUSE_WRITE and taken > REQUEST_MAX):
            self.counters.bad_requests += 1
            return NO_REPLY if silent else -EINVAL
        if opcode == FUSE_WRITE:
            taken = op.size         # the data stays where it is
        chain_gather(chain, IN_HEADER, self.request, taken)
        self.request[taken] = 0
        self.length = taken
        if op.names:
            length = component(self.request + op.size, taken - op.size)
            if length > 0:
                self.name = <const char *>self.request + op.size
                self.name2 = self.name + length + 1
                if op.names == 2:
                    length = component(<const uint8_t *>self.name2, taken - op.size - <uint64_t>length - 1)
            if length < 0:
                self.counters.bad_requests += length == -EINVAL
                return length
        return self.dispatch(header, chain)

    cdef int64_t dispatch(self, const fuse_in_header *h, DescChain *chain) noexcept nogil:
        cdef uint32_t opcode = h.opcode
        if fuse_ops[opcode].flags & OP_HANDLE:
            return self.on_handle(h, chain)
        if opcode == FUSE_INIT:
            return self.op_init()
        if opcode == FUSE_FORGET:
            return self.op_forget(h.nodeid)
        if opcode == FUSE_BATCH_FORGET:
            return self.op_batch_forget()
        if opcode == FUSE_INTERRUPT:
            return NO_REPLY         # nothing here waits for another request
        if opcode == FUSE_IOCTL:
            return -ENOTTY
        if opcode == FUSE_DESTROY:
            fs_store(&self.share.initialised, 0)
            if self.share.window is not None:
                self.share.window.clear()
            self.table.clear()
            return 0
        if opcode == FUSE_REMOVEMAPPING:
            return self.op_removemapping()
        if opcode == FUSE_RELEASE or opcode == FUSE_RELEASEDIR:
            if self.table.handle_release((<fuse_release_in *>self.request).fh, h.nodeid,
                                         FILE if opcode == FUSE_RELEASE else DIRECTORY):
                return 0
            return -EBADF
        return self.on_node(h)

    cdef int64_t on_node(self, const fuse_in_header *h) noexcept nogil:
        cdef uint32_t opcode = h.opcode
        cdef int64_t result
        cdef Node *node = self.table.node_get(h.nodeid)
        if node == NULL:
            return -ESTALE
        if opcode == FUSE_LOOKUP:
            result = self.op_lookup(node)
        elif opcode == FUSE_GETATTR:
            result = self.op_getattr(node)
        elif opcode == FUSE_SETATTR:
            result = self.op_setattr(node, h.nodeid)
        elif opcode == FUSE_READLINK:
            result = self.op_readlink(node)
        elif opcode == FUSE_SYMLINK or opcode == FUSE_MKNOD or opcode == FUSE_MKDIR:
            result = self.op_make(node, h)
        elif opcode == FUSE_UNLINK:
            result = self.op_remove(node, 0)
        elif opcode == FUSE_RMDIR:
            result = self.op_remove(node, AT_REMOVEDIR)
        elif opcode == FUSE_RENAME or opcode == FUSE_RENAME2:
            result = self.op_rename(node, h)
        elif opcode == FUSE_LINK:
            result = self.op_link(node)
        elif opcode == FUSE_OPEN:
            result = self.open_node(
                node, (<fuse_open_in *>self.request).flags,
                (<fuse_open_in *>self.request).open_flags & FUSE_OPEN_KILL_SUIDGID, <fuse_open_out *>self.out)
        elif opcode == FUSE_OPENDIR:
            result = self.op_opendir(node, h.nodeid)
        elif opcode == FUSE_CREATE or opcode == FUSE_TMPFILE:
            result = self.op_create(node, h)
        elif opcode == FUSE_STATFS:
            result = self.op_statfs(node)
        elif opcode == FUSE_ACCESS:
            result = self.op_access(node, h)
        elif opcode == FUSE_SYNCFS:
            result = self.op_syncfs(node)
        elif opcode == FUSE_SETUPMAPPING:
            result = self.op_setupmapping(node)
        else:
            result = self.op_xattr(node, opcode)
        self.table.node_put(node)
        return result

    cdef int64_t on_handle(self, const fuse_in_header *h, DescChain *chain) noexcept nogil:
        cdef uint32_t opcode = h.opcode
        cdef int64_t result
        cdef bint directory = opcode == FUSE_READDIR or opcode == FUSE_READDIRPLUS or opcode == FUSE_FSYNCDIR
        cdef Handle *handle
        if opcode == FUSE_FLUSH and not self.share.flush_matters:
            return -ENOSYS      # and Linux asks no more, which saves a round trip at every close
        # Every structure of these operations begins with the handle.
        handle = self.table.handle_get((<fuse_read_in *>self.request).fh, h.nodeid, DIRECTORY if directory else FILE)
        if handle == NULL:
            return -EBADF
        if opcode == FUSE_READ:
            result = self.op_read(handle, chain)
        elif opcode == FUSE_WRITE:
            result = self.op_write(handle, chain)
        elif opcode == FUSE_READDIR or opcode == FUSE_READDIRPLUS:
            result = self.op_readdir(handle, h.nodeid, opcode == FUSE_READDIRPLUS)
        else:
            result = self.op_file(handle, opcode)
        self.table.handle_put(handle)
        return result

    # The session

    cdef int64_t op_init(self) noexcept nogil:
        cdef const fuse_init_in *arg = <const fuse_init_in *>self.request
        cdef fuse_init_out *out = <fuse_init_out *>self.out
        cdef uint64_t offered, want
        memset(out, 0, sizeof(fuse_init_out))
        out.major = 7
        out.minor = 38
        if arg.major < 7 or (arg.major == 7 and arg.minor < MINOR_LEAST):
            return -EPROTO
        if arg.major > 7:
            return sizeof(fuse_init_out)        # the kernel asks again, with ours
        # A kernel that starts anew (kexec, a second mount) knows nothing of before.
        if self.share.window is not None:
            self.share.window.clear()
        self.table.clear()
        offered = arg.flags
        if offered & FUSE_INIT_EXT and self.length >= 20:
            offered |= <uint64_t>arg.flags2 << 32
        want = FUSE_ASYNC_READ | FUSE_ATOMIC_O_TRUNC | FUSE_BIG_WRITES | FUSE_DO_READDIRPLUS | FUSE_READDIRPLUS_AUTO \
            | FUSE_ASYNC_DIO | FUSE_PARALLEL_DIROPS | FUSE_MAX_PAGES | FUSE_HANDLE_KILLPRIV_V2 | FUSE_INIT_EXT
        if self.share.writeback:
            want |= FUSE_WRITEBACK_CACHE
        if self.share.dir_flags:
            want |= FUSE_CACHE_SYMLINKS
        else:
            want |= FUSE_AUTO_INVAL_DATA
        if self.share.window is not None:
            want |= FUSE_MAP_ALIGNMENT | FUSE_HAS_INODE_DAX
            out.map_alignment = DAX_SHIFT
        want &= offered
        self.share.dax_inodes = (want & FUSE_HAS_INODE_DAX) != 0
        out.max_readahead = arg.max_readahead
        out.flags = <uint32_t>want
        out.flags2 = <uint32_t>(want >> 32)
        out.max_background = 128
        out.congestion_threshold = 96
        out.max_write = MAX_WRITE
        out.max_pages = MAX_WRITE // 4096
        out.time_gran = 1
        fs_store(&self.share.initialised, 1)
        return sizeof(fuse_init_out)

    cdef int64_t op_forget(self, uint64_t nodeid) noexcept nogil:
        if not self.table.node_forget(nodeid, (<fuse_forget_in *>self.request).nlookup):
            self.counters.bad_forgets += 1
        return NO_REPLY

    cdef int64_t op_batch_forget(self) noexcept nogil:
        cdef uint64_t count = (<fuse_batch_forget_in *>self.request).count, i
        cdef const fuse_forget_one *one = <const fuse_forget_one *>(self.request + sizeof(fuse_batch_forget_in))
        if count > (self.length - sizeof(fuse_batch_forget_in)) // sizeof(fuse_forget_one):
            self.counters.bad_requests += 1
            return NO_REPLY
        for i in range(count):
            if not self.table.node_forget(one[i].nodeid, one[i].nlookup):
                self.counters.bad_forgets += 1
        return NO_REPLY

    # Names and attributes

    cdef void fill_attr(self, fuse_attr *attr, const statx *st) noexcept nogil:
        attr.ino = st.stx_ino
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
        # new_encode_dev() of Linux
        attr.rdev = (st.stx_rdev_minor & 0xff) | st.stx_rdev_major << 8 | (st.stx_rdev_minor & ~<uint32_t>0xff) << 12
        attr.blksize = st.stx_blksize
        attr.flags = FUSE_ATTR_DAX if self.share.dax_inodes and st.stx_mode & S_IFMT == S_IFREG else 0

    cdef void fill_entry(self, fuse_entry_out *entry, uint64_t nodeid, const statx *st) noexcept nogil:
        entry.nodeid = nodeid
        entry.generation = 0            # a node id is used once
        entry.entry_valid = entry.attr_valid = self.share.valid
        entry.entry_valid_nsec = entry.attr_valid_nsec = 0
        self.fill_attr(&entry.attr, st)

    cdef int64_t lookup(self, int dirfd, const char *name, fuse_entry_out *entry, bint likely) noexcept nogil:
        # What is at `name` now; `likely`: the guest may know it already, so that no descriptor has to be opened.
        cdef statx st
        cdef uint64_t nodeid
        cdef int fd
        if likely:
            if statx_call(dirfd, name, AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT, MASK, &st) < 0:
                return -errno
            nodeid = self.table.node_find(<uint64_t>st.stx_dev_major << 32 | st.stx_dev_minor, st.stx_ino,
                                          st.stx_mnt_id)
            if nodeid:
                self.fill_entry(entry, nodeid, &st)
                return sizeof(fuse_entry_out)
        if self.table.full():
            return -ENFILE
        fd = openat(dirfd, name, O_PATH | O_NOFOLLOW | O_CLOEXEC)
        if fd < 0:
            return -errno
        return self.adopt(fd, entry)

    cdef int64_t adopt(self, int fd, fuse_entry_out *entry) noexcept nogil:
        # Tell the guest of the O_PATH descriptor `fd`, which this takes.
        cdef statx st
        cdef uint64_t nodeid
        cdef int error
        if statx_call(fd, b"", AT_EMPTY_PATH, MASK, &st) < 0:
            error = errno
            close(fd)
            return -error
        nodeid = self.table.node_add(fd, st.stx_mode & S_IFMT, <uint64_t>st.stx_dev_major << 32 | st.stx_dev_minor,
                                     st.stx_ino, st.stx_mnt_id)
        if nodeid == 0:
            return -ENFILE
        self.fill_entry(entry, nodeid, &st)
        return sizeof(fuse_entry_out)

    cdef int64_t op_lookup(self, Node *node) noexcept nogil:
        cdef fuse_entry_out *entry = <fuse_entry_out *>self.out
        cdef int64_t result = self.lookup(node.fd, self.name, entry, True)
        if result == -ENOENT and self.share.dir_flags:
            memset(entry, 0, sizeof(fuse_entry_out))        # node 0: there is none, and it may remember that
            entry.entry_valid = self.share.valid
            return sizeof(fuse_entry_out)
        return result

    cdef int64_t op_getattr(self, Node *node) noexcept nogil:
        cdef fuse_attr_out *out = <fuse_attr_out *>self.out
        cdef statx st
        if statx_call(node.fd, b"", AT_EMPTY_PATH, STATX_BASIC_STATS, &st) < 0:
            return -errno
        memset(out, 0, sizeof(fuse_attr_out))
        out.attr_valid = self.share.valid
        self.fill_attr(&out.attr, &st)
        return sizeof(fuse_attr_out)

    cdef int64_t op_setattr(self, Node *node, uint64_t nodeid) noexcept nogil:
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
        if valid & FATTR_FH:
            handle = self.table.handle_get(arg.fh, nodeid, FILE)
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
                fs_capset(self.credentials.no_fsetid)
            status = ftruncate(handle.fd, arg.size) if handle != NULL \
                else truncate(self.path_of(node.fd), arg.size)
            if status < 0:
                error = errno
            if kill:
                fs_capset(self.credentials.full)
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
        if status < 0 and error == 0:
            error = errno
        if handle != NULL:
            self.table.handle_put(handle)
        return -error if status < 0 else self.op_getattr(node)

    cdef int64_t op_readlink(self, Node *node) noexcept nogil:
        cdef ssize_t size
        if node.type != S_IFLNK:
            return -EINVAL
        size = readlinkat(node.fd, b"", <char *>self.out, PATH_MAX)
        if size < 0:
            return -errno
        return size if <uint64_t>size <= self.room else -EIO

    cdef int64_t op_make(self, Node *node, const fuse_in_header *h) noexcept nogil:
        # SYMLINK, MKNOD, MKDIR
        cdef const fuse_mknod_in *arg = <const fuse_mknod_in *>self.request
        cdef int status, error
        cdef bint switch = self.credentials.switches and (h.uid or h.gid)
        cdef uint64_t target = 0
        if h.opcode == FUSE_SYMLINK:
            target = self.name2 - <const char *>self.request
            if target >= self.length or memchr(self.name2, 0, self.length - target) == NULL or self.name2[0] == 0:
                self.counters.bad_requests += 1
                return -EINVAL
        if switch:
            error = fs_become(h.uid, h.gid, self.credentials.create)
            if error:
                return -error
        if h.opcode == FUSE_SYMLINK:
            status = symlinkat(self.name2, node.fd, self.name)
        elif h.opcode == FUSE_MKDIR:
            status = mkdirat(node.fd, self.name, (<const fuse_mkdir_in *>arg).mode & 0o7777)
        else:
            # new_decode_dev() of Linux
            status = mknodat(node.fd, self.name, arg.mode, makedev(
                (arg.rdev & 0xfff00) >> 8, (arg.rdev & 0xff) | (arg.rdev >> 12 & 0xfff00)))
        error = errno
        if switch:
            fs_return(h.uid)
        if status < 0:
            return -error
        return self.lookup(node.fd, self.name, <fuse_entry_out *>self.out, False)

    cdef int64_t op_remove(self, Node *node, int flags) noexcept nogil:
        return -errno if unlinkat(node.fd, self.name, flags) < 0 else 0

    cdef int64_t op_rename(self, Node *node, const fuse_in_header *h) noexcept nogil:
        cdef const fuse_rename2_in *arg = <const fuse_rename2_in *>self.request
        cdef uint32_t flags = arg.flags if h.opcode == FUSE_RENAME2 else 0
        cdef Node *newdir
        cdef int status
        if flags & ~<uint32_t>(RENAME_NOREPLACE | RENAME_EXCHANGE):
            return -EINVAL
        newdir = self.table.node_get(arg.newdir)
        if newdir == NULL:
            return -ESTALE
        status = -errno if renameat2(node.fd, self.name, newdir.fd, self.name2, flags) < 0 else 0
        self.table.node_put(newdir)
        return status

    cdef int64_t op_link(self, Node *node) noexcept nogil:
        cdef Node *old = self.table.node_get((<const fuse_link_in *>self.request).oldnodeid)
        cdef fuse_entry_out *entry = <fuse_entry_out *>self.out
        cdef statx st
        cdef uint64_t nodeid
        cdef int64_t result
        if old == NULL:
            return -ESTALE
        # The magic link is followed to the inode itself, a symbolic link's too.
        if linkat(AT_FDCWD, self.path_of(old.fd), node.fd, self.name, AT_SYMLINK_FOLLOW) < 0 \
                or statx_call(old.fd, b"", AT_EMPTY_PATH, MASK, &st) < 0:
            result = -errno
        else:
            nodeid = self.table.node_find(old.dev, old.ino, old.mnt)
            self.fill_entry(entry, nodeid, &st)
            result = sizeof(fuse_entry_out) if nodeid else -ESTALE
        self.table.node_put(old)
        return result

    cdef int64_t op_access(self, Node *node, const fuse_in_header *h) noexcept nogil:
        # A kernel that mounts with default_permissions, as virtiofs does, judges by itself.
        cdef uint32_t mask = (<const fuse_access_in *>self.request).mask, mode
        cdef statx st
        if statx_call(node.fd, b"", AT_EMPTY_PATH, STATX_BASIC_STATS, &st) < 0:
            return -errno
        mode = st.stx_mode
        if h.uid == 0:
            # Root may execute what anybody may.
            return -EACCES if mask & 1 and node.type != S_IFDIR and not mode & 0o111 else 0
        mode = mode >> 6 if h.uid == st.stx_uid else mode >> 3 if h.gid == st.stx_gid else mode
        return -EACCES if mask & 7 & ~mode else 0

    cdef int64_t op_statfs(self, Node *node) noexcept nogil:
        cdef fuse_statfs_out *out = <fuse_statfs_out *>self.out
        cdef host_statfs st
        if fstatfs(node.fd, &st) < 0:
            return -errno
        memset(out, 0, sizeof(fuse_statfs_out))
        out.st.blocks, out.st.bfree, out.st.bavail = st.f_blocks, st.f_bfree, st.f_bavail
        out.st.files, out.st.ffree = st.f_files, st.f_ffree
        out.st.bsize, out.st.frsize, out.st.namelen = st.f_bsize, st.f_frsize, st.f_namelen
        return sizeof(fuse_statfs_out)

    cdef int64_t op_syncfs(self, Node *node) noexcept nogil:
        cdef int fd, status
        if node.type != S_IFDIR:
            return -EINVAL
        fd = openat(AT_FDCWD, self.path_of(node.fd), O_RDONLY | O_DIRECTORY | O_CLOEXEC)
        if fd < 0:
            return -errno
        status = -errno if syncfs(fd) < 0 else 0
        close(fd)
        return status

    # The DAX window

    cdef int64_t op_setupmapping(self, Node *node) noexcept nogil:
        # Linux names no handle: the node says which file, and the mapping outlives every open of it.
        cdef const fuse_setupmapping_in *arg = <const fuse_setupmapping_in *>self.request
        cdef bint writable = arg.flags & FUSE_SETUPMAPPING_FLAG_WRITE
        cdef int64_t result
        cdef int fd
        if self.share.window is None:
            return -ENOSYS
        if arg.flags & ~<uint64_t>(FUSE_SETUPMAPPING_FLAG_WRITE | FUSE_SETUPMAPPING_FLAG_READ) \
                or node.type != S_IFREG:
            return -EINVAL
        if writable and self.share.read_only:
            return -EROFS
        fd = openat(AT_FDCWD, self.path_of(node.fd), (O_RDWR if writable else O_RDONLY) | O_CLOEXEC)
        if fd < 0:
            return -errno
        result = self.share.window.map(fd, arg.foffset, arg.len, arg.moffset, writable)
        close(fd)
        return result

    cdef int64_t op_removemapping(self) noexcept nogil:
        cdef const fuse_removemapping_in *arg = <const fuse_removemapping_in *>self.request
        cdef const fuse_removemapping_one *one = <const fuse_removemapping_one *>(
            self.request + sizeof(fuse_removemapping_in))
        cdef uint64_t i
        cdef int64_t result = 0
        if self.share.window is None:
            return -ENOSYS
        if arg.count > (self.length - sizeof(fuse_removemapping_in)) // sizeof(fuse_removemapping_one):
            self.counters.bad_requests += 1
            return -EINVAL
        for i in range(arg.count):
            if self.share.window.unmap(one[i].moffset, one[i].len) < 0:
                result = -EINVAL
        return result

    cdef int64_t op_xattr(self, Node *node, uint32_t opcode) noexcept nogil:
        # GETXATTR, LISTXATTR, SETXATTR, REMOVEXATTR. ACLs are not offered: a guest that does not obey them must not
        # set them either (FUSE_POSIX_ACL is not negotiated).
        cdef uint64_t fixed = fuse_ops[opcode].size, at, kept, size, room
        cdef char *name = <char *>self.request + fixed
        cdef const char *end = <const char *>memchr(name, 0, self.length - fixed)
        cdef char *names = <char *>self.out
        cdef const char *path = self.path_of(node.fd)
        cdef ssize_t result
        if opcode != FUSE_LISTXATTR:
            if end == NULL or end == name:
                self.counters.bad_requests += 1
                return -EINVAL
            if end - name > NAME_MAX:
                return -ERANGE
            if is_acl(name):
                return -EOPNOTSUPP
        if opcode == FUSE_SETXATTR:
            at = end + 1 - <const char *>self.request
            size = (<const fuse_setxattr_in *>self.request).size
            if size > self.length - at:
                self.counters.bad_requests += 1
                return -EINVAL
            result = setxattr(path, name, end + 1, size, (<const fuse_setxattr_in *>self.request).flags)
            return -errno if result < 0 else 0
        if opcode == FUSE_REMOVEXATTR:
            return -errno if removexattr(path, name) < 0 else 0
        room = (<const fuse_getxattr_in *>self.request).size
        if room > self.room or (room == 0 and self.room < sizeof(fuse_getxattr_out)):
            self.counters.bad_requests += 1
            return -EIO
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
                size = strlen(names + at) + 1       # the kernel ends each with a 0
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

    cdef int host_flags(self, uint32_t wanted) noexcept nogil:
        # Of what the guest asks, that which means something for a regular file here. O_DIRECT is the guest's own.
        cdef int flags = <int>wanted & (O_ACCMODE | O_TRUNC | O_APPEND | O_SYNC | O_DSYNC)
        if self.share.writeback:
            # The guest's cache fills pages by reading, and knows the file's end itself.
            if flags & O_ACCMODE == O_WRONLY:
                flags = flags & ~O_ACCMODE | O_RDWR
            flags &= ~O_APPEND
        return flags | O_CLOEXEC | O_NOCTTY

    cdef int64_t open_node(self, Node *node, uint32_t wanted, bint kill, fuse_open_out *out) noexcept nogil:
        cdef int flags = self.host_flags(wanted), fd, error
        cdef uint64_t nodeid = <uint64_t>node.generation << 32 | node.index
        if node.type != S_IFREG:
            return -EISDIR if node.type == S_IFDIR else -ELOOP if node.type == S_IFLNK else -ENXIO
        if self.share.read_only and (wanted & O_ACCMODE != O_RDONLY or wanted & (O_TRUNC | O_CREAT)):
            return -EROFS
        if self.table.full():
            return -ENFILE
        kill = kill and flags & O_TRUNC and self.credentials.switches
        if kill:
            fs_capset(self.credentials.no_fsetid)
        fd = openat(AT_FDCWD, self.path_of(node.fd), flags)
        error = errno
        if kill:
            fs_capset(self.credentials.full)
        if fd < 0:
            return -error
        memset(out, 0, sizeof(fuse_open_out))
        out.fh = self.table.handle_add(fd, FILE, nodeid)
        out.open_flags = self.share.open_flags
        return sizeof(fuse_open_out) if out.fh else -ENFILE

    cdef int64_t op_opendir(self, Node *node, uint64_t nodeid) noexcept nogil:
        cdef fuse_open_out *out = <fuse_open_out *>self.out
        cdef int fd
        if node.type != S_IFDIR:
            return -ENOTDIR
        if self.table.full():
            return -ENFILE
        fd = openat(AT_FDCWD, self.path_of(node.fd), O_RDONLY | O_DIRECTORY | O_CLOEXEC)
        if fd < 0:
            return -errno
        memset(out, 0, sizeof(fuse_open_out))
        out.fh = self.table.handle_add(fd, DIRECTORY, nodeid)
        out.open_flags = self.share.dir_flags
        return sizeof(fuse_open_out) if out.fh else -ENFILE

    cdef int64_t op_create(self, Node *node, const fuse_in_header *h) noexcept nogil:
        # CREATE and TMPFILE. Without O_EXCL the host could open what is there already, a device or a FIFO: so it is
        # made with O_EXCL, and what exists is opened as any other node.
        cdef const fuse_create_in *arg = <const fuse_create_in *>self.request
        cdef fuse_entry_out *entry = <fuse_entry_out *>self.out
        cdef fuse_open_out *opened = <fuse_open_out *>(self.out + sizeof(fuse_entry_out))
        cdef int flags = self.host_flags(arg.flags) & ~O_TRUNC, fd, path_fd, error
        cdef bint switch = self.credentials.switches and (h.uid or h.gid)
        cdef int64_t result
        cdef Node *made
        if self.table.full():
            return -ENFILE
        if h.opcode == FUSE_TMPFILE and (node.type != S_IFDIR or flags & O_ACCMODE == O_RDONLY):
            return -EINVAL
        if switch:
            error = fs_become(h.uid, h.gid, self.credentials.create)
            if error:
                return -error
        if h.opcode == FUSE_TMPFILE:
            fd = openat(AT_FDCWD, self.path_of(node.fd), flags | O_TMPFILE, arg.mode & 0o7777)
        else:
            fd = openat(node.fd, self.name, flags | O_CREAT | O_EXCL | O_NOFOLLOW, arg.mode & 0o7777)
        error = errno
        if switch:
            fs_return(h.uid)
        if fd >= 0:
            path_fd = openat(AT_FDCWD, self.path_of(fd), O_PATH | O_CLOEXEC)
            if path_fd < 0:
                error = errno
                close(fd)
                return -error
            result = self.adopt(path_fd, entry)
            if result < 0:
                close(fd)
                return result
            memset(opened, 0, sizeof(fuse_open_out))
            opened.fh = self.table.handle_add(fd, FILE, entry.nodeid)
            opened.open_flags = self.share.open_flags
            result = sizeof(fuse_open_out) if opened.fh else -ENFILE
        elif h.opcode == FUSE_TMPFILE or error != EEXIST or arg.flags & O_EXCL:
            return -error
        else:
            result = self.lookup(node.fd, self.name, entry, True)
            if result < 0:
                return result
            made = self.table.node_get(entry.nodeid)
            if made == NULL:
                return -ESTALE
            result = self.open_node(made, arg.flags, arg.open_flags & FUSE_OPEN_KILL_SUIDGID, opened)
            self.table.node_put(made)
        if result < 0:
            self.table.node_forget(entry.nodeid, 1)
            return result
        return sizeof(fuse_entry_out) + sizeof(fuse_open_out)

    # Open files

    cdef int64_t op_read(self, Handle *handle, DescChain *chain) noexcept nogil:
        cdef const fuse_read_in *arg = <const fuse_read_in *>self.request
        cdef iovec *iov = chain.iov + chain.n_readable
        cdef iovec *end = iov + chain.n_writable
        cdef uint64_t skip = OUT_HEADER
        cdef uint32_t count
        cdef ssize_t done
        if arg.size > self.room:
            self.counters.bad_requests += 1
            return -EIO
        while skip >= iov.iov_len:      # the header's room ends somewhere in the writable buffers: room says so
            skip -= iov.iov_len
            iov += 1
            if iov == end:
                return 0                # nothing but the header
        self.direct = True
        self.narrowed, self.before = iov, iov[0]
        count = iov_window(&iov, <uint32_t>(end - iov), skip, arg.size)
        done = preadv(handle.fd, iov, <int>count, arg.offset)
        if done < 0:
            return -errno
        self.counters.bytes_read += done
        return done

    cdef int64_t op_write(self, Handle *handle, DescChain *chain) noexcept nogil:
        cdef const fuse_write_in *arg = <const fuse_write_in *>self.request
        cdef fuse_write_out *out = <fuse_write_out *>self.out
        cdef iovec *iov = chain.iov
        cdef uint64_t size = chain.readable_bytes - IN_HEADER - sizeof(fuse_write_in)
        cdef bint kill = arg.write_flags & FUSE_WRITE_KILL_SUIDGID and self.credentials.switches
        cdef uint32_t count
        cdef ssize_t done
        cdef int error
        if arg.size != size or size > MAX_WRITE:
            self.counters.bad_requests += 1
            return -EIO
        count = iov_window(&iov, chain.n_readable, IN_HEADER + sizeof(fuse_write_in), size)
        if kill:
            fs_capset(self.credentials.no_fsetid)
        done = pwritev(handle.fd, iov, <int>count, arg.offset)
        error = errno
        if kill:
            fs_capset(self.credentials.full)
        if done < 0:
            return -error
        self.counters.bytes_written += done
        out.size = <uint32_t>done
        out.padding = 0
        return sizeof(fuse_write_out)

    cdef int64_t op_file(self, Handle *handle, uint32_t opcode) noexcept nogil:
        # FSYNC, FSYNCDIR, FLUSH, FALLOCATE, LSEEK, COPY_FILE_RANGE
        cdef const fuse_fallocate_in *space
        cdef const fuse_copy_file_range_in *copy
        cdef Handle *target
        cdef int64_t result = 0, off_in, off_out
        if opcode == FUSE_FSYNC or opcode == FUSE_FSYNCDIR:
            result = fdatasync(handle.fd) if (<const fuse_fsync_in *>self.request).fsync_flags & FUSE_FSYNC_FDATASYNC \
                else fsync(handle.fd)
        elif opcode == FUSE_FLUSH:
            result = close(dup(handle.fd))
        elif opcode == FUSE_FALLOCATE:
            space = <const fuse_fallocate_in *>self.request
            result = fallocate(handle.fd, space.mode, space.offset, space.length)
        elif opcode == FUSE_LSEEK:
            result = lseek(handle.fd, (<const fuse_lseek_in *>self.request).offset,
                           (<const fuse_lseek_in *>self.request).whence)
            if result >= 0:
                (<fuse_lseek_out *>self.out).offset = result
                return sizeof(fuse_lseek_out)
        else:
            copy = <const fuse_copy_file_range_in *>self.request
            target = self.table.handle_get(copy.fh_out, copy.nodeid_out, FILE)
            if target == NULL:
                return -EBADF
            off_in, off_out = copy.off_in, copy.off_out
            result = copy_file_range(handle.fd, &off_in, target.fd, &off_out, min(copy.len, <uint64_t>1 << 31), 0)
            if result < 0:
                result = -errno
            self.table.handle_put(target)
            if result < 0:
                return result
            memset(self.out, 0, sizeof(fuse_write_out))
            (<fuse_write_out *>self.out).size = <uint32_t>result
            return sizeof(fuse_write_out)
        return -errno if result < 0 else 0

    cdef int64_t op_readdir(self, Handle *handle, uint64_t nodeid, bint plus) noexcept nogil:
        # READDIR and READDIRPLUS. Entries are read ahead into the handle, so that a guest that asks for a page at a
        # time costs one system call for hundreds of them.
        cdef const fuse_read_in *arg = <const fuse_read_in *>self.request
        cdef uint64_t room = min(min(<uint64_t>arg.size, self.room), <uint64_t>OUT_MAX), at = 0, size, length
        cdef uint32_t prefix = sizeof(fuse_entry_out) if plus else 0
        cdef linux_dirent64 *d
        cdef fuse_dirent *entry
        cdef statx st
        cdef int64_t result = 0
        cdef bint dots
        cdef uint64_t dev = 0, mnt = 0
        if arg.size > self.room:
            self.counters.bad_requests += 1
            return -EIO
        if plus and statx_call(handle.fd, b"", AT_EMPTY_PATH, MASK, &st) == 0:
            dev, mnt = <uint64_t>st.stx_dev_major << 32 | st.stx_dev_minor, st.stx_mnt_id
        pthread_mutex_lock(&handle.lock)
        if handle.entries == NULL:
            handle.entries = <uint8_t *>calloc(1, DIRENTS)
            if handle.entries == NULL:
                result = -ENOMEM
        if result == 0 and arg.offset != handle.position:
            if lseek(handle.fd, arg.offset, 0) < 0:
                result = -errno
            else:
                handle.at = handle.have = 0
                handle.position = arg.offset
        while result == 0:
            if handle.at >= handle.have:
                result = fs_getdents(handle.fd, handle.entries, DIRENTS)
                if result <= 0:
                    result = -errno if result < 0 else 0
                    break
                handle.at, handle.have, result = 0, <uint32_t>result, 0
            d = <linux_dirent64 *>(handle.entries + handle.at)
            length = strlen(d.d_name)
            size = prefix + sizeof(fuse_dirent) + (length + 7 & ~<uint64_t>7)
            if at + size > room:
                break
            memset(self.out + at, 0, size)
            dots = length <= 2 and d.d_name[0] == c'.' and (length == 1 or d.d_name[1] == c'.')
            entry = <fuse_dirent *>(self.out + at + prefix)
            entry.ino = d.d_ino
            if nodeid == ROOT and dots:
                entry.ino = self.table._node(ROOT).ino      # what is above is no concern of the guest's
            entry.off = d.d_off
            entry.namelen = <uint32_t>length
            entry.type = d.d_type
            memcpy(<uint8_t *>entry + sizeof(fuse_dirent), d.d_name, length)
            if plus and not dots:
                # Where it cannot be looked up, node 0 says so, and the guest has the name.
                if self.lookup(handle.fd, d.d_name, <fuse_entry_out *>(self.out + at),
                               self.table.node_known(dev, d.d_ino, mnt)) < 0:
                    memset(self.out + at, 0, prefix)
            at += size
            handle.at += d.d_reclen
            handle.position = d.d_off
        pthread_mutex_unlock(&handle.lock)
        return result if result < 0 and at == 0 else at
