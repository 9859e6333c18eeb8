# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""One request of a share: validation, dispatch and reply; the session (INIT, FORGET); and operations on open files.

`self` is the thread that executes the request: each executes one at a time, and has its own buffers.

Source: linux/fuse.h, and Linux fs/fuse/ for what a guest's kernel expects of each operation.
"""
from libc.errno cimport (
    EAGAIN, EBADF, EINTR, EINVAL, EIO, ENAMETOOLONG, ENOSPC, ENOSYS, ENOTTY, EOPNOTSUPP, EPROTO, EROFS, errno,
)
from libc.stdint cimport INT64_MAX, int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memchr, memcpy, memset, strlen

from virtio.fs._dax cimport DAX_SHIFT
from virtio.fs._host cimport *
from virtio.fs._inodes cimport ROOT, Node, node_at
from virtio.fs._nodes cimport on_node, open_fd
from virtio.fs._share cimport (
    ALLOCATED, ANNOUNCES, CHECKS_SGID, DAX_INODES, DIRENTS, FuseThread, IN_HEADER, INITIALISED, MAX_WRITE, MINOR_LEAST,
    MINOR_SGID, NAME_MAX, NO_OPEN, OUT_HEADER, OUT_MAX, PIECE, REQUEST_MAX, agreed, is_component,
)
from virtio.fs._table cimport Handle
from virtio.fs._fuse cimport *
from vmm._fastpath cimport DescChain, iovec
from vmm._iov cimport iov_gather, iov_part, iov_scatter
from vmm._sys cimport (
    counter_add, flag_read, flag_set, load32, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock, set_errno,
    store32,
)


cdef bint is_slow(uint32_t opcode) noexcept nogil:
    """Whether an operation may wait long for the host's disk, so that a helper thread should execute it."""
    return opcode <= FUSE_TMPFILE and fuse_ops[opcode].flags & OP_SLOW

cdef bint is_counted(uint32_t opcode) noexcept nogil:
    """Whether rate limits apply to an operation: it moves data or changes something."""
    return opcode <= FUSE_TMPFILE and (fuse_ops[opcode].flags & (OP_SLOW | OP_CHANGES) or opcode == FUSE_READ)

cdef uint64_t cost(uint32_t opcode, DescChain *chain) noexcept nogil:
    """Bytes that the host will move for the request, as far as the request shows now: the guest may change it."""
    cdef fuse_copy_file_range_in copy
    cdef fuse_fallocate_in space
    if opcode == FUSE_READ:
        return chain.writable_bytes
    if opcode == FUSE_WRITE or opcode == FUSE_SETXATTR:
        return chain.readable_bytes
    if opcode == FUSE_COPY_FILE_RANGE \
            and iov_gather(chain.iov, chain.n_readable, IN_HEADER, &copy, sizeof(copy)) == sizeof(copy):
        return 2 * min(copy.len, <uint64_t>PIECE)       # read and written
    if opcode == FUSE_FALLOCATE \
            and iov_gather(chain.iov, chain.n_readable, IN_HEADER, &space, sizeof(space)) == sizeof(space):
        return min(space.length, <uint64_t>PIECE)       # op_fallocate pays the rest
    return 0

cdef int64_t component(const uint8_t *p, uint64_t room, bint dots) noexcept nogil:
    # Returns the length of the name at `p`, which must be one path component, or -errno.
    cdef const uint8_t *end = <const uint8_t *>memchr(p, 0, room)
    cdef uint64_t length
    if end == NULL:
        return -EINVAL
    length = end - p
    if length > NAME_MAX:
        return -ENAMETOOLONG
    return length if is_component(p, length, dots) else -EINVAL

cdef int64_t or_errno(int64_t result) noexcept nogil:
    return -errno if result < 0 else result

cdef ssize_t read_all(int fd, iovec *iov, uint32_t count, uint64_t offset, uint64_t size) noexcept nogil:
    # preadv(2) until `size` bytes or the end of the file. Some file systems return less before the end, which a guest's
    # page cache would take for the end. Returns the bytes read, or -1 and errno after any error.
    cdef ssize_t result, done = 0
    while True:
        result = preadv(fd, iov, <int>count, offset + <uint64_t>done)
        if result <= 0:
            return result if result < 0 else done
        done += result
        if <uint64_t>done >= size:
            return done
        count = iov_part(iov, count, <size_t>result, size - <uint64_t>done, iov, count)

# One request

cdef uint32_t answer(FuseThread self, const fuse_in_header *header, DescChain *chain) noexcept nogil:
    cdef fuse_out_header out
    cdef int64_t result
    counter_add(&self.counters.requests, 1)
    self.direct = False
    if self.share.window is not None:
        self.share.window.map_regrown()
    result = execute(self, header, chain)
    if result == WOULD_WAIT:
        counter_add(&self.counters.requests, -1)
        if self.direct:
            self.narrowed[0] = self.before
        return HAND_OVER
    if result == NO_REPLY:
        return 0
    if chain.writable_bytes < OUT_HEADER:
        return 0
    out.unique = header.unique
    out.error = <int>result if result < 0 else 0
    out.len = OUT_HEADER + (<uint32_t>result if result > 0 else 0)
    if self.direct:
        self.narrowed[0] = self.before          # the header precedes the payload, maybe in the same buffer
    elif result > 0:
        iov_scatter(chain.iov + chain.n_readable, chain.n_writable, OUT_HEADER, self.out, result)
    iov_scatter(chain.iov + chain.n_readable, chain.n_writable, 0, &out, OUT_HEADER)
    return out.len

cdef int64_t execute(FuseThread self, const fuse_in_header *header, DescChain *chain) noexcept nogil:
    # Validate the request, then execute it. Returns the reply's size, -errno, NO_REPLY or WOULD_WAIT.
    cdef uint32_t opcode = header.opcode
    cdef uint64_t taken
    cdef int64_t length
    cdef const fuse_op *op
    cdef bint silent = False
    self.length = 0
    if opcode <= FUSE_TMPFILE:
        silent = fuse_ops[opcode].flags & OP_SILENT
    if chain.readable_bytes < IN_HEADER or header.len != chain.readable_bytes \
            or (not silent and chain.writable_bytes < OUT_HEADER):
        return self.bad_request(NO_REPLY if silent else -EIO)
    if opcode > FUSE_TMPFILE or not fuse_ops[opcode].flags & OP_KNOWN:
        return -ENOSYS
    op = &fuse_ops[opcode]
    taken = chain.readable_bytes - IN_HEADER
    self.room = chain.writable_bytes - OUT_HEADER if chain.writable_bytes >= OUT_HEADER else 0
    if not silent and self.room < op.out:
        return self.bad_request(-EIO)
    if not agreed(self.share, INITIALISED) and opcode != FUSE_INIT:
        return self.bad_request(NO_REPLY if silent else -EIO)
    if op.flags & OP_CHANGES and self.share.read_only:
        return -EROFS
    if taken < op.size or (opcode != FUSE_WRITE and taken > REQUEST_MAX):
        return self.bad_request(NO_REPLY if silent else -EINVAL)
    if opcode == FUSE_WRITE:
        taken = op.size         # the data is written from guest memory
    iov_gather(chain.iov, chain.n_readable, IN_HEADER, self.request, taken)
    self.request[taken] = 0
    self.length = taken
    if op.names:
        length = component(self.request + op.size, taken - op.size, opcode == FUSE_LOOKUP)
        if length > 0:
            self.name = <const char *>self.request + op.size
            self.name2 = self.name + length + 1
            if op.names == 2:
                length = component(<const uint8_t *>self.name2, taken - op.size - <uint64_t>length - 1,
                                   False)
        if length < 0:
            counter_add(&self.counters.bad_requests, length == -EINVAL)
            return length
    return dispatch(self, header, chain)

cdef int64_t dispatch(FuseThread self, const fuse_in_header *h, DescChain *chain) noexcept nogil:
    cdef uint32_t opcode = h.opcode
    if fuse_ops[opcode].flags & OP_HANDLE:
        return on_handle(self, h, chain)
    if opcode == FUSE_INIT:
        return op_init(self)
    if opcode == FUSE_FORGET:
        return op_forget(self, h.nodeid)
    if opcode == FUSE_BATCH_FORGET:
        return op_batch_forget(self)
    if opcode == FUSE_INTERRUPT:
        return NO_REPLY         # no request here can be interrupted
    if opcode == FUSE_IOCTL:
        return -ENOTTY
    if opcode == FUSE_DESTROY:
        flag_set(&self.share.session, 0)
        if self.share.window is not None:
            self.share.window.clear()
        self.table.clear()
        return 0
    if opcode == FUSE_REMOVEMAPPING:
        return op_removemapping(self)
    if opcode == FUSE_RELEASE or opcode == FUSE_RELEASEDIR:
        if self.table.handle_release((<fuse_release_in *>self.request).fh, h.nodeid,
                                     S_IFREG if opcode == FUSE_RELEASE else S_IFDIR):
            return 0
        return 0 if agreed(self.share, NO_OPEN) else -EBADF
    if agreed(self.share, NO_OPEN) and (opcode == FUSE_OPEN or opcode == FUSE_OPENDIR or opcode == FUSE_CREATE):
        return -ENOSYS
    return on_node(self, h)

# The session

cdef int64_t op_init(FuseThread self) noexcept nogil:
    cdef const fuse_init_in *arg = <const fuse_init_in *>self.request
    cdef fuse_init_out *out = <fuse_init_out *>self.out
    cdef uint64_t offered, want
    cdef int session = INITIALISED
    memset(out, 0, sizeof(fuse_init_out))
    out.major = 7
    out.minor = 38
    if arg.major < 7 or (arg.major == 7 and arg.minor < MINOR_LEAST):
        return -EPROTO
    if arg.major > 7:
        return sizeof(fuse_init_out)        # the kernel sends INIT again, with our version
    # A kernel that starts a new session (kexec, a second mount) does not know the old nodes.
    if self.share.window is not None:
        self.share.window.clear()
    self.table.clear()
    offered = arg.flags
    if offered & FUSE_INIT_EXT and self.length >= 20:
        offered |= <uint64_t>arg.flags2 << 32
    want = FUSE_ASYNC_READ | FUSE_ATOMIC_O_TRUNC | FUSE_BIG_WRITES | FUSE_DO_READDIRPLUS | FUSE_READDIRPLUS_AUTO \
        | FUSE_ASYNC_DIO | FUSE_PARALLEL_DIROPS | FUSE_MAX_PAGES | FUSE_HANDLE_KILLPRIV_V2 | FUSE_INIT_EXT \
        | FUSE_SUBMOUNTS | FUSE_EXPORT_SUPPORT
    if self.share.writeback:
        want |= FUSE_WRITEBACK_CACHE
    if self.share.dir_flags:
        want |= FUSE_CACHE_SYMLINKS
    else:
        want |= FUSE_AUTO_INVAL_DATA
    if self.share.open_flags & FOPEN_DIRECT_IO:
        want |= DIRECT_IO_ALLOW_MMAP
    if self.share.window is not None:
        want |= FUSE_MAP_ALIGNMENT | FUSE_HAS_INODE_DAX
        out.map_alignment = DAX_SHIFT
    # A thread that may read and write every file would refuse no OPEN, so the guest need not send any. Linux then
    # truncates by SETATTR and creates files by MKNOD, because it would not release a handle.
    if self.share.may_not_open \
            and (self.credentials.reads_all if self.share.read_only else self.credentials.writes_all) \
            and offered & FUSE_NO_OPEN_SUPPORT and offered & FUSE_NO_OPENDIR_SUPPORT:
        session |= NO_OPEN
        want &= ~<uint64_t>FUSE_ATOMIC_O_TRUNC
    want &= offered
    if arg.minor >= MINOR_SGID:
        session |= CHECKS_SGID
    if want & FUSE_SUBMOUNTS:
        session |= ANNOUNCES
    if want & FUSE_HAS_INODE_DAX:
        session |= DAX_INODES
    out.max_readahead = arg.max_readahead
    out.flags = <uint32_t>want
    out.flags2 = <uint32_t>(want >> 32)
    out.max_background = 128
    out.congestion_threshold = 96
    out.max_write = MAX_WRITE
    out.max_pages = MAX_WRITE // 4096
    out.time_gran = 1
    flag_set(&self.share.session, session)
    return sizeof(fuse_init_out)

cdef int64_t op_forget(FuseThread self, uint64_t nodeid) noexcept nogil:
    if not self.table.node_forget(nodeid, (<fuse_forget_in *>self.request).nlookup):
        counter_add(&self.counters.bad_forgets, 1)
    return NO_REPLY

cdef int64_t op_batch_forget(FuseThread self) noexcept nogil:
    cdef uint64_t count = (<fuse_batch_forget_in *>self.request).count, i
    cdef const fuse_forget_one *one = <const fuse_forget_one *>(self.request + sizeof(fuse_batch_forget_in))
    if count > (self.length - sizeof(fuse_batch_forget_in)) // sizeof(fuse_forget_one):
        return self.bad_request(NO_REPLY)
    for i in range(count):
        if not self.table.node_forget(one[i].nodeid, one[i].nlookup):
            counter_add(&self.counters.bad_forgets, 1)
    return NO_REPLY

cdef int64_t op_removemapping(FuseThread self) noexcept nogil:
    cdef const fuse_removemapping_in *arg = <const fuse_removemapping_in *>self.request
    cdef const fuse_removemapping_one *one = <const fuse_removemapping_one *>(
        self.request + sizeof(fuse_removemapping_in))
    cdef uint64_t i
    cdef int64_t result = 0
    if self.share.window is None:
        return -ENOSYS
    if arg.count > (self.length - sizeof(fuse_removemapping_in)) // sizeof(fuse_removemapping_one):
        return self.bad_request(-EINVAL)
    for i in range(arg.count):
        if self.share.window.unmap(one[i].moffset, one[i].len) < 0:
            result = -EINVAL
    return result

# Operations on open files: data moves directly between the file and guest memory

cdef int64_t on_handle(FuseThread self, const fuse_in_header *h, DescChain *chain) noexcept nogil:
    cdef uint32_t opcode = h.opcode
    cdef int64_t result
    cdef bint directory = opcode == FUSE_READDIR or opcode == FUSE_READDIRPLUS or opcode == FUSE_FSYNCDIR
    cdef Handle passing
    cdef Handle *handle
    if opcode == FUSE_FLUSH and not self.share.flush_matters:
        return -ENOSYS      # Linux then sends no more FLUSH, which saves a round trip at every close
    # The argument of each of these operations begins with the handle.
    handle = handle_of(
        self, (<fuse_read_in *>self.request).fh, h.nodeid, S_IFDIR if directory else S_IFREG,
        O_RDWR if opcode == FUSE_WRITE or opcode == FUSE_FALLOCATE else O_RDONLY, &passing)
    if handle == NULL:
        return -errno
    if opcode == FUSE_READ:
        result = op_read(self, handle, chain)
    elif opcode == FUSE_WRITE:
        result = op_write(self, handle, chain)
    elif opcode == FUSE_READDIR or opcode == FUSE_READDIRPLUS:
        result = op_readdir(self, handle, h.nodeid, opcode == FUSE_READDIRPLUS)
    else:
        result = op_file(self, handle, h)
    done_with(self, handle, &passing)
    return result

cdef Handle *handle_of(FuseThread self, uint64_t fh, uint64_t nodeid, uint32_t type, int access,
                       Handle *passing) noexcept nogil:
    # Returns the guest's handle, pinned, or with no_open `passing`, opened for this request only; or NULL and
    # errno.
    cdef Handle *handle
    cdef Node *node
    cdef int error
    if not agreed(self.share, NO_OPEN):
        handle = self.table.handle_get(fh, nodeid, type)
        if handle == NULL:
            set_errno(EBADF)
        return handle
    node = self.table.node_get(nodeid)
    if node == NULL:
        return NULL
    memset(passing, 0, sizeof(Handle))
    pthread_mutex_init(&passing.lock, NULL)
    if node.type != type:
        passing.fd = -1
        error = EBADF
    else:
        passing.fd = open_fd(self, node, access | O_CLOEXEC | (O_DIRECTORY if type == S_IFDIR else 0))
        error = errno
    passing.node = node
    if passing.fd < 0:
        self.table.node_put(node)
        set_errno(error)
        return NULL
    return passing

cdef void done_with(FuseThread self, Handle *handle, Handle *passing) noexcept nogil:
    if handle == passing:
        close(handle.fd)
        self.table.node_put(handle.node)
    else:
        self.table.handle_put(handle)

cdef int64_t op_read(FuseThread self, Handle *handle, DescChain *chain) noexcept nogil:
    cdef const fuse_read_in *arg = <const fuse_read_in *>self.request
    cdef iovec *iov = chain.iov + chain.n_readable
    cdef iovec *end = iov + chain.n_writable
    cdef uint64_t skip = OUT_HEADER
    cdef uint32_t count
    cdef struct_stat st
    cdef ssize_t done
    if arg.size > min(self.room, <uint64_t>MAX_WRITE):     # a driver can describe gigabytes, which would hold us up
        return self.bad_request(-EIO)
    while skip >= iov.iov_len:      # skip the space for the reply header; self.room says that it fits
        skip -= iov.iov_len
        iov += 1
        if iov == end:
            return 0                # there is only space for the header
    self.direct = True
    self.narrowed, self.before = iov, iov[0]
    count = <uint32_t>(end - iov)
    count = iov_part(iov, count, skip, arg.size, iov, count)
    if self.may_wait or flag_read(&self.share.no_nowait) or arg.offset > <uint64_t>INT64_MAX:
        done = read_all(handle.fd, iov, count, arg.offset, arg.size)
    else:
        done = preadv2(handle.fd, iov, <int>count, arg.offset, RWF_NOWAIT)
        if done < 0 and errno == EOPNOTSUPP:
            flag_set(&self.share.no_nowait, True)
            done = read_all(handle.fd, iov, count, arg.offset, arg.size)
        elif done < 0 and errno == EAGAIN:
            return WOULD_WAIT
        elif 0 <= done < <ssize_t>arg.size and fstat(handle.fd, &st) == 0 \
                and <int64_t>arg.offset + done < st.st_size:
            return WOULD_WAIT       # a short read before the end of the file: the rest is not in the page cache
    if done < 0:
        return -errno
    counter_add(&self.counters.bytes_read, done)
    return done

cdef int64_t op_write(FuseThread self, Handle *handle, DescChain *chain) noexcept nogil:
    cdef const fuse_write_in *arg = <const fuse_write_in *>self.request
    cdef fuse_write_out *out = <fuse_write_out *>self.out
    cdef iovec *iov = chain.iov
    cdef uint64_t size = chain.readable_bytes - IN_HEADER - sizeof(fuse_write_in)
    cdef bint kill = arg.write_flags & FUSE_WRITE_KILL_SUIDGID and self.credentials.switches
    # The guest writes back cached pages at their offset, even with O_APPEND, and ignores the count in the reply.
    cdef bint cached = arg.write_flags & FUSE_WRITE_CACHE
    cdef int flags = 0 if cached else write_flags(self, arg.flags)
    cdef uint32_t count
    cdef uint64_t total = 0
    cdef ssize_t done
    cdef int error
    if arg.size != size or size > MAX_WRITE:
        return self.bad_request(-EIO)
    if (handle.synchronous or flags & RWF_DSYNC) and not self.may_wait:
        return WOULD_WAIT
    count = iov_part(iov, chain.n_readable, IN_HEADER + sizeof(fuse_write_in), size, iov, chain.n_readable)
    if kill:
        fs_capset(self.credentials.full, CAPS_NO_FSETID)
    while True:
        done = pwritev2(handle.fd, iov, <int>count, arg.offset + total, flags) if flags \
            else pwritev(handle.fd, iov, <int>count, arg.offset + total)
        error = errno if done < 0 else EIO
        total += <uint64_t>max(done, 0)
        if done <= 0 or not cached or total == size:
            break
        count = iov_part(iov, count, <size_t>done, size - total, iov, count)
    if kill:
        fs_capset(self.credentials.full, CAPS_ALL)
    counter_add(&self.counters.bytes_written, total)
    if done < 0 or (cached and total < size):
        return -error
    out.size = <uint32_t>total
    out.padding = 0
    return sizeof(fuse_write_out)

cdef int write_flags(FuseThread self, uint32_t wanted) noexcept nogil:
    # The pwritev2(2) flags for the open flags `wanted`, which the file has in the guest now.
    cdef int flags = 0
    if wanted & O_APPEND and not self.share.writeback:
        flags |= RWF_APPEND     # with writeback only the guest knows where the file ends
    if wanted & O_SYNC == O_SYNC:
        flags |= RWF_DSYNC | RWF_SYNC
    elif wanted & O_DSYNC:
        flags |= RWF_DSYNC
    return flags

cdef int64_t op_file(FuseThread self, Handle *handle, const fuse_in_header *h) noexcept nogil:
    # FSYNC, FSYNCDIR, FLUSH, FALLOCATE, LSEEK, COPY_FILE_RANGE
    cdef uint32_t opcode = h.opcode
    # Linux does not send whether the caller may keep set-id bits. Only root may.
    cdef bint kill = h.uid and self.credentials.switches \
        and (opcode == FUSE_FALLOCATE or opcode == FUSE_COPY_FILE_RANGE)
    cdef int64_t result = 0
    if kill:
        fs_capset(self.credentials.full, CAPS_NO_FSETID)
    if opcode == FUSE_FSYNC or opcode == FUSE_FSYNCDIR:
        result = or_errno(
            fdatasync(handle.fd) if (<const fuse_fsync_in *>self.request).fsync_flags & FUSE_FSYNC_FDATASYNC
            else fsync(handle.fd))
    elif opcode == FUSE_FLUSH:
        result = or_errno(dup(handle.fd))
        if result >= 0:
            result = or_errno(close(<int>result))
    elif opcode == FUSE_FALLOCATE:
        result = op_fallocate(self, handle)
    elif opcode == FUSE_LSEEK:
        result = or_errno(lseek(handle.fd, (<const fuse_lseek_in *>self.request).offset,
                                (<const fuse_lseek_in *>self.request).whence))
        if result >= 0:
            (<fuse_lseek_out *>self.out).offset = result
            result = sizeof(fuse_lseek_out)
    else:
        result = op_copy(self, handle)
    if kill:
        fs_capset(self.credentials.full, CAPS_ALL)
    return result

cdef int64_t op_fallocate(FuseThread self, Handle *handle) noexcept nogil:
    # Allocate in pieces, so that stopping the device never waits long. If the disk lacks space, fail before the
    # first piece: an error does not free the pieces before it.
    cdef const fuse_fallocate_in *arg = <const fuse_fallocate_in *>self.request
    cdef uint64_t piece = arg.length, at = 0
    cdef struct_stat st
    cdef host_statfs disk
    if arg.length > ALLOCATED and arg.length <= <uint64_t>INT64_MAX and arg.offset <= INT64_MAX - arg.length \
            and not arg.mode & (FALLOC_FL_COLLAPSE_RANGE | FALLOC_FL_INSERT_RANGE):
        piece = ALLOCATED
        if not arg.mode & FALLOC_FL_PUNCH_HOLE and fstat(handle.fd, &st) == 0 and fstatfs(handle.fd, &disk) == 0 \
                and disk.f_blocks and arg.length > <uint64_t>st.st_blocks * 512 \
                and (arg.length - <uint64_t>st.st_blocks * 512) // <uint64_t>disk.f_bsize > disk.f_bfree:
            return -ENOSPC
    while True:
        if fallocate(handle.fd, arg.mode, arg.offset + at, min(piece, arg.length - at)) < 0:
            return -errno
        at += piece
        if at >= arg.length:
            break
        if flag_read(self.ending):
            return -EINTR
    pay(self, arg.length)
    return 0

cdef void pay(FuseThread self, uint64_t size) noexcept nogil:
    # What was not paid before: it was not known, or it was another number when `cost` read it.
    if size > self.paid:
        self.limiter.charge(size - self.paid)

cdef int64_t op_copy(FuseThread self, Handle *handle) noexcept nogil:
    cdef const fuse_copy_file_range_in *arg = <const fuse_copy_file_range_in *>self.request
    cdef Handle passing
    cdef Handle *target = handle_of(self, arg.fh_out, arg.nodeid_out, S_IFREG, O_RDWR, &passing)
    cdef int64_t off_in = arg.off_in, off_out = arg.off_out
    cdef int64_t result
    if target == NULL:
        return -errno
    result = or_errno(copy_file_range(
        handle.fd, &off_in, target.fd, &off_out, min(arg.len, <uint64_t>PIECE), 0))
    done_with(self, target, &passing)
    if result < 0:
        return result
    pay(self, 2 * min(arg.len, <uint64_t>PIECE))
    memset(self.out, 0, sizeof(fuse_write_out))
    (<fuse_write_out *>self.out).size = <uint32_t>result
    return sizeof(fuse_write_out)

cdef int64_t read_ahead(FuseThread self, Handle *handle) noexcept nogil:
    # Read entries from entries_next on. Returns the number of bytes, 0 at the directory's end, or -errno.
    cdef int64_t result
    pthread_mutex_lock(&handle.lock)
    result = lseek(handle.fd, self.entries_next, 0)
    if result >= 0:
        result = getdents64(handle.fd, self.entries, DIRENTS)
    if result < 0:
        result = -errno
    pthread_mutex_unlock(&handle.lock)
    self.entries_at, self.entries_have = 0, <uint32_t>max(result, <int64_t>0)
    return result

cdef int64_t op_readdir(FuseThread self, Handle *handle, uint64_t nodeid, bint plus) noexcept nogil:
    # READDIR and READDIRPLUS. Entries are read ahead, because guests ask for one page at a time: so hundreds of
    # entries take few system calls. The buffer belongs to the thread, so that a handle needs no heap memory.
    cdef const fuse_read_in *arg = <const fuse_read_in *>self.request
    cdef uint64_t room = min(min(<uint64_t>arg.size, self.room), <uint64_t>OUT_MAX), at = 0, size, length
    cdef uint32_t prefix = sizeof(fuse_entry_out) if plus else 0
    cdef dirent64 *d
    cdef fuse_dirent *entry
    cdef int64_t result = 0
    cdef bint dots
    cdef Node *node = handle.node
    if arg.size > self.room:
        return self.bad_request(-EIO)
    cdef uint64_t fh = nodeid if agreed(self.share, NO_OPEN) else arg.fh
    cdef uint32_t listing = load32(&node.listings)
    if arg.offset == 0:
        listing += 1
        store32(&node.listings, listing)
    # What was read ahead is of an earlier listing, if another thread has begun one since.
    if self.entries_fh != fh or self.entries_next != arg.offset or self.entries_listing != listing:
        self.entries_fh, self.entries_next, self.entries_listing = fh, arg.offset, listing
        self.entries_at = self.entries_have = 0
    while True:
        if self.entries_at >= self.entries_have:
            result = read_ahead(self, handle)
            if result <= 0:
                break
        d = <dirent64 *>(self.entries + self.entries_at)
        length = strlen(d.d_name)
        size = prefix + sizeof(fuse_dirent) + (length + 7 & ~<uint64_t>7)
        if at + size > room:
            break
        memset(self.out + at, 0, size)
        dots = length <= 2 and d.d_name[0] == c'.' and (length == 1 or d.d_name[1] == c'.')
        entry = <fuse_dirent *>(self.out + at + prefix)
        entry.ino = d.d_ino
        if nodeid == ROOT and dots:
            entry.ino = node_at(self.table, ROOT).ino      # do not show the inode above the root
        entry.off = d.d_off
        entry.namelen = <uint32_t>length
        entry.type = d.d_type
        memcpy(<uint8_t *>entry + sizeof(fuse_dirent), d.d_name, length)
        if plus and not dots:
            # If the look-up fails, send node 0: the guest gets the name only.
            if self.lookup(node, handle.fd, d.d_name, <fuse_entry_out *>(self.out + at),
                           self.table.node_known(node.dev, d.d_ino, node.mnt)) < 0:
                memset(self.out + at, 0, prefix)
        at += size
        self.entries_at += d.d_reclen
        self.entries_next = d.d_off
    return result if result < 0 and at == 0 else at
