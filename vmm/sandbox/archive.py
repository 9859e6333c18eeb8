# SPDX-License-Identifier: Apache-2.0
"""Directories as tar archives: pack one of the host for a sandbox, and unpack what a sandbox sends."""

from __future__ import annotations

import errno
import os
import stat
import tarfile
from typing import cast

from vmm.images.host import PullError
from vmm.images.layers import DAMAGED, Header
from vmm.sandbox.channel import FRAME_MAX
from vmm.sandbox.errors import AgentError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Any, BinaryIO

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
    for piece in _members(directory, "."):
        waiting += piece
        if len(waiting) >= FRAME_MAX:
            yield bytes(waiting)
            waiting.clear()
    yield bytes(waiting) + bytes(2 * _BLOCK)


def _members(path: str, name: str) -> Iterator[bytes]:
    if name.count("/") > _DEEPEST:
        raise OSError(errno.ELOOP, f"has directories nested more than {_DEEPEST} deep", path)
    status = os.lstat(path)
    kind = _TYPES.get(stat.S_IFMT(status.st_mode))
    if kind is None:
        return
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.mtime = kind, stat.S_IMODE(status.st_mode) & 0o777, int(status.st_mtime)
    if kind == tarfile.SYMTYPE:
        info.linkname = os.readlink(path)
        yield _header(info)
    elif kind == tarfile.REGTYPE:
        with open(path, "rb") as file:
            info.size = os.fstat(file.fileno()).st_size
            yield _header(info)
            yield from _contents(file, info.size)
    else:
        mode, info.mode = info.mode, info.mode | stat.S_IRWXU  # so that its owner can make files in it
        yield _header(info)
        for each in sorted(os.listdir(path)):
            yield from _members(os.path.join(path, each), f"{name}/{each}")
        if mode != info.mode:
            info.mode = mode
            yield _header(info)


def _header(info: tarfile.TarInfo) -> bytes:
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def _contents(file: BinaryIO, size: int) -> Iterator[bytes]:
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
    modes: dict[str, int] = {}  # of the directories that were made
    try:
        with tarfile.open(
            fileobj=cast("Any", source), mode="r|", tarinfo=Header, errors="surrogateescape", bufsize=FRAME_MAX
        ) as tar:
            for info in tar:
                tar.members.clear()  # type: ignore[attr-defined]  # it keeps all, of an archive without end, too
                _make(tar, info, target, modes)
        while source.read(FRAME_MAX):
            pass
    except (PullError, *DAMAGED) as error:
        raise AgentError(f"the guest sent no archive: {error}") from None
    if not modes:
        raise AgentError("the guest sent an archive without a directory")
    for path, mode in reversed(modes.items()):
        os.chmod(path, mode)


def _make(tar: tarfile.TarFile, info: tarfile.TarInfo, target: str, modes: dict[str, int]) -> None:
    if info.sparse is not None:  # a few bytes could be a file that fills the disk
        raise AgentError(f"the guest sent {info.name!r} with holes, which its agent does not make")
    top, *parts = info.name.split("/")
    path = "/".join((target, *parts))
    above = path.rpartition("/")[0]
    # Each directory was made here, so nothing is written through a link that the guest sent.
    if top != "." or not {"", ".", ".."}.isdisjoint(parts) or (parts and above not in modes) or len(parts) > _DEEPEST:
        raise AgentError(f"the guest sent the name {info.name!r}, which is not in a directory that it sent")
    mode = info.mode & 0o777
    if info.isdir():
        os.mkdir(path, 0o700)
        modes[path] = mode
    elif info.issym():
        os.symlink(info.linkname, path)
    elif info.isreg():
        contents = tar.extractfile(info)
        how = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with open(os.open(path, how, 0o600), "wb") as file:
            while contents is not None and (piece := contents.read(FRAME_MAX)):
                file.write(piece)
            file.flush()
            os.fchmod(file.fileno(), mode)
            if 0 <= info.mtime < _NEWEST:
                os.utime(file.fileno(), (info.mtime, info.mtime))
