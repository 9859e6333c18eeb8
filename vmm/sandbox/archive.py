# SPDX-License-Identifier: Apache-2.0
"""Directories as the agent sends and takes them: pack one of the host, unpack one of a sandbox. The same of a tar.

Of each file comes a frame with its entry, whose name is the path below the directory, and then frames with its
contents: see agent/tree.c.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tarfile
from itertools import chain
from typing import NamedTuple, cast

from vmm.closing import Closing
from vmm.images.host import PullError
from vmm.images.layers import DAMAGED, Header
from vmm.sandbox.channel import F_DATA, F_DONE, F_ENTRY, FRAME_MAX, frame, out_of_turn
from vmm.sandbox.errors import AgentError
from vmm.sandbox.files import ENTRY, READ, fields, opened

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import IO, Any

    Frames = Iterator[tuple[int, memoryview]]

_DEEPEST = 256  # directories below the copied one
_LONGEST = 8191  # bytes of a name and a link's target
_NEWEST = (1 << 33) * 10**9  # nanoseconds since 1970
_TYPES = {stat.S_IFREG: tarfile.REGTYPE, stat.S_IFDIR: tarfile.DIRTYPE, stat.S_IFLNK: tarfile.SYMTYPE}


class _Member(NamedTuple):
    mode: int
    uid: int
    gid: int
    links: int
    size: int
    modified: int  # nanoseconds since 1970
    name: str
    target: str


def pack(directory: str) -> Iterator[bytes]:
    """A directory with all files, directories and links in it, in frames for the agent.

    Permission bits and times of files are kept, owners are not. Sockets, devices and FIFOs are left out.

    :raises OSError: a file cannot be read, or directories are nested more than 256 deep
    """
    return _together(_members(None, directory, "."), frame(F_DONE))


def from_tar(path: str, pieces: Iterable[bytes | memoryview]) -> Iterator[bytes]:
    """Likewise what a tar archive has, which is not trusted; devices and FIFOs are left out.

    :param path: the guest's directory, for errors
    :raises OSError: the archive is damaged, or has a sparse file (EBADMSG); a name has ``..`` (EINVAL)
    """
    return _together(_of_tar(path, pieces), frame(F_DONE))


def to_tar(frames: Frames) -> Iterator[bytes]:
    """What the agent sends of a directory as a tar archive, in pieces. Names begin with ``./``."""
    return _together(_tar(frames), bytes(2 * tarfile.BLOCKSIZE))


def _together(pieces: Iterable[bytes | memoryview], end: bytes) -> Iterator[bytes]:
    waiting = bytearray()  # small ones, which leave together
    for piece in pieces:
        waiting += piece
        if len(waiting) >= FRAME_MAX:
            yield bytes(waiting)
            waiting.clear()
    yield bytes(waiting) + end


def _entry(name: str, mode: int, modified: int, target: str = "") -> bytes:
    data = os.fsencode(name) + b"\0" + os.fsencode(target)
    if data.count(b"\0") > 1:
        raise ValueError("a name has a NUL byte")
    if len(data) > _LONGEST:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), name)
    return frame(F_ENTRY, ENTRY.pack(mode, 0, 0, 0, 0, min(max(modified, 0), _NEWEST)) + data)


def _members(above: int | None, entry: str, name: str) -> Iterator[bytes]:
    # Of what is named `entry` in the directory `above`. A guest may have it in a mount, and put a link in its place.
    if name.count("/") >= _DEEPEST:
        raise OSError(errno.ELOOP, f"has directories nested more than {_DEEPEST} deep", entry)
    status = os.lstat(entry, dir_fd=above)
    mode, modified = status.st_mode & ~0o7000, status.st_mtime_ns
    if stat.S_ISLNK(mode):
        yield _entry(name, mode, modified, os.readlink(entry, dir_fd=above))
    elif stat.S_ISREG(mode):
        with opened(entry, above) as file:
            yield _entry(name, mode, modified)
            left = os.fstat(file.fileno()).st_size
            while piece := file.read(min(left, FRAME_MAX)):
                left -= len(piece)
                yield frame(F_DATA, piece)
    elif stat.S_ISDIR(mode):
        open_to_owner = mode | stat.S_IRWXU  # so that its owner can make files in it
        yield _entry(name, open_to_owner, modified)
        directory = os.open(entry, READ | os.O_DIRECTORY, dir_fd=above)
        try:
            for each in sorted(os.listdir(directory)):
                with contextlib.suppress(FileNotFoundError):  # it has gone meanwhile
                    yield from _members(directory, each, each if name == "." else f"{name}/{each}")
        except OSError as error:
            if isinstance(error.filename, str):
                error.filename = os.path.join(entry, error.filename)
            raise
        finally:
            os.close(directory)
        if mode != open_to_owner:
            yield _entry(name, mode, modified)


class _Pieces:
    # A file for tarfile, which reads it once from its beginning to its end. Where a member says that it is longer than
    # the archive, tarfile would go on to read for as long as that says.
    def __init__(self, pieces: Iterator[bytes | memoryview]) -> None:
        self._pieces = pieces
        self._rest = b""
        self._ended = False

    def read(self, size: int) -> bytes:
        parts, there = [self._rest], len(self._rest)
        while there < size and (piece := bytes(next(self._pieces, b""))):
            parts.append(piece)
            there += len(piece)
        whole = b"".join(parts)
        if not whole and self._ended:
            raise EOFError("it ends in the middle of a member")
        self._ended = not whole
        self._rest = whole[size:]
        return whole[:size]


def _of_tar(path: str, pieces: Iterable[bytes | memoryview]) -> Iterator[bytes]:
    begun = (piece for piece in pieces if piece)
    first = next(begun, None)
    if first is None:
        return  # nothing is an archive, too
    source = cast("Any", _Pieces(chain([first], begun)))
    try:
        with tarfile.open(
            fileobj=source, mode="r|", tarinfo=Header, errors="surrogateescape", bufsize=FRAME_MAX
        ) as tar:
            for info in tar:
                tar.members.clear()  # type: ignore[attr-defined]  # it keeps all, of an archive without end, too
                if info.sparse is not None:
                    raise PullError(f"{info.name} has holes")
                name, mode = _inside(path, info.name), info.mode & 0o7777
                modified = int(info.mtime) * 10**9
                if info.isdir():
                    yield _entry(name, stat.S_IFDIR | mode, modified)
                elif info.issym():
                    yield _entry(name, stat.S_IFLNK, modified, info.linkname)
                elif info.islnk():
                    yield _entry(name, 0, modified, _inside(path, info.linkname))
                elif info.isreg():
                    yield _entry(name, stat.S_IFREG | mode, modified)
                    contents = cast("IO[bytes]", tar.extractfile(info))
                    while piece := contents.read(FRAME_MAX):
                        yield frame(F_DATA, piece)
    except (PullError, *DAMAGED) as error:
        raise OSError(errno.EBADMSG, f"is not a tar archive: {error}", path) from None


def _inside(path: str, name: str) -> str:
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), f"{path}/{name}")
    return "/".join(parts) or "."


def _sent(frames: Frames) -> Iterator[tuple[_Member, Iterator[memoryview]]]:
    # Each file that the agent sends, and its contents, which are there until the next file is asked for.
    each = chain(frames, [(F_DONE, memoryview(b""))])
    kind, data = next(each)

    def contents(member: _Member) -> Iterator[memoryview]:
        nonlocal kind, data
        left = member.size if stat.S_ISREG(member.mode) else 0
        kind, data = next(each)
        while kind == F_DATA and len(data) <= left:
            left -= len(data)
            yield data
            kind, data = next(each)
        if left or kind == F_DATA:
            raise AgentError(f"the guest sent {member.name!r} in another size than {member.size} bytes")

    while kind == F_ENTRY:
        member = _Member(*fields(bytes(data)))
        pieces = contents(member)
        yield member, pieces
        for _ in pieces:
            pass  # what nobody wanted
    if kind != F_DONE:
        raise out_of_turn("get")


def _tar(frames: Frames) -> Iterator[bytes | memoryview]:
    for member, contents in _sent(frames):
        if kind := _TYPES.get(stat.S_IFMT(member.mode)):
            info = tarfile.TarInfo(member.name if member.name == "." else f"./{member.name}")
            info.type, info.mode, info.linkname = kind, stat.S_IMODE(member.mode), member.target
            info.uid, info.gid, info.mtime = member.uid, member.gid, max(0, member.modified // 10**9)
            info.size = member.size if kind == tarfile.REGTYPE else 0
            yield info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
            yield from contents
            yield bytes(-info.size % tarfile.BLOCKSIZE)


def unpack(frames: Frames, target: str) -> None:
    """Make the directory `target` of what the agent sends, which is not trusted.

    Permission bits and times of files are kept.

    :raises AgentError: the guest sends what is not a directory, or a name that leads out of `target`
    :raises OSError: a file cannot be made, as where one name is there twice
    """
    with _Tree(target) as tree:
        for member, contents in _sent(frames):
            tree.make(member, contents)
        tree.set_modes()


class _Tree(Closing):
    # What is made at `target`. The guest may have that place in a mount, and put a link there for a directory of ours:
    # each is entered from above, part by part, and no link is followed below `target`.
    def __init__(self, target: str) -> None:
        self._target = os.fsdecode(target)
        self._modes: dict[tuple[str, ...], int] = {}  # of the directories that were made
        self._entered: tuple[str, ...] = ()  # one of them
        self._fd = -1

    def _enter(self, parts: tuple[str, ...]) -> int:
        if self._fd < 0 or parts != self._entered:
            self.close()
            self._fd, self._entered = os.open(self._target, READ | os.O_DIRECTORY), parts
            for part in parts:
                above = self._fd
                self._fd = os.open(part, READ | os.O_DIRECTORY, dir_fd=above)
                os.close(above)
        return self._fd

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def make(self, member: _Member, contents: Iterable[memoryview]) -> None:
        parts = () if member.name == "." else tuple(member.name.split("/"))
        known = parts[:-1] in self._modes if parts else stat.S_ISDIR(member.mode)
        if not {"", ".", ".."}.isdisjoint(parts) or not known or len(parts) > _DEEPEST:
            raise AgentError(f"the guest sent the name {member.name!r}, which is not in a directory that it sent")
        mode, fd = member.mode & 0o777, -1
        try:
            above, name = (self._enter(parts[:-1]), parts[-1]) if parts else (None, self._target)
            if stat.S_ISDIR(member.mode):
                os.mkdir(name, 0o700, dir_fd=above)
                self._modes[parts] = mode
            elif stat.S_ISLNK(member.mode):
                os.symlink(member.target, name, dir_fd=above)
            elif stat.S_ISREG(member.mode):
                fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=above)
        except OSError as error:
            error.filename = "/".join((self._target, *parts))
            raise
        if fd >= 0:
            with open(fd, "wb") as file:
                for piece in contents:
                    file.write(piece)
                file.flush()
                os.fchmod(fd, mode)
                if 0 <= member.modified < _NEWEST:
                    os.utime(fd, ns=(member.modified, member.modified))

    def set_modes(self) -> None:
        if not self._modes:
            raise AgentError("the guest sent nothing in place of a directory")
        for parts, mode in reversed(self._modes.items()):
            os.fchmod(self._enter(parts), mode)
