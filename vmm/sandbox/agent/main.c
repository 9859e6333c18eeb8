// SPDX-License-Identifier: Apache-2.0
// Process 1: boots the system, starts a process for each connection from the host, and reaps orphaned processes.
#include "agent.h"
#include "libc.h"
#include <linux/vm_sockets.h>
#include <sys/signalfd.h>

static void signal_process(const struct request *request)
{
    long pid = number(value(request, "pid"), 0), which = number(value(request, "signal"), -1);
    if (pid < 2 || which < 0 || which > 64)
        send_failed(EINVAL, "signal");
    else if (CALL(kill, -pid, which))
        send_failed(errno, "signal");
    else
        send_ok();
}

static void serve(void)
{
    static const struct {
        const char *verb;
        void (*serve)(const struct request *request);
    } verbs[] = {
        {"run", run}, {"tcp", relay}, {"listen", serve_port}, {"signal", signal_process}, {"wake", wake},
        {"mount", mount_share}, {"read-only", make_read_only}, {"read", serve_files}, {"write", serve_files},
        {"list", serve_files}, {"stat", serve_files}, {"mkdir", serve_files}, {"remove", serve_files},
        {"rename", serve_files}, {"symlink", serve_files}, {"chmod", serve_files}, {"chown", serve_files},
        {"watch", serve_files}, {"get", serve_files}, {"put", serve_files},
    };
    static struct request request;
    for (;;) {
        if (!read_request(&request))
            continue;
        size_t i = 0;
        while (i < sizeof verbs / sizeof *verbs && strcmp(request.verb, verbs[i].verb))
            i++;
        if (i < sizeof verbs / sizeof *verbs)
            verbs[i].serve(&request);
        else
            send_failed(ENOSYS, request.verb);
    }
}

static int listen_for_host(void)
{
    int fd = (int)CALL(socket, AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct sockaddr_vm address = {.svm_family = AF_VSOCK, .svm_port = PORT, .svm_cid = VMADDR_CID_ANY};
    if (fd < 0 || CALL(bind, fd, &address, sizeof address) || CALL(listen, fd, 128)) {
        say("no socket device", errno);
        return -1;
    }
    return fd;
}

static void accept_one(int listener, int signals)
{
    struct sockaddr_vm peer = {0};
    socklen_t length = sizeof peer;
    int fd = (int)CALL(accept4, listener, &peer, &length, SOCK_CLOEXEC);
    if (fd < 0)
        return;
    // A guest program can also connect (vsock_loopback). Its connection is closed.
    if (peer.svm_cid == VMADDR_CID_HOST) {
        long child = CALL(fork);
        if (!child) {
            CALL(close, listener);
            CALL(close, signals);
            spit("/proc/self/oom_score_adj", "-999"); // killed only instead of a panic; see become for its commands
            host = fd;
            serve();
        }
        if (child < 0)
            say("fork", errno);
    }
    close(fd);
}

int main(void)
{
    if (CALL(getpid) != 1)
        return 1;
    boot();
    // Blocked for good: SIGCHLD is read from a signalfd, and instead of SIGPIPE write returns an error.
    uint64_t chosen = 1ul << (SIGCHLD - 1), blocked = chosen | 1ul << (SIGPIPE - 1);
    CALL(rt_sigprocmask, SIG_BLOCK, &blocked, NULL, sizeof blocked);
    spit("/proc/self/oom_score_adj", "-1000");
    int signals = (int)CALL(signalfd4, -1, &chosen, sizeof chosen, SFD_CLOEXEC | SFD_NONBLOCK);
    int listener = listen_for_host();
    if (listener < 0)
        return 1; // the kernel panics, and the VM ends
    for (;;) {
        struct pollfd fds[2] = {{listener, POLLIN, 0}, {signals, POLLIN, 0}};
        wait_for(fds, 2, -1);
        if (fds[1].revents) {
            struct signalfd_siginfo info;
            while (read(signals, &info, sizeof info) > 0)
                continue;
            while (CALL(wait4, -1, NULL, WNOHANG, NULL) > 0)
                continue;
        }
        if (fds[0].revents)
            accept_one(listener, signals);
    }
}
