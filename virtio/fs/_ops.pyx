# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""One request of a share: validation, dispatch and reply; and the session (INIT, FORGET).

Source: linux/fuse.h, and Linux fs/fuse/ for what a guest's kernel expects of each operation.
"""
from libc.errno cimport EBADF, EINVAL, EIO, ENAMETOOLONG, ENOSYS, ENOTTY, EPROTO, EROFS
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memchr, memset

from virtio.fs._dax cimport DAX_SHIFT
from virtio.fs._files cimport FileOperations
from virtio.fs._host cimport *
from virtio.fs._share cimport (
    ANNOUNCES, CHECKS_SGID, DAX_INODES, IN_HEADER, INITIALISED, MAX_WRITE, MINOR_LEAST, MINOR_SGID, NAME_MAX, NO_OPEN,
    OUT_HEADER, PIECE, REQUEST_MAX, agreed,
)
from virtio.fs._table cimport DIRECTORY, FILE
from virtio.fs._fuse cimport *
from vmm._fastpath cimport DescChain
from vmm._iov cimport iov_gather, iov_scatter
from vmm._sys cimport counter_add


cdef bint is_slow(uint32_t opcode) noexcept nogil:
    """Whether an operation may wait long for the host's disk, so that a helper thread should execute it."""
    return opcode <= FUSE_TMPFILE and fuse_ops[opcode].flags & OP_SLOW

cdef bint is_counted(uint32_t opcode) noexcept nogil:
    """Whether rate limits apply to an operation: it moves data or changes something."""
    return opcode <= FUSE_TMPFILE and (fuse_ops[opcode].flags & (OP_SLOW | OP_CHANGES) or opcode == FUSE_READ)

cdef uint64_t cost(uint32_t opcode, DescChain *chain) noexcept nogil:
    """Bytes that the host will move for the request, as far as the request shows."""
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
        return min(space.length, <uint64_t>PIECE)       # op_fallocate charges the rest
    return 0

cdef int64_t component(const uint8_t *p, uint64_t room, bint dots) noexcept nogil:
    # Returns the length of the name at `p`, which must be one path component, or -errno. `dots`: "." and ".." are
    # allowed.
    cdef const uint8_t *end = <const uint8_t *>memchr(p, 0, room)
    cdef uint64_t length
    if end == NULL:
        return -EINVAL
    length = end - p
    if length > NAME_MAX:
        return -ENAMETOOLONG
    if length == 0 or memchr(p, c'/', length) != NULL:
        return -EINVAL
    if not dots and p[0] == c'.' and (length == 1 or (length == 2 and p[1] == c'.')):
        return -EINVAL
    return length

cdef class Server(FileOperations):
    """Executes requests, one at a time; every thread has its own."""

    # One request

    cdef uint32_t answer(self, const fuse_in_header *header, DescChain *chain) noexcept nogil:
        cdef fuse_out_header out
        cdef int64_t result
        counter_add(&self.counters.requests, 1)
        self.direct = False
        if self.share.window is not None:
            self.share.window.map_regrown()
        result = self.execute(header, chain)
        if result == WOULD_WAIT:
            counter_add(&self.counters.requests, -1)
            if self.direct:
                self.narrowed[0] = self.before
            return HAND_OVER
        if result == NO_REPLY:
            return 0
        if chain.writable_bytes < OUT_HEADER:
            counter_add(&self.counters.bad_requests, 1)
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

    cdef int64_t execute(self, const fuse_in_header *header, DescChain *chain) noexcept nogil:
        # Validate the request, then execute it. Returns the reply's size, -errno, NO_REPLY or WOULD_WAIT.
        cdef uint32_t opcode = header.opcode
        cdef uint64_t taken
        cdef int64_t length
        cdef const fuse_op *op
        cdef bint silent = False
        self.length = 0
        if opcode <= FUSE_TMPFILE:
            silent = fuse_ops[opcode].flags & OP_SILENT
        if chain.readable_bytes < IN_HEADER or header.len != chain.readable_bytes:
            counter_add(&self.counters.bad_requests, 1)
            return NO_REPLY if silent else -EIO
        if opcode > FUSE_TMPFILE or not fuse_ops[opcode].flags & OP_KNOWN:
            return -ENOSYS
        op = &fuse_ops[opcode]
        taken = chain.readable_bytes - IN_HEADER
        self.room = chain.writable_bytes - OUT_HEADER if chain.writable_bytes >= OUT_HEADER else 0
        if not silent and (chain.writable_bytes < OUT_HEADER or self.room < op.out):
            counter_add(&self.counters.bad_requests, 1)
            return -EIO
        if not agreed(self.share, INITIALISED) and opcode != FUSE_INIT:
            counter_add(&self.counters.bad_requests, 1)
            return NO_REPLY if silent else -EIO
        if op.flags & OP_CHANGES and self.share.read_only:
            return -EROFS
        if taken < op.size or (opcode != FUSE_WRITE and taken > REQUEST_MAX):
            counter_add(&self.counters.bad_requests, 1)
            return NO_REPLY if silent else -EINVAL
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
            return NO_REPLY         # no request here can be interrupted
        if opcode == FUSE_IOCTL:
            return -ENOTTY
        if opcode == FUSE_DESTROY:
            fs_store(&self.share.session, 0)
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
            return 0 if agreed(self.share, NO_OPEN) else -EBADF
        if agreed(self.share, NO_OPEN) and (opcode == FUSE_OPEN or opcode == FUSE_OPENDIR or opcode == FUSE_CREATE):
            return -ENOSYS
        return self.on_node(h)
    # The session

    cdef int64_t op_init(self) noexcept nogil:
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
        fs_store(&self.share.session, session)
        return sizeof(fuse_init_out)

    cdef int64_t op_forget(self, uint64_t nodeid) noexcept nogil:
        if not self.table.node_forget(nodeid, (<fuse_forget_in *>self.request).nlookup):
            counter_add(&self.counters.bad_forgets, 1)
        return NO_REPLY

    cdef int64_t op_batch_forget(self) noexcept nogil:
        cdef uint64_t count = (<fuse_batch_forget_in *>self.request).count, i
        cdef const fuse_forget_one *one = <const fuse_forget_one *>(self.request + sizeof(fuse_batch_forget_in))
        if count > (self.length - sizeof(fuse_batch_forget_in)) // sizeof(fuse_forget_one):
            counter_add(&self.counters.bad_requests, 1)
            return NO_REPLY
        for i in range(count):
            if not self.table.node_forget(one[i].nodeid, one[i].nlookup):
                counter_add(&self.counters.bad_forgets, 1)
        return NO_REPLY

    cdef int64_t op_removemapping(self) noexcept nogil:
        cdef const fuse_removemapping_in *arg = <const fuse_removemapping_in *>self.request
        cdef const fuse_removemapping_one *one = <const fuse_removemapping_one *>(
            self.request + sizeof(fuse_removemapping_in))
        cdef uint64_t i
        cdef int64_t result = 0
        if self.share.window is None:
            return -ENOSYS
        if arg.count > (self.length - sizeof(fuse_removemapping_in)) // sizeof(fuse_removemapping_one):
            counter_add(&self.counters.bad_requests, 1)
            return -EINVAL
        for i in range(arg.count):
            if self.share.window.unmap(one[i].moffset, one[i].len) < 0:
                result = -EINVAL
        return result
