// SPDX-License-Identifier: Apache-2.0
// Directories with all that is in them. Each file is an F_ENTRY, whose name is the path below the directory, and then
// F_DATA with its contents. The directory itself comes first, as ".", and each other one before what is in it. The verb
// "get" sends that, without devices, pipes and sockets. The verb "put" makes what the host sends, up to F_DONE; there an
// entry without a type is another name of the file that its target names.
#include "agent.h"
#include "libc.h"

enum {
    PROBED = 1 << 16, // a file up to this size is read before its entry is sent: stat lies about those of /proc
};

static char bytes[FRAME_MAX + 2]; // contents, or an entry with a NUL behind its name and its target
static char failed_at[NAME_ROOM]; // what F_FAILED names

// get

static char name[NAME_ROOM]; // of the file that is sent, below the directory; empty for the directory

// The result for what cannot be read: that it was removed since its directory was read is no error.
static int unless_gone(void)
{
    return errno == ENOENT ? 0 : -1;
}

static int send_file(int fd, struct stat *status)
{
    size_t known = 0, most;
    ssize_t done = 1;
    while (known < PROBED && (done = read(fd, bytes + known, PROBED - known)) > 0)
        known += (size_t)done;
    if (done < 0)
        return -1;
    if (known < PROBED || status->st_size < PROBED)
        status->st_size = (off_t)known;
    send_entry(fd, "", name, status);
    if (known)
        send_frame(F_DATA, NULL, 0, bytes, known);
    for (uint64_t left = (uint64_t)status->st_size - known; left; left -= (uint64_t)done) {
        most = left < FRAME_MAX ? (size_t)left : FRAME_MAX;
        done = read(fd, bytes, most);
        if (done < 0)
            return -1;
        if (!done) // a file that has become shorter has zeros at its end
            memset(bytes, 0, (size_t)(done = (ssize_t)most));
        send_frame(F_DATA, NULL, 0, bytes, (size_t)done);
    }
    return 0;
}

static int pack(int directory, const char *entry, size_t length, int depth);

static int pack_entries(int fd, size_t length, int depth)
{
    char names[4096];
    long done;
    while ((done = CALL(getdents64, fd, names, sizeof names)) > 0)
        for (long at = 0; at < done;) {
            struct directory_entry *each = (void *)(names + at);
            at += each->length;
            if (!strcmp(each->name, ".") || !strcmp(each->name, ".."))
                continue;
            size_t longer = length + join(name + length, NAME_ROOM - length, length ? "/" : "", each->name, NULL);
            if (longer == NAME_ROOM - 1) {
                errno = ENAMETOOLONG;
                return -1;
            }
            if (pack(fd, each->name, longer, depth + 1))
                return -1;
            name[length] = 0;
        }
    return done < 0 && !(depth && errno == ENOENT) ? -1 : 0;
}

// `length` is that of `name`. On an error that stays as it is.
static int pack(int directory, const char *entry, size_t length, int depth)
{
    struct stat status;
    if (look(directory, entry, AT_SYMLINK_NOFOLLOW, &status))
        return unless_gone();
    if (S_ISLNK(status.st_mode))
        return send_entry(directory, entry, name, &status) ? unless_gone() : 0;
    if (!S_ISREG(status.st_mode) && !S_ISDIR(status.st_mode))
        return 0;
    if (S_ISDIR(status.st_mode) && depth == DEEPEST) {
        errno = ELOOP;
        return -1;
    }
    int fd = open_file(directory, entry, O_RDONLY | O_NONBLOCK | O_NOFOLLOW, 0), failed;
    if (fd < 0)
        return unless_gone();
    if (S_ISREG(status.st_mode)) {
        failed = send_file(fd, &status);
    } else {
        send_entry(directory, entry, depth ? name : ".", &status);
        failed = pack_entries(fd, length, depth);
    }
    close(fd);
    return failed;
}

int get_tree(const struct request *request, const char *path, const char **what)
{
    int fd = open_file(AT_FDCWD, path, O_RDONLY | O_DIRECTORY, 0);
    if (fd < 0)
        return -1;
    *name = 0;
    int failed = pack(fd, ".", 0, 0);
    close(fd);
    if (failed) {
        join(failed_at, sizeof failed_at, value(request, "path"), *name ? "/" : "", name, NULL);
        *what = failed_at;
    }
    return failed;
}

// put

static char parent[NAME_ROOM]; // the current directory, below that of the request

static int open_new(const char *path)
{
    struct stat status;
    int how = O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_NONBLOCK;
    if (!look(AT_FDCWD, path, AT_SYMLINK_NOFOLLOW, &status) && (!S_ISREG(status.st_mode) || status.st_nlink > 1) &&
        CALL(unlink, path) && !S_ISREG(status.st_mode))
        return -1; // a file's other names keep its contents, where that can be
    int fd = open_file(AT_FDCWD, path, how, 0600);
    // A program that runs keeps its file; one that its owner may not write, as git has, is replaced.
    if (fd < 0 && (errno == ETXTBSY || errno == EACCES) && !CALL(unlink, path))
        fd = open_file(AT_FDCWD, path, how, 0600);
    return fd;
}

static int make_directory_at(const char *path, mode_t mode)
{
    struct stat status;
    if (CALL(mkdir, path, 0700) && errno != EEXIST)
        return -1;
    if (look(AT_FDCWD, path, 0, &status))
        return -1;
    if (!S_ISDIR(status.st_mode)) {
        errno = ENOTDIR;
        return -1;
    }
    return (status.st_mode & 07777) == mode ? 0 : (int)CALL(chmod, path, mode);
}

static int link_to(int base, const char *target, const char *path)
{
    int here = open_file(AT_FDCWD, ".", O_PATH, 0);
    const char *old = CALL(fchdir, base) ? NULL : enter(target, 0);
    int failed = !old || CALL(linkat, AT_FDCWD, old, here, path, 0), error = errno;
    CALL(fchdir, here);
    close(here);
    errno = error;
    return failed ? -1 : 0;
}

// Make one file in the directory `base`; `path` is in the current directory. `fd` becomes that of a file to be written.
static int make(int base, const char *path, const struct entry *entry, const char *target, int *fd)
{
    if (S_ISREG(entry->mode))
        return (*fd = open_new(path)) < 0 ? -1 : 0;
    if (S_ISDIR(entry->mode))
        return make_directory_at(path, entry->mode & 07777);
    if (CALL(unlink, path) && errno != ENOENT)
        return -1;
    return S_ISLNK(entry->mode) ? (int)CALL(symlink, target, path) : link_to(base, target, path);
}

static int finish(int *fd, const struct entry *entry)
{
    struct timespec times[2] = {{.tv_nsec = UTIME_OMIT}, {entry->changed / 1000000000, entry->changed % 1000000000}};
    int failed = *fd >= 0 && (CALL(fchmod, *fd, entry->mode & 07777) || CALL(utimensat, *fd, NULL, times, 0));
    close(*fd);
    *fd = -1;
    return failed ? -1 : 0;
}

// Begin the file of the entry in `bytes`, of `length` bytes.
static int begin(const struct request *request, int base, size_t length, struct entry *entry, int *fd)
{
    bytes[length] = bytes[length + 1] = 0;
    memcpy(entry, bytes, sizeof *entry);
    const char *path = bytes + sizeof *entry, *target = path + strlen(path) + 1, *part = strrchr(path, '/');
    size_t above = part ? (size_t)(part - path) : 0;
    join(failed_at, sizeof failed_at, value(request, "path"), "/", path, NULL);
    if (above >= NAME_ROOM) {
        errno = ENAMETOOLONG;
        return -1;
    }
    if (above == strlen(parent) && !strncmp(path, parent, above)) {
        path += above + (part != NULL); // most files are in the directory of the one before
    } else {
        memcpy(parent, path, above);
        parent[above] = 0;
        path = CALL(fchdir, base) ? NULL : enter(path, 1);
    }
    return path ? make(base, path, entry, target, fd) : -1;
}

int put_tree(const struct request *request, const char *path, const char **what)
{
    struct entry entry = {0};
    int base = CALL(mkdir, path, 0755) && errno != EEXIST ? -1 : open_file(AT_FDCWD, path, O_PATH | O_DIRECTORY, 0);
    int error = base < 0 ? errno : 0, fd = -1;
    char type;
    join(parent, sizeof parent, "/", NULL); // no directory yet
    do {
        size_t length = read_frame(&type, bytes);
        if (error)
            continue; // the rest is read, too
        if (type == F_ENTRY)
            *what = failed_at;
        if (type == F_DATA)
            error = fd < 0 ? 0 : store(fd, bytes, length);
        else if (finish(&fd, &entry) || (type == F_ENTRY && begin(request, base, length, &entry, &fd)))
            error = errno;
    } while (type && type != F_DONE);
    close(fd);
    close(base);
    errno = error;
    return error ? -1 : 0;
}
