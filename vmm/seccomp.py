# SPDX-License-Identifier: Apache-2.0
"""What each thread may ask of the host: one seccomp filter a kind of thread, an allowlist, built by libseccomp.

Every thread that ``vmm.threads.spawn`` starts puts on the filter of its kind before it does anything. ``guard`` sees to
that, and leaves the threads alone that are there already. ``enable`` does more, for ``pyvmm serve``: it puts the filter
``base`` on the whole process first.

Filters only ever take away, and a new thread inherits its maker's. So a thread behind a filter, as the vCPU that brings
a driver up, makes none: ``fc_spawn`` does, whose filter has all that any kind has, or which has none in a program that
embeds us.

A system call that is not allowed ends the process with status 148 and one line on stderr that names it.
Source: Linux seccomp(2), Documentation/userspace-api/seccomp_filter.rst; ioctl numbers of linux/kvm.h, if_tun.h, fs.h.
"""

from __future__ import annotations

import errno
import os
import threading
from _queue import SimpleQueue  # `queue` itself imports more, on the path of a launch

from vmm import _seccomp, logger, threads
from vmm.errors import HostError
from vmm.signals import deaf

TYPE_CHECKING = False
if TYPE_CHECKING:
    Test = tuple[int, int, int]  # argument, mask, value
    Rule = tuple[str, tuple[Test, ...]]

STATUS_BAD_SYSCALL = 148
# A ring for each queue of the disks that a machine may have; further ones do without io_uring.
RINGS = 19

_LOW = 0xFFFF_FFFF  # an int argument: the kernel does not look at the rest of the register
_PROT_EXEC = 4
_AF_UNIX = 1
_AT_EMPTY_PATH = 0x1000
_CLONE_FS = 0x200
# What glibc's pthread_create asks for: a thread of this process and nothing else.
_CLONE_THREAD_FLAGS = 0x3D_0F00
# Its flags are behind a pointer, where no filter looks; without it glibc takes clone.
_ABSENT = ("clone3",)
_PR_SET_NAME, _PR_SET_NO_NEW_PRIVS = 15, 38
_SECCOMP_SET_MODE_FILTER = 1
_FCNTL = (1, 2, 3, 4, 1030)  # F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC
_LOCKS = (5, 36, 37)  # F_GETLK, F_OFD_GETLK, F_OFD_SETLK
_KVM_RUN, _KVM_GET_REGS, _KVM_GET_SREGS = 0xAE80, 0x8090_AE81, 0x8138_AE83
_PIT = (0x4040_AE77, 0x4070_AEA0)  # KVM_CREATE_PIT2, KVM_SET_PIT2: a guest's timer is made when it uses it
_TUN = (0x4004_54D0, 0x4004_54D9)  # TUNSETOFFLOAD, TUNSETQUEUE
_TUN_OPEN = (0x4004_54CA, 0x8004_54D2, 0x4004_54D8)  # TUNSETIFF, TUNGETIFF, TUNSETVNETHDRSZ
_SIOCGIFINDEX = 0x8933
_PAGEMAP_SCAN = 0xC060_6610
# As they are in vmm._kvm_state and vmm._uffd, whose import would cost a launch more than the filters.
_KVM_READS = (
    0xAE03, 0xC004_AE02, 0xC008_AE88, 0xC008_AE91, 0x8004_AE98, 0x8090_AE81, 0x8138_AE83, 0x8140_AECC, 0x9000_AEA4,
    0x9000_AECF, 0x8188_AEA6, 0x8080_AEA1, 0x8400_AE8E, 0x8040_AE9F, 0x8070_AE9F, 0xC208_AE62, 0x8030_AE7C, 0xAEA3,
)  # fmt: skip
_UFFD = (0xAA00, 0xC018_AA3F, 0xC020_AA00)
_KICK = 34  # SIGRTMIN as glibc has it
# TCGETS, TCSETS, TCSETSW, TCSETSF, TIOCGWINSZ, TIOCGPGRP; and what glibc 2.42 has for the first four, of termios2.
_TERMINAL = (0x5401, 0x5402, 0x5403, 0x5404, 0x5413, 0x540F, 0x802C_542A, 0x402C_542B, 0x402C_542C, 0x402C_542D)
_IS_TERMINAL = (0x5401, 0x802C_542A)
_DESCRIPTOR = (0x5421, 0x5451)  # FIONBIO, FIOCLEX
# BLKROGET, BLKSSZGET, BLKIOMIN, BLKIOOPT, BLKPBSZGET, BLKGETSIZE64
_BLOCK_ASK = (0x125E, 0x1268, 0x1278, 0x1279, 0x127B, 0x8008_1272)
_BLOCK_CHANGE = (0x1277, 0x127F)  # BLKDISCARD, BLKZEROOUT


def _allow(names: str) -> tuple[Rule, ...]:
    return tuple((name, ()) for name in names.split())


def _ints(name: str, argument: int, *values: int) -> tuple[Rule, ...]:
    return tuple((name, ((argument, _LOW, value & _LOW),)) for value in values)


def _ioctl(*requests: int) -> tuple[Rule, ...]:
    return _ints("ioctl", 1, *requests)


# What a snapshot takes: the machine's state is read, its memory mapped anew, and both written to files.
_SNAPSHOT = (
    *_allow("memfd_create pwrite64 fsync rename fsetxattr fremovexattr"),
    *_ioctl(*_KVM_READS, *_PIT, _PAGEMAP_SCAN),
)
# What the interpreter, the allocator, locks and the end of a thread take. tgkill is to this process only: see _rules.
_COMMON = (
    *_allow(
        "read write writev close futex munmap mremap madvise brk rt_sigprocmask rt_sigreturn getpid gettid sched_yield"
        " clock_gettime clock_nanosleep nanosleep gettimeofday exit exit_group getrandom restart_syscall poll lseek"
        " fstat rseq set_robust_list"
    ),
    ("mmap", ((2, _PROT_EXEC, 0),)),
    ("mprotect", ((2, _PROT_EXEC, 0),)),
    ("newfstatat", ((3, _AT_EMPTY_PATH, _AT_EMPTY_PATH),)),
    *_ints("prctl", 0, _PR_SET_NAME),
    *_ints("fcntl", 1, *_FCNTL),
    *_ioctl(*_IS_TERMINAL),  # a message asks whether stderr is one
)
_EVENTS = _allow("epoll_wait epoll_pwait epoll_ctl timerfd_settime")
_STREAM = _allow("readv sendmsg recvmsg recvfrom sendto")
_SOCKETS = (
    *_ints("socket", 0, _AF_UNIX),
    *_allow("accept4 connect shutdown getsockopt setsockopt getsockname"),
)
_FILES = (
    *_allow("openat newfstatat readlink unlink getcwd pread64 preadv preadv2 ftruncate fallocate dup3 access"),
    *_ints("fcntl", 1, *_LOCKS),
)
_ENDING = _allow("unlink newfstatat timerfd_settime epoll_ctl")  # what closing a machine takes
_SHARE = (
    *_allow(
        "openat statx newfstatat fstatfs preadv preadv2 pwritev pwritev2 fsync fdatasync syncfs ftruncate truncate"
        " fallocate getdents64 readlinkat mkdirat mknodat symlinkat linkat unlinkat renameat renameat2 fchmod fchmodat"
        " fchownat utimensat getxattr listxattr setxattr removexattr copy_file_range dup umask fchdir"
        # On an overlayfs, to tell inodes of one number apart.
        " inotify_init1 inotify_add_watch inotify_rm_watch"
        # A share of root's acts as the guest's users: on credentials of this thread alone.
        " geteuid capget capset setgroups setresuid setresgid"
    ),
    *_ints("unshare", 0, _CLONE_FS),
    *_ints("fcntl", 1, *_LOCKS),
)

# By kind of thread, what it has beside _COMMON.
KINDS: dict[str, tuple[Rule, ...]] = {
    # The main thread, once the machine runs; it ends it.
    "vmm": (*_ENDING, *_allow("openat rt_sigaction pipe2 getpgrp"), *_ioctl(*_TERMINAL)),
    # The API, once the machine runs: PATCHes open files, and it may be this thread that ends the machine.
    "api": (
        *_ENDING, *_EVENTS, *_STREAM, *_SOCKETS, *_FILES, *_SNAPSHOT, *_allow("getpgrp"),
        *_ioctl(*_TERMINAL, *_DESCRIPTOR, *_BLOCK_ASK),
    ),
    # It activates and resets devices, too, and says why a guest ended.
    "vcpu": (
        *_EVENTS, *_ints("rt_sigaction", 0, _KICK), *_ioctl(_KVM_RUN, _KVM_GET_REGS, _KVM_GET_SREGS, *_PIT, *_TUN),
    ),
    "blk": (
        *_EVENTS, *_allow("preadv preadv2 pread64 pwritev pwritev2 pwrite64 fsync fdatasync fallocate"),
        *_ioctl(*_BLOCK_CHANGE),
    ),
    "net": (*_EVENTS, *_allow("readv recvmsg sendmsg"), *_ioctl(*_TUN)),
    "vsock": (*_EVENTS, *_STREAM, *_SOCKETS),
    "fs": (*_EVENTS, *_SHARE),
    # Devices in Python: random numbers, balloon, console.
    "device": (*_EVENTS, *_allow("fallocate")),
    "metrics": _allow("select poll"),
    "undertaker": (),
    "console": (*_ioctl(*_TERMINAL), *_allow("select pselect6 ppoll")),
}  # fmt: skip
# Its rings were made and restricted before there was any filter.
KINDS["blk-uring"] = (*KINDS["blk"], *_allow("io_uring_enter"))
# Whose descriptors are open already. By Landlock, too, where the kernel has it, they open, make and remove no file.
FILELESS = ("vcpu", "blk", "blk-uring", "net", "vsock", "device", "metrics", "undertaker", "console")
# What makes threads, and lets them put their filters on.
_SPAWN = (
    *_ints("clone", 0, _CLONE_THREAD_FLAGS),
    *_ints("seccomp", 0, _SECCOMP_SET_MODE_FILTER),
    *_ints("prctl", 0, _PR_SET_NO_NEW_PRIVS),
    *_allow("landlock_create_ruleset landlock_add_rule landlock_restrict_self"),
)
# While the machine is put together, before the guest's first instruction.
_BUILD = (
    *_FILES, *_SOCKETS, *_STREAM,
    *_allow(
        "memfd_create eventfd2 timerfd_create epoll_create1 pipe2 getdents64 readlinkat access faccessat2 stat lstat"
        " getuid geteuid getgid getegid uname sysinfo rt_sigaction sigaltstack bind listen statfs fstatfs fadvise64"
        " unlinkat rename sched_getaffinity getrusage mincore mlock mkdir umask chmod times statx dup dup2 select"
        " getpgrp fgetxattr"
    ),
    *_allow("mmap mprotect"),  # executable, too: extension modules of devices are imported when they are needed
    *_ints("prlimit64", 0, 0),
    ("ioctl", ((1, 0xFF00, 0xAE00),)),  # all of KVM's
    *_ioctl(*_TUN_OPEN, *_BLOCK_ASK, *_DESCRIPTOR, *_TERMINAL, _SIOCGIFINDEX, *_UFFD),
)  # fmt: skip


def _rules(kind: str) -> list[Rule]:
    # Without doubles, and without tests of arguments where all are allowed.
    union = [rule for rules in KINDS.values() for rule in rules]
    own = {"spawn": (*union, *_SPAWN), "base": (*union, *_SPAWN, *_BUILD)}.get(kind) or KINDS[kind]
    rules = dict.fromkeys((*_COMMON, *own, *_ints("tgkill", 0, os.getpid())))
    whole = {name for name, tests in rules if not tests}
    return [rule for rule in rules if not rule[1] or rule[0] not in whole]


class Filters:
    """The filters of this process; ``vmm.threads`` calls ``start`` and ``install``.

    :param alone: no code but ours runs in this process: ``fc_spawn`` has a filter, too
    :param whole: there is one on every thread of the process already
    """

    def __init__(self, *, alone: bool, whole: bool = False) -> None:
        self.alone = alone
        self._whole = whole
        self._code: dict[str, bytes] = {}
        self._maker = 0  # the process that has fc_spawn: a forked child has none of its parent's threads
        self._making = threading.Lock()
        self._wanted: SimpleQueue[tuple[threading.Thread, SimpleQueue[BaseException | None]]] = SimpleQueue()

    def compile(self, kind: str) -> bytes:
        """The filter of `kind`, compiled once.

        :raises HostError: libseccomp failed
        """
        code = self._code.get(kind)
        if code is None:
            try:
                code = self._code[kind] = _seccomp.compile_filter(_rules(kind), _ABSENT)
            except OSError as error:
                raise HostError(error.errno or 0, f"compile the seccomp filter of {kind}") from None
        return code

    def install(self, kind: str, below: tuple[int, bool] | None = None) -> None:
        """Put the filter of `kind` over what the calling thread has; it stays.

        :param below: as of ``vmm.threads.spawn``
        :raises HostError: the kernel or libseccomp refused it
        """
        code = self.compile(kind)
        try:
            if kind in KINDS:  # what makes threads would hand it down
                _seccomp.confine(kind in FILELESS or below is not None, *(below or ()))
            _seccomp.install(code, kind)
        except OSError as error:
            raise HostError(error.errno or 0, f"confine a thread of kind {kind}") from None

    def enforce(self) -> None:
        """Put ``base`` on every thread there is, and begin to make threads.

        :raises HostError: the kernel or libseccomp refused
        """
        for kind in (*KINDS, "spawn"):
            self.compile(kind)  # behind a filter that could not be done
        code = self.compile("base")
        try:
            _seccomp.install(code, "base", whole_process=True)
        except OSError as error:
            raise HostError(error.errno or 0, "install seccomp filters") from None
        self._have_maker()

    def confines(self) -> bool:
        """Whether the calling thread has a filter."""
        return self._whole or _seccomp.is_confined()

    def start(self, thread: threading.Thread) -> None:
        """Start `thread`, from whatever thread.

        :raises RuntimeError: no thread to be had
        """
        if not self.confines():
            self._have_maker()
            thread.start()
            return
        done: SimpleQueue[BaseException | None] = SimpleQueue()
        self._wanted.put((thread, done))
        if (problem := done.get()) is not None:
            raise problem

    def _have_maker(self) -> None:
        with self._making:
            if self._maker == os.getpid():
                return
            self._code.clear()  # the process's number is in them, where they were made before a fork
            self._wanted = SimpleQueue()
            try:
                threading.Thread(target=self._make_threads, name="fc_spawn", daemon=True).start()
            except RuntimeError:
                raise HostError(errno.EAGAIN, "start a thread") from None
            self._maker = os.getpid()

    def _make_threads(self) -> None:
        deaf()  # threads inherit this
        if self.alone:
            self.install("spawn")
        while True:
            thread, done = self._wanted.get()
            try:
                thread.start()
                done.put(None)
            except RuntimeError as error:
                done.put(error)
            del thread, done


def _ready(*, alone: bool) -> None:
    # What has to be so before there is a filter; in the main thread.
    import time

    try:
        _seccomp.catch_faults(alone)
    except OSError as error:
        raise HostError(error.errno or 0, "use seccomp filters; --no-seccomp, or seccomp=False, goes without") from None
    logger.watch(_seccomp.log_to)
    # The C library reads files for these, once.
    time.localtime()
    os.strerror(errno.EPERM)


def guard(*, alone: bool) -> None:
    """Let every thread that ``vmm.threads`` starts from here on have its filter; idempotent.

    :param alone: no code but ours runs in this process
    :raises HostError: the kernel has no seccomp filters
    """
    if threads.guard is None:
        _ready(alone=alone)
        threads.set_guard(Filters(alone=alone))


def enable() -> None:
    """Put the filters in force, for this whole process and for good; idempotent.

    Before a machine is made, in the main thread. From here on this process can start no other program.

    :raises HostError: the kernel or libseccomp refuses
    """
    if isinstance(threads.guard, Filters):
        return
    from vmm import _uring
    from vmm.preload import preload_later

    try:
        filters = Filters(alone=True, whole=True)
        _uring.stock(RINGS)
        _ready(alone=True)
        filters.enforce()
    except HostError as error:
        threads.set_guard(error)
        raise
    preload_later()
    threads.no_programs = threads.no_programs or "and seccomp, which is on, forbids that"
    threads.set_guard(filters)
