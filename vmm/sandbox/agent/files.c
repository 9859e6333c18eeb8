// SPDX-License-Identifier: Apache-2.0
// Verbs for files: path=..., and user=... to act as that user.
#include "agent.h"
#include "libc.h"
#include <sys/inotify.h>

static char bytes[FRAME_MAX];

// Change to the directory of `path`, and return the path's last part, or NULL. This goes part by part, because only at
// the end of a path the kernel refuses a link that another user left in a sticky directory (fs.protected_symlinks).
const char *enter(const char *path, int make)
{
    char part[256];
    if (*path == '/' && CALL(chdir, "/"))
        return NULL;
    for (;;) {
        for (; *path == '/'; path++)
            continue;
        const char *end = path, *after;
        for (; *end && *end != '/'; end++)
            continue;
        for (after = end; *after == '/'; after++)
            continue;
        if (!*after)
            return *path ? path : ".";
        size_t length = (size_t)(end - path);
        if (length >= sizeof part) {
            errno = ENAMETOOLONG;
            return NULL;
        }
        memcpy(part, path, length);
        part[length] = 0;
        if (CALL(chdir, part) &&
            (!make || errno != ENOENT || (CALL(mkdir, part, 0755) && errno != EEXIST) || CALL(chdir, part)))
            return NULL;
        path = after;
    }
}

// Make a directory, which may be there already.
static int make_one(const char *path)
{
    struct stat status;
    int failed = CALL(mkdir, path, 0755) != 0, error = errno;
    if (failed && error == EEXIST && !look(AT_FDCWD, path, 0, &status) && S_ISDIR(status.st_mode))
        return 0;
    errno = error;
    return failed ? -1 : 0;
}

int make_directory(const char *path)
{
    const char *name = enter(path, 1);
    int failed = !name || make_one(name), error = errno;
    CALL(chdir, "/");
    errno = error;
    return failed ? -1 : 0;
}

int send_entry(int directory, const char *path, const char *name, const struct stat *status)
{
    struct entry entry = {
        status->st_mode, status->st_uid, status->st_gid, (uint32_t)status->st_nlink, (uint64_t)status->st_size,
        status->st_mtim.tv_sec * 1000000000 + status->st_mtim.tv_nsec,
    };
    static char text[NAME_ROOM + 4096];
    size_t length = join(text, NAME_ROOM, name, NULL) + 1;
    if (S_ISLNK(status->st_mode)) {
        ssize_t more = CALL(readlinkat, directory, path, text + length, 4096);
        if (more < 0)
            return -1;
        length += (size_t)more;
    }
    send_frame(F_ENTRY, &entry, sizeof entry, text, length);
    return 0;
}

static int look_and_send(int directory, const char *path, const char *name, int flags)
{
    struct stat status;
    return look(directory, path, flags, &status) || send_entry(directory, path, name, &status) ? -1 : 0;
}

static int list(const char *path)
{
    static char names[32768];
    int fd = open_file(AT_FDCWD, path, O_RDONLY | O_DIRECTORY, 0);
    if (fd < 0)
        return -1;
    long done;
    int failed = 0;
    while (!failed && (done = CALL(getdents64, fd, names, sizeof names)) > 0)
        for (long at = 0; !failed && at < done;) {
            struct directory_entry *each = (void *)(names + at);
            if (strcmp(each->name, ".") && strcmp(each->name, ".."))
                failed = look_and_send(fd, each->name, each->name, AT_SYMLINK_NOFOLLOW) && errno == EACCES; // for all
            at += each->length;
        }
    close(fd);
    return failed || done < 0 ? -1 : 0;
}

// What is in a directory may be removed by others meanwhile.
static int remove_all(int directory, const char *name, int depth)
{
    char names[1024];
    if (!CALL(unlinkat, directory, name, 0) || (depth && errno == ENOENT))
        return 0;
    if (errno != EISDIR)
        return -1;
    if (depth == DEEPEST) {
        errno = ELOOP;
        return -1;
    }
    int fd = open_file(directory, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW, 0), failed = fd < 0, removed = 1;
    while (removed && !failed) { // read the directory again after each round, because removing entries moves the others
        removed = 0;
        CALL(lseek, fd, 0, SEEK_SET);
        for (long done; !failed && (done = CALL(getdents64, fd, names, sizeof names)) > 0;)
            for (long at = 0; !failed && at < done;) {
                struct directory_entry *each = (void *)(names + at);
                if (strcmp(each->name, ".") && strcmp(each->name, "..")) {
                    failed = remove_all(fd, each->name, depth + 1);
                    removed = 1;
                }
                at += each->length;
            }
    }
    close(fd);
    return (failed || CALL(unlinkat, directory, name, AT_REMOVEDIR)) && !(depth && errno == ENOENT) ? -1 : 0;
}

static int read_file(const struct request *request, const char *path)
{
    int fd = open_file(AT_FDCWD, path, O_RDONLY | O_NONBLOCK, 0); // O_NONBLOCK: opening a pipe must not wait
    const char *offset = value(request, "offset");
    long at = offset ? number(offset, -1) : 0;
    uint64_t left = (uint64_t)number(value(request, "length"), INT64_MAX);
    ssize_t done = 1;
    if (fd < 0 || (at && CALL(lseek, fd, at, SEEK_SET) < 0))
        done = -1;
    while (done > 0 && left) {
        done = read(fd, bytes, left < FRAME_MAX ? left : FRAME_MAX);
        if (done > 0) {
            send_frame(F_DATA, NULL, 0, bytes, (size_t)done);
            left -= (uint64_t)done;
        }
    }
    close(fd);
    return done < 0 ? -1 : 0;
}

// Whether files can take more memory. If not, the kernel would kill a program of the guest to write one.
static int has_room(void)
{
    char text[256];
    return free_memory() > 8 * RESERVE || slurp("/proc/meminfo", text, sizeof text) <= 0 ||
           field(text, "MemAvailable:", INT64_MAX) > RESERVE;
}

// Write all of `from` to a file. Returns 0 or the error.
int store(int fd, const char *from, size_t length)
{
    if (!has_room())
        return ENOMEM;
    for (size_t at = 0; at < length;) {
        ssize_t done = write(fd, from + at, length - at);
        if (done < 0)
            return errno;
        at += (size_t)done;
    }
    return 0;
}

// Read all frames, even after an error.
static int write_file(const struct request *request, const char *path)
{
    long mode = number(value(request, "mode"), -1);
    int how = O_WRONLY | O_CREAT | O_NONBLOCK | (value(request, "append") ? O_APPEND : O_TRUNC), fd = -1, error = 0;
    if ((fd = open_file(AT_FDCWD, path, how, 0644)) < 0 || (mode >= 0 && CALL(fchmod, fd, mode & 07777)))
        error = errno;
    char type;
    for (size_t length; (length = read_frame(&type, bytes)), type == F_DATA;)
        if (!error)
            error = store(fd, bytes, length);
    if (fd >= 0)
        close(fd);
    errno = error;
    return error ? -1 : 0;
}

static int watch(const char *path)
{
    int fd = (int)CALL(inotify_init1, IN_CLOEXEC);
    uint32_t mask = IN_CREATE | IN_DELETE | IN_MOVED_FROM | IN_MOVED_TO | IN_CLOSE_WRITE | IN_ATTRIB | IN_DELETE_SELF;
    if (fd < 0 || CALL(inotify_add_watch, fd, path, mask) < 0) {
        close(fd);
        return -1;
    }
    CALL(chdir, "/"); // so that the directory's file system can be unmounted
    uint32_t none = 0;
    send_frame(F_STARTED, &none, sizeof none, NULL, 0);
    for (;;) {
        struct pollfd fds[2] = {{host, POLLIN | POLLRDHUP, 0}, {fd, POLLIN, 0}};
        flush();
        wait_for(fds, 2, -1);
        if (fds[0].revents || has_read_ahead())
            _exit(0);
        ssize_t done = read(fd, bytes, sizeof bytes);
        for (ssize_t at = 0; at < done;) {
            struct inotify_event *event = (void *)(bytes + at);
            const char *name = event->len ? event->name : "";
            if (event->mask & IN_IGNORED) { // the last one: the directory was removed, or its file system unmounted
                close(fd);
                return 0;
            }
            send_frame(F_CHANGE, &event->mask, sizeof event->mask, name, strlen(name));
            at += (ssize_t)(sizeof *event + event->len);
        }
    }
}

static int move(const char *name, const char *to, int base)
{
    int from = open_file(AT_FDCWD, ".", O_PATH, 0);
    const char *new = *to != '/' && CALL(fchdir, base) ? NULL : enter(to, 0);
    int failed = !new || CALL(renameat2, from, name, AT_FDCWD, new, 0);
    close(from);
    return failed ? -1 : 0;
}

// `path` is a name in the current directory. `base` is where a relative path begins.
static int do_verb(const struct request *request, const char *path, const struct identity *owner, int base,
                   const char **what)
{
    const char *verb = request->verb, *to = value(request, "to");
    if (!strcmp(verb, "read"))
        return read_file(request, path);
    if (!strcmp(verb, "write"))
        return write_file(request, path);
    if (!strcmp(verb, "get"))
        return get_tree(request, path, what);
    if (!strcmp(verb, "put"))
        return put_tree(request, path, what);
    if (!strcmp(verb, "list"))
        return list(path);
    if (!strcmp(verb, "watch"))
        return watch(path);
    if (!strcmp(verb, "stat"))
        return look_and_send(AT_FDCWD, path, "", value(request, "follow") ? 0 : AT_SYMLINK_NOFOLLOW);
    if (!strcmp(verb, "mkdir"))
        return value(request, "parents") ? make_one(path) : (int)CALL(mkdir, path, 0755);
    if (!strcmp(verb, "remove"))
        return remove_all(AT_FDCWD, path, 0);
    if (!strcmp(verb, "chmod"))
        return (int)CALL(chmod, path, number(value(request, "mode"), 0) & 07777);
    if (!strcmp(verb, "chown"))
        return (int)CALL(fchownat, AT_FDCWD, path, owner->uid, owner->gid, AT_SYMLINK_NOFOLLOW);
    if (!to) {
        errno = EINVAL;
        return -1;
    }
    return !strcmp(verb, "rename") ? move(path, to, base) : (int)CALL(symlink, to, path);
}

static int act_as(const struct identity *who)
{
    return CALL(setgroups, who->groups, who->group) || CALL(setresgid, -1, who->gid, -1) ||
           CALL(setresuid, -1, who->uid, -1);
}

void serve_files(const struct request *request)
{
    static const struct identity root;
    struct identity user, owner = {.uid = (uid_t)-1, .gid = (gid_t)-1};
    int bad = 0;
    const char *path = value(request, "path"), *who = value(request, "user"), *whose = value(request, "owner");
    const char *what = path ? path : "path"; // what F_FAILED names
    if (!path || !*path) {
        bad = 1;
    } else if (who && find_user(who, &user)) {
        bad = 1;
        what = pair(request, "user");
    } else if (whose && find_user(whose, &owner)) {
        bad = 1;
        what = pair(request, "owner");
    }
    if (bad)
        errno = EINVAL;
    CALL(chdir, !bad && who ? user.home : "/root"); // the base of a relative path
    int base = open_file(AT_FDCWD, ".", O_PATH, 0);
    if (!bad && who && act_as(&user)) {
        bad = 1;
        what = who;
    }
    const char *name = bad ? NULL : enter(path, value(request, "parents") != NULL);
    int failed = !name || do_verb(request, name, &owner, base, &what), error = errno;
    if (!name && (!strcmp(request->verb, "write") || !strcmp(request->verb, "put")))
        for (char type = F_DATA; type && type != F_DONE;)
            read_frame(&type, bytes);
    if (who) {
        CALL(setresuid, -1, 0, -1);
        act_as(&root);
    }
    close(base);
    CALL(chdir, "/");
    if (failed)
        send_failed(error, what);
    else
        send_ok();
}
