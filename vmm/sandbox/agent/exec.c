// SPDX-License-Identifier: Apache-2.0
// Verb "run", a command: arg (an array), env (an array of NAME=VALUE), cwd, user, tty (ROWSxCOLUMNS), limit (an array of
// NUMBER:SOFT:HARD), keep (continue when the host disconnects), nostdin, quiet (no F_STARTED). Replies:
// F_STARTED, output, F_EXIT; or F_FAILED. Without nostdin the host sends F_STDIN of length 0 before the next request.
#include "agent.h"
#include "libc.h"
#include <linux/prctl.h>
#include <sys/signalfd.h>
#include <termios.h>

enum { WORDS = PARAMETERS_MAX + 16 };

static char *arguments[WORDS + 1], *environment[WORDS + 1];
static char scratch[5][512];
static struct identity user;
static char input[FRAME_MAX], output[FRAME_MAX];
static size_t pending, taken; // bytes of `input` still to write, and bytes already written
static int all_read; // the host has sent the end of its input

struct command {
    pid_t pid;
    int in, out, err; // -1: closed; with a terminal `in` and `out` are its one descriptor
    int terminal;
};

static void add(char **list, int *count, const char *word)
{
    if (*count < WORDS)
        list[(*count)++] = (char *)word;
    list[*count] = NULL;
}

static int has(char **list, const char *pair)
{
    size_t length = (size_t)(strchr(pair, '=') + 1 - pair);
    for (; *list; list++)
        if (!strncmp(*list, pair, length))
            return 1;
    return 0;
}

static void make_environment(const struct request *request, int terminal)
{
    static const char *const names[] = {"PATH=", "HOME=", "USER=", "LOGNAME=", "TERM="};
    const char *const values[] = {
        "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", user.home, user.name, user.name,
        "xterm-256color",
    };
    int count = 0;
    environment[0] = NULL;
    const char *variable;
    for (int i = 0; (variable = next_value(request, "env", &i));)
        if (strchr(variable, '='))
            add(environment, &count, variable);
    for (int i = 0; i < 4 + !!terminal; i++) {
        join(scratch[i], sizeof scratch[i], names[i], values[i], NULL);
        if (!has(environment, scratch[i]))
            add(environment, &count, scratch[i]);
    }
}

static int limit(const char *text)
{
    char copy[64];
    join(copy, sizeof copy, text, NULL);
    char *soft = strchr(copy, ':'), *hard = soft ? strchr(soft + 1, ':') : NULL;
    if (!hard)
        return 0;
    *soft++ = *hard++ = 0;
    uint64_t limits[2] = {(uint64_t)number(soft, -1), (uint64_t)number(hard, -1)}; // -1: no limit
    return (int)CALL(prlimit64, 0, number(copy, 0), limits, NULL);
}

// The child's parameters and its error. The child shares its parent's memory.
static struct {
    const struct request *request;
    int ends[3], terminal, error;
    long parent;
    const char *what;
} child;

static void fail(const char *what)
{
    child.error = errno;
    child.what = what;
    _exit(127);
}

static void become(void)
{
    const struct request *request = child.request;
    CALL(setsid);
    for (int i = 0; i < 3; i++)
        CALL(dup2, child.ends[i], i);
    if (child.terminal)
        CALL(ioctl, 0, TIOCSCTTY, 0);
    spit("/proc/self/oom_score_adj", "0"); // the agent has -999, so that its commands are killed first
    const char *text;
    for (int i = 0; (text = next_value(request, "limit", &i));)
        if (limit(text))
            fail("limits");
    const char *cwd = value(request, "cwd");
    if ((user.uid || user.gid || user.groups > 1) &&
        (CALL(setgroups, user.groups, user.group) || CALL(setresgid, user.gid, user.gid, user.gid) ||
            CALL(setresuid, user.uid, user.uid, user.uid)))
        fail("user");
    // End with this connection's process, also if that is killed. Changing the user would undo this.
    if (!value(request, "keep") && (CALL(prctl, PR_SET_PDEATHSIG, SIGKILL), CALL(getppid) != child.parent))
        _exit(127);
    // Change directory as the user, so that one without permission is refused. Default: the home directory, if it
    // exists.
    if (cwd ? CALL(chdir, cwd) : CALL(chdir, user.home) && CALL(chdir, "/"))
        fail(cwd ? pair(request, "cwd") : "/"); // so that it is not taken for the program
    uint64_t none = 0;
    CALL(rt_sigprocmask, SIG_SETMASK, &none, NULL, sizeof none);
    execute(arguments, environment);
    fail(arguments[0]);
}

static int open_terminal(const char *size, int *other)
{
    struct winsize window = {0};
    int unlock = 0, fd = open_file(AT_FDCWD, "/dev/ptmx", O_RDWR, 0);
    if (fd < 0)
        return -1;
    window.ws_row = (unsigned short)digits(&size);
    window.ws_col = (unsigned short)number(size + (*size == 'x'), 80);
    CALL(ioctl, fd, TIOCSPTLCK, &unlock);
    CALL(ioctl, fd, TIOCSWINSZ, &window);
    *other = (int)CALL(ioctl, fd, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC);
    CALL(fchown, *other, user.uid, -1);
    return *other < 0 ? -1 : fd;
}

static int begin_pipes(int without_input, struct command *command)
{
    static int nothing = -1;
    int in[2] = {-1, -1}, out[2] = {-1, -1}, err[2] = {-1, -1};
    if (without_input && nothing < 0)
        nothing = open_file(AT_FDCWD, "/dev/null", O_RDONLY, 0);
    if ((!without_input && CALL(pipe2, in, O_CLOEXEC)) || CALL(pipe2, out, O_CLOEXEC) || CALL(pipe2, err, O_CLOEXEC)) {
        for (int i = 0; i < 2; i++)
            close(in[i]), close(out[i]);
        return -1;
    }
    command->in = in[1], command->out = out[0], command->err = err[0];
    child.ends[0] = without_input ? nothing : in[0], child.ends[1] = out[1], child.ends[2] = err[1];
    if (!without_input)
        CALL(fcntl, command->in, F_SETFL, O_NONBLOCK);
    return 0;
}

// Returns 0 if the command was started; otherwise F_FAILED was sent.
static int begin(const struct request *request, struct command *command)
{
    const char *size = value(request, "tty");
    int without_input = value(request, "nostdin") != NULL, other = -1;
    child.request = request;
    child.terminal = command->terminal = size != NULL;
    child.error = 0;
    child.parent = CALL(getpid);
    if (size) {
        command->in = command->out = open_terminal(size, &other);
        child.ends[0] = child.ends[1] = child.ends[2] = other;
        if (command->in >= 0)
            CALL(fcntl, command->in, F_SETFL, O_NONBLOCK);
    }
    if (size ? command->in < 0 : begin_pipes(without_input, command)) {
        send_failed(errno, size ? "terminal" : "pipe");
        return -1;
    }
    command->pid = (pid_t)spawn(become, commands);
    int error = command->pid < 0 ? errno : child.error;
    if (size || !without_input)
        close(child.ends[0]);
    if (!size)
        close(child.ends[1]), close(child.ends[2]);
    if (!error)
        return 0;
    send_failed(error, command->pid > 0 ? child.what : "fork");
    if (command->pid > 0)
        CALL(wait4, command->pid, NULL, 0, NULL);
    close(command->in);
    if (!size)
        close(command->out), close(command->err);
    return -1;
}

// Read and discard the rest of the host's input. With a terminal it ends only with the connection.
static void skip_input(int terminal)
{
    owned = keep = 0;
    while (!all_read) {
        char type;
        size_t length = read_frame(&type, input);
        all_read = type == F_STDIN && !length && !terminal;
    }
}

// Handle one frame from the host.
static void from_host(struct command *command)
{
    char type;
    size_t length = read_frame(&type, input);
    uint16_t size[2];
    if (type == F_WINDOW && length == sizeof size && command->terminal) {
        memcpy(size, input, sizeof size);
        struct winsize window = {.ws_row = size[0], .ws_col = size[1]};
        CALL(ioctl, command->out, TIOCSWINSZ, &window);
    } else if (type == F_STDIN && length) {
        taken = 0;
        pending = command->in < 0 ? 0 : length;
    } else if (type == F_STDIN && command->terminal) {
        input[0] = 4; // the character of Ctrl-D: end of input
        taken = 0, pending = 1;
    } else if (type == F_STDIN) {
        all_read = 1;
        if (command->in >= 0)
            close(command->in);
        command->in = -1;
    }
}

static void to_command(struct command *command)
{
    ssize_t done = write(command->in, input + taken, pending);
    if (done < 0 && errno == EAGAIN)
        return;
    if (done < 0 && !command->terminal) { // the command has closed its input
        close(command->in);
        command->in = -1;
    }
    if (done < 0)
        done = (ssize_t)pending;
    taken += (size_t)done, pending -= (size_t)done;
}

// Send up to `most` bytes of the command's output. Returns their number, or 0 at the end. `events` are from poll.
static size_t from_command(int *fd, short events, char type, size_t most)
{
    ssize_t done = !(events & POLLIN) ? 0 : read(*fd, output, most < FRAME_MAX ? most : FRAME_MAX);
    if (done > 0) {
        send_frame(type, NULL, 0, output, (size_t)done);
        return (size_t)done;
    }
    close(*fd);
    *fd = -1;
    return 0;
}

// Send the output that is in the pipe or terminal when the command has ended. Processes that still hold it may write
// more; that is not read.
static void drain(int *fd, char type, int terminal)
{
    // FIONREAD counts 4 KiB at most of the 12 KiB that a terminal may hold.
    for (int i = 0; terminal && i < 4 && *fd >= 0; i++)
        from_command(fd, POLLIN, type, FRAME_MAX);
    int left = 0;
    if (*fd < 0 || CALL(ioctl, *fd, FIONREAD, &left))
        return;
    for (size_t done; left > 0 && *fd >= 0; left -= (int)done)
        if (!(done = from_command(fd, POLLIN, type, (size_t)left)))
            return;
}

static long out_of_memory(void)
{
    static char text[16384];
    static int fd = -1;
    if (fd < 0)
        fd = open_file(AT_FDCWD, "/proc/vmstat", O_RDONLY, 0);
    ssize_t length = CALL(pread64, fd, text, sizeof text - 1, 0);
    text[length > 0 ? length : 0] = 0;
    return field(text, "oom_kill ", 0);
}

void run(const struct request *request)
{
    struct command command = {.in = -1, .out = -1, .err = -1};
    const char *who = value(request, "user");
    static int signals = -1;
    int count = 0, status = 0;
    all_read = value(request, "nostdin") != NULL;
    long before = out_of_memory();
    if (before)
        keep_free(free_memory() > 8 * RESERVE);
    CALL(chdir, "/");
    const char *argument;
    for (int i = 0; (argument = next_value(request, "arg", &i));)
        add(arguments, &count, argument);
    if (!count || find_user(who ? who : "0", &user)) {
        send_failed(EINVAL, count ? "user" : "command");
        skip_input(0);
        return;
    }
    make_environment(request, value(request, "tty") != NULL);
    uint64_t chosen = 1ul << (SIGCHLD - 1);
    if (signals < 0)
        signals = (int)CALL(signalfd4, -1, &chosen, sizeof chosen, SFD_CLOEXEC | SFD_NONBLOCK);
    if (begin(request, &command)) {
        skip_input(command.terminal);
        return;
    }
    owned = command.pid, keep = value(request, "keep") != NULL;
    pending = taken = 0;
    uint32_t pid = (uint32_t)command.pid;
    if (!value(request, "quiet"))
        send_frame(F_STARTED, &pid, sizeof pid, NULL, 0);
    for (;;) {
        short more = (short)(command.in >= 0 && pending ? POLLOUT : 0);
        struct pollfd fds[5] = {
            {gone || (keep && pending) ? -1 : host, (short)(pending ? POLLRDHUP : POLLIN | POLLRDHUP), 0},
            {signals, POLLIN, 0},
            {command.out, (short)(POLLIN | (command.terminal ? more : 0)), 0},
            {command.err, POLLIN, 0},
            {command.terminal || !more ? -1 : command.in, more, 0},
        };
        flush();
        wait_for(fds, 5, has_read_ahead() && !pending ? 0 : -1);
        if (fds[0].revents & (POLLRDHUP | POLLHUP | POLLERR) && !keep)
            host_gone();
        else if ((fds[0].revents || has_read_ahead()) && !pending) // what came before the end is input of the command
            from_host(&command);
        if (fds[2].revents & POLLOUT || fds[4].revents)
            to_command(&command);
        if (fds[2].revents & (POLLIN | POLLHUP) && !from_command(&command.out, fds[2].revents, F_STDOUT, FRAME_MAX) &&
            command.terminal)
            command.in = -1;
        if (fds[3].revents)
            from_command(&command.err, fds[3].revents, F_STDERR, FRAME_MAX);
        if (fds[1].revents) {
            struct signalfd_siginfo info;
            read(signals, &info, sizeof info);
            if (CALL(wait4, command.pid, &status, WNOHANG, NULL) == command.pid)
                break;
        }
    }
    int killed = WIFSIGNALED(status) ? WTERMSIG(status) == SIGKILL : WEXITSTATUS(status) == 128 + SIGKILL;
    if (killed)
        keep_free(0);
    int memory = killed && out_of_memory() != before;
    if (killed && !memory && !before)
        keep_free(1);
    drain(&command.out, F_STDOUT, command.terminal);
    drain(&command.err, F_STDERR, 0);
    int signalled = WIFSIGNALED(status), code = signalled ? WTERMSIG(status) : WEXITSTATUS(status);
    uint8_t end[] = {(uint8_t)signalled, (uint8_t)code, (uint8_t)memory};
    send_frame(F_EXIT, end, sizeof end, NULL, 0);
    if (gone)
        _exit(0);
    if (!command.terminal)
        close(command.in);
    close(command.out);
    close(command.err);
    skip_input(command.terminal);
}
