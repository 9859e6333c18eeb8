// SPDX-License-Identifier: Apache-2.0
// The part of a C library that the agent needs: system calls, and a few functions for bytes and strings.
#include "libc.h"
#include <linux/sched.h>
#include <stdarg.h>
#include <sys/sysinfo.h>

static int error_number;

int *__errno_location(void)
{
    return &error_number;
}

long call(long number, long a, long b, long c, long d, long e, long f)
{
    register long fourth __asm__("r10") = d;
    register long fifth __asm__("r8") = e;
    register long sixth __asm__("r9") = f;
    long result;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(fourth), "r"(fifth), "r"(sixth)
                     : "rcx", "r11", "memory");
    if (result < 0 && result > -4096) {
        errno = (int)-result;
        return -1;
    }
    return result;
}

void *memcpy(void *restrict to, const void *restrict from, size_t length)
{
    void *start = to;
    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(length) : : "memory");
    return start;
}

void *memset(void *to, int byte, size_t length)
{
    void *start = to;
    __asm__ volatile("rep stosb" : "+D"(to), "+c"(length) : "a"(byte) : "memory");
    return start;
}

size_t strlen(const char *text)
{
    size_t length = 0;
    for (; text[length]; length++)
        __asm__ volatile("");
    return length;
}

int strncmp(const char *a, const char *b, size_t length)
{
    for (; length; a++, b++, length--)
        if (*a != *b || !*a)
            return (unsigned char)*a - (unsigned char)*b;
    return 0;
}

int strcmp(const char *a, const char *b)
{
    return strncmp(a, b, (size_t)-1);
}

// The names are in parentheses because they are also macros since glibc 2.43.
char *(strchr)(const char *text, int byte)
{
    for (; *text != (char)byte; text++)
        if (!*text)
            return NULL;
    return (char *)text;
}

char *(strrchr)(const char *text, int byte)
{
    char *found = NULL;
    for (; *text; text++)
        if (*text == (char)byte)
            found = (char *)text;
    return found;
}

ssize_t read(int fd, void *to, size_t length)
{
    return CALL(read, fd, to, length);
}

ssize_t write(int fd, const void *from, size_t length)
{
    return CALL(write, fd, from, length);
}

int close(int fd)
{
    int before = errno, result = (int)CALL(close, fd);
    errno = before;
    return result;
}

void _exit(int status)
{
    for (;;)
        CALL(exit_group, status);
}

int open_file(int directory, const char *path, int flags, int mode)
{
    return (int)CALL(openat, directory, path, flags | O_CLOEXEC | O_NOCTTY, mode);
}

int look(int directory, const char *path, int flags, struct stat *status)
{
    return (int)CALL(newfstatat, directory, path, status, flags);
}

int wait_for(struct pollfd *fds, int count, int milliseconds)
{
    int ready;
    do
        ready = (int)CALL(poll, fds, count, milliseconds);
    while (ready < 0 && errno == EINTR);
    return ready;
}

size_t join(char *to, size_t room, ...)
{
    va_list list;
    size_t length = 0;
    va_start(list, room);
    for (const char *part; (part = va_arg(list, const char *));)
        for (; *part && length + 1 < room; part++)
            to[length++] = *part;
    va_end(list);
    to[length] = 0;
    return length;
}

char *decimal(unsigned long value, char buffer[24])
{
    char *at = buffer + 23;
    *at = 0;
    do
        *--at = (char)('0' + value % 10);
    while (value /= 10);
    return at;
}

long digits(const char **at)
{
    long result = 0;
    for (; **at >= '0' && **at <= '9'; ++*at)
        result = result > (INT64_MAX - 9) / 10 ? INT64_MAX : result * 10 + (**at - '0');
    return result;
}

long field(const char *text, const char *name, long otherwise)
{
    size_t length = strlen(name);
    for (; text; text = strchr(text, '\n')) {
        text += *text == '\n';
        if (strncmp(text, name, length))
            continue;
        for (text += length; *text == ' '; text++)
            continue;
        return digits(&text);
    }
    return otherwise;
}

ssize_t slurp(const char *path, char *to, size_t room)
{
    int fd = open_file(AT_FDCWD, path, O_RDONLY, 0);
    if (fd < 0)
        return -1;
    size_t length = 0;
    for (ssize_t more; length + 1 < room && (more = read(fd, to + length, room - 1 - length)) > 0;)
        length += (size_t)more;
    to[length] = 0;
    close(fd);
    return (ssize_t)length;
}

int spit(const char *path, const char *text)
{
    int fd = open_file(AT_FDCWD, path, O_WRONLY | O_CREAT | O_TRUNC, 0644);
    if (fd < 0)
        return -1;
    ssize_t done = write(fd, text, strlen(text));
    close(fd);
    return done < 0 ? -1 : 0;
}

void execute(char **arguments, char **environment)
{
    const char *name = arguments[0], *path = "/usr/bin:/bin";
    char place[4096];
    int seen = ENOENT;
    if (strchr(name, '/')) {
        CALL(execve, name, arguments, environment);
        return;
    }
    for (char **each = environment; *each; each++)
        if (!strncmp(*each, "PATH=", 5))
            path = *each + 5;
    while (*path) {
        size_t length = 0;
        for (; *path && *path != ':'; path++)
            if (length + 1 < sizeof place)
                place[length++] = *path;
        place[length] = 0;
        path += *path == ':';
        if (length + strlen(name) + 2 > sizeof place)
            continue;
        join(place + length, sizeof place - length, length ? "/" : "./", name, NULL);
        CALL(execve, place, arguments, environment);
        if (errno != ENOENT && errno != ENOTDIR)
            seen = errno;
    }
    errno = seen;
}

unsigned long free_memory(void)
{
    struct sysinfo info = {0};
    CALL(sysinfo, &info);
    return info.freeram * info.mem_unit / 1024;
}

// long spawn_by(long number, long first, long second, void (*body)(void)) is the system call clone or clone3, whose
// child calls `body`. Source: clone(2).
__asm__("spawn_by: mov %rdi, %rax\n mov %rsi, %rdi\n mov %rdx, %rsi\n mov %rcx, %r9\n xor %edx, %edx\n xor %r10d, %r10d\n"
        " xor %r8d, %r8d\n syscall\n test %rax, %rax\n jnz 1f\n xor %ebp, %ebp\n call *%r9\n hlt\n 1: ret\n");
long spawn_by(long number, long first, long second, void (*body)(void));

static int group_to_enter;
static void (*body_to_call)(void);

static void enter_group(void)
{
    int fd = open_file(group_to_enter, "cgroup.procs", O_WRONLY, 0);
    if (fd >= 0) {
        write(fd, "0", 1);
        close(fd);
    }
    body_to_call();
}

long spawn(void (*body)(void), int cgroup)
{
    static _Alignas(16) char stack[1 << 15];
    struct clone_args how = {
        .flags = CLONE_VM | CLONE_VFORK | CLONE_INTO_CGROUP, .exit_signal = SIGCHLD, .stack = (uint64_t)stack,
        .stack_size = sizeof stack, .cgroup = (uint64_t)cgroup,
    };
    long result = cgroup < 0 ? -EBADF : spawn_by(SYS_clone3, (long)&how, sizeof how, body);
    // A cgroup that is full still takes who enters it later. That waits for all CPUs, so it is not the first choice.
    if (result < 0) {
        group_to_enter = cgroup, body_to_call = body;
        result = spawn_by(SYS_clone, CLONE_VM | CLONE_VFORK | SIGCHLD, (long)(stack + sizeof stack),
            cgroup < 0 ? body : enter_group);
    }
    if (result < 0)
        errno = (int)-result;
    return result < 0 ? -1 : result;
}

__asm__(".globl _start\n_start: xor %ebp, %ebp\n mov %rsp, %rdi\n and $-16, %rsp\n call start\n hlt\n");

__attribute__((used)) void start(void)
{
    _exit(main());
}
