# SPDX-License-Identifier: Apache-2.0
"""The allowed system calls of each kind of thread. ``setup.py`` makes filters of them, so a start compiles none.

This module imports nothing of pyvmm, and nothing imports it at run time: ``vmm.jail._seccomp`` has the filters, and
``vmm.jail.seccomp`` puts them on. libseccomp compiles them.
Source: Linux seccomp(2), Documentation/userspace-api/seccomp_filter.rst; ioctl numbers of linux/kvm.h, if_tun.h, fs.h;
libseccomp's seccomp.h.
"""

from __future__ import annotations

import ctypes
import os

Test = tuple[int, int, int]  # argument, mask, value
Rule = tuple[str, tuple[Test, ...]]

# In the filters, in the place of the process's number, which is put in when a thread gets its filter.
PID = 0x7A5B_5A5A

_LOW = 0xFFFF_FFFF  # an int argument: the kernel does not look at the rest of the register
_PROT_EXEC = 4
_AF_UNIX, _AF_INET, _AF_INET6 = 1, 2, 10
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
_KVM_RUN, _KVM_GET_REGS, _KVM_GET_SREGS, _KVM_KVMCLOCK_CTRL = 0xAE80, 0x8090_AE81, 0x8138_AE83, 0xAEAD
_PIT = (0x4040_AE77, 0x4070_AEA0)  # KVM_CREATE_PIT2, KVM_SET_PIT2: a guest's timer is made when it uses it
_TUN = (0x4004_54D0, 0x4004_54D9)  # TUNSETOFFLOAD, TUNSETQUEUE
_TUN_OPEN = (0x4004_54CA, 0x8004_54D2, 0x4004_54D8)  # TUNSETIFF, TUNGETIFF, TUNSETVNETHDRSZ
_SIOCGIFINDEX = 0x8933
_PAGEMAP_SCAN = 0xC060_6610
_MARKS = 0o2004000 | 1  # O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY
# As they are in vmm.kvm._state, and in <linux/userfaultfd.h> for vmm._uffd.
_KVM_READS = (
    0xAE03, 0xC004_AE02, 0xC008_AE88, 0xC008_AE91, 0x8004_AE98, 0x8090_AE81, 0x8138_AE83, 0x8140_AECC, 0x9000_AEA4,
    0x9000_AECF, 0x8188_AEA6, 0x8080_AEA1, 0x8400_AE8E, 0x8040_AE9F, 0x8070_AE9F, 0xC208_AE62, 0x8030_AE7C, 0xAEA3,
)  # fmt: skip
_UFFD = (0xAA00, 0xC018_AA3F, 0xC020_AA00)
_RECORD = (0x8010_AA02, 0xC028_AA03, 0xC020_AA08)
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
    *_allow("memfd_create pwrite64 fsync fdatasync rename fgetxattr fsetxattr fremovexattr"),
    *_allow("getdents64 flock"),  # what a killed one has left is removed
    *_ioctl(*_KVM_READS, *_PIT, _PAGEMAP_SCAN, _UFFD[2]),
)
# What the interpreter, the allocator, locks and the end of a thread take. tgkill is to this process only: see _rules.
_COMMON = (
    *_allow(
        "read write writev close futex munmap mremap madvise brk rt_sigprocmask rt_sigreturn getpid gettid sched_yield"
        " clock_gettime clock_nanosleep nanosleep gettimeofday exit exit_group getrandom restart_syscall poll lseek"
        " fstat rseq set_robust_list"
        " getsockname getpeername"  # a socket of the embedding program whose last reference goes on this thread
        " pause"  # a daemon thread of CPython 3.14 that wants to go on while the interpreter ends
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
        *_EVENTS, *_ints("rt_sigaction", 0, _KICK),
        *_ioctl(_KVM_RUN, _KVM_GET_REGS, _KVM_GET_SREGS, _KVM_KVMCLOCK_CTRL, *_PIT, *_TUN),
    ),
    "blk": (
        *_EVENTS, *_allow("preadv preadv2 pread64 pwritev pwritev2 pwrite64 fsync fdatasync fallocate"),
        *_ioctl(*_BLOCK_CHANGE),
    ),
    # It says why passt has ended, which takes wait4.
    "net": (*_EVENTS, *_allow("readv recvmsg sendmsg wait4"), *_ioctl(*_TUN)),
    "vsock": (*_EVENTS, *_STREAM, *_SOCKETS),
    "fs": (*_EVENTS, *_SHARE),
    # Devices in Python: random numbers, balloon, console.
    "device": (*_EVENTS, *_allow("fallocate")),
    "metrics": _allow("select poll"),
    "undertaker": _allow("fsync"),
    "recorder": (*_allow("pread64"), *_ioctl(*_RECORD)),
    "console": (*_ioctl(*_TERMINAL), *_allow("select pselect6 ppoll")),
    "console-socket": (*_allow("accept4 sendto recvfrom"), *_ioctl(*_DESCRIPTOR)),
}  # fmt: skip
# Its rings were made and restricted before there was any filter.
KINDS["blk-uring"] = (*KINDS["blk"], *_allow("io_uring_enter"))
# It asks the host's nameservers for a guest. It is started where no filter is: passt, which it is for, could not be.
KINDS["resolver"] = (
    *_ints("socket", 0, _AF_INET, _AF_INET6),
    *_allow("connect getsockname sendto recvfrom"),
)
# Whose descriptors are open already. By Landlock, too, where the kernel has it, they open, make and remove no file.
FILELESS = tuple(
    "vcpu blk blk-uring net vsock device metrics undertaker recorder console console-socket resolver".split()
)
# What makes threads, and lets them put their filters on.
_SPAWN = (
    *_ints("clone", 0, _CLONE_THREAD_FLAGS),
    *_ints("seccomp", 0, _SECCOMP_SET_MODE_FILTER),
    *_ints("prctl", 0, _PR_SET_NO_NEW_PRIVS),
    *_allow("landlock_create_ruleset landlock_add_rule landlock_restrict_self"),
    *_allow("sched_getaffinity"),  # a new thread of CPython 3.14 asks glibc for its stack, and glibc asks for that
)
# While the machine is put together, before the guest's first instruction.
_BUILD = (
    *_FILES, *_SOCKETS, *_STREAM,
    *_allow(
        "memfd_create eventfd2 timerfd_create epoll_create1 pipe2 getdents64 readlinkat access faccessat2 stat lstat"
        " getuid geteuid getgid getegid uname sysinfo rt_sigaction sigaltstack bind listen statfs fstatfs fadvise64"
        " unlinkat link rename sched_getaffinity getrusage mincore mlock mkdir umask chmod times statx dup dup2 select"
        " getpgrp fgetxattr"
    ),
    *_allow("mmap mprotect"),  # executable, too: extension modules of devices are imported when they are needed
    *_ints("prlimit64", 0, 0),
    *_ints("userfaultfd", 0, _MARKS),
    ("ioctl", ((1, 0xFF00, 0xAE00),)),  # all of KVM's
    *_ioctl(*_TUN_OPEN, *_BLOCK_ASK, *_DESCRIPTOR, *_TERMINAL, _SIOCGIFINDEX, *_UFFD),
)  # fmt: skip


def rules_of(kind: str) -> list[Rule]:
    """All rules of a kind of thread, or of ``spawn`` and ``base``.

    There are no duplicates, and no tests of arguments where all arguments are allowed.
    """
    union = [rule for name, rules in KINDS.items() if name != "resolver" for rule in rules]
    own = {"spawn": (*union, *_SPAWN), "base": (*union, *_SPAWN, *_BUILD)}.get(kind) or KINDS[kind]
    rules = dict.fromkeys((*_COMMON, *own, *_ints("tgkill", 0, PID)))
    whole = {name for name, tests in rules if not tests}
    return [rule for rule in rules if not rule[1] or rule[0] not in whole]


class _Compare(ctypes.Structure):
    _fields_ = (
        ("argument", ctypes.c_uint), ("operator", ctypes.c_int), ("mask", ctypes.c_uint64), ("value", ctypes.c_uint64),
    )  # fmt: skip


_TRAP, _ALLOW, _NO_SUCH_CALL = 0x0003_0000, 0x7FFF_0000, 0x0005_0026
_OPTIMIZE, _BINARY_TREE = 8, 2  # of the system calls, in place of a list of them
_MASKED_EQUAL = 7
_X86_64 = 0xC000_003E


class Compiler:
    """libseccomp.

    :raises OSError: libseccomp is not installed
    """

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libseccomp.so.2")
        self._library.seccomp_init.restype = ctypes.c_void_p
        self._library.seccomp_syscall_resolve_num_arch.restype = ctypes.c_void_p

    def compile(self, rules: list[Rule]) -> bytes:
        """The BPF program that allows what `rules` say, and traps everything else.

        :raises OSError: libseccomp refused a rule
        :raises ValueError: an unknown system call
        """
        library, context = self._library, ctypes.c_void_p(self._library.seccomp_init(_TRAP))
        if not context:
            raise MemoryError
        try:
            self._check(library.seccomp_attr_set(context, _OPTIMIZE, _BINARY_TREE), "optimize")
            for name in _ABSENT:
                self._check(library.seccomp_rule_add_array(context, _NO_SUCH_CALL, self._number(name), 0, None), name)
            for name, tests in rules:
                compare = [_Compare(which, _MASKED_EQUAL, mask, value) for which, mask, value in tests]
                array = (_Compare * len(tests))(*compare)
                status = library.seccomp_rule_add_array(context, _ALLOW, self._number(name), len(tests), array)
                self._check(status, name)
            # A pipe, which holds 8,192 instructions; the kernel takes 4,096.
            out, into = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                self._check(library.seccomp_export_bpf(context, into), "export")
                return os.read(out, 1 << 16)
            finally:
                os.close(out)
                os.close(into)
        finally:
            library.seccomp_release(context)

    def _number(self, name: str) -> int:
        number: int = self._library.seccomp_syscall_resolve_name(name.encode())
        if number == -1:
            raise ValueError(f"no system call {name}")
        return number

    def _check(self, status: int, what: str) -> None:
        if status < 0:
            raise OSError(-status, f"libseccomp: {what}: {os.strerror(-status)}")

    def name(self, number: int) -> str:
        """The name of the system call `number`; empty if it does not exist."""
        found = self._library.seccomp_syscall_resolve_num_arch(_X86_64, number)
        return ctypes.string_at(found).decode() if found else ""  # never freed: this is a build


def header() -> str:
    """The text of ``vmm/jail/_seccomp_filters.h``: the filters of all kinds, and names of system calls for messages."""
    compiler = Compiler()
    code: list[str] = []
    rows = []
    for kind in (*KINDS, "spawn", "base"):
        program = compiler.compile(rules_of(kind))
        words = [int.from_bytes(program[at : at + 8], "little") for at in range(0, len(program), 8)]
        rows.append(f'    {{"{kind}", {len(code)}, {len(words)}, {int(kind in KINDS)}, {int(kind in FILELESS)}}},')
        code += [f"    {{{w & 0xFFFF:#x}, {w >> 16 & 0xFF}, {w >> 24 & 0xFF}, {w >> 32:#x}}}," for w in words]
    names = [f'    [{number}] = "{name}",' for number in range(512) if (name := compiler.name(number))]
    return "\n".join((
        "/* Made by setup.py of vmm/jail/rules.py. */",
        "#include <linux/filter.h>",
        f"enum {{ SYSCALLS = 512, NAME = 32, KIND = 16, PID = {PID:#x} }};",
        "static const char syscall_names[SYSCALLS][NAME] = {", *names, "};",
        "static const struct sock_filter filter_code[] = {", *code, "};",
        "static struct filter { char kind[KIND]; unsigned short start, count; char thread, fileless; } filters[] = {",
        *rows, "};", "",
    ))  # fmt: skip
