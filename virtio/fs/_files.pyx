# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""FUSE operations on open files and directories: data moves directly between the file and guest memory."""
from libc.errno cimport EAGAIN, EBADF, EINTR, EIO, ENOSPC, ENOSYS, EOPNOTSUPP, errno
from libc.stdint cimport INT64_MAX, int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset, strlen

from virtio.fs._host cimport *
from virtio.fs._inodes cimport ROOT, Node
from virtio.fs._nodes cimport NodeOperations
from virtio.fs._share cimport ALLOCATED, DIRENTS, IN_HEADER, MAX_WRITE, NO_OPEN, OUT_HEADER, OUT_MAX, PIECE, agreed
from virtio.fs._table cimport DIRECTORY, FILE, Handle, Kind
from virtio.fs._fuse cimport *
from vmm._fastpath cimport DescChain, iovec
from vmm._iov cimport iov_part
from vmm._sys cimport counter_add, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock


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

cdef class FileOperations(NodeOperations):
    """READ, WRITE, READDIRPLUS, FSYNC and the other operations on open files."""

    cdef int64_t on_handle(self, const fuse_in_header *h, DescChain *chain) noexcept nogil:
        cdef uint32_t opcode = h.opcode
        cdef int64_t result
        cdef bint directory = opcode == FUSE_READDIR or opcode == FUSE_READDIRPLUS or opcode == FUSE_FSYNCDIR
        cdef Handle passing
        cdef Handle *handle
        if opcode == FUSE_FLUSH and not self.share.flush_matters:
            return -ENOSYS      # Linux then sends no more FLUSH, which saves a round trip at every close
        # The argument of each of these operations begins with the handle.
        handle = self.handle_of(
            (<fuse_read_in *>self.request).fh, h.nodeid, DIRECTORY if directory else FILE,
            O_RDWR if opcode == FUSE_WRITE or opcode == FUSE_FALLOCATE else O_RDONLY, &passing)
        if handle == NULL:
            return -errno
        if opcode == FUSE_READ:
            result = self.op_read(handle, chain)
        elif opcode == FUSE_WRITE:
            result = self.op_write(handle, chain)
        elif opcode == FUSE_READDIR or opcode == FUSE_READDIRPLUS:
            result = self.op_readdir(handle, h.nodeid, opcode == FUSE_READDIRPLUS)
        else:
            result = self.op_file(handle, h)
        self.done_with(handle, &passing)
        return result

    cdef Handle *handle_of(self, uint64_t fh, uint64_t nodeid, Kind kind, int access,
                           Handle *passing) noexcept nogil:
        # Returns the guest's handle, pinned, or with no_open `passing`, opened for this request only; or NULL and
        # errno.
        cdef Handle *handle
        cdef Node *node
        cdef int error
        if not agreed(self.share, NO_OPEN):
            handle = self.table.handle_get(fh, nodeid, kind)
            if handle == NULL:
                set_errno(EBADF)
            return handle
        node = self.table.node_get(nodeid)
        if node == NULL:
            return NULL
        memset(passing, 0, sizeof(Handle))
        pthread_mutex_init(&passing.lock, NULL)
        if node.type != <uint32_t>(S_IFDIR if kind == DIRECTORY else S_IFREG):
            passing.fd = -1
            error = EBADF
        else:
            passing.fd = self.opened(node, access | O_CLOEXEC | (O_DIRECTORY if kind == DIRECTORY else 0))
            error = errno
        passing.node = node
        if passing.fd < 0:
            self.table.node_put(node)
            set_errno(error)
            return NULL
        return passing

    cdef void done_with(self, Handle *handle, Handle *passing) noexcept nogil:
        if handle == passing:
            close(handle.fd)
            self.table.node_put(handle.node)
        else:
            self.table.handle_put(handle)

    cdef int64_t op_read(self, Handle *handle, DescChain *chain) noexcept nogil:
        cdef const fuse_read_in *arg = <const fuse_read_in *>self.request
        cdef iovec *iov = chain.iov + chain.n_readable
        cdef iovec *end = iov + chain.n_writable
        cdef uint64_t skip = OUT_HEADER
        cdef uint32_t count
        cdef host_stat st
        cdef ssize_t done
        if arg.size > self.room:
            counter_add(&self.counters.bad_requests, 1)
            return -EIO
        while skip >= iov.iov_len:      # skip the space for the reply header; self.room says that it fits
            skip -= iov.iov_len
            iov += 1
            if iov == end:
                return 0                # there is only space for the header
        self.direct = True
        self.narrowed, self.before = iov, iov[0]
        count = <uint32_t>(end - iov)
        count = iov_part(iov, count, skip, arg.size, iov, count)
        if self.may_wait or fs_load(&self.share.no_nowait) or arg.offset > <uint64_t>INT64_MAX:
            done = read_all(handle.fd, iov, count, arg.offset, arg.size)
        else:
            done = preadv2(handle.fd, iov, <int>count, arg.offset, RWF_NOWAIT)
            if done < 0 and errno == EOPNOTSUPP:
                fs_store(&self.share.no_nowait, True)
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

    cdef int64_t op_write(self, Handle *handle, DescChain *chain) noexcept nogil:
        cdef const fuse_write_in *arg = <const fuse_write_in *>self.request
        cdef fuse_write_out *out = <fuse_write_out *>self.out
        cdef iovec *iov = chain.iov
        cdef uint64_t size = chain.readable_bytes - IN_HEADER - sizeof(fuse_write_in)
        cdef bint kill = arg.write_flags & FUSE_WRITE_KILL_SUIDGID and self.credentials.switches
        # The guest writes back cached pages at their offset, even with O_APPEND, and ignores the count in the reply.
        cdef bint cached = arg.write_flags & FUSE_WRITE_CACHE
        cdef int flags = 0 if cached else self.write_flags(arg.flags)
        cdef uint32_t count
        cdef uint64_t total = 0
        cdef ssize_t done
        cdef int error
        if arg.size != size or size > MAX_WRITE:
            counter_add(&self.counters.bad_requests, 1)
            return -EIO
        if (handle.synchronous or flags & RWF_DSYNC) and not self.may_wait:
            return WOULD_WAIT
        count = iov_part(iov, chain.n_readable, IN_HEADER + sizeof(fuse_write_in), size, iov, chain.n_readable)
        if kill:
            fs_capset(self.credentials.no_fsetid)
        while True:
            done = pwritev2(handle.fd, iov, <int>count, arg.offset + total, flags) if flags \
                else pwritev(handle.fd, iov, <int>count, arg.offset + total)
            error = errno if done < 0 else EIO
            total += <uint64_t>max(done, 0)
            if done <= 0 or not cached or total == size:
                break
            count = iov_part(iov, count, <size_t>done, size - total, iov, count)
        if kill:
            fs_capset(self.credentials.full)
        counter_add(&self.counters.bytes_written, total)
        if done < 0 or (cached and total < size):
            return -error
        out.size = <uint32_t>total
        out.padding = 0
        return sizeof(fuse_write_out)

    cdef int write_flags(self, uint32_t wanted) noexcept nogil:
        # The pwritev2(2) flags for the open flags `wanted`, which the file has in the guest now.
        cdef int flags = 0
        if wanted & O_APPEND and not self.share.writeback:
            flags |= RWF_APPEND     # with writeback only the guest knows where the file ends
        if wanted & O_SYNC == O_SYNC:
            flags |= RWF_DSYNC | RWF_SYNC
        elif wanted & O_DSYNC:
            flags |= RWF_DSYNC
        return flags

    cdef int64_t op_file(self, Handle *handle, const fuse_in_header *h) noexcept nogil:
        # FSYNC, FSYNCDIR, FLUSH, FALLOCATE, LSEEK, COPY_FILE_RANGE
        cdef uint32_t opcode = h.opcode
        # Linux does not send whether the caller may keep set-id bits. Only root may.
        cdef bint kill = h.uid and self.credentials.switches \
            and (opcode == FUSE_FALLOCATE or opcode == FUSE_COPY_FILE_RANGE)
        cdef int64_t result = 0
        if kill:
            fs_capset(self.credentials.no_fsetid)
        if opcode == FUSE_FSYNC or opcode == FUSE_FSYNCDIR:
            result = or_errno(
                fdatasync(handle.fd) if (<const fuse_fsync_in *>self.request).fsync_flags & FUSE_FSYNC_FDATASYNC
                else fsync(handle.fd))
        elif opcode == FUSE_FLUSH:
            result = or_errno(dup(handle.fd))
            if result >= 0:
                result = or_errno(close(<int>result))
        elif opcode == FUSE_FALLOCATE:
            result = self.op_fallocate(handle)
        elif opcode == FUSE_LSEEK:
            result = or_errno(lseek(handle.fd, (<const fuse_lseek_in *>self.request).offset,
                                    (<const fuse_lseek_in *>self.request).whence))
            if result >= 0:
                (<fuse_lseek_out *>self.out).offset = result
                result = sizeof(fuse_lseek_out)
        else:
            result = self.op_copy(handle)
        if kill:
            fs_capset(self.credentials.full)
        return result

    cdef int64_t op_fallocate(self, Handle *handle) noexcept nogil:
        # Allocate in pieces, so that stopping the device never waits long. If the disk lacks space, fail before the
        # first piece: an error does not free the pieces before it.
        cdef const fuse_fallocate_in *arg = <const fuse_fallocate_in *>self.request
        cdef uint64_t piece = arg.length, at = 0
        cdef host_stat st
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
            if fs_load(self.ending):
                return -EINTR
        if arg.length > PIECE:
            self.limiter.charge(arg.length - PIECE)     # the first PIECE bytes were charged before
        return 0

    cdef int64_t op_copy(self, Handle *handle) noexcept nogil:
        cdef const fuse_copy_file_range_in *arg = <const fuse_copy_file_range_in *>self.request
        cdef Handle passing
        cdef Handle *target = self.handle_of(arg.fh_out, arg.nodeid_out, FILE, O_RDWR, &passing)
        cdef int64_t off_in = arg.off_in, off_out = arg.off_out
        cdef int64_t result
        if target == NULL:
            return -errno
        result = or_errno(copy_file_range(
            handle.fd, &off_in, target.fd, &off_out, min(arg.len, <uint64_t>PIECE), 0))
        self.done_with(target, &passing)
        if result < 0:
            return result
        memset(self.out, 0, sizeof(fuse_write_out))
        (<fuse_write_out *>self.out).size = <uint32_t>result
        return sizeof(fuse_write_out)

    cdef int64_t read_ahead(self, Handle *handle) noexcept nogil:
        # Read entries from entries_next on. Returns the number of bytes, 0 at the directory's end, or -errno.
        cdef int64_t result
        pthread_mutex_lock(&handle.lock)
        result = lseek(handle.fd, self.entries_next, 0)
        if result >= 0:
            result = fs_getdents(handle.fd, self.entries, DIRENTS)
        if result < 0:
            result = -errno
        pthread_mutex_unlock(&handle.lock)
        self.entries_at, self.entries_have = 0, <uint32_t>max(result, <int64_t>0)
        return result

    cdef int64_t op_readdir(self, Handle *handle, uint64_t nodeid, bint plus) noexcept nogil:
        # READDIR and READDIRPLUS. Entries are read ahead, because guests ask for one page at a time: so hundreds of
        # entries take few system calls. The buffer belongs to the thread, so that a handle needs no heap memory.
        cdef const fuse_read_in *arg = <const fuse_read_in *>self.request
        cdef uint64_t room = min(min(<uint64_t>arg.size, self.room), <uint64_t>OUT_MAX), at = 0, size, length
        cdef uint32_t prefix = sizeof(fuse_entry_out) if plus else 0
        cdef linux_dirent64 *d
        cdef fuse_dirent *entry
        cdef int64_t result = 0
        cdef bint dots
        cdef Node *node = handle.node
        if arg.size > self.room:
            counter_add(&self.counters.bad_requests, 1)
            return -EIO
        cdef uint64_t fh = nodeid if agreed(self.share, NO_OPEN) else arg.fh
        if self.entries_fh != fh or self.entries_next != arg.offset or arg.offset == 0:
            self.entries_fh, self.entries_next = fh, arg.offset
            self.entries_at = self.entries_have = 0
        while True:
            if self.entries_at >= self.entries_have:
                result = self.read_ahead(handle)
                if result <= 0:
                    break
            d = <linux_dirent64 *>(self.entries + self.entries_at)
            length = strlen(d.d_name)
            size = prefix + sizeof(fuse_dirent) + (length + 7 & ~<uint64_t>7)
            if at + size > room:
                break
            memset(self.out + at, 0, size)
            dots = length <= 2 and d.d_name[0] == c'.' and (length == 1 or d.d_name[1] == c'.')
            entry = <fuse_dirent *>(self.out + at + prefix)
            entry.ino = d.d_ino
            if nodeid == ROOT and dots:
                entry.ino = self.table._node(ROOT).ino      # do not show the inode above the root
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
