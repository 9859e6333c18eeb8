// SPDX-License-Identifier: Apache-2.0
// Directories as tar archives, in F_DATA frames. The verb "get" sends what is in a directory, "put" makes in a directory
// what an archive has. Names begin with "./". Devices, pipes and sockets are left out.
// Source: tar(5), for ustar, extended headers (types x and g), and the long names of GNU tar (types L and K).
#include "agent.h"
#include "libc.h"

enum {
    BLOCK = 512,
    NAME_ROOM = 8192,
    PROBED = 1 << 16, // a file up to this size is read before its header is sent: stat lies about those of /proc
};

struct header {
    char name[100], mode[8], uid[8], gid[8], size[12], mtime[12], checksum[8], type, link[100];
    char magic[6], version[2], user[32], group[32], major[8], minor[8], prefix[155], rest[12];
};
_Static_assert(sizeof(struct header) == BLOCK, "a header is a block");

static char room[FRAME_MAX]; // what is sent next, or the frame that was read last

static uint64_t sum(const struct header *header)
{
    uint64_t total = 0;
    for (size_t i = 0; i < BLOCK; i++) {
        int inside = i >= offsetof(struct header, checksum) && i < offsetof(struct header, type);
        total += inside ? ' ' : ((const unsigned char *)header)[i];
    }
    return total;
}

// get

static size_t filled;

static void send_room(void)
{
    if (filled)
        send_frame(F_DATA, NULL, 0, room, filled);
    filled = 0;
}

// The place for the next `length` bytes, which count as filled; zeros up to the end of the last block.
static char *next(size_t length)
{
    size_t whole = (length + BLOCK - 1) / BLOCK * BLOCK;
    if (whole > sizeof room - filled)
        send_room();
    char *at = room + filled;
    memset(at + length, 0, whole - length);
    filled += whole;
    return at;
}

static void put_octal(char *to, size_t width, uint64_t number)
{
    for (to[--width] = 0; width; number >>= 3)
        to[--width] = (char)('0' + (number & 7));
}

static void send_header(const char *name, const struct stat *status, char type, uint64_t size, const char *link)
{
    struct header *header = (void *)next(BLOCK);
    memset(header, 0, BLOCK);
    memcpy(header->name, name, strlen(name) < sizeof header->name ? strlen(name) : sizeof header->name);
    memcpy(header->link, link, strlen(link) < sizeof header->link ? strlen(link) : sizeof header->link);
    put_octal(header->mode, sizeof header->mode, status->st_mode & 07777);
    put_octal(header->uid, sizeof header->uid, status->st_uid <= 07777777 ? status->st_uid : 0);
    put_octal(header->gid, sizeof header->gid, status->st_gid <= 07777777 ? status->st_gid : 0);
    put_octal(header->size, sizeof header->size, size >> 33 ? 0 : size);
    put_octal(header->mtime, sizeof header->mtime, status->st_mtim.tv_sec < 0 ? 0 : (uint64_t)status->st_mtim.tv_sec);
    header->type = type;
    memcpy(header->magic, "ustar", sizeof header->magic);
    memcpy(header->version, "00", sizeof header->version);
    put_octal(header->checksum, sizeof header->checksum - 1, sum(header));
    header->checksum[sizeof header->checksum - 1] = ' ';
}

// Append "LENGTH KEY=VALUE\n", whose length counts its own digits.
static size_t add_record(char *to, size_t at, const char *key, const char *value)
{
    char digits[24];
    size_t length = strlen(key) + strlen(value) + 3, all = length + 1;
    while (length + strlen(decimal(all, digits)) > all)
        all++;
    return at + join(to + at, NAME_ROOM * 2 - at, decimal(all, digits), " ", key, "=", value, "\n", NULL);
}

static void send_member(const char *name, const struct stat *status, char type, uint64_t size, const char *link)
{
    static char records[NAME_ROOM * 2];
    char digits[24];
    size_t length = 0;
    if (strlen(name) > sizeof((struct header *)0)->name)
        length = add_record(records, length, "path", name);
    if (strlen(link) > sizeof((struct header *)0)->link)
        length = add_record(records, length, "linkpath", link);
    if (size >> 33)
        length = add_record(records, length, "size", decimal(size, digits));
    if (length) {
        send_header("././@PaxHeader", status, 'x', length, "");
        memcpy(next(length), records, length);
    }
    send_header(name, status, type, size, link);
}

// The result for what cannot be read: that it was removed since its directory was read is no error.
static int unless_gone(void)
{
    return errno == ENOENT ? 0 : -1;
}

static int pack_file(int directory, const char *entry, const char *name, const struct stat *status)
{
    static char start[PROBED];
    int fd = open_file(directory, entry, O_RDONLY | O_NONBLOCK | O_NOFOLLOW, 0);
    if (fd < 0)
        return unless_gone();
    size_t known = 0;
    ssize_t done = 1;
    while (known < sizeof start && (done = read(fd, start + known, sizeof start - known)) > 0)
        known += (size_t)done;
    uint64_t size = known < sizeof start || status->st_size < PROBED ? known : (uint64_t)status->st_size;
    if (done >= 0) {
        send_member(name, status, '0', size, "");
        memcpy(next(known), start, known);
    }
    for (uint64_t left = size - known; left && done >= 0;) {
        size_t piece = left < PROBED ? (size_t)left : PROBED, got = 0;
        char *to = next(piece);
        while (got < piece && (done = read(fd, to + got, piece - got)) > 0)
            got += (size_t)done;
        memset(to + got, 0, piece - got); // a file that has become shorter has zeros at its end
        left -= piece;
    }
    close(fd);
    return done < 0 ? -1 : 0;
}

// `name` is the name in the archive, of `length` bytes, in a buffer of NAME_ROOM. On an error it stays as it is.
static int pack(int directory, const char *entry, char *name, size_t length, int depth)
{
    static char target[4097];
    struct stat status;
    char names[4096];
    if (look(directory, entry, AT_SYMLINK_NOFOLLOW, &status))
        return unless_gone();
    if (S_ISREG(status.st_mode))
        return pack_file(directory, entry, name, &status);
    if (S_ISLNK(status.st_mode)) {
        ssize_t done = CALL(readlinkat, directory, entry, target, sizeof target - 1);
        if (done < 0)
            return unless_gone();
        target[done] = 0;
        send_member(name, &status, '2', 0, target);
        return 0;
    }
    if (!S_ISDIR(status.st_mode))
        return 0;
    if (depth == DEEPEST) {
        errno = ELOOP;
        return -1;
    }
    int fd = open_file(directory, entry, O_RDONLY | O_DIRECTORY | O_NOFOLLOW, 0), failed = 0;
    if (fd < 0)
        return unless_gone();
    send_member(name, &status, '5', 0, "");
    long done = 0;
    while (!failed && (done = CALL(getdents64, fd, names, sizeof names)) > 0)
        for (long at = 0; !failed && at < done;) {
            struct directory_entry *each = (void *)(names + at);
            at += each->length;
            if (!strcmp(each->name, ".") || !strcmp(each->name, ".."))
                continue;
            size_t longer = length + join(name + length, NAME_ROOM - length, "/", each->name, NULL);
            if (longer == NAME_ROOM - 1) {
                errno = ENAMETOOLONG;
                failed = 1;
            } else if (!(failed = pack(fd, each->name, name, longer, depth + 1))) {
                name[length] = 0;
            }
        }
    close(fd);
    return failed || (done < 0 && !(depth && errno == ENOENT)) ? -1 : 0;
}

static char failed_at[NAME_ROOM]; // what F_FAILED names

int get_archive(const struct request *request, const char *path, const char **what)
{
    static char name[NAME_ROOM];
    int fd = open_file(AT_FDCWD, path, O_RDONLY | O_DIRECTORY, 0);
    if (fd < 0)
        return -1;
    filled = 0; // an archive that failed may have left something
    join(name, sizeof name, ".", NULL);
    int failed = pack(fd, ".", name, 1, 0);
    close(fd);
    if (failed) {
        join(failed_at, sizeof failed_at, value(request, "path"), name + 1, NULL);
        *what = failed_at;
        return -1;
    }
    memset(next(2 * BLOCK), 0, 2 * BLOCK);
    send_room();
    return 0;
}

// put

static size_t at, there; // of `room`
static int last; // the last frame was read

static size_t piece(char **bytes, uint64_t most)
{
    if (at == there && !last) {
        char type;
        at = 0;
        there = read_frame(&type, room);
        last = !there;
    }
    size_t length = there - at < most ? there - at : (size_t)most;
    *bytes = room + at;
    at += length;
    return length;
}

static int no_archive(void)
{
    errno = EBADMSG;
    return -1;
}

// Read `length` bytes into `to`, or over them if that is NULL. -1: the archive ends before.
static int take(char *to, uint64_t length)
{
    char *bytes;
    for (size_t done; length; length -= done) {
        if (!(done = piece(&bytes, length)))
            return no_archive();
        if (to) {
            memcpy(to, bytes, done);
            to += done;
        }
    }
    return 0;
}

static uint64_t get_number(const char *text, size_t width)
{
    uint64_t result = 0;
    if (*text & 0x80) { // GNU tar's for large numbers
        for (size_t i = 1; i < width; i++)
            result = result << 8 | (unsigned char)text[i];
        return result;
    }
    for (size_t i = 0; i < width && text[i]; i++)
        if (text[i] >= '0' && text[i] <= '7')
            result = result << 3 | (uint64_t)(text[i] - '0');
    return result;
}

struct member {
    char name[NAME_ROOM], link[NAME_ROOM];
    uint64_t size;
    int has_name, has_link, has_size; // from an extended header
};

static int read_records(struct member *member, char *text, size_t length)
{
    for (char *record = text, *end; record < text + length; record = end) {
        size_t size = 0;
        char *key = record;
        for (; *key >= '0' && *key <= '9' && size <= length; key++)
            size = size * 10 + (size_t)(*key - '0');
        end = record + size;
        if (*key != ' ' || end <= key + 1 || end > text + length || end[-1] != '\n')
            return no_archive();
        end[-1] = 0;
        char *text_of = strchr(++key, '=');
        if (!text_of)
            return no_archive();
        *text_of++ = 0;
        if (strlen(text_of) >= NAME_ROOM)
            return no_archive();
        if (!strncmp(key, "GNU.sparse.", 11))
            return no_archive(); // of a file with holes only the pieces are here
        if (!strcmp(key, "path"))
            member->has_name = (int)join(member->name, NAME_ROOM, text_of, NULL);
        else if (!strcmp(key, "linkpath"))
            member->has_link = (int)join(member->link, NAME_ROOM, text_of, NULL);
        else if (!strcmp(key, "size")) {
            member->size = (uint64_t)number(text_of, 0);
            member->has_size = 1;
        }
    }
    return 0;
}

static int read_extension(struct member *member, char type, uint64_t size)
{
    static char text[NAME_ROOM * 4 + 1];
    if (type == 'g')
        return take(NULL, size) || take(NULL, -size % BLOCK);
    if (size >= (type == 'x' ? sizeof text : NAME_ROOM))
        return no_archive();
    if (take(text, size) || take(NULL, -size % BLOCK))
        return -1;
    text[size] = 0;
    if (type == 'L')
        member->has_name = (int)join(member->name, NAME_ROOM, text, NULL);
    else if (type == 'K')
        member->has_link = (int)join(member->link, NAME_ROOM, text, NULL);
    else
        return read_records(member, text, size);
    return 0;
}

// A field that need not end with a NUL.
static void take_field(char *to, const char *field, size_t width)
{
    size_t length = 0;
    for (; length < width && field[length]; length++)
        continue;
    memcpy(to, field, length);
    to[length] = 0;
}

// The next member, without its contents. 0: there is none. -1: not an archive, or it ends too early.
static int read_member(struct member *member, struct header *header)
{
    member->has_name = member->has_link = member->has_size = 0;
    for (;;) {
        char *bytes;
        size_t got = piece(&bytes, BLOCK);
        if (!got)
            return 0;
        memcpy(header, bytes, got);
        if (take((char *)header + got, BLOCK - got))
            return -1;
        if (!*header->name && sum(header) == 8 * ' ')
            return 0; // a block of zeros
        if (get_number(header->checksum, sizeof header->checksum) != sum(header))
            return no_archive();
        uint64_t size = get_number(header->size, sizeof header->size);
        if (header->type == 'x' || header->type == 'g' || header->type == 'L' || header->type == 'K') {
            if (read_extension(member, header->type, size))
                return -1;
            continue;
        }
        if (header->type == 'S')
            return no_archive(); // GNU tar's for such a file
        if (!member->has_size)
            member->size = size;
        if (!member->has_link)
            take_field(member->link, header->link, sizeof header->link);
        if (!member->has_name) {
            size_t before = 0;
            if (!strncmp(header->magic, "ustar", 6) && *header->prefix) {
                take_field(member->name, header->prefix, sizeof header->prefix);
                before = strlen(member->name);
                member->name[before++] = '/';
            }
            take_field(member->name + before, header->name, sizeof header->name);
        }
        for (size_t end = strlen(member->name); end > 1 && member->name[end - 1] == '/';)
            member->name[--end] = 0;
        if (header->type != '0' && header->type != '7' && header->type)
            member->size = 0; // whatever its header says, as of a link, nothing follows
        return 1;
    }
}

// A path within the archive: without a slash at its start, and NULL if a part of it is "..".
static const char *inside(const char *name)
{
    for (; *name == '/'; name++)
        continue;
    for (const char *part = name; part; part = strchr(part, '/')) {
        part += *part == '/';
        if (part[0] == '.' && part[1] == '.' && (!part[2] || part[2] == '/')) {
            errno = EINVAL;
            return NULL;
        }
    }
    return *name ? name : ".";
}

static int unpack_file(const char *name, const struct member *member, long mode, uint64_t modified)
{
    struct stat status;
    int how = O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_NONBLOCK;
    if (!look(AT_FDCWD, name, AT_SYMLINK_NOFOLLOW, &status) && (!S_ISREG(status.st_mode) || status.st_nlink > 1) &&
        CALL(unlink, name) && !S_ISREG(status.st_mode))
        return -1; // a file's other names keep its contents, where that can be
    int fd = open_file(AT_FDCWD, name, how, 0600);
    // A program that runs keeps its file; one that its owner may not write, as git has, is replaced.
    if (fd < 0 && (errno == ETXTBSY || errno == EACCES) && !CALL(unlink, name))
        fd = open_file(AT_FDCWD, name, how, 0600);
    if (fd < 0)
        return -1;
    int error = 0;
    char *bytes;
    for (uint64_t left = member->size; left && !error;) {
        size_t length = piece(&bytes, left);
        error = length ? store(fd, bytes, length) : EBADMSG;
        left -= length;
    }
    struct timespec times[2] = {{.tv_nsec = UTIME_OMIT}, {.tv_sec = (time_t)modified}};
    if (!error && (CALL(fchmod, fd, mode) || CALL(utimensat, fd, NULL, times, 0)))
        error = errno;
    close(fd);
    errno = error;
    return error || take(NULL, -member->size % BLOCK) ? -1 : 0;
}

static int unpack_directory(const char *name, long mode)
{
    struct stat status;
    if (CALL(mkdir, name, 0700) && errno != EEXIST)
        return -1;
    if (look(AT_FDCWD, name, 0, &status))
        return -1;
    if (!S_ISDIR(status.st_mode)) {
        errno = ENOTDIR;
        return -1;
    }
    return (status.st_mode & 07777) == mode ? 0 : (int)CALL(chmod, name, mode);
}

// Make one member in the directory `base`; `name` is in the current directory.
static int unpack(int base, const char *name, const struct member *member, const struct header *header)
{
    long mode = (long)get_number(header->mode, sizeof header->mode) & 07777;
    if (!header->type || header->type == '0' || header->type == '7')
        return unpack_file(name, member, mode, get_number(header->mtime, sizeof header->mtime));
    if (header->type == '5')
        return unpack_directory(name, mode);
    if (header->type != '1' && header->type != '2')
        return 0;
    const char *target = header->type == '1' ? inside(member->link) : member->link;
    if (!target || (CALL(unlink, name) && errno != ENOENT))
        return -1;
    if (header->type == '2')
        return (int)CALL(symlink, target, name);
    int here = open_file(AT_FDCWD, ".", O_PATH, 0);
    const char *old = CALL(fchdir, base) ? NULL : enter(target, 0);
    int failed = !old || CALL(linkat, AT_FDCWD, old, here, name, 0), error = errno;
    CALL(fchdir, here);
    close(here);
    errno = error;
    return failed ? -1 : 0;
}

int put_archive(const struct request *request, const char *path, const char **what)
{
    static struct member member;
    static char parent[NAME_ROOM];
    struct header header;
    at = there = 0;
    last = 0;
    int base = CALL(mkdir, path, 0755) && errno != EEXIST ? -1 : open_file(AT_FDCWD, path, O_PATH | O_DIRECTORY, 0);
    int more = base < 0 ? -1 : 0, known = 0;
    while (more >= 0 && (more = read_member(&member, &header)) > 0) {
        const char *name = inside(member.name), *part = name ? strrchr(name, '/') : NULL;
        size_t length = part ? (size_t)(part - name) : 0;
        if (name && known && length == strlen(parent) && !strncmp(name, parent, length)) {
            name += length + (part != NULL); // most members are in the directory of the one before
        } else if (name) {
            memcpy(parent, name, length);
            parent[length] = 0;
            name = CALL(fchdir, base) ? NULL : enter(name, 1);
            known = name != NULL;
        }
        if (!name || unpack(base, name, &member, &header)) {
            more = -1;
            join(failed_at, sizeof failed_at, value(request, "path"), "/", member.name, NULL);
            *what = failed_at;
        }
    }
    int error = errno;
    char *rest;
    do // what follows the archive's end, or the member that failed
        at = there;
    while (piece(&rest, FRAME_MAX) || !last);
    if (base >= 0)
        close(base);
    errno = error;
    return more < 0 ? -1 : 0;
}
