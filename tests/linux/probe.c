// SPDX-License-Identifier: Apache-2.0
// A client and server that measures every kind of socket in the same way, for guest and host. No Debian tool does that.
//
//   probe serve ADDRESS                     answer the modes below, until killed
//   probe send|recv|ping|connect|udp ADDRESS SECONDS [SIZE]
//   probe check ADDRESS CONNECTIONS BYTES   all connections at once, both directions, every byte compared
//   probe http ADDRESS SECONDS              GET /, a connection each
//   probe create|stat|unlink DIRECTORY COUNT
//   probe again DIRECTORY COUNT SECONDS     open, read and close the files of `create`, over and over
//   probe map FILE BYTES                    write through a shared mapping and read() it, and the other way round
//   probe lie ADDRESS                       drive the virtio-mmio device at that address, with invalid rings
//
// ADDRESS: tcp:IP:PORT, udp:IP:PORT, vsock:CID:PORT, unix:PATH, or hybrid:PATH:PORT (Firecracker's CONNECT).
// A client prints its rate and its count: bytes, round trips, connections, packets that arrived, files.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/vm_sockets.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { BUFFER = 256 << 10, BACKLOG = 1024, STACK = 512 << 10 };

struct request {
    char mode;  // s(ink), z(ero: a source), e(cho), c(onnect), h(old), x(change)
    uint32_t seed;
    uint64_t bytes;
} __attribute__((packed));

static void fail(const char *what)
{
    fprintf(stderr, "probe: %s: %s\n", what, strerror(errno));
    exit(1);
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static int read_all(int fd, void *data, size_t size)
{
    for (size_t done = 0; done < size;) {
        ssize_t n = read(fd, (char *)data + done, size - done);
        if (n <= 0) return -1;
        done += n;
    }
    return 0;
}

static int write_all(int fd, const void *data, size_t size)
{
    for (size_t done = 0; done < size;) {
        ssize_t n = write(fd, (const char *)data + done, size - done);
        if (n <= 0) return -1;
        done += n;
    }
    return 0;
}

union address {
    struct sockaddr any;
    struct sockaddr_in in;
    struct sockaddr_vm vm;
    struct sockaddr_un un;
};

// Returns the socket. Sets *port for a hybrid address only.
static int make(const char *text, union address *address, socklen_t *size, unsigned *port)
{
    char kind[8], host[108];
    const char *rest = strchr(text, ':'), *last = strrchr(text, ':');
    memset(address, 0, sizeof *address);
    *port = 0;
    if (!rest || rest - text >= (long)sizeof kind) { errno = EINVAL; fail(text); }
    snprintf(kind, sizeof kind, "%.*s", (int)(rest - text), text);
    rest++;
    snprintf(host, sizeof host, "%.*s", last > rest ? (int)(last - rest) : (int)strlen(rest), rest);
    unsigned number = strtoul(last + 1, NULL, 10);
    int type = SOCK_STREAM;
    if (!strcmp(kind, "tcp") || !strcmp(kind, "udp")) {
        address->in.sin_family = AF_INET;
        address->in.sin_port = htons(number);
        inet_pton(AF_INET, host, &address->in.sin_addr);
        *size = sizeof address->in;
        if (*kind == 'u') type = SOCK_DGRAM;
    } else if (!strcmp(kind, "vsock")) {
        address->vm.svm_family = AF_VSOCK;
        address->vm.svm_cid = strtoul(host, NULL, 10);
        address->vm.svm_port = number;
        *size = sizeof address->vm;
    } else {
        address->un.sun_family = AF_UNIX;
        strcpy(address->un.sun_path, host);
        *size = sizeof address->un;
        if (!strcmp(kind, "hybrid")) *port = number;
    }
    int fd = socket(address->any.sa_family, type | SOCK_CLOEXEC, 0);
    if (fd < 0) fail(text);
    return fd;
}

static int try_connect(const char *text)
{
    union address address;
    socklen_t size;
    unsigned port;
    int one = 1, fd = make(text, &address, &size, &port);
    int failed = connect(fd, &address.any, size);
    if (!failed && port) {
        char line[64], c = 0;
        int n = snprintf(line, sizeof line, "CONNECT %u\n", port);
        failed = write_all(fd, line, n);
        for (n = 0; !failed && c != '\n'; n++) {
            failed = read_all(fd, &c, 1);
            if (n == 0 && c != 'O') failed = -1;
        }
    }
    if (failed) {
        close(fd);
        return -1;
    }
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    return fd;
}

static int dial(const char *text)
{
    int fd = try_connect(text);
    if (fd < 0) fail(text);
    return fd;
}

// A byte stream in which every byte depends on its offset and on its connection.
static void pattern(uint8_t *data, uint32_t seed, uint64_t at, size_t size)
{
    for (size_t i = 0; i < size; i++) {
        uint64_t p = at + i;
        data[i] = (uint8_t)(p ^ p >> 8 ^ p >> 16) + seed * 31;
    }
}

struct stream {
    int fd;
    uint32_t seed;
    uint64_t bytes;
    int bad;
};

static void *sender(void *argument)
{
    struct stream *s = argument;
    uint8_t data[16384];
    for (uint64_t at = 0; at < s->bytes;) {
        size_t n = s->bytes - at < sizeof data ? s->bytes - at : sizeof data;
        pattern(data, s->seed, at, n);
        if (write_all(s->fd, data, n)) { s->bad = 1; break; }
        at += n;
    }
    shutdown(s->fd, SHUT_WR);  // half-closed: the other way goes on
    return NULL;
}

// Returns 0 if exactly the expected bytes arrived, followed by the end.
static int receive(struct stream *s)
{
    uint8_t data[16384], right[16384];
    uint64_t at = 0;
    ssize_t n;
    while ((n = read(s->fd, data, sizeof data)) > 0) {
        if (at + n > s->bytes) return 1;
        pattern(right, s->seed, at, n);
        if (memcmp(data, right, n)) return 1;
        at += n;
    }
    return n < 0 || at != s->bytes;
}

static void thread(pthread_t *id, void *(*work)(void *), void *argument)
{
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, STACK);
    if (pthread_create(id, &attributes, work, argument)) fail("thread");
}

// Send and receive at once. Returns 0 if every byte was right.
static int exchange(int fd, uint32_t ours, uint32_t theirs, uint64_t bytes)
{
    struct stream out = {fd, ours, bytes, 0}, in = {fd, theirs, bytes, 0};
    pthread_t id;
    thread(&id, sender, &out);
    int bad = receive(&in);
    pthread_join(id, NULL);
    return bad || out.bad;
}

static void *serve_one(void *argument)
{
    int fd = (intptr_t)argument;
    struct request request;
    uint64_t count = 0;
    ssize_t n;
    char *data = calloc(1, BUFFER);
    if (!read_all(fd, &request, sizeof request)) {
        if (request.mode == 's') {
            // It does not wait for the end of the stream: not every peer supports half-closed streams.
            size_t size = request.bytes < BUFFER ? request.bytes : BUFFER;
            for (*data = 0; !*data && !read_all(fd, data, size);) count += size;
            write_all(fd, &count, sizeof count);
        } else if (request.mode == 'z') {
            size_t size = request.bytes < BUFFER ? request.bytes : BUFFER;
            while (write(fd, data, size) > 0);
        } else if (request.mode == 'e') {
            while ((n = read(fd, data, BUFFER)) > 0 && !write_all(fd, data, n));
        } else if (request.mode == 'x') {
            exchange(fd, request.seed + 1, request.seed, request.bytes);
        }
    }
    free(data);
    close(fd);
    return NULL;
}

static void serve_udp(int fd)
{
    char data[65536];
    union address from;
    uint64_t count = 0;
    for (;;) {
        socklen_t size = sizeof from;
        ssize_t n = recvfrom(fd, data, sizeof data, 0, &from.any, &size);
        if (n < 0) fail("recvfrom");
        if (n == 1 && *data == '0') count = 0;
        if (n == 1 && (*data == '?' || *data == '0')) sendto(fd, &count, sizeof count, 0, &from.any, size);
        else count++;
    }
}

// Closes what its other side has closed. One thread for all: thousands would be too many for a small guest.
static void *hold(void *argument)
{
    struct epoll_event event;
    while (epoll_wait((intptr_t)argument, &event, 1, -1) >= 0) close(event.data.fd);
    return NULL;
}

static void serve(const char *text)
{
    union address address;
    socklen_t size;
    unsigned port;
    int one = 1, room = 1 << 20, held = -1, listener = make(text, &address, &size, &port);
    if (address.any.sa_family == AF_UNIX) unlink(address.un.sun_path);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(listener, &address.any, size)) fail(text);
    if (!strncmp(text, "udp", 3)) {
        setsockopt(listener, SOL_SOCKET, SO_RCVBUFFORCE, &room, sizeof room);
        serve_udp(listener);
    }
    if (listen(listener, BACKLOG)) fail(text);
    for (;;) {
        int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        if (fd < 0) fail("accept");
        char mode = 0;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        // A connection without data is handled here, so that no thread's start is measured.
        if (recv(fd, &mode, 1, MSG_PEEK) == 1 && mode == 'c') {
            write_all(fd, &mode, 1);
            close(fd);
            continue;
        }
        pthread_t id;
        if (mode == 'h') {
            struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
            read(fd, &mode, 1);
            if (held < 0) thread(&id, hold, (void *)(intptr_t)(held = epoll_create1(EPOLL_CLOEXEC)));
            epoll_ctl(held, EPOLL_CTL_ADD, fd, &event);
            continue;
        }
        thread(&id, serve_one, (void *)(intptr_t)fd);
        pthread_detach(id);
    }
}

static void result(uint64_t count, double seconds) { printf("%.1f %llu\n", count / seconds, (unsigned long long)count); }

static void stream(const char *mode, const char *text, double seconds, size_t size)
{
    if (size > BUFFER) size = BUFFER;
    struct request request = {*mode == 's' ? 's' : *mode == 'r' ? 'z' : 'e', 0, size};
    char *data = calloc(1, size);
    uint64_t count = 0;
    int fd = dial(text);
    ssize_t n;
    if (write_all(fd, &request, sizeof request)) fail(mode);
    double start = now(), end = start + seconds;
    while (now() < end) {
        if (*mode == 's') n = write_all(fd, data, size) ? -1 : (ssize_t)size;
        else if (*mode == 'r') n = read(fd, data, size);
        else n = write_all(fd, data, size) || read_all(fd, data, size) ? -1 : 1;
        if (n <= 0) fail(mode);
        count += n;
    }
    if (*mode == 's') {  // what has arrived counts, and when
        *data = 1;
        if (write_all(fd, data, size) || read_all(fd, &count, sizeof count)) fail("count");
    }
    result(count, now() - start);
}

static void connections(const char *text, double seconds)
{
    uint64_t count = 0;
    double start = now();
    for (; now() < start + seconds; count++) {
        char c = 'c';
        int fd = dial(text);
        if (write_all(fd, &c, 1) || read_all(fd, &c, 1)) fail("connect");
        close(fd);
    }
    result(count, now() - start);
}

static void http(const char *text, double seconds)
{
    static const char ask[] = "GET / HTTP/1.1\r\nHost: probe\r\nConnection: close\r\n\r\n", good[] = "HTTP/1.1 200 ";
    char said[4096];
    uint64_t count = 0;
    double start = now();
    for (; now() < start + seconds; count++) {
        size_t size = 0;
        ssize_t n;
        int fd = dial(text);
        if (write_all(fd, ask, sizeof ask - 1)) fail("http");
        while ((n = read(fd, said + size, sizeof said - size)) > 0) size += n;
        if (n < 0 || size < sizeof good || memcmp(said, good, sizeof good - 1)) fail("http");
        close(fd);
    }
    result(count, now() - start);
}

static uint64_t ask_udp(int fd, char what)
{
    struct timeval patience = {.tv_usec = 200000};
    uint64_t count;
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    for (int i = 0; i < 50; i++)
        if (send(fd, &what, 1, 0) == 1 && recv(fd, &count, sizeof count, 0) == sizeof count) return count;
    fail("udp: no answer");
    return 0;
}

static void packets(const char *text, double seconds, size_t size)
{
    union address address;
    socklen_t length;
    unsigned port;
    int fd = make(text, &address, &length, &port);
    char *data = calloc(1, size);
    if (connect(fd, &address.any, length)) fail(text);
    ask_udp(fd, '0');
    double start = now();
    while (now() < start + seconds)
        for (int i = 0; i < 16; i++)
            if (send(fd, data, size, 0) < 0 && errno != ENOBUFS && errno != ECONNREFUSED) fail("send");
    double took = now() - start;
    result(ask_udp(fd, '?'), took);
}

static uint64_t check_bytes;

static void *check_one(void *argument)
{
    struct stream *s = argument;
    struct request request = {'x', s->seed, check_bytes};
    int fd = s->fd;
    s->bad = write_all(fd, &request, sizeof request) || exchange(fd, s->seed, s->seed + 1, check_bytes);
    close(fd);
    return NULL;
}

static void check(const char *text, int count, uint64_t bytes)
{
    struct stream *streams = calloc(count, sizeof *streams);
    pthread_t *ids = calloc(count, sizeof *ids);
    int bad = 0;
    check_bytes = bytes;
    double start = now();
    for (int i = 0; i < count; i++) {
        streams[i].fd = dial(text);
        streams[i].seed = i * 2;
    }
    for (int i = 0; i < count; i++) thread(&ids[i], check_one, &streams[i]);
    for (int i = 0; i < count; i++) {
        pthread_join(ids[i], NULL);
        bad += streams[i].bad;
    }
    result(2 * count * bytes, now() - start);
    if (bad) {
        fprintf(stderr, "probe: %d of %d connections had wrong bytes, or too few\n", bad, count);
        exit(1);
    }
}

static void files(const char *what, const char *directory, long count)
{
    char path[4096], data[4096] = {0};
    struct stat facts;
    double start = now();
    for (long i = 0; i < count; i++) {
        int failed;
        snprintf(path, sizeof path, "%s/f%ld", directory, i);
        if (*what == 's') failed = stat(path, &facts);
        else if (*what == 'u') failed = unlink(path);
        else {
            int fd = open(path, O_WRONLY | O_CREAT | O_EXCL, 0644);
            failed = fd < 0 || write(fd, data, 1000) != 1000 || close(fd);
        }
        if (failed) fail(path);
    }
    result(count, now() - start);
}

static void again(const char *directory, long count, double seconds)
{
    char path[4096], data[4096];
    uint64_t done = 0;
    double start = now();
    for (; now() < start + seconds; done++) {
        snprintf(path, sizeof path, "%s/f%ld", directory, (long)(done % count));
        int fd = open(path, O_RDONLY);
        if (fd < 0 || read(fd, data, sizeof data) != 1000 || close(fd)) fail(path);
    }
    result(done, now() - start);
}

// Both ways: read() returns what was stored in the mapping, and the mapping shows what was written.
static void map(const char *path, size_t size)
{
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0644);
    if (fd < 0 || ftruncate(fd, size)) fail(path);
    uint8_t *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    uint8_t *data = malloc(size), *right = malloc(size);
    if (memory == MAP_FAILED) fail("mmap");
    double start = now();
    pattern(right, 1, 0, size);
    memcpy(memory, right, size);
    if (msync(memory, size, MS_SYNC)) fail("msync");
    if (pread(fd, data, size, 0) != (ssize_t)size || memcmp(data, right, size)) { errno = EIO; fail("read"); }
    pattern(right, 2, 0, size);
    if (pwrite(fd, right, size, 0) != (ssize_t)size || memcmp(memory, right, size)) { errno = EIO; fail("mapping"); }
    munmap(memory, size);
    close(fd);
    result(size, now() - start);
}

// The registers (virtio 1.2, 4.2.2) of a device that was unbound from its driver.
static void lie(unsigned long address)
{
    static const uint64_t addresses[] = {0xfffffffffffff000, 0xdead0000, 0x1001, 0xffffffff0000};
    int fd = open("/dev/mem", O_RDWR | O_SYNC);
    uint8_t *page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, address & ~4095ul);
    if (fd < 0 || page == MAP_FAILED) fail("/dev/mem");
    volatile uint32_t *r = (volatile uint32_t *)(page + (address & 4095));
    unsigned broken = 0, count = 0;
    for (; count < sizeof addresses / sizeof *addresses; count++) {
        r[0x70 / 4] = 0;
        r[0x70 / 4] = 3;
        r[0x24 / 4] = 1, r[0x20 / 4] = 1;  // VIRTIO_F_VERSION_1
        r[0x24 / 4] = 0, r[0x20 / 4] = 0;
        r[0x70 / 4] = 11;
        r[0x30 / 4] = 0;
        r[0x38 / 4] = r[0x34 / 4];
        for (int which = 0x80; which <= 0xa0; which += 0x10) {
            r[which / 4] = (uint32_t)addresses[count];
            r[(which + 4) / 4] = addresses[count] >> 32;
        }
        r[0x44 / 4] = 1;
        r[0x70 / 4] = 15;
        for (int i = 0; i < 100; i++) r[0x50 / 4] = i & 3;
        usleep(100000);
        broken += (r[0x70 / 4] & 0x40) != 0;
    }
    printf("%u %u\n", broken, count);
}

int main(int argc, char **argv)
{
    signal(SIGPIPE, SIG_IGN);
    if (argc < 3) return 2;
    const char *mode = argv[1], *address = argv[2];
    double number = argc > 3 ? atof(argv[3]) : 0;
    long size = argc > 4 ? atol(argv[4]) : 64 << 10;
    if (!strcmp(mode, "serve")) serve(address);
    else if (!strcmp(mode, "send") || !strcmp(mode, "recv")) stream(mode, address, number, size);
    else if (!strcmp(mode, "ping")) stream(mode, address, number, 1);
    else if (!strcmp(mode, "connect")) connections(address, number);
    else if (!strcmp(mode, "udp")) packets(address, number, argc > 4 ? size : 64);
    else if (!strcmp(mode, "check")) check(address, number, size);
    else if (!strcmp(mode, "create") || !strcmp(mode, "stat") || !strcmp(mode, "unlink")) files(mode, address, number);
    else if (!strcmp(mode, "http")) http(address, number);
    else if (!strcmp(mode, "again") && argc > 4) again(address, number, atof(argv[4]));
    else if (!strcmp(mode, "map")) map(address, number);
    else if (!strcmp(mode, "lie")) lie(strtoul(address, NULL, 16));
    else return 2;
    return 0;
}
