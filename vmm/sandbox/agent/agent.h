// SPDX-License-Identifier: Apache-2.0
// The agent: process 1 of a sandbox, and a process for each connection of the host. Without a C library (libc.c has
// what it needs), so that it is small and runs under any image.
//
// A connection comes from the host (CID 2) to port PORT, and brings requests. A request is a length (u32) and words,
// each ended by a NUL: a verb, then KEY=VALUE. What follows are frames, both ways: a type (u8), a length (u32), bytes.
// All numbers are little-endian. The last frame of an answer is F_DONE, F_EXIT or F_FAILED; then the next request, behind
// the end of what the host had to send with this one.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

enum {
    PORT = 521, // below 1024, where no user of the guest but root can listen
    REQUEST_MAX = 1 << 20,
    WORDS_MAX = 8192,
    FRAME_MAX = 1 << 18,
};

enum {
    // from the host
    F_STDIN = 'i', // of length 0: the end
    F_WINDOW = 'w', // u16 rows, u16 columns
    F_DATA = 'd', // both ways: of a file; from the host of length 0: the end
    // from here
    F_STARTED = 'p', // u32 process id
    F_STDOUT = 'o',
    F_STDERR = 'e',
    F_EXIT = 'x', // u8 whether by a signal, u32 status or signal, u8 whether the kernel was out of memory meanwhile
    F_ENTRY = 'n', // of a directory: see files.c
    F_CHANGE = 'c', // u32 inotify's mask, name
    F_DONE = 'k',
    F_FAILED = 'f', // u32 errno, what was tried
};

struct request {
    int count;
    char *words[WORDS_MAX + 1];
};

struct identity {
    uid_t uid;
    gid_t gid;
    int groups;
    gid_t group[64];
    char name[64], home[256], shell[256];
};

// main.c
const char *value(const struct request *request, const char *key);
long number(const char *text, long otherwise);
void say(const char *what, int error);

// frames.c: all end the process when the host has gone
extern int host;
extern pid_t owned; // the command of this connection, or 0
extern int keep; // it goes on when the host has gone
extern int gone; // the host has, and `host` is /dev/null
void host_gone(void);
int read_request(struct request *request);
size_t read_frame(char *type, char *bytes);
void send_frame(char type, const void *head, size_t head_length, const void *bytes, size_t length);
void flush(void); // what send_frame has kept, before a wait; read_all and its like do it
void send_ok(void);
void send_failed(int error, const char *what);
void read_all(void *to, size_t length);
int has_read_ahead(void); // bytes of the host's that poll does not see

// boot.c
void boot(void);
void wake(const struct request *request);
int mount_share(const char *tag, const char *path, int read_only);
int make_parents(const char *path, int with_last);

// users.c
int find_user(const char *who, struct identity *who_is);

// exec.c
void run(const struct request *request);

// files.c
int serve_files(const struct request *request);

// ports.c
void relay(const struct request *request);
void serve_port(const struct request *request);
