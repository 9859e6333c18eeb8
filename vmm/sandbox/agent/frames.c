// SPDX-License-Identifier: Apache-2.0
// Requests and frames on the connection to the host.
#include "agent.h"
#include "libc.h"

int host = -1;
pid_t owned;
int keep;

// A command ends with whoever wanted it; one that is to be kept writes to nobody.
void host_gone(void)
{
    if (!keep) {
        if (owned)
            CALL(kill, -owned, SIGKILL);
        _exit(0);
    }
    close(host);
    host = open_file(AT_FDCWD, "/dev/null", O_RDWR, 0);
}

static char request_bytes[REQUEST_MAX + 1];

void read_all(void *to, size_t length)
{
    for (char *at = to; length;) {
        ssize_t done = read(host, at, length);
        if (done < 0 && errno == EINTR)
            continue;
        if (done <= 0) {
            host_gone();
            memset(at, 0, length);
            return;
        }
        at += done;
        length -= (size_t)done;
    }
}

// 0: the request is beyond a limit, and was read and refused.
int read_request(struct request *request)
{
    uint32_t length;
    read_all(&length, sizeof length);
    request->count = 0;
    if (length > REQUEST_MAX)
        _exit(0);
    read_all(request_bytes, length);
    request_bytes[length] = 0;
    for (char *at = request_bytes; at < request_bytes + length; at += strlen(at) + 1) {
        if (request->count == WORDS_MAX) {
            send_failed(E2BIG, "request");
            return 0;
        }
        request->words[request->count++] = at;
    }
    if (!request->count) {
        send_failed(EINVAL, "request");
        return 0;
    }
    return 1;
}

size_t read_frame(char *type, char *bytes)
{
    char head[5];
    uint32_t length;
    read_all(head, sizeof head);
    memcpy(&length, head + 1, sizeof length);
    if (length > FRAME_MAX)
        _exit(0);
    read_all(bytes, length);
    *type = head[0];
    return length;
}

void send_frame(char type, const void *head, size_t head_length, const void *bytes, size_t length)
{
    char first[5] = {type};
    uint32_t total = (uint32_t)(head_length + length);
    memcpy(first + 1, &total, sizeof total);
    struct iovec parts[3] = {{first, sizeof first}, {(void *)head, head_length}, {(void *)bytes, length}};
    for (int at = 0; at < 3;) {
        ssize_t done = CALL(writev, host, parts + at, 3 - at);
        if (done < 0 && errno == EINTR)
            continue;
        if (done < 0) {
            host_gone();
            return;
        }
        for (; at < 3 && (size_t)done >= parts[at].iov_len; at++)
            done -= (ssize_t)parts[at].iov_len;
        if (at < 3) {
            parts[at].iov_base = (char *)parts[at].iov_base + done;
            parts[at].iov_len -= (size_t)done;
        }
    }
}

void send_ok(void)
{
    send_frame(F_DONE, NULL, 0, NULL, 0);
}

void send_failed(int error, const char *what)
{
    uint32_t number = (uint32_t)error;
    size_t length = strlen(what);
    send_frame(F_FAILED, &number, sizeof number, what, length < 4096 ? length : 4096);
}
