# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""Install seccomp filters on threads, report a thread that breaks its filter, and restrict threads by Landlock.

``setup.py`` compiles the filters from ``vmm/jail/rules.py``. Source: Linux seccomp(2), landlock(7).
"""
import gc
import os

from libc.errno cimport errno

cdef extern from *:
    """
    #include <errno.h>
    #include <linux/seccomp.h>
    #include <malloc.h>
    #include <pthread.h>
    #include <signal.h>
    #include <stdlib.h>
    #include <string.h>
    #include <sys/prctl.h>
    #include <sys/syscall.h>
    #include <ucontext.h>
    #include <unistd.h>
    #include "_seccomp_filters.h"

    enum { FILTERS = sizeof filters / sizeof *filters, MOST = 1024, STATUS_BAD_SYSCALL = 148 /* Firecracker's */ };
    static __thread char thread_kind[KIND];
    static volatile int trap_log = -1;

    static size_t put(char *line, size_t at, const char *text) {
        while (*text && at < 220) line[at++] = *text++;
        return at;
    }
    static size_t put_number(char *line, size_t at, unsigned long value, unsigned base) {
        char digits[24];
        size_t n = sizeof(digits);
        digits[--n] = 0;
        do digits[--n] = "0123456789abcdef"[value % base]; while (value /= base);
        return put(line, at, digits + n);
    }
    /* Runs on the thread that broke its filter, at any point of its work: only async-signal-safe calls. */
    static void on_sigsys(int number, siginfo_t *info, void *context) {
        static const int registers[] = { REG_RDI, REG_RSI, REG_RDX };
        char line[256];
        size_t at = 0;
        unsigned call = (unsigned)info->si_syscall;
        (void)number;
        at = put(line, at, "pyvmm: seccomp: a thread of kind ");
        at = put(line, at, thread_kind[0] ? thread_kind : "base");
        at = put(line, at, " made the forbidden system call ");
        at = put(line, at, call < SYSCALLS && syscall_names[call][0] ? syscall_names[call] : "number");
        at = put(line, at, " (");
        at = put_number(line, at, call, 10);
        at = put(line, at, "), arguments");
        for (int i = 0; i < 3; i++) {
            at = put(line, at, i ? ", 0x" : " 0x");
            at = put_number(line, at, ((ucontext_t *)context)->uc_mcontext.gregs[registers[i]], 16);
        }
        at = put(line, at, "\\n");
        if (write(2, line, at) < 0) {}
        if (trap_log >= 0 && write(trap_log, line, at) < 0) {}
        _exit(STATUS_BAD_SYSCALL);
    }
    /* glibc's malloc opens files, which no filter allows: to count the CPUs when it makes the ninth arena, and to read
       the host's overcommit policy before it first shrinks a thread's arena. These settings avoid both. */
    static void calm_malloc(void) {
        mallopt(M_ARENA_MAX, 8);
        mallopt(M_TRIM_THRESHOLD, 1 << 30);
    }
    /* A program that embeds pyvmm keeps its malloc settings. Instead a thread without a filter makes malloc read both
       files now. An arena shrinks once its free top exceeds twice the largest block ever freed: nearly a whole arena.
       */
    static void *be_a_thread(void *unused) {
        enum { BLOCK = 100 << 10, BLOCKS = (60 << 20) / BLOCK };
        void *blocks[BLOCKS];
        int made = 0;
        while (made < BLOCKS && (blocks[made] = malloc(BLOCK))) made++;
        while (made) free(blocks[--made]);
        pthread_exit(unused);           /* loads libgcc now: a thread that ends at interpreter exit needs it */
    }
    static void prepare_malloc(void) {
        pthread_t thread;
        if (!getenv("MALLOC_ARENA_MAX") && !getenv("GLIBC_TUNABLES"))
            mallopt(M_ARENA_MAX, 8 * (int)sysconf(_SC_NPROCESSORS_ONLN));   /* malloc's own default */
        if (!pthread_create(&thread, NULL, be_a_thread, NULL)) pthread_join(thread, NULL);
    }
    static int can_trap(void) {
        unsigned action = SECCOMP_RET_TRAP;
        return (int)syscall(SYS_seccomp, SECCOMP_GET_ACTION_AVAIL, 0, &action);
    }
    static int trap_sigsys(void) {
        struct sigaction action;
        sigset_t mask;
        if (!sigaction(SIGSYS, NULL, &action) && action.sa_handler != SIG_DFL && action.sa_handler != SIG_IGN)
            return 0;                   /* the embedding program has a handler: keep it */
        memset(&action, 0, sizeof(action));
        action.sa_sigaction = on_sigsys;
        action.sa_flags = SA_SIGINFO;
        sigfillset(&action.sa_mask);
        if (sigaction(SIGSYS, &action, NULL)) return -1;
        sigemptyset(&mask);
        sigaddset(&mask, SIGSYS);
        return pthread_sigmask(SIG_UNBLOCK, &mask, NULL);
    }
    /* Landlock's numbers are literals (Linux include/uapi/linux/landlock.h): Debian 12's headers lack half of them. */
    static int landlock_abi(void) { return (int)syscall(444, NULL, (size_t)0, 1u); }
    static int landlock_confine(int no_files, int below, int changes) {
        static const unsigned long long FILES[] = { 0, 0x1fff, 0x3fff, 0x7fff, 0x7fff, 0xffff };
        /* Rights below a directory: read files and list directories; with `changes`, all but execute and ioctl. */
        enum { READS = 0xc, CHANGES = 0x7ffe };
        struct { unsigned long long files, net, scoped; } rules = { 0, 0, 0 };
        struct { unsigned long long allowed; int parent; } __attribute__((packed)) rule = { 0, below };
        int abi = landlock_abi(), fd, status;
        long errata;
        if (abi < 1) return 0;
        /* A ruleset with any file right also forbids renames to another directory. Version 2 can allow them again. */
        if (no_files && !(changes && abi < 2)) rules.files = FILES[abi < 5 ? abi : 5];
        if (abi >= 4) rules.net = 3;                            /* bind and connect of TCP */
        if (abi >= 6) rules.scoped = 1;                         /* abstract sockets */
        /* Scope signals only if erratum 2 is fixed: before, it blocked signals between threads of one process, too. */
        if (abi >= 6 && (errata = syscall(444, NULL, (size_t)0, 2u)) > 0 && errata & 2) rules.scoped |= 2;
        if (!rules.files && !rules.net) return 0;
        if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)) return -1;
        fd = (int)syscall(444, &rules, (size_t)(abi < 4 ? 8 : abi < 6 ? 16 : 24), 0u);
        if (fd < 0) return -1;
        rule.allowed = rules.files & (changes ? CHANGES : READS);
        status = below >= 0 && rule.allowed ? (int)syscall(445, fd, 1, &rule, 0u) : 0;
        if (!status) status = (int)syscall(446, fd, 0u);
        close(fd);
        return status;
    }
    /* The filter for `kind` with this process's id filled in. EINVAL: there is no such kind. */
    static int filter_install(const char *kind, int whole_process) {
        struct sock_filter code[MOST];
        struct sock_fprog program = { 0, code };
        unsigned long flags = whole_process ? SECCOMP_FILTER_FLAG_TSYNC : 0;
        for (int i = 0; i < FILTERS; i++)
            if (!strcmp(filters[i].kind, kind) && filters[i].count <= MOST) {
                program.len = filters[i].count;
                memcpy(code, filter_code + filters[i].start, program.len * sizeof *code);
            }
        for (int at = 0; at < program.len; at++)
            if (code[at].code == (BPF_JMP | BPF_JEQ | BPF_K) && code[at].k == PID) code[at].k = (unsigned)getpid();
        if (!program.len) {
            errno = EINVAL;
            return -1;
        }
        strcpy(thread_kind, kind);
        if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)) return -1;
        return (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &program);
    }
    """
    enum: FILTERS
    struct filter:
        char[16] kind
        bint thread
        bint fileless
    filter *filters
    char[16] thread_kind
    int trap_log
    int trap_sigsys() noexcept nogil
    int can_trap() noexcept nogil
    void calm_malloc() noexcept nogil
    void prepare_malloc() noexcept nogil
    int landlock_abi() noexcept nogil
    int landlock_confine(bint no_files, int below, bint changes) noexcept nogil
    long filter_install(const char *kind, bint whole_process) noexcept nogil


def kinds():
    """Every kind of thread, and whether it opens no files."""
    return {filters[i].kind.decode(): filters[i].fileless for i in range(FILTERS) if filters[i].thread}


def is_confined():
    """Whether the calling thread has installed a filter."""
    return thread_kind[0] != 0


def collect_elsewhere(phase, info):
    """A callback for ``gc.callbacks``: a collection that starts on a thread with a filter collects nothing.

    The thread that starts a collection runs the finalizers of all garbage, also of the embedding program. Those may
    open files or wait for children, which no filter allows. So all objects are frozen during the collection, and a
    later one on another thread collects them. Side effect: objects that the program itself had frozen are unfrozen.
    """
    if not thread_kind[0]:
        return
    # This is not Python code: no bytecode runs between here and the collection, so no other thread can create garbage.
    # A later callback in the list would allow that, so this one moves itself to the end.
    if gc.callbacks[len(gc.callbacks) - 1] is not collect_elsewhere:
        gc.callbacks.append(collect_elsewhere)
    if phase == "start":
        gc.freeze()
    else:
        gc.unfreeze()


def catch_faults(bint alone):
    """When a thread breaks its filter, write the system call's name to stderr and end the process with status 148.

    :param alone: whether only pyvmm runs in this process, so that malloc may be tuned for it
    :raises OSError: the kernel does not support seccomp filters
    """
    if can_trap():
        raise OSError(errno, os.strerror(errno))
    if alone:
        calm_malloc()
    else:
        prepare_malloc()
    if trap_sigsys():
        raise OSError(errno, os.strerror(errno))


def log_to(int fd):
    """Write a violation's line to `fd` as well as to stderr; borrowed; -1: only to stderr. For ``vmm.logger.watch``."""
    global trap_log
    trap_log = fd


def landlock():
    """The kernel's Landlock version; below 1: the kernel has no Landlock."""
    return landlock_abi()


def confine(bint no_files, int below=-1, bint changes=False):
    """Forbid the calling thread TCP connections and abstract sockets, as far as the kernel's Landlock supports it.

    :param no_files: also forbid opening, creating, changing and removing files
    :param below: a directory's descriptor: files below it may be read in spite of `no_files`; borrowed; -1: none
    :param changes: files in `below` may also be created, changed and removed. Before Linux 5.19 `no_files`
        then has no effect, because Landlock could not allow renames between directories
    :raises OSError: the kernel refused
    """
    if landlock_confine(no_files, below, changes):
        raise OSError(errno, f"Landlock: {os.strerror(errno)}")


def install(str kind, bint whole_process=False):
    """Install a filter on the calling thread, or on all threads. It is permanent; a further filter only forbids more.

    :param kind: a key of ``kinds``, or ``base`` or ``spawn``
    :raises OSError: the kernel refused, or the kind is unknown
    """
    cdef long status = filter_install(kind.encode(), whole_process)
    if status:
        raise OSError(errno, f"seccomp: {os.strerror(errno) if status < 0 else 'another thread has another filter'}")
