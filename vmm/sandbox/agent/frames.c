// SPDX-License-Identifier: Apache-2.0
// Requests and frames on the connection to the host, and the console.
#include "agent.h"
#include "libc.h"

int host = -1;
pid_t owned;
int keep, gone;

// The host has disconnected: kill its command and exit. With `keep` the command continues, and its output is discarded.
void host_gone(void)
{
    if (!keep) {
        if (owned)
            CALL(kill, -owned, SIGKILL);
        _exit(0);
    }
    gone = 1;
    close(host);
    host = open_file(AT_FDCWD, "/dev/null", O_RDWR, 0);
}

static int deaf; // the host takes no more. With `keep` what it has sent before is still read

static char waiting[1 << 14]; // small frames, held back until the next wait, so that they are sent as one packet
static size_t waiting_length;

static void send_all(struct iovec *parts, int count)
{
    while (count && !deaf) {
        ssize_t done = CALL(writev, host, parts, count);
        if (done < 0 && errno == EINTR)
            continue;
        if (done < 0) {
            deaf = 1;
            if (!keep)
                host_gone();
            return;
        }
        for (; count && (size_t)done >= parts->iov_len; parts++, count--)
            done -= (ssize_t)parts->iov_len;
        if (count) {
            parts->iov_base = (char *)parts->iov_base + done;
            parts->iov_len -= (size_t)done;
        }
    }
}

void flush(void)
{
    struct iovec all = {waiting, waiting_length};
    waiting_length = 0;
    if (all.iov_len)
        send_all(&all, 1);
}

static char ahead[1 << 14]; // bytes read in advance, so that a small frame takes one call
static size_t ahead_at, ahead_length;
static char request_bytes[REQUEST_MAX + 1];

int has_read_ahead(void)
{
    return ahead_at < ahead_length;
}

int read_all(void *to, size_t length)
{
    flush();
    for (char *at = to; length;) {
        size_t there = ahead_length - ahead_at;
        if (there) {
            there = there < length ? there : length;
            memcpy(at, ahead + ahead_at, there);
            ahead_at += there;
            at += there;
            length -= there;
            continue;
        }
        int small = length < sizeof ahead;
        ssize_t done = small ? read(host, ahead, sizeof ahead) : read(host, at, length);
        if (done < 0 && errno == EINTR)
            continue;
        if (done <= 0) {
            host_gone();
            return -1;
        }
        ahead_at = 0;
        ahead_length = small ? (size_t)done : 0;
        at += small ? 0 : done;
        length -= small ? 0 : (size_t)done;
    }
    return 0;
}

// Returns 0 if the request is invalid: it was read, and F_FAILED was sent.
int read_request(struct request *request)
{
    uint32_t length;
    read_all(&length, sizeof length);
    if (length > REQUEST_MAX)
        _exit(0);
    read_all(request_bytes, length);
    request_bytes[length] = 0;
    int error = parse_request(request_bytes, length, request);
    if (error)
        send_failed(error, "request");
    return !error;
}

const char *pair(const struct request *request, const char *key)
{
    static char text[4096];
    join(text, sizeof text, key, "=", value(request, key), NULL);
    return text;
}

long number(const char *text, long otherwise)
{
    if (!text || !*text)
        return otherwise;
    long result = digits(&text);
    return *text || result == INT64_MAX ? otherwise : result;
}

size_t read_frame(char *type, char *bytes)
{
    char head[5];
    uint32_t length;
    *type = 0;
    if (read_all(head, sizeof head))
        return 0;
    memcpy(&length, head + 1, sizeof length);
    if (length > FRAME_MAX)
        _exit(0);
    if (read_all(bytes, length))
        return 0;
    *type = head[0];
    return length;
}

void send_frame(char type, const void *head, size_t head_length, const void *bytes, size_t length)
{
    char first[5] = {type};
    uint32_t total = (uint32_t)(head_length + length);
    memcpy(first + 1, &total, sizeof total);
    struct iovec parts[3] = {{first, sizeof first}, {(void *)head, head_length}, {(void *)bytes, length}};
    if (sizeof first + total > sizeof waiting - waiting_length)
        flush();
    if (sizeof first + total > sizeof waiting / 4) {
        flush();
        send_all(parts, 3);
        return;
    }
    for (int i = 0; i < 3; i++) {
        memcpy(waiting + waiting_length, parts[i].iov_base, parts[i].iov_len);
        waiting_length += parts[i].iov_len;
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

// Write to the console, which the host shows if the system does not boot.
void say(const char *what, int error)
{
    char line[512], digits[24];
    if (error)
        join(line, sizeof line, "agent: ", what, ": error ", decimal((unsigned long)error, digits), "\n", NULL);
    else
        join(line, sizeof line, "agent: ", what, "\n", NULL);
    write(2, line, strlen(line));
}
