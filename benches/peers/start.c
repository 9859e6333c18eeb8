// SPDX-License-Identifier: Apache-2.0
/* Starts COUNT copies of a VMM at once and prints the times of each, in microseconds after its own exec.

   start COUNT DIRECTORY MARK HOLD REQUESTS -- PROGRAM ARGUMENT...

   In ARGUMENT, %d is the number of the copy, two digits. REQUESTS is a file of HTTP requests, each ended by a NUL; %%
   in it is also the copy's number. If REQUESTS is "-", there is no socket. Each copy's socket is DIRECTORY/N.sock. The
   output is one line for each copy:
       connected answer... asked mark exit rss_kib
   The first answer is timed from the exec, the others from their requests; `asked` is the time of the last request.
   MARK is a byte in the guest's output that ends the wait. With HOLD 1 the copy is then killed; with 2 it is killed
   half a second after its last answer. This program has one thread and no Python, so that it takes little of the
   processors that the VMMs need. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { MOST = 64, ASKED = 32, PATIENCE = 60 };

struct copy {
    pid_t pid;
    int sock, out, next, have;
    double begun, connected, asked, answers[ASKED], mark, ended;
    long rss;
    struct sockaddr_un address;
    char text[4096];
};

static struct copy all[MOST];
static char *requests[ASKED];
static int wanted;

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e6 + t.tv_nsec / 1e3;
}

static void fail(const char *what)
{
    perror(what);
    for (int i = 0; i < MOST; i++)
        if (all[i].pid > 0) kill(all[i].pid, SIGKILL);
    exit(1);
}

static char *numbered(const char *text, const char *sign, int number)
{
    char *made = NULL;
    const char *at = strstr(text, sign);
    if (at == NULL) return strdup(text);
    if (asprintf(&made, "%.*s%02d%s", (int)(at - text), text, number, at + strlen(sign)) < 0) fail("asprintf");
    return made;
}

static void begin(struct copy *each, int number, const char *directory, char **words)
{
    int pipes[2], count = 0;
    char *arguments[64];
    if (pipe2(pipes, O_CLOEXEC)) fail("pipe2");
    while (words[count] && count < 63) arguments[count] = numbered(words[count], "%d", number), count++;
    arguments[count] = NULL;
    each->address.sun_family = AF_UNIX;
    snprintf(each->address.sun_path, sizeof each->address.sun_path, "%s/%02d.sock", directory, number);
    unlink(each->address.sun_path);
    each->sock = -1;
    each->out = pipes[0];
    each->begun = now();
    each->pid = vfork();
    if (each->pid < 0) fail("vfork");
    if (each->pid == 0) {
        dup2(open("/dev/null", O_RDWR), 0);
        dup2(pipes[1], 1);
        dup2(0, 2);
        execvp(arguments[0], arguments);
        _exit(127);
    }
    close(pipes[1]);
}

static void ask(struct copy *each, int number)
{
    char *text = numbered(requests[each->next], "%%", number);
    each->asked = now();
    each->have = 0;
    if (send(each->sock, text, strlen(text), MSG_NOSIGNAL) != (ssize_t)strlen(text)) fail("send");
    free(text);
}

static long resident(pid_t pid)
{
    char name[64], line[256];
    long kib = 0;
    snprintf(name, sizeof name, "/proc/%d/status", pid);
    FILE *file = fopen(name, "r");
    while (file && fgets(line, sizeof line, file)) sscanf(line, "VmRSS: %ld", &kib);
    if (file) fclose(file);
    return kib;
}

/* A response is complete with its head and as many bytes of body as Content-Length says. */
static int whole(struct copy *each)
{
    each->text[each->have] = 0;
    char *end = strstr(each->text, "\r\n\r\n"), *length = strstr(each->text, "Content-Length: ");
    if (end == NULL) return 0;
    if (length && length < end && end + 4 + atoi(length + 16) > each->text + each->have) return 0;
    if (strncmp(each->text, "HTTP/1.1 2", 10)) {
        fprintf(stderr, "%s\nanswered: %s\n", requests[each->next], each->text);
        errno = EPROTO;
        fail("a request");
    }
    return 1;
}

int main(int argc, char **argv)
{
    int count = atoi(argv[1]), mark = argv[3][0], hold = atoi(argv[4]), open_ends = 0;
    signal(SIGCHLD, SIG_DFL);
    prctl(PR_SET_TIMERSLACK, 1000);
    if (strcmp(argv[5], "-")) {
        static char text[65536];
        int file = open(argv[5], O_RDONLY), size = read(file, text, sizeof text - 1);
        if (size < 0) fail(argv[5]);
        for (char *at = text; at < text + size && wanted < ASKED; at += strlen(at) + 1) requests[wanted++] = at;
    }
    (void)argc;
    for (int i = 0; i < count; i++) begin(&all[i], i, argv[2], argv + 7);
    double start = now();
    do {
        struct pollfd polled[2 * MOST];
        int waiting = 0;
        open_ends = 0;
        for (int i = 0; i < count; i++) {
            struct copy *each = &all[i];
            polled[2 * i] = (struct pollfd){.fd = each->sock, .events = POLLIN};
            polled[2 * i + 1] = (struct pollfd){.fd = each->mark ? -1 : each->out, .events = POLLIN};
            if (each->ended) polled[2 * i].fd = polled[2 * i + 1].fd = -1;
            if (!each->ended) open_ends++;
            if (wanted && each->sock < 0 && !each->connected) {
                int sock = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
                if (connect(sock, (struct sockaddr *)&each->address, sizeof each->address) == 0) {
                    each->connected = now();
                    each->sock = polled[2 * i].fd = sock;
                    ask(each, i);
                } else {
                    close(sock);
                    waiting = 1;
                }
            }
            if (each->mark) waiting = 1; /* wait for its exit */
            if (hold == 2 && each->pid > 0 && each->next == wanted && !each->rss && now() - each->answers[wanted - 1] -
            each->begun > 5e5) {
                each->rss = resident(each->pid);
                kill(each->pid, SIGKILL);
                each->mark = each->mark ? each->mark : now();
            }
        }
        struct timespec rest = {.tv_nsec = waiting ? 100000 + 25000 * count : 50000000};
        if (ppoll(polled, 2 * count, &rest, NULL) < 0) fail("ppoll");
        for (int i = 0; i < count; i++) {
            struct copy *each = &all[i];
            if (polled[2 * i].fd >= 0 && polled[2 * i].revents && each->next < wanted) {
                int got = recv(each->sock, each->text + each->have, sizeof each->text - 1 - each->have, 0);
                if (got <= 0) fail("recv");
                each->have += got;
                if (whole(each)) {
                    /* The first answer is timed from the exec, the others from their requests. */
                    each->answers[each->next] = now() - (each->next ? each->asked : each->begun);
                    if (++each->next < wanted) ask(each, i);
                }
            }
            if (polled[2 * i + 1].fd >= 0 && polled[2 * i + 1].revents) {
                char text[4096];
                int got = read(each->out, text, sizeof text);
                if (got <= 0 || memchr(text, mark, got)) {
                    each->mark = got > 0 ? now() : -1;
                    if (hold == 1 && each->pid > 0) kill(each->pid, SIGKILL);
                }
            }
            int status;
            if (!each->ended && each->pid > 0 && waitpid(each->pid, &status, WNOHANG) == each->pid) {
                char text[4096];
                each->ended = now();
                each->pid = 0;
                if (!each->mark) {
                    int got = read(each->out, text, sizeof text);
                    each->mark = got > 0 && memchr(text, mark, got) ? each->ended : -1;
                }
            }
        }
        if (now() - start > PATIENCE * 1e6) fail("no end in sight");
    } while (open_ends);
    for (int i = 0; i < count; i++) {
        struct copy *each = &all[i];
        printf("%.0f", each->connected ? each->connected - each->begun : -1);
        for (int j = 0; j < wanted; j++) printf(" %.0f", j < each->next ? each->answers[j] : -1);
        printf(" %.0f", wanted ? each->asked - each->begun : 0);
        printf(" %.0f %.0f %ld\n", each->mark > 0 ? each->mark - each->begun : -1, each->ended - each->begun,
        each->rss);
    }
    return 0;
}
