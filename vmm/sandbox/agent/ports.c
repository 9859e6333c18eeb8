// SPDX-License-Identifier: Apache-2.0
// TCP ports on the guest's loopback. Verb "tcp" connects the host to a port on which a guest program listens: after
// F_DONE this connection carries the port's data. Verb "listen" listens on a port for guest programs and forwards each
// connection to the host's vsock port `to`. It replies F_STARTED with the port, and listens until the host disconnects.
#include "agent.h"
#include "libc.h"
#include <linux/vm_sockets.h>
#include <netinet/in.h>

static char buffer[2][FRAME_MAX];

// Copy data in both directions until both have ended. Then exit.
static void pass_on(int one, int other)
{
    int from[2] = {one, other}, to[2] = {other, one};
    size_t length[2] = {0, 0}, at[2] = {0, 0};
    int open[2] = {1, 1};
    CALL(fcntl, one, F_SETFL, O_NONBLOCK);
    CALL(fcntl, other, F_SETFL, O_NONBLOCK);
    while (open[0] || open[1]) {
        struct pollfd fds[2] = {{one, 0, 0}, {other, 0, 0}};
        for (int i = 0; i < 2; i++) {
            if (open[i] && !length[i])
                fds[i].events |= POLLIN;
            if (length[i])
                fds[!i].events |= POLLOUT;
        }
        for (int i = 0; i < 2; i++)
            if (length[i] && !length[!i])
                fds[i].fd = -1; // it may have hung up, which poll would report until what it sent is written
        wait_for(fds, 2, -1);
        for (int i = 0; i < 2; i++) {
            if (!open[i] && !length[i] && fds[i].revents & (POLLHUP | POLLERR))
                _exit(0); // the other direction is closed, too
            if (open[i] && !length[i] && fds[i].revents) {
                ssize_t done = read(from[i], buffer[i], FRAME_MAX);
                if (done > 0) {
                    length[i] = (size_t)done;
                    at[i] = 0;
                } else if (done == 0) {
                    open[i] = 0;
                    CALL(shutdown, to[i], SHUT_WR);
                } else if (errno != EAGAIN) {
                    _exit(0);
                }
            }
            if (length[i]) {
                ssize_t done = write(to[i], buffer[i] + at[i], length[i]);
                if (done < 0 && errno != EAGAIN)
                    _exit(0);
                if (done > 0) {
                    at[i] += (size_t)done;
                    length[i] -= (size_t)done;
                }
            }
        }
    }
    _exit(0);
}

static struct sockaddr_in loopback(long port)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = (uint16_t)(port >> 8 | port << 8)};
    address.sin_addr.s_addr = 0x0100007f;
    return address;
}

void relay(const struct request *request)
{
    long port = number(value(request, "port"), 0);
    if (port < 1 || port > 65535) {
        send_failed(EINVAL, "port");
        return;
    }
    int fd = (int)CALL(socket, AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct sockaddr_in address = loopback(port);
    if (fd < 0 || CALL(connect, fd, &address, sizeof address)) {
        send_failed(errno, "connect");
        close(fd);
        return;
    }
    send_ok();
    flush();
    pass_on(host, fd);
}

static int listen_at(long port, uint32_t *taken)
{
    struct sockaddr_in address = loopback(port);
    socklen_t length = sizeof address;
    int one = 1, fd = (int)CALL(socket, AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return -1;
    CALL(setsockopt, fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (CALL(bind, fd, &address, sizeof address) || CALL(listen, fd, 128) || CALL(getsockname, fd, &address, &length)) {
        close(fd);
        return -1;
    }
    *taken = __builtin_bswap16(address.sin_port);
    return fd;
}

static void to_host(int fd, long port)
{
    struct sockaddr_vm address = {.svm_family = AF_VSOCK, .svm_port = (unsigned)port, .svm_cid = VMADDR_CID_HOST};
    int out = (int)CALL(socket, AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (out < 0 || CALL(connect, out, &address, sizeof address))
        _exit(0);
    pass_on(fd, out);
}

void serve_port(const struct request *request)
{
    long port = number(value(request, "port"), -1), to = number(value(request, "to"), -1);
    uint32_t taken;
    int fd = -1;
    errno = EINVAL;
    if (port >= 0 && port <= 65535 && to >= 0 && to <= UINT32_MAX)
        fd = listen_at(port, &taken);
    if (fd < 0) {
        send_failed(errno, "port");
        return;
    }
    send_frame(F_STARTED, &taken, sizeof taken, NULL, 0);
    flush();
    struct {
        void *handler;
        unsigned long flags;
        void *restorer;
        uint64_t mask;
    } ignore = {SIG_IGN, 0, NULL, 0}; // the kernel reaps the children
    CALL(rt_sigaction, SIGCHLD, &ignore, NULL, sizeof ignore.mask);
    for (;;) {
        struct pollfd fds[2] = {{host, POLLIN | POLLRDHUP, 0}, {fd, POLLIN, 0}};
        wait_for(fds, 2, -1);
        if (fds[0].revents)
            _exit(0);
        int inside = (int)CALL(accept4, fd, NULL, NULL, SOCK_CLOEXEC);
        if (inside >= 0 && !CALL(fork)) {
            close(fd);
            close(host);
            to_host(inside, to);
        }
        close(inside);
    }
}
