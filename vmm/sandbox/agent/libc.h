// SPDX-License-Identifier: Apache-2.0
// The C library's headers, for types and constants, and the functions of libc.c. CALL(name, ...) makes any system call.
// Unlike the C library's, `close` leaves errno as it is, so that a function can clean up and return what failed before.
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

// Concatenate the strings up to a NULL, truncated to `room` bytes. Returns the length.
size_t join(char *to, size_t room, ...);
char *decimal(unsigned long value, char buffer[24]);
long digits(const char **at); // the decimal number there, whose end *at becomes; INT64_MAX: it is too large
ssize_t slurp(const char *path, char *to, size_t room);
int spit(const char *path, const char *text); // replace what is in a file, which need not be there
// The number behind `name` at the start of a line of `text`, or `otherwise`.
long field(const char *text, const char *name, long otherwise);
unsigned long free_memory(void); // KiB, without what the kernel could reclaim

int open_file(int directory, const char *path, int flags, int mode); // adds O_CLOEXEC and O_NOCTTY
int look(int directory, const char *path, int flags, struct stat *status);
// Become the program arguments[0], looked for as execvpe(3) does, by the PATH of `environment`. Returns if it cannot.
void execute(char **arguments, char **environment);
// Start a child in the cgroup of that directory, or with -1 in this process's. It shares this process's memory and calls
// `body`, which must not return. Waits until the child has executed another program or ended. Returns its process id,
// or -1.
long spawn(void (*body)(void), int cgroup);
int wait_for(struct pollfd *fds, int count, int milliseconds);

long call(long number, long a, long b, long c, long d, long e, long f);
#define CALL(name, ...) CALL_(SYS_##name, ##__VA_ARGS__, 0, 0, 0, 0, 0, 0)
#define CALL_(number, a, b, c, d, e, f, ...) \
    call(number, (long)(a), (long)(b), (long)(c), (long)(d), (long)(e), (long)(f))
