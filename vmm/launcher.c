// SPDX-License-Identifier: Apache-2.0
/* The program pyvmm, also installed as firecracker and jailer. It does the few things that must not wait for the Python
   interpreter, and then goes on in a start image (start_image.h), or executes the interpreter in the same process.

   It prints --version and --help (for firecracker and jailer), makes the API's socket, and executes `python -I -S
   vmm/__main__.py`. -I: PYTHON* variables and the current directory do not affect what runs. -S: without `site`, whose
   result is known here. It passes these -X options to Python:
       pyvmm         the name it was started with, for sys.argv[0]
       pyvmm_path    the import path, separated by colons
       pyvmm_socket  the listening socket's descriptor, a colon and its path, if there is one
       pyvmm_held    SIGINT is blocked until Python can handle it without a traceback

   The interpreter must have the version for which this program was built. It is beside it in a virtual environment, or
   in PATH. The packages are in the site-packages beside that directory, or where an editable installation points. A
   copy made by `pyvmm link` has both at its end: "interpreter\0path\0", their length as 8 hexadecimal digits, and
   MAGIC.

   PYVMM_START=cold in the environment starts an interpreter in any case; with PYVMM_START=warm it is an error, which
   says why, if there is no start image that fits.

   Anything unusual (an invalid command line, a socket path that is in use) is left to Python, which does the same more
   slowly and reports errors. The socket is the only file that this program creates. */
#define _GNU_SOURCE
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "start_image.h"

#define API_VERSION "1.12.1"
#define MAGIC "pyvmm-link-1"
#define DEFAULT_SOCKET "/run/firecracker.socket"

enum { BACKLOG = 128, ROOM = 4096, STATUS_HOST = 1 };

/* The same as OPTIONS in vmm/commands/serve.py; a test compares them. */
static const char *const with_value[] = {
    "--api-sock", "--id", "--config-file", "--log-path", "--level", "--module", "--metrics-path", "--start-time-us",
    "--start-time-cpu-us", "--parent-cpu-time-us", "--mmds-size-limit", "--metadata", "--http-api-max-payload-size",
};
static const char *const switches[] = {"--show-level", "--show-log-origin", "--boot-timer", "--no-seccomp"};

static char interpreter[ROOM], packages[ROOM], path[2 * ROOM + 1];

static bool there(const char *directory, const char *name, char *found)
{
    int length = snprintf(found, ROOM, "%s/%s", directory, name);
    return length > 0 && length < ROOM && access(found, F_OK) == 0;
}

/* Set `packages` to the directory with the vmm package: `directory`, or the target of an editable installation in it.
   Set `path` to the import path. Returns whether it was found. */
static bool packages_in(const char *directory)
{
    char file[ROOM], line[ROOM];
    if (there(directory, "vmm/__main__.py", file)) {
        snprintf(packages, ROOM, "%s", directory);
        snprintf(path, sizeof path, "%s", directory);
        return true;
    }
    if (!there(directory, EDITABLE, file)) return false;
    FILE *opened = fopen(file, "re");
    if (opened == NULL) return false;
    bool found = fgets(line, ROOM, opened) != NULL;
    fclose(opened);
    line[strcspn(line, "\n")] = 0;
    if (!found || !there(line, "vmm/__main__.py", file)) return false;
    snprintf(packages, ROOM, "%s", line);
    snprintf(path, sizeof path, "%s:%s", line, directory);
    return true;
}

/* Read what `pyvmm link` wrote at the end of this program's file. Returns whether there is anything. */
static bool read_tail(const char *self)
{
    char end[8 + sizeof MAGIC - 1 + 1] = "", text[2 * ROOM];
    int file = open(self, O_RDONLY | O_CLOEXEC);
    off_t at = lseek(file, -(off_t)(sizeof end - 1), SEEK_END);
    bool found = at > 0 && read(file, end, sizeof end - 1) == (ssize_t)(sizeof end - 1) && !strcmp(end + 8, MAGIC);
    if (found) {
        end[8] = 0;
        size_t length = strtoul(end, NULL, 16);
        found = length > 2 && length < sizeof text && (off_t)length < at &&
                pread(file, text, length, at - length) == (ssize_t)length && text[length - 1] == 0;
        if (found) {
            size_t first = strlen(text);
            found = first + 1 < length && first < ROOM && strlen(text + first + 1) < ROOM;
            if (found) {
                strcpy(interpreter, text);
                strcpy(path, text + first + 1);
                snprintf(packages, ROOM, "%.*s", (int)strcspn(path, ":"), path);
            }
        }
    }
    close(file);
    return found;
}

static bool in_path(void)
{
    const char *all = getenv("PATH");
    while (all && *all) {
        size_t length = strcspn(all, ":");
        char directory[ROOM];
        snprintf(directory, ROOM, "%.*s", (int)length, all);
        if (length && there(directory, PYTHON, interpreter)) return true;
        all += length + (all[length] == ':');
    }
    return false;
}

static bool find_python(void)
{
    static const char *const below[] = {
        "../lib/" PYTHON "/site-packages", "../lib/" PYTHON "/dist-packages", "../lib64/" PYTHON "/site-packages", "..",
    };
    char self[ROOM], directory[ROOM], place[ROOM];
    ssize_t length = readlink("/proc/self/exe", self, ROOM - 1);
    if (length <= 0) return false;
    self[length] = 0;
    if (read_tail(self)) return true;
    snprintf(directory, ROOM, "%.*s", (int)(strrchr(self, '/') - self), self);
    if (!there(directory, PYTHON, interpreter) && !in_path()) return false;
    for (size_t i = 0; i < sizeof below / sizeof *below; i++)
        if (there(directory, below[i], place) && packages_in(place)) return true;
    return false;
}

/* Whether the interpreter decodes names and texts as UTF-8, as the one in the image does. */
static bool speaks_utf8(void)
{
    const char *name = getenv("LC_ALL");
    if (!name || !*name) name = getenv("LC_CTYPE");
    if (!name || !*name) name = getenv("LANG");
    if (!name || !*name || !strcmp(name, "C") || !strcmp(name, "POSIX")) return true;
    const char *code = strchr(name, '.');
    return code && (!strncasecmp(code, ".UTF-8", 6) || !strncasecmp(code, ".UTF8", 5));
}

/* Whether the environment has no wishes of the dynamic linker and the C library, which are obeyed at a start alone. */
static bool plain_environment(void)
{
    static const char *const wishes[] = {"LD_", "GLIBC_", "MALLOC_"};
    for (char **each = environ; *each; each++)
        for (size_t i = 0; i < sizeof wishes / sizeof *wishes; i++)
            if (!strncmp(*each, wishes[i], strlen(wishes[i]))) return false;
    return true;
}

/* Go on from the start image, or return why not; `what` is what that is said of. */
static const char *start_warm(struct image_given *given, const char **what)
{
    char directory[ROOM], image[2 * ROOM];
    snprintf(directory, sizeof directory, "%.*s", (int)(strrchr(interpreter, '/') - interpreter), interpreter);
    snprintf(image, sizeof image, "%s/vmm/__pycache__/start-" PYTHON ".image", packages);
    *what = "LC_ALL, LC_CTYPE or LANG";
    if (!speaks_utf8()) return "is a locale without UTF-8";
    *what = "LD_*, GLIBC_* or MALLOC_*";
    if (getauxval(AT_SECURE) || !plain_environment()) return "asks for something at the start of a program";
    for (int number = 1; number < NSIG; number++) {
        struct sigaction now;
        if (!sigaction(number, NULL, &now) && now.sa_handler == SIG_IGN) given->ignored |= 1ull << (number - 1);
    }
    return start_from_image(image, directory, given, what);
}

static bool among(const char *const *words, size_t count, const char *word, size_t length)
{
    for (size_t i = 0; i < count; i++)
        if (strlen(words[i]) == length && !memcmp(words[i], word, length)) return true;
    return false;
}

/* The path of the API's socket on the command line of `serve`; NULL: no socket, or Python must parse the line. */
static const char *socket_path(char **words)
{
    const char *found = DEFAULT_SOCKET;
    for (; *words; words++) {
        size_t length = strcspn(*words, "=");
        const char *value = (*words)[length] ? *words + length + 1 : NULL;
        if (among(switches, sizeof switches / sizeof *switches, *words, length) && !value) continue;
        if (!among(with_value, sizeof with_value / sizeof *with_value, *words, length)) return NULL;
        const char *option = *words;
        if (!value && (!(value = *++words) || *value == '-')) return NULL;
        if (length == strlen("--api-sock") && !memcmp(option, "--api-sock", length)) found = value;
    }
    return found;
}

/* Make a socket that listens at `name`, as vmm/unix_socket.py does. -1: it failed, and Python will report why. */
static int listening(const char *name)
{
    struct sockaddr_un place = {.sun_family = AF_UNIX}, built = {.sun_family = AF_UNIX};
    struct stat what;
    size_t length = strlen(name);
    if (length == 0 || length >= sizeof place.sun_path) return -1;
    memcpy(place.sun_path, name, length);
    int made = snprintf(built.sun_path, sizeof built.sun_path, "%s.%d", name, getpid());
    if (made >= (int)sizeof built.sun_path) return -1;
    if (lstat(name, &what) == 0) {
        int probe = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
        bool dead = S_ISSOCK(what.st_mode) && probe >= 0 && connect(probe, (void *)&place, sizeof place) < 0 &&
                    errno == ECONNREFUSED;
        if (probe >= 0) close(probe);
        if (!dead || unlink(name)) return -1;
    } else if (errno != ENOENT) {
        return -1;
    }
    /* Give the socket its name only when it listens, so that a client that sees the file can connect. link() does not
       replace a file that another process has made in the meantime. */
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (fd < 0) return -1;
    if (bind(fd, (void *)&built, sizeof built) == 0) {
        bool done = listen(fd, BACKLOG) == 0 && link(built.sun_path, name) == 0;
        unlink(built.sun_path);
        if (done) return fd;
    }
    close(fd);
    return -1;
}

static int tell(const char *name, const char *what)
{
    if (!strcmp(what, "--version")) {
        printf("%s v" API_VERSION "\n\npyvmm " VERSION "\n", !strcmp(name, "jailer") ? "Jailer" : "Firecracker");
    } else {
        char file[2 * ROOM], text[16384];
        snprintf(file, sizeof file, "%s/vmm/commands/help/%s.txt", packages, name);
        FILE *opened = fopen(file, "re");
        if (opened == NULL) return -1;
        fwrite(text, 1, fread(text, 1, sizeof text, opened), stdout);
        fclose(opened);
    }
    return fflush(stdout) ? STATUS_HOST : 0;
}

int main(int argc, char **argv)
{
    char number[256], named[ROOM + 16], where[sizeof path + 16], start[2 * ROOM];
    const char *name = (const char *)getauxval(AT_EXECFN);
    const char *base, *place = NULL;
    int fd = -1;
    /* If stdin, stdout or stderr is closed, the next file opened would take its number, such as the guest's memory. */
    for (int i = 0; i < 3; i++)
        if (fcntl(i, F_GETFD) < 0) open("/dev/null", O_RDWR);
    if (name == NULL || !*name) name = argc ? argv[0] : "pyvmm";
    base = strrchr(name, '/') ? strrchr(name, '/') + 1 : name;
    if (!find_python()) {
        fprintf(stderr, "pyvmm: no " PYTHON " with pyvmm in it, beside this program or in PATH; install pyvmm again\n");
        return STATUS_HOST;
    }
    bool firecracker = !strcmp(base, "firecracker");
    bool asks = argc == 2 && (!strcmp(argv[1], "--version") || !strcmp(argv[1], "--help"));
    if (asks && (firecracker || !strcmp(base, "jailer"))) {
        int status = tell(base, argv[1]);
        if (status >= 0) return status;
    }
    if (firecracker)
        place = socket_path(argv + 1);
    else if (strcmp(base, "jailer") && argc > 1 && (!strcmp(argv[1], "serve") || !strncmp(argv[1], "--", 2)))
        place = socket_path(argv + 1 + (argv[1][0] == 's'));
    if (place != NULL) fd = listening(place);

    sigset_t held, before;
    sigemptyset(&held);
    sigaddset(&held, SIGINT);
    sigprocmask(SIG_BLOCK, &held, &before);

    const char *how = getenv("PYVMM_START"), *what;
    bool prepares = argc > 1 && !strcmp(argv[1], "prepare"); /* it must not need what it replaces */
    if (!prepares && (how == NULL || strcmp(how, "cold"))) {
        static struct image_given given; /* it outlives this function */
        given = (struct image_given){
            .argc = argc, .argv = argv, .environ = environ, .name = name, .socket = fd < 0 ? "" : place, .fd = fd,
            .held = !sigismember(&before, SIGINT),
        };
        const char *problem = start_warm(&given, &what);
        if (how != NULL && !strcmp(how, "warm")) {
            fprintf(stderr, "pyvmm: PYVMM_START warm: %s %s\n", what, problem);
            if (fd >= 0) unlink(place);
            return STATUS_HOST;
        }
    }

    char **words = calloc(argc + 14, sizeof *words), **word = words;
    if (words == NULL) return STATUS_HOST;
    snprintf(named, sizeof named, "pyvmm=%s", name);
    snprintf(where, sizeof where, "pyvmm_path=%s", path);
    snprintf(number, sizeof number, "pyvmm_socket=%d:%s", fd, fd < 0 ? "" : place);
    snprintf(start, sizeof start, "%s/vmm/__main__.py", packages);
    *word++ = interpreter;
    *word++ = "-I";
    *word++ = "-S";
    *word++ = "-X", *word++ = named;
    *word++ = "-X", *word++ = where;
    if (fd >= 0) *word++ = "-X", *word++ = number;
    if (!sigismember(&before, SIGINT)) *word++ = "-X", *word++ = "pyvmm_held";
    *word++ = start;
    for (int i = 1; i < argc; i++) *word++ = argv[i];
    execv(interpreter, words);
    fprintf(stderr, "pyvmm: %s: %s\n", interpreter, strerror(errno));
    if (fd >= 0) unlink(place);
    return STATUS_HOST;
}
