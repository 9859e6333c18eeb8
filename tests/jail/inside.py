# SPDX-License-Identifier: Apache-2.0
"""A program that goes into a jail and tries things there: ``inside.py BASE UID KIND ATTEMPT ...``.

KIND is the kind of thread that tries, behind its seccomp filter, or ``none`` for a thread without one. Each thing is
tried in a process of its own, which says ``done`` if it was done, else the error's name, or ends by what seccomp makes
of it. Printed is a JSON object: by attempt, the exit status, what it said and what it was told on stderr.
"""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import signal
import struct
import sys
import tempfile
import threading
from collections.abc import Callable

from vmm.jail import jailer

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
AT_FDCWD = -100
O_RDWR, O_CREAT = os.O_RDWR, os.O_CREAT
PARENT = os.getppid()


def call(number: int, *arguments: object) -> int:
    """A system call by its number, so that no wrapper of libc's comes between.

    :raises OSError: the call failed
    """
    words = [
        argument.encode() if isinstance(argument, str)
        else ctypes.c_long(argument) if isinstance(argument, int)
        else argument for argument in arguments
    ]  # fmt: skip
    result: int = libc.syscall(ctypes.c_long(number), *words)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def open_(path: str, flags: int = os.O_RDONLY) -> int:
    return call(257, AT_FDCWD, path, flags, 0o600)


def born(pid: int) -> None:
    if pid == 0:
        os._exit(0)


def memory_of(pid: int) -> None:
    open_(f"/proc/{pid}/mem")


def walk_up_from(fd: int) -> None:
    call(257, fd, "../../../../../../../etc/passwd", os.O_RDONLY, 0)


def become_root_again() -> None:
    call(105, 0)
    os.stat("/only-root")


def bind_over() -> None:
    call(165, "/run", "/dev", "none", 0x1000, 0)


def make_disk() -> None:
    call(133, "/run/sda", 0o060600, os.makedev(8, 0))


def open_made_disk() -> None:
    make_disk()
    open_("/run/sda")


def raise_capabilities() -> None:
    admin = 1 << 21
    data = (ctypes.c_uint32 * 6)(admin, admin, 0, 0, 0, 0)
    call(126, ctypes.byref(ctypes.c_uint64(0x2008_0522)), ctypes.byref(data))


def read_parent() -> None:
    here, there = ctypes.create_string_buffer(8), (ctypes.c_uint64 * 2)(0x1000, 8)
    call(310, PARENT, ctypes.byref((ctypes.c_uint64 * 2)(ctypes.addressof(here), 8)), 1, ctypes.byref(there), 1, 0)


def terminal_types() -> None:
    call(16, 0, 0x5412, ctypes.byref(ctypes.c_char(b"x")))  # TIOCSTI


def ring_of_a_disk() -> int:
    """What ``vmm._uring`` has made before the filter; there is none without one."""
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}") == "anon_inode:[io_uring]":
                return int(name)
        except OSError:
            pass  # the directory's own
    return -1


def by_ring(ring: int, opcode: int, fd: int, off: int, address: int, length: int, flags: int = 0) -> None:
    """One submission; what came of it has to be a descriptor."""
    if ring < 0:
        raise OSError(errno.ENOENT, "no ring")
    sizes = (12288, 16384) if ring == RING else (4096, 4096)  # of 256 entries, and of 4
    with mmap.mmap(ring, sizes[0]) as rings, mmap.mmap(ring, sizes[1], offset=0x1000_0000) as entries:
        at = int.from_bytes(rings[OFFSETS[0] :][:4], "little")
        entry = opcode.to_bytes(4, "little") + (fd & 0xFFFF_FFFF).to_bytes(4, "little")
        entry += off.to_bytes(8, "little") + address.to_bytes(8, "little")
        entry += length.to_bytes(4, "little") + flags.to_bytes(4, "little")
        entries[64 * at : 64 * at + 64] = entry.ljust(64, b"\0")
        rings[OFFSETS[0] : OFFSETS[0] + 4] = (at + 1).to_bytes(4, "little")
        call(426, ring, 1, 1, 1, 0, 0)
        assert rings[OFFSETS[1] :][:4] == bytes(4), "a ring is used once here"
        result = int.from_bytes(rings[OFFSETS[2] + 8 :][:4], "little", signed=True)
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    assert result > 2


PATH = ctypes.create_string_buffer(b"/run/file")


def open_by(ring: int) -> None:
    by_ring(ring, 18, AT_FDCWD, 0, ctypes.addressof(PATH), 0)


def socket_by(ring: int) -> None:
    by_ring(ring, 45, 2, 1, 0, 0)


def new_ring() -> int:
    return call(425, 4, bytes(120))


def ring_offsets() -> tuple[int, ...]:
    """Of the submissions' tail, of the completions' head and of the first completion, the same in every ring."""
    params = ctypes.create_string_buffer(120)
    os.close(call(425, 4, params))
    words = struct.unpack("30I", params.raw)
    return words[11], words[20], words[25]


# Numbers of x86_64.
ATTEMPTS: dict[str, Callable[[], object]] = {
    "open the host's passwd": lambda: open_("/etc/passwd"),
    "leave by ..": lambda: open_("/../../../../../etc/passwd"),
    "leave by .. from a directory's descriptor": lambda: walk_up_from(open_("/run", os.O_DIRECTORY)),
    "leave by .. from proc's descriptor": lambda: walk_up_from(open_("/proc/self/fd", os.O_DIRECTORY)),
    "leave by the first process's root": lambda: open_("/proc/1/root/etc/passwd"),
    "leave by the parent's root": lambda: open_(f"/proc/{PARENT}/root/etc/passwd"),
    "leave by the parent's directory": lambda: open_(f"/proc/{PARENT}/cwd"),
    "open the first process's memory": lambda: memory_of(1),
    "open the parent's memory": lambda: memory_of(PARENT),
    "write a setting of the kernel's": lambda: open_("/proc/sys/kernel/core_pattern", os.O_WRONLY),
    "write to the interpreter": lambda: open_("/proc/self/exe", os.O_WRONLY),
    "open a file by its handle": lambda: call(304, open_("/run"), b"\x08\0\0\0\x01\0\0\0" + bytes(8), 0),
    "mount": bind_over,
    "unmount": lambda: call(166, "/proc", 2),
    "remount proc writable": lambda: call(165, "proc", "/proc", "proc", 32, 0),
    "open_tree": lambda: call(428, AT_FDCWD, "/run", 1),
    "pivot_root": lambda: call(155, "/run", "/run"),
    "chroot": lambda: call(161, "/run"),
    "mknod of a disk": make_disk,
    "open a disk by mknod": open_made_disk,
    "link out of the tree": lambda: call(86, "/run/file", "/../../../../../tmp/out"),
    "setns": lambda: call(308, open_("/proc/self/ns/mnt"), 0),
    "unshare a user namespace": lambda: call(272, 0x1000_0000),
    "unshare a mount namespace": lambda: call(272, 0x0002_0000),
    "setuid(0)": become_root_again,
    "setresuid(0)": lambda: (call(117, 0, 0, 0), os.stat("/only-root")),
    "setgroups": lambda: call(116, 1, ctypes.byref(ctypes.c_uint(4))),
    "capset": raise_capabilities,
    "ptrace of the parent": lambda: call(101, 16, PARENT, 0, 0),
    "ptrace of the first process": lambda: call(101, 16, 1, 0, 0),
    "read the parent's memory": read_parent,
    "kill the parent": lambda: call(62, PARENT, 0),
    "kill everybody": lambda: call(62, -1, 0),
    "pidfd_open": lambda: call(434, PARENT, 0),
    "limits of the parent": lambda: call(302, PARENT, 7, 0, ctypes.byref((ctypes.c_uint64 * 2)())),
    "execve": lambda: call(59, "/proc/self/exe", 0, 0),
    "execve from memory": lambda: call(322, call(319, "x", 0), "", 0, 0, 0x1000),
    "fork": lambda: born(call(57)),
    "vfork": lambda: born(call(58)),
    "clone a process": lambda: born(call(56, 17, 0, 0, 0, 0)),
    "executable memory": lambda: call(9, 0, 4096, 7, 0x22, -1, 0),
    "socket(AF_INET)": lambda: call(41, 2, 1, 0),
    "socket(AF_NETLINK)": lambda: call(41, 16, 3, 0),
    "socket(AF_PACKET)": lambda: call(41, 17, 3, 0x0300),
    "socket(AF_VSOCK)": lambda: call(41, 40, 1, 0),
    "bpf": lambda: call(321, 0, bytes(120), 120),
    "perf_event_open": lambda: call(298, b"\x01\0\0\0\x70\0\0\0" + bytes(104), 0, -1, -1, 0),
    "keyctl": lambda: call(250, 0, -3, 1),
    "add_key": lambda: call(248, "user", "a", "b", 1, -3),
    "userfaultfd": lambda: call(323, 0),
    "userfaultfd by its device": lambda: call(16, open_("/dev/userfaultfd", O_RDWR), 0xAA00, 0),
    "io_uring_setup": new_ring,
    "openat by a new ring": lambda: open_by(new_ring()),
    "socket(AF_INET) by a new ring": lambda: socket_by(new_ring()),
    "openat by a disk's ring": lambda: open_by(RING),
    "socket(AF_INET) by a disk's ring": lambda: socket_by(RING),
    "io_uring_register": lambda: call(427, RING, 9, 0, 0),  # a personality
    "init_module": lambda: call(175, bytes(64), 64, ""),
    "finit_module": lambda: call(313, open_("/run"), "", 0),
    "kexec_load": lambda: call(246, 0, 0, 0, 0),
    "reboot": lambda: call(169, 0xFEE1_DEAD, 672274793, 0x89ABCDEF, 0),  # CAD on, as it is
    "settimeofday": lambda: call(164, 0, bytes(8)),
    "clock_settime": lambda: call(227, 0, bytes(16)),
    "sethostname": lambda: call(170, "x", 1),
    "swapoff": lambda: call(168, "/run"),
    "iopl": lambda: call(172, 3),
    "syslog": lambda: call(103, 3, bytes(10), 10),
    "type into a terminal": terminal_types,
}


RING = -1
OFFSETS: tuple[int, ...] = ()


def main(base: str, uid: int, kind: str, attempts: list[str]) -> None:
    """Be jailed, and let a process each try one thing as a thread of that kind."""
    global OFFSETS
    OFFSETS = ring_offsets()
    jail = jailer.Jail("/bin/firecracker", "attempt", uid, uid, chroot_base_dir=base)
    jailer.close_what_was_inherited()
    if kind != "none":
        from vmm.jail.preload import preload

        preload()
    jail.enter()
    with open("/run/file", "w"):
        pass
    told = {}
    for attempt in attempts:
        with tempfile.TemporaryFile(dir="/run") as said, tempfile.TemporaryFile(dir="/run") as heard:
            pid = os.fork()
            if pid == 0:
                os.dup2(said.fileno(), 1)
                os.dup2(heard.fileno(), 2)
                signal.alarm(20)
                in_a_process(kind, ATTEMPTS[attempt])
            _, status = os.waitpid(pid, 0)
            words = [os.pread(file.fileno(), 4096, 0).decode().strip() for file in (said, heard)]
            told[attempt] = (os.waitstatus_to_exitcode(status), *words)
    print(json.dumps(told))


def in_a_process(kind: str, attempt: Callable[[], object]) -> None:
    """Try it, and end."""
    global RING

    def try_it() -> None:
        try:
            attempt()
        except OSError as error:
            print(errno.errorcode.get(error.errno or 0, str(error.errno)), flush=True)
            os._exit(1)
        print("done", flush=True)
        os._exit(0)

    if kind == "none":
        try_it()
    from vmm import threads
    from vmm.jail import seccomp

    seccomp.enable()
    RING = ring_of_a_disk()
    threads.spawn(kind, "tries", try_it)
    threading.Event().wait(20)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4:])
