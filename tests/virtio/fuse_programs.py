# SPDX-License-Identifier: Apache-2.0
"""Random programs of file operations, done in two directories side by side: their results are to be the same.

A program is a list of steps; a step is a method of :class:`Actor`, its arguments and a user. A result does
not contain what differs between file systems: inode numbers, current times, sizes of directories, blocks.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import random
import stat
from collections.abc import Callable
from typing import Any, NamedTuple

NAMES = "abc"
PATHS = [*NAMES, "a/a", "a/b", "b/a", "b/c", "c/a", "a/a/b", "b/c/a", "b/c/b"]
MODES = (0o644, 0o600, 0o444, 0o222, 0o666, 0o755, 0o4755, 0o2755, 0o6777, 0o2770, 0o1777, 0o777, 0)
SIZES = (0, 1, 100, 4095, 4096, 4097, 10_000, 65_536, 70_001, 200_000)
RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_WHITEOUT = 1, 2, 4
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 16
XATTRS = ("user.one", "user.two", "trusted.three", "security.four")
SLOTS = 4


class User(NamedTuple):
    uid: int
    gid: int
    groups: tuple[int, ...]


ROOT_USER = User(0, 0, ())
USERS = (ROOT_USER, ROOT_USER, ROOT_USER, User(1000, 1000, (2000,)), User(1001, 2000, ()))


class Step(NamedTuple):
    what: str
    arguments: tuple[Any, ...]
    user: User


def told(status: os.stat_result) -> tuple[int, ...]:
    """What two file systems have to agree on."""
    size = status.st_size if not stat.S_ISDIR(status.st_mode) else 0
    return (status.st_mode, status.st_nlink, status.st_uid, status.st_gid, size, status.st_rdev)


def pattern(size: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(size)


class Actor:
    """Does the steps of a program below one directory."""

    def __init__(self, root: str) -> None:
        self.root = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
        self.files: dict[int, int] = {}
        self.libc = ctypes.CDLL(None, use_errno=True)

    def close(self) -> None:
        for fd in (*self.files.values(), self.root):
            os.close(fd)

    def do(self, step: Step) -> Any:
        """The result of a step, or the name of its error."""
        os.fchdir(self.root)
        os.setgroups(step.user.groups)
        os.setegid(step.user.gid)
        os.seteuid(step.user.uid)
        try:
            return getattr(self, step.what)(*step.arguments)
        except OSError as error:
            return errno.errorcode[error.errno or 0]
        finally:
            os.seteuid(0)
            os.setegid(0)
            os.setgroups([])

    def _fd(self, slot: int) -> int:
        if slot not in self.files:
            raise OSError(errno.EBADF, "no file is open here")
        return self.files[slot]

    # The tree

    def mkdir(self, path: str, mode: int) -> Any:
        os.mkdir(path, mode)
        return told(os.lstat(path))

    def rmdir(self, path: str) -> None:
        os.rmdir(path)

    def unlink(self, path: str) -> None:
        os.unlink(path)

    def rename(self, old: str, new: str, flags: int) -> None:
        if self.libc.renameat2(-100, old.encode(), -100, new.encode(), flags):
            raise OSError(ctypes.get_errno(), "renameat2")

    def link(self, old: str, new: str) -> Any:
        os.link(old, new, follow_symlinks=False)
        return told(os.lstat(new))

    def symlink(self, target: str, path: str) -> Any:
        os.symlink(target, path)
        return os.readlink(path), told(os.lstat(path))

    def readlink(self, path: str) -> str:
        return os.readlink(path)

    def mknod(self, path: str, mode: int, device: int) -> Any:
        os.mknod(path, mode, device)
        return told(os.lstat(path))

    def chmod(self, path: str, mode: int) -> Any:
        os.chmod(path, mode)
        return told(os.stat(path))

    def lchown(self, path: str, uid: int, gid: int) -> Any:
        os.lchown(path, uid, gid)
        return told(os.lstat(path))

    def utime(self, path: str, when: int) -> Any:
        os.utime(path, ns=(when, when + 1), follow_symlinks=False)
        status = os.lstat(path)
        return status.st_atime_ns, status.st_mtime_ns

    def truncate(self, path: str, size: int) -> Any:
        os.truncate(path, size)
        return told(os.stat(path))

    def stat(self, path: str) -> Any:
        return told(os.stat(path))

    def access(self, path: str, mode: int) -> bool:
        return os.access(path, mode, effective_ids=True)

    def listdir(self, path: str) -> Any:
        with os.scandir(path) as entries:
            return sorted((entry.name, entry.is_dir(follow_symlinks=False), entry.is_symlink()) for entry in entries)

    def setxattr(self, path: str, name: str, size: int, flags: int) -> None:
        os.setxattr(path, name, pattern(size, size), flags, follow_symlinks=False)

    def getxattr(self, path: str, name: str) -> bytes:
        return os.getxattr(path, name, follow_symlinks=False)

    def listxattr(self, path: str) -> list[str]:
        return sorted(os.listxattr(path, follow_symlinks=False))

    def removexattr(self, path: str, name: str) -> None:
        os.removexattr(path, name, follow_symlinks=False)

    # Open files

    def open(self, slot: int, path: str, flags: int, mode: int) -> Any:
        fd = os.open(path, flags | os.O_NONBLOCK, mode)
        if slot in self.files:
            os.close(self.files.pop(slot))
        self.files[slot] = fd
        return told(os.fstat(fd))

    def shut(self, slot: int) -> None:
        os.close(self._fd(slot))
        del self.files[slot]

    def setfl(self, slot: int, flags: int) -> None:
        fcntl.fcntl(self._fd(slot), fcntl.F_SETFL, flags)

    def pread(self, slot: int, size: int, offset: int) -> bytes:
        return os.pread(self._fd(slot), size, offset)

    def pwrite(self, slot: int, size: int, offset: int, seed: int) -> Any:
        done = os.pwrite(self._fd(slot), pattern(size, seed), offset)
        return done, told(os.fstat(self._fd(slot)))

    def write(self, slot: int, size: int, seed: int) -> Any:
        done = os.write(self._fd(slot), pattern(size, seed))
        return done, told(os.fstat(self._fd(slot))), os.lseek(self._fd(slot), 0, os.SEEK_CUR)

    def append(self, slot: int, size: int, seed: int, flags: int) -> Any:
        done = os.pwritev(self._fd(slot), [pattern(size, seed)], 0, flags)
        return done, told(os.fstat(self._fd(slot)))

    def seek(self, slot: int, offset: int, whence: int) -> int:
        if stat.S_ISDIR(os.fstat(self._fd(slot)).st_mode):
            return 0  # a directory's offsets are the file system's own
        return os.lseek(self._fd(slot), offset, whence)

    def ftruncate(self, slot: int, size: int) -> Any:
        os.ftruncate(self._fd(slot), size)
        return told(os.fstat(self._fd(slot)))

    def fallocate(self, slot: int, mode: int, offset: int, size: int) -> Any:
        offset_, size_ = ctypes.c_long(offset), ctypes.c_long(size)
        if self.libc.fallocate(self._fd(slot), mode, offset_, size_):
            raise OSError(ctypes.get_errno(), "fallocate")
        return told(os.fstat(self._fd(slot)))

    def fsync(self, slot: int, data: bool) -> None:
        (os.fdatasync if data else os.fsync)(self._fd(slot))

    def fchmod(self, slot: int, mode: int) -> Any:
        os.fchmod(self._fd(slot), mode)
        return told(os.fstat(self._fd(slot)))

    def copy(self, slot: int, to: int, size: int, offset: int, offset_to: int) -> Any:
        done = os.copy_file_range(self._fd(slot), self._fd(to), size, offset, offset_to)
        return done, told(os.fstat(self._fd(to)))

    def map_write(self, slot: int, offset: int, size: int, seed: int) -> Any:
        end = os.fstat(self._fd(slot)).st_size
        if not stat.S_ISREG(os.fstat(self._fd(slot)).st_mode):
            raise OSError(errno.ENODEV, "no regular file")
        with mmap.mmap(self._fd(slot), end) if end else mmap.mmap(-1, 4096) as view:
            data = pattern(max(0, min(size, end - offset)), seed)
            view[offset : offset + len(data)] = data
            if seed % 2:
                view.flush()
        return told(os.fstat(self._fd(slot)))

    def map_read(self, slot: int, offset: int, size: int) -> bytes:
        end = os.fstat(self._fd(slot)).st_size
        if not stat.S_ISREG(os.fstat(self._fd(slot)).st_mode) or not end:
            return b""
        with mmap.mmap(self._fd(slot), end, prot=mmap.PROT_READ) as view:
            return view[offset : min(offset + size, end)]


def picture(root: str) -> dict[str, Any]:
    """All below `root`, as a user who may see everything finds it."""
    found: dict[str, Any] = {}
    for at, dirs, files in os.walk(root):
        for name in (*dirs, *files):
            full = os.path.join(at, name)
            status = os.lstat(full)
            content: Any = None
            if stat.S_ISREG(status.st_mode):
                with open(full, "rb") as file:
                    content = hash(file.read()), status.st_size
            elif stat.S_ISLNK(status.st_mode):
                content = os.readlink(full)
            names = sorted(os.listxattr(full, follow_symlinks=False))
            attributes = {name: os.getxattr(full, name, follow_symlinks=False) for name in names}
            found[os.path.relpath(full, root)] = (told(status), content, attributes)
    return found


def _tree_steps(rng: random.Random) -> dict[str, tuple[int, Callable[[], tuple[Any, ...]]]]:
    """Weight and arguments of each step on names."""

    def path() -> str:
        chosen: str = rng.choice(PATHS)
        return chosen

    kinds = (stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK)
    # Not (-1, -1): Linux's client leaves the set-id bits to the share, and then asks it nothing.
    owners = ((0, 0), (1000, -1), (-1, 1000), (1000, 2000), (-1, 2000), (1001, 2000))
    renames = (0, 0, RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_WHITEOUT, RENAME_WHITEOUT | RENAME_NOREPLACE, 3, 8)
    return {
        "mkdir": (8, lambda: (path(), rng.choice((0o755, 0o777, 0o1777, 0o2777, 0o2775, 0o700)))),
        "rmdir": (2, lambda: (path(),)),
        "unlink": (3, lambda: (path(),)),
        "rename": (6, lambda: (path(), path(), rng.choice(renames))),
        "link": (4, lambda: (path(), path())),
        "symlink": (2, lambda: (rng.choice(("a", "b", "../a", "none", "x" * 300)), path())),
        "readlink": (1, lambda: (path(),)),
        "mknod": (3, lambda: (path(), rng.choice(kinds) | rng.choice(MODES), rng.choice((0, os.makedev(7, 300))))),
        "chmod": (5, lambda: (path(), rng.choice(MODES))),
        "lchown": (3, lambda: (path(), *rng.choice(owners))),
        "utime": (2, lambda: (path(), rng.randrange(10**18))),
        "truncate": (3, lambda: (path(), rng.choice(SIZES))),
        "stat": (3, lambda: (path(),)),
        "access": (2, lambda: (path(), rng.randrange(8))),
        "listdir": (2, lambda: (rng.choice((".", path())),)),
        "setxattr": (3, lambda: (path(), rng.choice(XATTRS), rng.choice((0, 1, 100, 1000)), rng.randrange(3))),
        "getxattr": (1, lambda: (path(), rng.choice(XATTRS))),
        "listxattr": (1, lambda: (path(),)),
        "removexattr": (1, lambda: (path(), rng.choice(XATTRS))),
    }


def _file_steps(rng: random.Random) -> dict[str, tuple[int, Callable[[], tuple[Any, ...]]]]:
    """Weight and arguments of each step on what is open."""
    access = (os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_RDWR)
    more = (0, 0, os.O_CREAT, os.O_CREAT, os.O_CREAT | os.O_EXCL, os.O_TRUNC, os.O_CREAT | os.O_TRUNC, os.O_NOFOLLOW)
    extra = (0, 0, 0, os.O_APPEND, os.O_APPEND, os.O_DSYNC, os.O_DIRECTORY)

    def slot() -> int:
        return rng.randrange(SLOTS)

    def offset() -> int:
        return rng.choice((0, 0, 1, 4096, rng.randrange(100_000)))

    def size() -> int:
        return rng.choice((*SIZES, rng.randrange(1, 20_000)))

    def flags() -> int:
        if rng.random() < 0.1:
            return os.O_TMPFILE | rng.choice((os.O_RDWR, os.O_WRONLY))
        return rng.choice(access) | rng.choice(more) | rng.choice(extra)

    modes = (0, KEEP_SIZE, PUNCH_HOLE | KEEP_SIZE, ZERO_RANGE, ZERO_RANGE | KEEP_SIZE)
    return {
        "open": (20, lambda: (slot(), rng.choice((".", *PATHS * 3)), flags(), rng.choice(MODES))),
        "shut": (3, lambda: (slot(),)),
        "setfl": (4, lambda: (slot(), rng.choice((0, os.O_APPEND)))),
        "pread": (8, lambda: (slot(), size(), offset())),
        "pwrite": (12, lambda: (slot(), size(), offset(), rng.randrange(1000))),
        "write": (8, lambda: (slot(), size(), rng.randrange(1000))),
        "append": (4, lambda: (slot(), size(), rng.randrange(1000), rng.choice((os.RWF_APPEND, os.RWF_DSYNC)))),
        "seek": (3, lambda: (slot(), offset(), rng.choice((os.SEEK_SET, os.SEEK_END, os.SEEK_CUR)))),
        "ftruncate": (5, lambda: (slot(), size())),
        "fallocate": (4, lambda: (slot(), rng.choice(modes), offset(), size())),
        "fsync": (2, lambda: (slot(), rng.random() < 0.5)),
        "fchmod": (2, lambda: (slot(), rng.choice(MODES))),
        "copy": (4, lambda: (slot(), slot(), size(), offset(), offset())),
        "map_write": (5, lambda: (slot(), offset(), size(), rng.randrange(1000))),
        "map_read": (4, lambda: (slot(), offset(), size())),
    }


def program(seed: int, length: int) -> list[Step]:
    """A program of `length` steps."""
    rng = random.Random(seed)
    steps = _tree_steps(rng) | _file_steps(rng)
    names = rng.choices(list(steps), [weight for weight, _ in steps.values()], k=length)
    return [Step(name, steps[name][1](), rng.choice(USERS)) for name in names]


def differences(plain: str, mounted: str, seed: int, length: int, skipped: tuple[str, ...] = ()) -> list[str]:
    """Do a program in both directories; where their results are not the same, with what led there."""
    actors = Actor(plain), Actor(mounted)
    history: list[str] = []
    try:
        for number, step in enumerate(program(seed, length)):
            if step.what in skipped:
                continue
            expected, got = (actor.do(step) for actor in actors)
            history.append(f"{number} {step.what}{step.arguments} by {step.user.uid}: {_short(expected)}")
            if expected != got:
                return [*history[-40:], f"seed {seed}: on the share: {_short(got)}"]
            if number % 100 == 99 and (found := _unlike(plain, mounted)):
                return [*history[-100:], f"seed {seed}, after step {number}: {found}"]
    finally:
        for actor in actors:
            actor.close()
    found = _unlike(plain, mounted)
    return [*history[-100:], f"seed {seed}, at the end: {found}"] if found else []


def _unlike(plain: str, mounted: str) -> str:
    expected, got = picture(plain), picture(mounted)
    names = sorted(name for name in expected.keys() | got.keys() if expected.get(name) != got.get(name))
    return "; ".join(f"{name}: {_short(expected.get(name))}, on the share {_short(got.get(name))}" for name in names)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 200 else f"{text[:120]}... ({len(text)}, {hash(text):x})"


def empty(directory: str) -> None:
    """Remove everything in `directory`."""
    for at, dirs, files in os.walk(directory, topdown=False):
        for name in files:
            os.unlink(os.path.join(at, name))
        for name in dirs:
            full = os.path.join(at, name)
            (os.unlink if os.path.islink(full) else os.rmdir)(full)
