# SPDX-License-Identifier: Apache-2.0
# passt's end of a network device: a stream of frames, each with a 4-byte big-endian length in front and no virtio
# header. In the guest's buffers a frame is behind a virtio header. Source: passt(1).
from libc.errno cimport EAGAIN, ECONNRESET, EINTR, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memset

from vmm._fastpath cimport DescChain, iovec
from vmm._iov cimport iov_part, iov_scatter

cdef extern from *:
    """
    #include <errno.h>
    #include <sys/socket.h>
    #include <sys/uio.h>
    static inline void net_set_errno(int value) { errno = value; }
    static inline ssize_t net_send(int fd, struct iovec *iov, size_t n) {
        struct msghdr m = { .msg_iov = iov, .msg_iovlen = n };
        return sendmsg(fd, &m, MSG_DONTWAIT | MSG_NOSIGNAL);
    }
    """
    void net_set_errno(int value) noexcept nogil
    ssize_t net_send(int fd, iovec *iov, size_t n) noexcept nogil
    ssize_t readv(int fd, const iovec *iov, int count) noexcept nogil

cdef extern from "<linux/virtio_net.h>" nogil:
    struct virtio_net_hdr_mrg_rxbuf:
        pass

cdef enum:
    VNET_HEADER = sizeof(virtio_net_hdr_mrg_rxbuf)
    UIO_MAXIOV = 1024
    PARTS = UIO_MAXIOV - 1      # iovecs of a chain, beside one of our own

cdef struct Stream:
    uint8_t[4] length
    uint32_t length_got         # bytes received of the length
    uint64_t frame_size
    uint64_t frame_got          # bytes received of the frame, and then of the next one's length
    bint dropping               # discard the rest of this frame: its driver is gone
    bint cut                    # there were no buffers for a part of this frame: it is lost, even if more come now
    uint8_t[4] tx_length
    uint64_t tx_size
    uint64_t tx_left            # bytes left to send of the length and the frame


cdef inline ssize_t stream_read_rest(Stream *s, int fd, const iovec *iov, uint32_t n_iov, uint64_t held) noexcept nogil:
    # Read the rest of a frame, and the next one's length if that is there: one call for each frame of a flood. Returns
    # 1 when the frame is complete, or the result of the failed read.
    cdef ssize_t got
    cdef uint8_t[4096] scrap
    cdef uint64_t room
    cdef iovec[UIO_MAXIOV] rest
    cdef uint32_t n
    while s.length_got < 4:
        rest[0] = iovec(<void *>&s.length[s.length_got], 4 - s.length_got)
        got = readv(fd, rest, 1)
        if got <= 0:
            return got
        s.length_got += <uint32_t>got
    if s.frame_got == 0:
        s.cut = False
        s.frame_size = <uint64_t>s.length[0] << 24 | s.length[1] << 16 | s.length[2] << 8 | s.length[3]
    while s.frame_got < s.frame_size:
        room = 0 if s.dropping else held - VNET_HEADER
        if s.frame_got < room:
            n = iov_part(iov, n_iov, VNET_HEADER + s.frame_got, s.frame_size - s.frame_got, rest, PARTS)
            if s.frame_size <= room and n < PARTS:
                rest[n] = iovec(<void *>s.length, 4)
                n += 1
        else:
            rest[0] = iovec(<void *>scrap, min(<uint64_t>sizeof(scrap), s.frame_size - s.frame_got))
            n = 1
            s.cut = True
        got = readv(fd, rest, n)
        if got <= 0:
            return got
        s.frame_got += got
    return 1


cdef inline ssize_t stream_read(Stream *s, int fd, const iovec *iov, uint32_t n_iov, uint64_t held) noexcept nogil:
    # Read a frame into the buffers, which hold `held` bytes, behind an empty header. Returns the size of both, which
    # exceeds theirs if the frame did not fit; or -1 and errno. The end of the stream is reported as ECONNRESET.
    cdef ssize_t got
    cdef uint8_t[VNET_HEADER] header
    while True:
        got = stream_read_rest(s, fd, iov, n_iov, held)
        if got < 0:
            return -1
        if got == 0:
            net_set_errno(ECONNRESET)
            return -1
        s.length_got = <uint32_t>(s.frame_got - s.frame_size)
        s.frame_got = 0
        if not s.dropping:
            break
        s.dropping = False
    memset(header, 0, VNET_HEADER)
    iov_scatter(iov, n_iov, 0, header, VNET_HEADER)
    return held + 1 if s.cut else VNET_HEADER + s.frame_size


cdef inline ssize_t stream_write(Stream *s, int fd, const DescChain *chain, uint8_t *head,
                                 uint64_t head_size) noexcept nogil:
    # Send the chain's frame, whose first `head_size` bytes are those at `head`. Returns 0 when all of it is sent, or -1
    # and errno. After a partial send the chain is put back and popped again. If the driver changed it in between, the
    # stream gets other bytes, in the same number.
    cdef iovec[UIO_MAXIOV + 1] rest
    cdef uint64_t size = chain.readable_bytes - VNET_HEADER, done
    cdef uint8_t[4096] filler
    cdef ssize_t sent
    cdef uint32_t n
    if s.tx_left == 0:
        s.tx_size = size
        s.tx_left = 4 + size
        for n in range(4):
            s.tx_length[n] = <uint8_t>(size >> (24 - 8 * n))
    while s.tx_left:
        done = 4 + s.tx_size - s.tx_left
        n = 0
        if done < 4:
            rest[0] = iovec(<void *>&s.tx_length[done], 4 - done)
            n = 1
            done = 4
        done -= 4
        if done < head_size:
            rest[n] = iovec(<void *>&head[done], head_size - done)
            n += 1
            done = head_size
        if done < size:
            n += iov_part(chain.iov, chain.n_readable, VNET_HEADER + done, min(size, s.tx_size) - done, &rest[n], PARTS)
        elif done < s.tx_size:
            memset(filler, 0, sizeof(filler))
            rest[n] = iovec(<void *>filler, min(<uint64_t>sizeof(filler), s.tx_size - done))
            n += 1
        sent = net_send(fd, rest, n)
        if sent < 0:
            if errno != EAGAIN and errno != EINTR:
                s.tx_left = 0
            return -1
        s.tx_left -= sent
    return 0
