// SPDX-License-Identifier: Apache-2.0
// A TCP port of the guest, for the host: after F_DONE the connection is that to the port.
#include "agent.h"
#include "libc.h"
#include <netinet/in.h>

static char buffer[2][FRAME_MAX];

void relay(const struct request *request)
{
    long port = number(value(request, "port"), 0);
    if (port < 1 || port > 65535) {
        send_failed(EINVAL, "port");
        return;
    }
    int fd = (int)CALL(socket, AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = (uint16_t)(port >> 8 | port << 8)};
    address.sin_addr.s_addr = 0x0100007f;
    if (fd < 0 || CALL(connect, fd, &address, sizeof address)) {
        send_failed(errno, "connect");
        close(fd);
        return;
    }
    send_ok();
    flush();
    int from[2] = {host, fd}, to[2] = {fd, host};
    size_t length[2] = {0, 0}, at[2] = {0, 0};
    int open[2] = {1, 1};
    CALL(fcntl, host, F_SETFL, O_NONBLOCK);
    CALL(fcntl, fd, F_SETFL, O_NONBLOCK);
    while (open[0] || open[1]) {
        struct pollfd fds[2] = {{host, 0, 0}, {fd, 0, 0}};
        for (int i = 0; i < 2; i++) {
            if (open[i] && !length[i])
                fds[i].events |= POLLIN;
            if (length[i])
                fds[!i].events |= POLLOUT;
        }
        wait_for(fds, 2, -1);
        for (int i = 0; i < 2; i++) {
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
