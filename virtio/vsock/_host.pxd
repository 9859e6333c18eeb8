# SPDX-License-Identifier: Apache-2.0
# Host calls of the socket device.

from vmm._fastpath cimport iovec

cdef extern from *:
    """
    #include <poll.h>
    static inline int poll_one(int fd, short events, int most) {
        struct pollfd p = { .fd = fd, .events = events };
        return poll(&p, 1, most) > 0;
    }
    /* Whether the peer has closed its socket, not only shut down writing. */
    #define peer_closed(fd) poll_one(fd, 0, 0)
    /* Whether the peer will write no more. */
    #define peer_shut_down(fd) poll_one(fd, POLLRDHUP, 0)
    /* Wait until the socket has room or its peer is gone; at most `most` milliseconds. */
    #define wait_for_room(fd, most) poll_one(fd, POLLOUT, most)
    static inline int lowest_bit(unsigned bits) { return __builtin_ctz(bits); }
    """
    bint peer_closed(int fd) noexcept nogil
    void wait_for_room(int fd, int most) noexcept nogil
    bint peer_shut_down(int fd) noexcept nogil
    int lowest_bit(unsigned int bits) noexcept nogil

cdef extern from "<sys/socket.h>" nogil:
    struct sockaddr:
        pass
    struct msghdr:
        iovec *msg_iov
        size_t msg_iovlen
        int msg_flags
    int socket(int domain, int kind, int protocol)
    int connect(int fd, const sockaddr *address, unsigned int length)
    int accept4(int fd, sockaddr *address, unsigned int *length, int flags)
    int shutdown(int fd, int how)
    ssize_t recvmsg(int fd, msghdr *message, int flags)
    ssize_t sendmsg(int fd, const msghdr *message, int flags)
    ssize_t send(int fd, const void *data, size_t length, int flags)
    ssize_t recv(int fd, void *data, size_t length, int flags)
    int setsockopt(int fd, int level, int name, const void *value, unsigned int length)
    enum: SOL_SOCKET, SO_SNDBUF, AF_UNIX, SOCK_STREAM, SOCK_NONBLOCK, SOCK_CLOEXEC
    enum: MSG_CTRUNC, MSG_DONTWAIT, MSG_NOSIGNAL, MSG_PEEK
    enum: SHUT_RD_ "SHUT_RD"
    enum: SHUT_WR_ "SHUT_WR"

cdef extern from "<sys/un.h>" nogil:
    struct sockaddr_un:
        unsigned short sun_family
        char[108] sun_path
