# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""Block device requests: validated without access to the disk, then executed directly on guest memory."""
from libc.errno cimport EINTR, EINVAL, EIO, ENOMEM, EOPNOTSUPP, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free
from posix.stdlib cimport posix_memalign
from posix.uio cimport preadv, pwritev2
from posix.unistd cimport fdatasync, pread, pwrite

from vmm._fastpath cimport DescChain, iovec
from vmm._iov cimport iov_cut, iov_gather, iov_part, iov_scatter, iov_take

cdef extern from *:
    """
    #include <fcntl.h>
    #include <linux/falloc.h>
    #include <linux/fs.h>
    #include <stdint.h>
    #include <stdlib.h>
    #include <sys/ioctl.h>
    #include <sys/uio.h>
    #include <unistd.h>
    static const _Alignas(4096) uint8_t zeroes[1 << 16];
    static inline int discard_device(int fd, uint64_t start, uint64_t length) {
        uint64_t range[2] = { start, length };
        return ioctl(fd, BLKDISCARD, range);
    }
    """
    const void *zeroes
    int discard_device(int fd, uint64_t start, uint64_t length) noexcept nogil

cdef extern from "<fcntl.h>" nogil:
    int fallocate(int fd, int mode, long offset, long length)
    enum: FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE

cdef enum:
    NO_TYPE = 0xffff_ffff
    ZEROES = 1 << 16        # bytes per write if the file system cannot zero
    BOUNCE = 1 << 20        # bytes copied at a time if direct I/O refuses the guest's buffers


# Validation

cdef int validate(Request *r, const BlockFile *disk, uint64_t features) noexcept nogil:
    cdef DescChain *chain = &r.chain
    cdef iovec *out = chain.iov
    cdef iovec *last
    cdef uint32_t n_out = chain.n_readable
    cdef uint64_t room, sectors
    cdef virtio_blk_outhdr header
    cdef virtio_blk_discard_write_zeroes part
    r.type = NO_TYPE
    r.status = NULL
    r.offset = r.length = 0
    if chain.n_writable == 0:
        return S_IOERR
    # The status is the last writable byte, however the driver splits the buffers (§2.7.4).
    last = &out[chain.n_readable + chain.n_writable - 1]
    last.iov_len -= 1
    r.status = <uint8_t *>last.iov_base + last.iov_len
    room = chain.writable_bytes - 1
    r.data = &chain.iov[chain.n_readable]
    r.count = chain.n_writable - (last.iov_len == 0)
    if chain.readable_bytes < HEADER_BYTES:
        return S_IOERR
    iov_take(&header, &out, &n_out, HEADER_BYTES)
    r.type = header.type
    if header.type == T_IN or header.type == T_OUT:
        r.length = room
        if header.type == T_OUT:
            r.data = out
            r.count = n_out
            r.length = chain.readable_bytes - HEADER_BYTES
            if room or disk.read_only:      # §5.2.6.2: a read-only device fails writes
                return S_IOERR
        elif n_out:
            return S_IOERR
        sectors = r.length // SECTOR
        if r.length % SECTOR:
            return S_IOERR
    elif header.type == T_FLUSH:
        return S_IOERR if n_out or room else S_OK
    elif header.type == T_GET_ID:
        return S_IOERR if n_out or room < ID_BYTES else S_OK
    elif (header.type == T_DISCARD and features & F_DISCARD) \
            or (header.type == T_WRITE_ZEROES and features & F_WRITE_ZEROES):
        if room or chain.readable_bytes != HEADER_BYTES + RANGE_BYTES:      # max_discard_seg etc. are 1
            return S_IOERR
        iov_take(&part, &out, &n_out, RANGE_BYTES)
        r.unmap = part.flags & RANGE_UNMAP != 0
        if part.flags & ~<uint32_t>RANGE_UNMAP or (r.unmap and header.type == T_DISCARD):
            return S_UNSUPP                 # §5.2.6.2
        header.sector = part.sector
        sectors = part.num_sectors
        if disk.read_only or sectors > <uint32_t>(MAX_DISCARD if header.type == T_DISCARD else MAX_WRITE_ZEROES):
            return S_IOERR
        r.length = sectors * SECTOR
    else:
        return S_UNSUPP
    if sectors == 0 or header.sector > disk.sectors or sectors > disk.sectors - header.sector:
        return S_IOERR
    r.offset = header.sector * SECTOR
    return S_OK


# Execution by system calls. Each returns 0, an errno or FILE_ENDS; r.offset, r.length and r.data are the rest to do.

cdef void advance(Request *r, uint64_t done) noexcept nogil:
    r.offset += done
    r.length -= done
    iov_cut(&r.data, &r.count, done)


cdef inline int transfer(Request *r, const BlockFile *disk, int flags) noexcept nogil:
    cdef ssize_t done
    while True:
        # A chain has at most as many buffers as its queue has entries, so never more than UIO_MAXIOV, 1024.
        if r.type == T_IN:
            if r.count == 1:
                done = pread(disk.fd, r.data.iov_base, r.data.iov_len, r.offset)
            else:
                done = preadv(disk.fd, r.data, r.count, r.offset)
        elif r.count == 1 and not flags:
            done = pwrite(disk.fd, r.data.iov_base, r.data.iov_len, r.offset)
        else:
            done = pwritev2(disk.fd, r.data, r.count, r.offset, flags)
        if <uint64_t>done == r.length:
            return 0
        if done > 0:
            advance(r, done)
        elif done == 0:
            return FILE_ENDS
        elif errno == EINVAL and disk.direct:
            return bounce(r, disk, flags)
        elif errno != EINTR:
            return errno


cdef int bounce(Request *r, const BlockFile *disk, int flags) noexcept nogil:
    # Direct I/O needs aligned memory, and a guest's buffers may be unaligned.
    cdef void *buffer
    cdef ssize_t done = 1
    cdef int failed = 0
    cdef iovec one
    if posix_memalign(&buffer, 4096, BOUNCE):
        return ENOMEM
    while r.length and done > 0:
        one.iov_base = buffer
        one.iov_len = min(r.length, <uint64_t>BOUNCE)
        if r.type == T_IN:
            done = preadv(disk.fd, &one, 1, r.offset)
            if done > 0:
                copy(r, <uint8_t *>buffer, done)
        else:
            copy(r, <uint8_t *>buffer, one.iov_len)
            done = pwritev2(disk.fd, &one, 1, r.offset, flags)
        if done > 0:
            advance(r, done)
        else:
            failed = errno if done < 0 else FILE_ENDS
    free(buffer)
    return failed


cdef void copy(Request *r, uint8_t *buffer, size_t size) noexcept nogil:
    # Copy `size` bytes between `buffer` and the start of the guest's buffers: from the guest for OUT, otherwise to it.
    if r.type == T_OUT:
        iov_gather(r.data, r.count, 0, buffer, size)
    else:
        iov_scatter(r.data, r.count, 0, buffer, size)


cdef int range_mode(const Request *r) noexcept nogil:
    if r.type == T_DISCARD or r.unmap:
        return FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
    return FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE


cdef int clear(Request *r, const BlockFile *disk, bint ask) noexcept nogil:
    cdef ssize_t done
    cdef uint64_t end
    if r.type == T_DISCARD and disk.discard_block:
        # The rest of the range stays as it is, which a device may do. The last block may be shorter.
        end = r.offset + r.length
        r.offset += -r.offset & (disk.discard_block - 1)
        if end < disk.sectors * SECTOR:
            end &= -disk.discard_block
        if end <= r.offset:
            return 0
        r.length = end - r.offset
    if r.type == T_DISCARD and disk.block_device:
        return errno if discard_device(disk.fd, r.offset, r.length) < 0 else 0
    while ask:
        if fallocate(disk.fd, range_mode(r), r.offset, r.length) == 0:
            return 0
        if errno != EINTR:
            if errno != EOPNOTSUPP:
                return errno
            break
    if r.type == T_DISCARD:
        return EOPNOTSUPP
    while r.length:
        done = pwrite(disk.fd, zeroes, min(r.length, <uint64_t>ZEROES), r.offset)
        if done > 0:
            r.offset += done
            r.length -= done
        elif done == 0 or errno != EINTR:
            return EIO if done == 0 else errno
    return 0


cdef int execute(Request *r, const BlockFile *disk, int dsync) noexcept nogil:
    cdef int failed
    if r.type == T_IN or r.type == T_OUT:
        return transfer(r, disk, dsync)
    if r.type == T_GET_ID:
        copy(r, <uint8_t *>disk.serial, ID_BYTES)
        return 0
    if r.type == T_DISCARD or r.type == T_WRITE_ZEROES:
        failed = clear(r, disk, True)
        if failed or not dsync:
            return failed
    elif disk.unsafe:
        return 0
    return errno if fdatasync(disk.fd) < 0 else 0


cdef int execute_piece(Request *r, const BlockFile *disk, int dsync, iovec *room) noexcept nogil:
    cdef Request piece = r[0]
    cdef uint64_t size = DISCARD_PIECE - r.offset % DISCARD_PIECE if r.type == T_DISCARD else PIECE
    cdef int failed
    size = piece.length = min(size, r.length)
    if r.type == T_IN or r.type == T_OUT:
        piece.data = room
        piece.count = iov_part(r.data, r.count, 0, size, room, r.count)
        failed = transfer(&piece, disk, dsync)
        if failed == 0:
            advance(r, size)
        return failed
    failed = execute(&piece, disk, dsync if size == r.length else 0)
    r.offset += size
    r.length -= size
    return failed


def punch_hole(int fd, uint64_t offset, uint64_t length):
    """Punch a hole: free the blocks of [`offset`, `offset` + `length`), bytes, which then reads as zeroes.

    :param fd: borrowed
    :returns: 0, or an error number
    """
    return errno if fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length) < 0 else 0
