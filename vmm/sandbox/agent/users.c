// SPDX-License-Identifier: Apache-2.0
// Users and groups, from the image's /etc/passwd and /etc/group.
// Source: passwd(5), group(5).
#include "agent.h"
#include "libc.h"

static char text[1 << 18];

// Split the next line of `at` into at most `most` fields. Returns the text after the line, or NULL at the end.
static char *fields_of(char *at, char **fields, int most)
{
    if (!*at)
        return NULL;
    char *end = strchr(at, '\n'), *next = end ? end + 1 : at + strlen(at);
    if (end)
        *end = 0;
    for (int i = 0; i < most; i++) {
        char *colon = strchr(at, ':');
        fields[i] = at;
        if (colon)
            *colon = 0;
        at = colon && i + 1 < most ? colon + 1 : at + strlen(at);
    }
    return next;
}

static int in_list(const char *list, const char *name)
{
    size_t length = strlen(name);
    for (; length && list; list = strchr(list, ',') ? strchr(list, ',') + 1 : NULL)
        if (!strncmp(list, name, length) && (!list[length] || list[length] == ','))
            return 1;
    return 0;
}

// Parse USER or USER:GROUP, each a name or a number; a number need not be in the files. -1: unknown user or group.
static int read_user(const char *who, struct identity *found)
{
    char user[256], *fields[6];
    memset(found, 0, sizeof *found);
    if (strlen(who) >= sizeof user)
        return -1; // cut, it could be another one
    join(user, sizeof user, who, NULL);
    char *group = strchr(user, ':');
    if (group)
        *group++ = 0;
    long uid = number(user, -1);
    if (uid > UINT32_MAX - 1)
        return -1;
    int known = 0;
    join(found->home, sizeof found->home, "/", NULL);
    if (slurp("/etc/passwd", text, sizeof text) < 0)
        text[0] = 0;
    for (char *at = text; !known && (at = fields_of(at, fields, 6));) {
        if (uid >= 0 ? number(fields[2], -1) != uid : strcmp(fields[0], user) != 0)
            continue;
        known = 1;
        uid = number(fields[2], -1);
        found->gid = (gid_t)number(fields[3], 0);
        join(found->name, sizeof found->name, fields[0], NULL);
        if (*fields[5])
            join(found->home, sizeof found->home, fields[5], NULL);
    }
    if (!known && !strcmp(user, "root"))
        uid = 0; // root, for an image without users
    if (uid < 0)
        return -1;
    if (!known)
        join(found->name, sizeof found->name, uid ? user : "root", NULL);
    found->uid = (uid_t)uid;
    long gid = group ? number(group, -1) : -1;
    if (slurp("/etc/group", text, sizeof text) < 0)
        text[0] = 0;
    for (char *at = text; (at = fields_of(at, fields, 4));) {
        long number_of = number(fields[2], -1);
        if (number_of < 0)
            continue;
        if (group && gid < 0 && !strcmp(fields[0], group))
            gid = number_of;
        int more = !group && number_of != found->gid; // as Docker does
        if (more && in_list(fields[3], found->name) && found->groups < 63)
            found->group[++found->groups] = (gid_t)number_of;
    }
    if (group && (gid < 0 || gid > UINT32_MAX - 1))
        return -1;
    if (group)
        found->gid = (gid_t)gid;
    // Its own group is among them: otherwise a setgid program gets what files deny to that group.
    found->group[0] = found->gid;
    found->groups++;
    return 0;
}

// Whether a file is unchanged since the last call.
static int unchanged(const char *path, struct stat *seen)
{
    struct stat now;
    if (look(AT_FDCWD, path, 0, &now))
        memset(&now, 0, sizeof now);
    int same = now.st_ino == seen->st_ino && now.st_dev == seen->st_dev && now.st_size == seen->st_size &&
               now.st_ctim.tv_sec == seen->st_ctim.tv_sec && now.st_ctim.tv_nsec == seen->st_ctim.tv_nsec;
    *seen = now;
    return same;
}

// read_user with a cache: used if `who` is the same as in the last call and both files are unchanged.
int find_user(const char *who, struct identity *found)
{
    static struct stat passwd, group;
    static struct identity last;
    static char asked[64];
    int same = unchanged("/etc/passwd", &passwd) & unchanged("/etc/group", &group) && *asked && !strcmp(asked, who);
    if (!same) {
        *asked = 0;
        if (read_user(who, &last))
            return -1;
        join(asked, sizeof asked, strlen(who) < sizeof asked ? who : "", NULL);
    }
    *found = last;
    return 0;
}
