# SPDX-License-Identifier: Apache-2.0
"""Files of a sandbox."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import posixpath
import stat
import struct

from vmm.closing import Closing
from vmm.config.option import check_type
from vmm.errors import ConfigError
from vmm.sandbox.channel import (
    F_CHANGE,
    F_DATA,
    F_DONE,
    F_ENTRY,
    F_FAILED,
    F_STARTED,
    FRAME_MAX,
    Channel,
    Deadline,
    Link,
    failure,
    frame,
    frames,
    out_of_turn,
)  # fmt: skip
from vmm.sandbox.errors import AgentError, SandboxGone

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import IO, Any, Literal, TypeAlias, overload

    from vmm.sandbox.channel import Parameter

    Data: TypeAlias = str | bytes | IO[str] | IO[bytes] | Iterable[str | bytes]

ENTRY = struct.Struct("<IIIIQq")
_TYPES = {stat.S_IFREG: "file", stat.S_IFDIR: "dir", stat.S_IFLNK: "symlink"}
# Of inotify(7).
_CHANGES = {
    0x4: "attributes", 0x8: "written", 0x40: "removed", 0x80: "created", 0x100: "created", 0x200: "removed",
    0x400: "removed",
}  # fmt: skip
_LOST = 0x4000  # IN_Q_OVERFLOW
DEFAULT_TIMEOUT = 60.0
_NO_LIMIT = 1e9
# How to open a file of the host that a guest may have in a mount: a link or a FIFO may be in its place by now.
READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_ENTRIES_MAX, _ENTRIES_SIZE = 1 << 20, 1 << 29  # of one directory, and bytes of them


def fields(data: bytes) -> tuple[Any, ...]:
    """The fields of an F_ENTRY frame: six numbers as agent/agent.h has them, the name, the target of a symbolic link.

    :raises AgentError: the frame cannot be one
    """
    name, end, target = data[ENTRY.size :].partition(b"\0")
    if not end or b"\0" in target:
        raise AgentError("the guest sent an entry that is cut short, or has a name that no file has")
    return *ENTRY.unpack_from(data), os.fsdecode(name), os.fsdecode(target)


class Entry:
    """A file of the guest, as its kernel describes it.

    :ivar name: its last part
    :ivar path: its whole path
    :ivar type: ``file``, ``dir``, ``symlink`` or ``other``
    :ivar size: bytes
    :ivar mode: permission bits
    :ivar uid: owner
    :ivar gid: group
    :ivar modified: seconds since 1970
    :ivar target: target of a symbolic link, or None
    """

    __slots__ = ("gid", "mode", "modified", "name", "path", "size", "target", "type", "uid")

    def __init__(self, directory: str, data: bytes) -> None:
        mode, self.uid, self.gid, _, self.size, changed, name, target = fields(data)
        if "/" in name or name in (".", ".."):
            raise AgentError("the guest sent a name that no file has")
        self.path = posixpath.join(directory, name) if name else directory
        self.name = posixpath.basename(self.path.rstrip("/")) or "/"
        self.type = _TYPES.get(stat.S_IFMT(mode), "other")
        self.mode = stat.S_IMODE(mode)
        self.modified = changed / 1e9
        self.target = target if self.type == "symlink" else None

    def __repr__(self) -> str:
        return f"Entry({self.path!r}, {self.type!r}, size={self.size}, mode={self.mode:#o})"


class Change:
    """A change in a watched directory.

    :ivar name: name of the file; ``""``: the directory itself
    :ivar kind: ``created``, ``written``, ``removed`` or ``attributes``
    """

    __slots__ = ("kind", "name")

    def __init__(self, name: str, kind: str) -> None:
        self.name = name
        self.kind = kind

    def __repr__(self) -> str:
        return f"Change({self.name!r}, {self.kind!r})"


class Files:
    """Files of a sandbox: ``sandbox.files``.

    A relative path begins in the home directory of `user`, by default root. Errors of the guest are raised as
    FileNotFoundError and the other OSErrors, with the guest's path; a user or group that the guest does not have as
    ConfigError. Each call may take `timeout` seconds.
    """

    def __init__(self, link: Link) -> None:
        self._link = link

    def _ask(
        self, verb: str, path: str, timeout: float, frames: Iterable[bytes] = (), **more: Parameter
    ) -> Iterator[tuple[int, memoryview]]:
        # The answer's frames before the last, each until the next.
        deadline, path = Deadline(timeout), os.fsdecode(path)  # raises if `path` cannot be a path
        doing = f"{verb} {path}"
        channel = self._link.take(deadline, doing)
        whole = False
        try:
            channel.request(deadline, doing, verb, path=path, **more)
            for frame in frames:
                channel.send(deadline, doing, frame)
            while True:
                kind, data = channel.read_view(deadline, doing)
                if kind in (F_DONE, F_FAILED):
                    whole = True
                    break
                yield kind, data
        except SandboxGone as error:
            raise self._link.explained(error) from None
        finally:
            if whole:
                self._link.keep(channel)
            else:
                channel.close()
        if kind == F_FAILED:
            raise _error(bytes(data), **more)

    def _do(self, verb: str, path: str, timeout: float, frames: Iterable[bytes] = (), **more: Parameter) -> None:
        for _ in self._ask(verb, path, timeout, frames, **more):
            raise out_of_turn(verb)

    def read_bytes(
        self, path: str, *, offset: int = 0, length: int | None = None, user: str | int | None = None,
        timeout: float = DEFAULT_TIMEOUT,
    ) -> bytes:  # fmt: skip
        """The contents of a file, or `length` bytes of it from `offset` on."""
        whole = io.BytesIO()  # gives what it holds without a copy
        for piece in self._pieces(path, offset, length, user, timeout):
            whole.write(piece)
        return whole.getvalue()

    def stream(
        self, path: str, *, offset: int = 0, length: int | None = None, user: str | int | None = None,
        timeout: float = DEFAULT_TIMEOUT,
    ) -> Iterator[bytes]:  # fmt: skip
        """The contents of a file in pieces of at most 256 KiB; `timeout` is for all of them."""
        yield from map(bytes, self._pieces(path, offset, length, user, timeout))

    def _pieces(
        self, path: str, offset: int, length: int | None, user: str | int | None, timeout: float
    ) -> Iterator[memoryview]:
        if offset < 0 or (length is not None and length < 0):
            raise ConfigError("offset, length", f"{offset}, {length}", "must be 0 or more")
        left = length
        for kind, data in self._ask("read", path, timeout, user=user, offset=offset, length=length):
            if kind != F_DATA:
                raise out_of_turn(f"read {path}")
            if left is not None and (left := left - len(data)) < 0:
                raise AgentError(f"read {path}: the guest sent more than {length} bytes")
            yield data

    if TYPE_CHECKING:

        @overload
        def read(self, path: str, format: Literal["text"] = ..., *, user: str | int | None = ...,
                 timeout: float = ...) -> str: ...  # fmt: skip
        @overload
        def read(self, path: str, format: Literal["bytes"], *, user: str | int | None = ...,
                 timeout: float = ...) -> bytes: ...  # fmt: skip

    def read(
        self, path: str, format: str = "text", *, user: str | int | None = None, timeout: float = DEFAULT_TIMEOUT
    ) -> str | bytes:
        """The contents of a file, as ``text`` (UTF-8) or ``bytes``."""
        if format not in ("text", "bytes"):
            raise ConfigError("format", format, "must be text or bytes")
        data = self.read_bytes(path, user=user, timeout=timeout)
        return data.decode() if format == "text" else data

    def write(
        self, path: str, data: Data, *, mode: int | None = None,
        append: bool = False, user: str | int | None = None, timeout: float = DEFAULT_TIMEOUT,
    ) -> None:  # fmt: skip
        """Make a file or replace its contents. Missing directories above it are made.

        :param data: text, bytes, an open file or pieces; text is written as UTF-8
        :param mode: permission bits; None: unchanged, and 0644 for a new file
        """
        mode = None if mode is None else _mode(mode)
        self._do("write", path, timeout, _data_frames(_pieces(data)), user=user, mode=mode, append=append, parents=True)

    def list(self, path: str, *, user: str | int | None = None, timeout: float = DEFAULT_TIMEOUT) -> list[Entry]:
        """The entries of a directory, by name."""
        return sorted(self._entries("list", path, timeout, user=user), key=lambda entry: entry.name)

    def stat(
        self, path: str, *, follow: bool = False, user: str | int | None = None, timeout: float = DEFAULT_TIMEOUT
    ) -> Entry:
        """The entry of one file; with `follow`, of the target of a symbolic link."""
        found = list(self._entries("stat", path, timeout, user=user, follow=follow))
        if len(found) != 1:
            raise AgentError(f"stat {path}: the guest sent {len(found)} entries")
        return found[0]

    get_info = stat

    def _entries(self, verb: str, path: str, timeout: float, **more: Parameter) -> Iterator[Entry]:
        count = size = 0
        path = os.fsdecode(path)
        for kind, data in self._ask(verb, path, timeout, (), **more):
            if kind != F_ENTRY:
                raise out_of_turn(f"{verb} {path}")
            count, size = count + 1, size + len(data)
            if count > _ENTRIES_MAX or size > _ENTRIES_SIZE:
                raise AgentError(f"{verb} {path}: the guest sent more than {_ENTRIES_MAX} entries, or too long ones")
            yield Entry(path, bytes(data))

    def exists(self, path: str, *, user: str | int | None = None, timeout: float = DEFAULT_TIMEOUT) -> bool:
        """Whether the file exists."""
        try:
            self.stat(path, follow=True, user=user, timeout=timeout)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def make_dir(
        self, path: str, *, parents: bool = True, user: str | int | None = None, timeout: float = DEFAULT_TIMEOUT
    ) -> None:
        """Make a directory; with `parents` also missing ones above it, and it may exist already."""
        self._do("mkdir", path, timeout, user=user, parents=parents)

    def remove(self, path: str, *, user: str | int | None = None, timeout: float = DEFAULT_TIMEOUT) -> None:
        """Remove a file, or a directory with its contents. Symbolic links are not followed."""
        self._do("remove", path, timeout, user=user)

    def rename(self, path: str, to: str, *, user: str | int | None = None, timeout: float = DEFAULT_TIMEOUT) -> None:
        """Move a file to another path, and replace a file there."""
        self._do("rename", path, timeout, user=user, to=os.fsdecode(to))

    def symlink(self, path: str, to: str, *, user: str | int | None = None, timeout: float = DEFAULT_TIMEOUT) -> None:
        """Make `path` a symbolic link to `to`."""
        self._do("symlink", path, timeout, user=user, to=os.fsdecode(to))

    def chmod(self, path: str, mode: int, *, user: str | int | None = None, timeout: float = DEFAULT_TIMEOUT) -> None:
        """Change permission bits."""
        self._do("chmod", path, timeout, user=user, mode=_mode(mode))

    def chown(self, path: str, owner: str, *, timeout: float = DEFAULT_TIMEOUT) -> None:
        """Change the owner: ``USER`` with its group, or ``USER:GROUP``, names or numbers."""
        self._do("chown", path, timeout, owner=owner)

    def copy_in(self, source: str, path: str, *, user: str | int | None = None, timeout: float | None = None) -> None:
        """Copy a file of the host, or a directory with all files, directories and links in it.

        Files that exist are replaced. Files of a directory that the copy does not have stay.

        :param path: the new name of `source`, not a directory to put it into
        :param timeout: seconds for all of it
        :raises OSError: `source` is a socket, a device or a FIFO; within a directory they are left out, as what is
            removed meanwhile
        """
        mode = os.lstat(source).st_mode
        if stat.S_IFMT(mode) not in _TYPES:
            raise _no_file(source)
        left = Deadline(timeout).left(f"copy {source}") or _NO_LIMIT
        if stat.S_ISLNK(mode):
            self.symlink(path, os.readlink(source), user=user, timeout=left)
        elif stat.S_ISDIR(mode):
            from vmm.sandbox.archive import pack

            self._do("put", path, left, pack(source), user=user, parents=True)
        else:
            with opened(source) as file:
                self.write(path, file, mode=stat.S_IMODE(mode) & 0o777, user=user, timeout=left)

    def copy_out(self, path: str, target: str, *, user: str | int | None = None, timeout: float | None = None) -> None:
        """Copy a file, or a directory with all files, directories and links in it, to the host.

        Links are copied as links, and nothing is written through one, whatever the guest says.

        A file that is at `target` stays as it is until all of a file is here to replace it.

        :param target: the new name of `path`, not a directory to put it into
        :param timeout: seconds for all of it
        :raises FileExistsError: `target` is a directory or a link, or it exists and `path` is not a file
        :raises OSError: `path` is a socket, a device or a FIFO; within a directory they are left out
        """
        deadline = Deadline(timeout)
        doing = f"copy {path}"
        entry = self.stat(path, user=user, timeout=deadline.left(doing) or _NO_LIMIT)
        if entry.type == "other":
            raise _no_file(path)
        if entry.type != "file" or not os.path.isfile(target) or os.path.islink(target):
            self._copy_out(entry, target, deadline, doing, user)
            return
        import tempfile

        new = tempfile.mktemp(prefix=".pyvmm-", dir=os.path.dirname(target) or ".")  # _copy_out makes it, or fails
        try:
            self._copy_out(entry, new, deadline, doing, user)
            os.replace(new, target)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(new)

    def _copy_out(self, entry: Entry, target: str, deadline: Deadline, doing: str, user: str | int | None) -> None:
        left = deadline.left(doing) or _NO_LIMIT
        if entry.type == "symlink":
            os.symlink(entry.target or "", target)
        elif entry.type == "dir":
            from vmm.sandbox.archive import unpack

            unpack(self._ask("get", entry.path, left, user=user), target)
        elif entry.type == "file":
            with open(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
                for piece in self._pieces(entry.path, 0, None, user, left):
                    file.write(piece)
                os.fchmod(file.fileno(), entry.mode & 0o777)

    def put_archive(
        self, path: str, data: Data, *, user: str | int | None = None, timeout: float = DEFAULT_TIMEOUT
    ) -> None:
        """Make in the directory `path` what a tar archive has. Missing directories are made.

        Files that exist are replaced, and other files stay. All files belong to `user`. Devices and FIFOs are left out.

        :param data: an archive without compression: bytes, an open file or pieces
        :raises OSError: `data` is not an archive, or has a sparse file (EBADMSG), a name has ``..`` (EINVAL), or a file
            cannot be made
        """
        from vmm.sandbox.archive import from_tar

        path = os.fsdecode(path)
        self._do("put", path, timeout, from_tar(path, _pieces(data)), user=user, parents=True)

    def get_archive(
        self, path: str, *, user: str | int | None = None, timeout: float = DEFAULT_TIMEOUT
    ) -> Iterator[bytes]:
        """A directory with all files, directories and links in it as a tar archive, in pieces. Names begin with ``./``.

        :raises OSError: `path` is not a directory, or a file cannot be read
        """
        from vmm.sandbox.archive import to_tar

        yield from to_tar(self._ask("get", path, timeout, user=user))

    def watch(self, path: str, *, user: str | int | None = None, timeout: float | None = None) -> Watch:
        """Changes in a directory from here on, as they happen: an iterator, which you close.

        It ends when the directory is removed, or its file system is unmounted. If more than the guest's kernel keeps
        happens before it is read, it raises an OSError (EOVERFLOW): changes were lost. Then it goes on.

        :param timeout: seconds until it ends by CommandTimeout
        """
        deadline, doing = Deadline(timeout), f"watch {path}"
        channel = self._link.connect(deadline, doing)
        try:
            channel.request(deadline, doing, "watch", path=os.fsdecode(path), user=user)
            kind, data = channel.read(deadline, doing)
            if kind == F_FAILED:
                raise _error(data, user=user)
            if kind != F_STARTED:
                raise out_of_turn(doing)
        except BaseException:
            channel.close()
            raise
        return Watch(self._link, channel, deadline, path)


class Watch(Closing):
    """Changes in a directory, one after the other; a context manager. Made by ``Files.watch``."""

    def __init__(self, link: Link, channel: Channel, deadline: Deadline, path: str) -> None:
        self._link = link
        self._channel = channel
        self._deadline = deadline
        self._path = path
        self._more: list[Change] = []
        self._closed = False

    def __iter__(self) -> Watch:
        return self

    def __next__(self) -> Change:
        doing = f"watch {self._path}"
        while not self._more:
            if self._closed:
                raise StopIteration
            try:
                kind, data = self._channel.read(self._deadline, doing)
            except SandboxGone as error:
                if self._closed:
                    raise StopIteration from None
                raise self._link.explained(error) from None
            if kind == F_DONE:
                self.close()
                raise StopIteration
            if kind != F_CHANGE or len(data) < 4:
                raise out_of_turn(doing)
            (mask,) = struct.unpack_from("<I", data)
            if mask & _LOST:
                raise OSError(errno.EOVERFLOW, "changes were lost: too many happened before they were read", self._path)
            self._more = [Change(os.fsdecode(data[4:]), what) for bit, what in _CHANGES.items() if mask & bit]
        return self._more.pop(0)

    def close(self) -> None:
        """Watch no more: iteration ends, in another thread, too. Idempotent."""
        self._closed = True
        self._channel.close()


def opened(path: str, above: int | None = None) -> IO[bytes]:
    """A file of the host, by ``READ``; `above` is the directory that `path` begins in."""
    # Python closes a directory that is there by now only if the descriptor is its own.
    return open(path, "rb", opener=lambda path, _: os.open(path, READ, dir_fd=above))


def _no_file(path: str) -> OSError:
    return OSError(errno.EINVAL, "is not a file, directory or link", path)


def _error(data: bytes, **parameters: Parameter) -> OSError | ConfigError:
    number, what = failure(data)
    for key in ("user", "owner"):
        if number == errno.EINVAL and what == f"{key}={parameters.get(key)}":
            return ConfigError(key, parameters[key], "the guest does not have this user or group")
    return OSError(number, os.strerror(number), what)


def _mode(mode: int) -> int:
    check_type("Files", "mode", "int", mode)
    if not 0 <= mode <= 0o7777:
        raise ConfigError("mode", f"{mode:#o}", "must be 0 to 0o7777")
    return mode


def _pieces(data: Data) -> Iterable[bytes | memoryview]:
    pieces: Iterable[str | bytes | memoryview]
    if isinstance(data, (str, bytes, bytearray, memoryview)):
        pieces = (data,)
    elif hasattr(data, "read"):
        pieces = iter(lambda: data.read(FRAME_MAX) or b"", b"")  # of a text file the end is an empty text
    elif hasattr(data, "__iter__"):
        pieces = data
    else:
        raise TypeError(f"data of a file must be text, bytes, an open file or pieces of them, not {data!r}")
    return (piece.encode() if isinstance(piece, str) else piece for piece in pieces)


def _data_frames(pieces: Iterable[bytes | memoryview]) -> Iterator[bytes]:
    for piece in pieces:
        yield from frames(F_DATA, piece)
    yield frame(F_DONE)
