// SPDX-License-Identifier: Apache-2.0
// Starts the program of a container image, from the initramfs: with /mnt as the root directory, as the image's user.
//
// /run/enter has the parameters, each ended by a NUL: uid, gid, all groups as "1,2", working directory, number of
// variables, the variables, the program and its arguments. Exit status 127: not found; 126: cannot be executed.
#include "../sandbox/agent/libc.h"

enum { ROOM = 1 << 20, WORDS = 16384, GROUPS = 64 };

static char bytes[ROOM], *words[WORDS + 1];

static void fail(const char *what, const char *why, int status)
{
    char line[512];
    size_t length = join(line, sizeof line, "pyvmm: ", what, why, "\n", NULL);
    write(2, line, length);
    _exit(status);
}

static long word_number(int index)
{
    const char *at = words[index];
    return digits(&at);
}

// Make the program's working directory, and those above it, if the image lacks them.
static void make_directories(char *path)
{
    for (char *at = path + 1; *at; at++)
        if (*at == '/') {
            *at = 0;
            CALL(mkdir, path, 0755);
            *at = '/';
        }
    CALL(mkdir, path, 0755);
}

static void become(void)
{
    gid_t groups[GROUPS];
    int count = 0;
    for (const char *at = words[2]; *at && count < GROUPS; at += *at == ',')
        groups[count++] = (gid_t)digits(&at);
    if (CALL(setgroups, count, groups) || CALL(setgid, word_number(1)) || CALL(setuid, word_number(0)))
        fail("the image's user", ": cannot be set", 126);
}

int main(void)
{
    ssize_t length = slurp("/run/enter", bytes, sizeof bytes);
    int count = 0;
    for (char *at = bytes; at < bytes + length && count < WORDS; at += strlen(at) + 1)
        words[count++] = at;
    long variables = count > 4 ? word_number(4) : 0;
    if (count < 6 || variables > count - 6)
        fail("/run/enter", " is damaged", 126);
    char **environment = words + 5, **arguments = words + 5 + variables;
    // The NULL that ends the variables overwrites the program's name, so copy the arguments first.
    static char *program[WORDS + 1];
    for (int i = 0; arguments[i]; i++)
        program[i] = arguments[i];
    arguments[0] = NULL;
    if (CALL(chroot, "/mnt"))
        fail("/mnt", ": cannot be the root directory", 126);
    make_directories(words[3]);
    if (CALL(chdir, words[3]))
        fail(words[3], ": cannot be the working directory", 126);
    become();
    execute(program, environment);
    if (errno == ENOENT || errno == ENOTDIR)
        fail(program[0], ": not found", 127);
    fail(program[0], ": cannot be executed", 126);
    return 126;
}
