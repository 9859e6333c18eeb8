# SPDX-License-Identifier: Apache-2.0
# The socket device in C: what it calls of the host's, the packets of §5.10.6, and what it keeps of each connection.
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t

from vmm._fastpath cimport iovec

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <poll.h>
    #include <time.h>
    /* Guest memory into a local, once: the compiler may not look there again. */
    static inline void copy_once(void *to, const void *from, size_t n) {
        __builtin_memcpy(to, from, n);
        __asm__ __volatile__("" : "+r"(to) : : "memory");
    }
    static inline uint64_t vsock_now(void) {
        struct timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
    }
    /* Whether the other end is closed, not only shut down for writing. */
    static inline int hung_up(int fd) {
        struct pollfd p = { .fd = fd, .events = 0 };
        return poll(&p, 1, 0) > 0;
    }
    /* Whether the other end will write no more. */
    static inline int shut_up(int fd) {
        struct pollfd p = { .fd = fd, .events = POLLRDHUP };
        return poll(&p, 1, 0) > 0;
    }
    static inline int lowest_bit(unsigned bits) { return __builtin_ctz(bits); }
    """
    void copy_once(void *to, const void *source, size_t n) noexcept nogil
    uint64_t vsock_now() noexcept nogil
    bint hung_up(int fd) noexcept nogil
    bint shut_up(int fd) noexcept nogil
    int lowest_bit(unsigned int bits) noexcept nogil

cdef extern from "<sys/socket.h>" nogil:
    struct sockaddr:
        pass
    struct msghdr:
        iovec *msg_iov
        size_t msg_iovlen
    int socket(int domain, int kind, int protocol)
    int connect(int fd, const sockaddr *address, unsigned int length)
    int accept4(int fd, sockaddr *address, unsigned int *length, int flags)
    int shutdown(int fd, int how)
    ssize_t sendmsg(int fd, const msghdr *message, int flags)
    ssize_t send(int fd, const void *data, size_t length, int flags)
    ssize_t recv(int fd, void *data, size_t length, int flags)
    enum: AF_UNIX, SOCK_STREAM, SOCK_NONBLOCK, SOCK_CLOEXEC, MSG_DONTWAIT, MSG_NOSIGNAL, MSG_PEEK
    enum: SHUT_RD_ "SHUT_RD"
    enum: SHUT_WR_ "SHUT_WR"

cdef extern from "<sys/un.h>" nogil:
    struct sockaddr_un:
        unsigned short sun_family
        char[108] sun_path

cdef extern from "<sys/uio.h>" nogil:
    ssize_t readv(int fd, const iovec *iov, int count)

cdef extern from "<sys/epoll.h>" nogil:
    enum: EPOLLIN, EPOLLOUT, EPOLLRDHUP, EPOLLET

cdef extern from "<sys/eventfd.h>" nogil:
    int eventfd_write(int fd, uint64_t value)

cdef extern from "<unistd.h>" nogil:
    int close(int fd)

# <linux/virtio_vsock.h>, §5.10.6
cdef enum:
    OP_REQUEST = 1
    OP_RESPONSE = 2
    OP_RST = 3
    OP_SHUTDOWN = 4
    OP_RW = 5
    OP_CREDIT_UPDATE = 6
    OP_CREDIT_REQUEST = 7
    TYPE_STREAM = 1
    SHUT_RCV = 1                # the flags of SHUTDOWN: will not receive,
    SHUT_SEND = 2               # will not send
    SHUT_BOTH = 3
    HOST_CID = 2
    HEADER = 44

cdef packed struct Header:
    uint64_t src_cid
    uint64_t dst_cid
    uint32_t src_port
    uint32_t dst_port
    uint32_t len
    uint16_t type
    uint16_t op
    uint32_t flags
    uint32_t buf_alloc
    uint32_t fwd_cnt

cdef enum:
    RX = 0                      # places of the queues, which are their numbers too (§5.10.2)
    TX = 1
    CONNECTIONS = 4096
    BUCKETS = 8192
    NONE = -1
    TOKEN_LISTENER = 0x10000
    MAX_PACKET = 65536          # payload of one packet, as Linux has it (VIRTIO_VSOCK_MAX_PKT_BUF_SIZE)
    BUFFER = 262144             # what we grant the guest for each connection, bytes
    TURN = 128                  # chains of one queue before the other sockets are looked at
    BATCH = 16                  # chains that one readv fills
    MAX_CHAIN = 256             # buffers of a chain: the size of its queue
    IOV_MAX = 1024              # Linux UIO_MAXIOV
    PUBLISH = 16                # chains returned between two looks at whether the driver sleeps
    REPLIES = 256               # resets to packets that belong to no connection
    LINE = 32                   # "CONNECT 4294967294\r\n" has 20
    FIRST_HOST_PORT = 1 << 30
    ACCEPTS = 64
    SECOND = 1000000000
    TICK = SECOND // 8

cdef enum State:
    FREE = 0
    GREETING                    # a host program, its CONNECT line is not here yet; no ports
    CONNECTING                  # REQUEST is sent or pending
    OPEN
    CLOSING                     # no descriptor; the guest was told, its RST or the deadline ends it
    KILLED                      # no descriptor; ends when RST is sent
    LEAVING                     # the guest is done with it; no ports; what it sent is still to be written

cdef struct Conn:
    int fd                      # -1: none
    State state
    uint32_t pending            # 1 << OP_*: packets to send
    uint32_t shut               # SHUT_*: what the guest was told; SEND: the host sent its last, RCV: it reads no more
    uint32_t guest_shut         # SHUT_*: what the guest told
    bint readable               # there may be data: the last read did not say EAGAIN
    bint asked                  # CREDIT_REQUEST was sent since there was credit last
    bint queued                 # is in the list of turns
    bint entered                # has its ports in the hash table
    uint32_t guest_port
    uint32_t host_port
    uint32_t peer_buf_alloc     # the guest's credit: free = peer_buf_alloc - (tx_cnt - peer_fwd_cnt)
    uint32_t peer_fwd_cnt
    uint32_t tx_cnt
    uint32_t rx_cnt             # ours: free = BUFFER - (rx_cnt - fwd_cnt); the guest knows of fwd_sent
    uint32_t fwd_cnt
    uint32_t fwd_sent
    uint8_t *buffer             # ring of BUFFER bytes; NULL while used is 0
    uint32_t start
    uint32_t used
    uint32_t batch              # chains to try to fill at once
    uint64_t deadline           # on the monotonic clock, ns; 0: none
    int32_t hash_next
    int32_t previous            # in the list of turns
    int32_t next                # in it, or of the free ones

cdef struct Reply:
    uint64_t src_cid
    uint32_t src_port
    uint32_t dst_port
    uint16_t type

cdef struct Counters:
    uint64_t packets_tx         # tx: guest to host
    uint64_t packets_rx
    uint64_t bytes_tx
    uint64_t bytes_rx
    uint64_t opened_by_guest
    uint64_t opened_by_host
    uint64_t refused            # no program behind the port, on either side
    uint64_t closed
    uint64_t resets_sent
    uint64_t bad_requests
    uint64_t bad_credit
    uint64_t bad_lines
    uint64_t timeouts
    uint64_t full               # connections refused for want of a place or a descriptor
