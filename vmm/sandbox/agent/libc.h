// SPDX-License-Identifier: Apache-2.0
// The C library's headers, for types and numbers, and what libc.c has. CALL(name, ...) is any system call.
#pragma once
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

int main(void);

// The strings up to a NULL, one after the other, as much as there is room; returns the length.
size_t join(char *to, size_t room, ...);
char *decimal(unsigned long value, char buffer[24]);
ssize_t slurp(const char *path, char *to, size_t room);
int spit(const char *path, const char *text);

int open_file(int directory, const char *path, int flags, int mode); // close on exec, no controlling terminal
int look(int directory, const char *path, int flags, struct stat *status);
// A child that shares this process's memory, calls `body` and does not return. It is waited for until it has executed
// another program or ended. Returns its process id; -1: an error.
long spawn(void (*body)(void));
int wait_for(struct pollfd *fds, int count, int milliseconds);

long call(long number, long a, long b, long c, long d, long e, long f);
#define CALL(name, ...) CALL_(SYS_##name, ##__VA_ARGS__, 0, 0, 0, 0, 0, 0)
#define CALL_(number, a, b, c, d, e, f, ...) \
    call(number, (long)(a), (long)(b), (long)(c), (long)(d), (long)(e), (long)(f))
