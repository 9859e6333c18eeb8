# SPDX-License-Identifier: Apache-2.0
# passt's end of a network device: a stream of frames, each with a 4-byte big-endian length in front and no virtio
# header. In the guest's buffers a frame is behind a virtio header. Source: passt(1).
from libc.errno cimport EAGAIN, ECONNRESET, EINTR, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memmove, memset
from posix.uio cimport readv

from vmm._fastpath cimport DescChain, iovec
from vmm._iov cimport iov_part, iov_scatter
from vmm._sys cimport set_errno

cdef extern from *:
    """
    #include <sys/socket.h>
    #include <sys/uio.h>
    static inline ssize_t net_send(int fd, struct iovec *iov, size_t n) {
        struct msghdr m = { .msg_iov = iov, .msg_iovlen = n };
        return sendmsg(fd, &m, MSG_DONTWAIT | MSG_NOSIGNAL);
    }
    """
    ssize_t net_send(int fd, iovec *iov, size_t n) noexcept nogil

cdef extern from "<linux/virtio_net.h>" nogil:
    struct virtio_net_hdr_mrg_rxbuf:
        pass

cdef enum:
    VNET_HEADER = sizeof(virtio_net_hdr_mrg_rxbuf)
    UIO_MAXIOV = 1024
    PARTS = UIO_MAXIOV - 1      # iovecs of a chain, beside one of our own
    LENGTH = 4
    # To read a frame of an Ethernet by a call of its own takes longer than to copy it. So after such a frame the next
    # ones are read ahead, into memory of our own. After a larger frame, only the next one's length is.
    AHEAD = 1 << 16
    COPIED = 2048

cdef struct Stream:
    uint8_t *ahead              # AHEAD bytes, of which [ahead_at, ahead_end) were received and are still to be taken
    uint32_t ahead_at
    uint32_t ahead_end
    bint inside                 # the frame's length was received, and the frame is not complete
    uint64_t frame_size         # of the last frame or this one
    uint64_t frame_got          # bytes received of this frame
    bint cut                    # a part of this frame found no buffers, or its driver is gone: the frame is lost
    uint8_t[4] tx_length
    uint64_t tx_size
    uint64_t tx_left            # bytes left to send of the length and the frame


cdef inline uint32_t stream_room(Stream *s) noexcept nogil:
    # How many bytes to read to `ahead`.
    return AHEAD if s.frame_size <= COPIED else LENGTH


cdef inline ssize_t stream_read_length(Stream *s, int fd) noexcept nogil:
    # Take a frame's length. Returns 1, or the result of the failed read.
    cdef uint32_t held
    cdef const uint8_t *length
    cdef iovec room
    cdef ssize_t got
    while s.ahead_end - s.ahead_at < LENGTH:
        held = s.ahead_end - s.ahead_at
        memmove(s.ahead, &s.ahead[s.ahead_at], held)
        s.ahead_at = 0
        s.ahead_end = held
        room = iovec(&s.ahead[held], stream_room(s) - held)
        got = readv(fd, &room, 1)
        if got <= 0:
            return got
        s.ahead_end += <uint32_t>got
    length = &s.ahead[s.ahead_at]
    s.frame_size = <uint64_t>length[0] << 24 | length[1] << 16 | length[2] << 8 | length[3]
    s.ahead_at += LENGTH
    s.inside = True
    s.cut = False
    return 1


cdef inline ssize_t stream_read_rest(Stream *s, int fd, const iovec *iov, uint32_t n_iov, uint64_t held) noexcept nogil:
    # Take the rest of a frame: what was read ahead, and then from the socket. Returns 1 when the frame is complete, or
    # the result of the failed read.
    cdef ssize_t got
    cdef uint8_t[4096] scrap
    cdef uint64_t room, want
    cdef iovec[UIO_MAXIOV] rest
    cdef uint32_t n
    if not s.inside:
        got = stream_read_length(s, fd)
        if got <= 0:
            return got
    while s.frame_got < s.frame_size:
        room = held - VNET_HEADER
        want = s.frame_size - s.frame_got
        if s.frame_got >= room:
            s.cut = True
        if s.ahead_at < s.ahead_end:
            want = min(want, <uint64_t>(s.ahead_end - s.ahead_at))
            if not s.cut:
                want = iov_scatter(iov, n_iov, VNET_HEADER + s.frame_got, &s.ahead[s.ahead_at], want)
            s.ahead_at += <uint32_t>want
            s.frame_got += want
            continue
        if not s.cut:
            n = iov_part(iov, n_iov, VNET_HEADER + s.frame_got, want, rest, PARTS)
            if s.frame_size <= room and n < PARTS:
                rest[n] = iovec(s.ahead, stream_room(s))
                n += 1
        else:
            want = min(want, <uint64_t>sizeof(scrap))
            rest[0] = iovec(<void *>scrap, want)
            n = 1
        got = readv(fd, rest, n)
        if got <= 0:
            return got
        s.ahead_at = 0
        s.ahead_end = <uint32_t>(got - want) if <uint64_t>got > want else 0
        s.frame_got += got - s.ahead_end
    s.inside = False
    return 1


cdef inline ssize_t stream_read(Stream *s, int fd, const iovec *iov, uint32_t n_iov, uint64_t held) noexcept nogil:
    # Read a frame into the buffers, which hold `held` bytes, behind an empty header. Returns the size of both, which
    # exceeds theirs if the frame did not fit; or -1 and errno. The end of the stream is reported as ECONNRESET.
    cdef ssize_t got = stream_read_rest(s, fd, iov, n_iov, held)
    cdef uint8_t[VNET_HEADER] header
    if got < 0:
        return -1
    if got == 0:
        set_errno(ECONNRESET)
        return -1
    s.frame_got = 0
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
