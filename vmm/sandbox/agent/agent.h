// SPDX-License-Identifier: Apache-2.0
// The agent: process 1 of a sandbox, and one more process for each connection from the host. It uses no C library
// (libc.c has what it needs), so it is small and runs with any image.
//
// The host (CID 2) connects to vsock port PORT and sends requests. A request is a length (u32) and a JSON object, such as
// {"verb": "run", "arg": ["ls", "/"], "cwd": "/"}. Then frames follow in both directions: a type (u8), a length (u32),
// bytes. All numbers are little-endian. The last frame of a reply is F_DONE, F_EXIT or F_FAILED. The next request follows
// the host's last frame for this one.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <sys/stat.h>
#include <sys/types.h>

enum {
    PORT = 521, // below 1024, where no user of the guest but root can listen
    REQUEST_MAX = 1 << 20,
    PARAMETERS_MAX = 8192,
    FRAME_MAX = 1 << 18,
    DEEPEST = 256, // directories that are removed or sent below one another
    NAME_ROOM = 8192, // of a name in F_ENTRY and of a directory's path
    RESERVE = 2048, // KiB that programs leave free, until one was killed because they have filled the memory
};

enum {
    // from the host
    F_STDIN = 'i', // input of the command; length 0: end of input
    F_WINDOW = 'w', // u16 rows, u16 columns
    // both directions
    F_DATA = 'd', // data of a file
    F_ENTRY = 'n', // struct entry, the name, a NUL, and the target of a symbolic link
    F_DONE = 'k', // from the host: the end of what is written
    // from the agent
    F_STARTED = 'p', // u32 process id
    F_STDOUT = 'o',
    F_STDERR = 'e',
    F_EXIT = 'x', // u8 ended by a signal, u8 status or signal, u8 killed because the guest was out of memory
    F_CHANGE = 'c', // u32 inotify's mask, name
    F_FAILED = 'f', // u32 errno, what failed: a path, a program, or KEY=VALUE of the request
};

struct parameter { // of an array one for each of its values
    const char *key, *value;
};

struct request {
    const char *verb;
    int count;
    struct parameter parameters[PARAMETERS_MAX];
};

struct entry {
    uint32_t mode, uid, gid;
    uint32_t links;
    uint64_t size;
    int64_t changed; // nanoseconds since 1970
};

struct identity {
    uid_t uid;
    gid_t gid;
    int groups;
    gid_t group[64]; // gid is the first
    char name[64], home[256];
};

// frames.c: all of these call host_gone when the host has disconnected
extern int host;
extern pid_t owned; // the command of this connection, or 0
extern int keep; // the command continues when the host disconnects
extern int gone; // the host has disconnected, and `host` is /dev/null
void host_gone(void);
int read_request(struct request *request);
const char *pair(const struct request *request, const char *key); // "KEY=VALUE" until the next call, for F_FAILED
long number(const char *text, long otherwise); // of decimal digits; otherwise: of anything else
void say(const char *what, int error); // on the console; error 0: no number
size_t read_frame(char *type, char *bytes); // type 0: the host has gone before its end
void send_frame(char type, const void *head, size_t head_length, const void *bytes, size_t length);
void flush(void); // send the frames that send_frame holds back; call it before waiting. The read functions call it
void send_ok(void);
void send_failed(int error, const char *what);
int read_all(void *to, size_t length); // -1: the host has gone before
int has_read_ahead(void); // whether bytes from the host are already read, so that poll does not report them

// json.c
int parse_request(char *text, size_t length, struct request *request);
const char *value(const struct request *request, const char *key); // the first one's, or NULL
// Each value of an array, or NULL after the last. `index` is 0 at first.
const char *next_value(const struct request *request, const char *key, int *index);

// boot.c
extern int commands; // the cgroup of commands, or -1
void boot(void);
void keep_free(int more);
void wake(const struct request *request);
void mount_share(const struct request *request);
void make_read_only(const struct request *request);
int make_directory(const char *path); // and those above it; an absolute path

// users.c
int find_user(const char *who, struct identity *who_is);

// exec.c
void run(const struct request *request);

// files.c
struct directory_entry { // struct linux_dirent64
    uint64_t inode;
    int64_t offset;
    uint16_t length;
    uint8_t type;
    char name[];
};
void serve_files(const struct request *request);
int send_entry(int directory, const char *path, const char *name, const struct stat *status);
const char *enter(const char *path, int make);
int store(int fd, const char *from, size_t length);

// tree.c: `what` becomes the path at which they failed
int get_tree(const struct request *request, const char *path, const char **what);
int put_tree(const struct request *request, const char *path, const char **what);

// ports.c
void relay(const struct request *request);
void serve_port(const struct request *request);
