// SPDX-License-Identifier: Apache-2.0
/* The program pyvmm, and under their own names firecracker and jailer: the few things that must not wait for an
   interpreter, and then, in the same process, the interpreter.

   It says --version and --help of a runtime's program, makes the API's socket, and becomes `python -I -S
   vmm/__main__.py`: isolated, so that neither PYTHON* variables nor the current directory decide what runs, and without
   `site`, whose work is known here. What it tells Python, by -X:
       pyvmm         the name it was started by, as sys.argv[0]
       pyvmm_path    where to import from, colons between
       pyvmm_socket  the listening socket's descriptor, a colon and its path, where there is one
       pyvmm_held    that Ctrl-C waits, which would be a traceback until there is somebody who catches it

   An interpreter of the version it was built for stands beside it in a virtual environment, else in PATH; the packages
   stand in the site-packages beside that directory, or where an editable installation points. A copy that `pyvmm link`
   makes elsewhere has both at its end: "interpreter\0path\0", their length as 8 hexadecimal digits, and MAGIC.

   Whatever is not plain (a command line with a mistake, a socket's path that is taken) is left to Python, which
   does the same slowly, with the messages. Nothing is written but the socket. */
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

#define API_VERSION "1.12.1"
#define MAGIC "pyvmm-link-1"
#define DEFAULT_SOCKET "/run/firecracker.socket"

enum { BACKLOG = 128, ROOM = 4096, STATUS_HOST = 1 };

/* Of vmm/commands/serve.py's OPTIONS, which a test compares. */
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

/* The directory of packages that `directory` has or, by an editable installation, names; with what else is there. */
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

/* What `pyvmm link` wrote at the end of this file. */
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

static bool among(const char *const *words, size_t count, const char *word, size_t length)
{
    for (size_t i = 0; i < count; i++)
        if (strlen(words[i]) == length && !memcmp(words[i], word, length)) return true;
    return false;
}

/* Where a plain command line of `serve` wants its socket; NULL: nowhere, or it is not plain. */
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

/* A socket that listens at `name`, as vmm/api/listen.py makes it; -1: Python shall try, and say what is wrong. */
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
    /* Whoever sees the file can connect: it gets its name when it listens. A link does not replace what came there. */
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
    /* The next thing opened would become what is missing of them: a guest's memory as our terminal. */
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
