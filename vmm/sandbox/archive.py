# SPDX-License-Identifier: Apache-2.0
"""Directories as tar archives: pack one of the host for a sandbox, and unpack what a sandbox sends."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tarfile
from typing import cast

from vmm.closing import Closing
from vmm.images.host import PullError
from vmm.images.layers import DAMAGED, Header
from vmm.sandbox.channel import FRAME_MAX
from vmm.sandbox.errors import AgentError
from vmm.sandbox.files import READ, opened

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import IO, Any

_BLOCK = 512
_DEEPEST = 256  # directories below the copied one
_NEWEST = 1 << 33  # seconds since 1970: what a ustar header can hold
_TYPES = {stat.S_IFREG: tarfile.REGTYPE, stat.S_IFDIR: tarfile.DIRTYPE, stat.S_IFLNK: tarfile.SYMTYPE}


def pack(directory: str) -> Iterator[bytes]:
    """A directory with all files, directories and links in it as an archive, in pieces. Names begin with ``./``.

    Permission bits and times of files are kept, owners are not. Sockets, devices and FIFOs are left out.

    :raises OSError: a file cannot be read, or directories are nested more than 256 deep
    """
    waiting = bytearray()  # small members, which leave together
    for piece in _members(None, directory, "."):
        waiting += piece
        if len(waiting) >= FRAME_MAX:
            yield bytes(waiting)
            waiting.clear()
    yield bytes(waiting) + bytes(2 * _BLOCK)


def _members(above: int | None, entry: str, name: str) -> Iterator[bytes]:
    # Of what is named `entry` in the directory `above`. A guest may have it in a mount, and put a link in its place.
    if name.count("/") > _DEEPEST:
        raise OSError(errno.ELOOP, f"has directories nested more than {_DEEPEST} deep", entry)
    status = os.lstat(entry, dir_fd=above)
    kind = _TYPES.get(stat.S_IFMT(status.st_mode))
    if kind is None:
        return
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.mtime = kind, stat.S_IMODE(status.st_mode) & 0o777, int(status.st_mtime)
    if kind == tarfile.SYMTYPE:
        info.linkname = os.readlink(entry, dir_fd=above)
        yield _header(info)
    elif kind == tarfile.REGTYPE:
        with opened(entry, above) as file:
            info.size = os.fstat(file.fileno()).st_size
            yield _header(info)
            yield from _contents(file, info.size)
    else:
        mode, info.mode = info.mode, info.mode | stat.S_IRWXU  # so that its owner can make files in it
        yield _header(info)
        directory = os.open(entry, READ | os.O_DIRECTORY, dir_fd=above)
        try:
            for each in sorted(os.listdir(directory)):
                with contextlib.suppress(FileNotFoundError):  # it has gone meanwhile
                    yield from _members(directory, each, f"{name}/{each}")
        except OSError as error:
            if isinstance(error.filename, str):
                error.filename = os.path.join(entry, error.filename)
            raise
        finally:
            os.close(directory)
        if mode != info.mode:
            info.mode = mode
            yield _header(info)


def _header(info: tarfile.TarInfo) -> bytes:
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def _contents(file: IO[bytes], size: int) -> Iterator[bytes]:
    left = size
    while left:
        most = min(left, FRAME_MAX)
        piece = file.read(most) or bytes(most)  # a file that has become shorter has zeros at its end
        left -= len(piece)
        yield piece
    yield bytes(-size % _BLOCK)


class _Pieces:
    # A file for tarfile, which reads it once from its beginning to its end. Where a member says that it is longer than
    # the archive, tarfile would go on to read for as long as that says.
    def __init__(self, pieces: Iterable[bytes | memoryview]) -> None:
        self._pieces = iter(pieces)
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


def unpack(pieces: Iterable[bytes | memoryview], target: str) -> None:
    """Make the directory `target` of an archive, which is not trusted. Names in it begin with ``./``.

    Permission bits and times of files are kept.

    :raises AgentError: the pieces are not an archive, or a name in it leads out of `target`
    :raises OSError: a file cannot be made, as where one name is there twice
    """
    source = _Pieces(pieces)
    with _Tree(target) as tree:
        try:
            with tarfile.open(
                fileobj=cast("Any", source), mode="r|", tarinfo=Header, errors="surrogateescape", bufsize=FRAME_MAX
            ) as tar:
                for info in tar:
                    tar.members.clear()  # type: ignore[attr-defined]  # it keeps all, of an archive without end, too
                    tree.make(tar, info)
            while source.read(FRAME_MAX):
                pass
        except (PullError, *DAMAGED) as error:
            raise AgentError(f"the guest sent no archive: {error}") from None
        tree.set_modes()


class _Tree(Closing):
    # What is made of an archive at `target`. The guest may have that place in a mount, and put a link there for a
    # directory of ours: each is entered from above, part by part, and no link is followed below `target`.
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

    def make(self, tar: tarfile.TarFile, info: tarfile.TarInfo) -> None:
        if info.sparse is not None:  # a few bytes could be a file that fills the disk
            raise AgentError(f"the guest sent {info.name!r} with holes, which its agent does not make")
        top, *rest = info.name.split("/")
        parts, fd = tuple(rest), -1
        known = parts[:-1] in self._modes if parts else info.isdir()
        if top != "." or not {"", ".", ".."}.isdisjoint(parts) or not known or len(parts) > _DEEPEST:
            raise AgentError(f"the guest sent the name {info.name!r}, which is not in a directory that it sent")
        mode = info.mode & 0o777
        try:
            above, name = (self._enter(parts[:-1]), parts[-1]) if parts else (None, self._target)
            if info.isdir():
                os.mkdir(name, 0o700, dir_fd=above)
                self._modes[parts] = mode
            elif info.issym():
                os.symlink(info.linkname, name, dir_fd=above)
            elif info.isreg():
                fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=above)
        except OSError as error:
            error.filename = "/".join((self._target, *parts))
            raise
        if fd >= 0:
            with open(fd, "wb") as file:
                contents = tar.extractfile(info)
                while contents is not None and (piece := contents.read(FRAME_MAX)):
                    file.write(piece)
                file.flush()
                os.fchmod(fd, mode)
                if 0 <= info.mtime < _NEWEST:
                    os.utime(fd, (info.mtime, info.mtime))

    def set_modes(self) -> None:
        if not self._modes:
            raise AgentError("the guest sent an archive without a directory")
        for parts, mode in reversed(self._modes.items()):
            os.fchmod(self._enter(parts), mode)
