# SPDX-License-Identifier: Apache-2.0
"""Files by E2B's names: ``sandbox.files``."""

from __future__ import annotations

import contextlib
import posixpath
import stat
import threading
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum

from vmm import threads
from vmm.sandbox.e2b.errors import InvalidArgumentException, SandboxException, translated
from vmm.sandbox.files import DEFAULT_TIMEOUT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any, Literal, overload

    from vmm.sandbox.files import Data, Entry, Files, Watch


class FileType(Enum):
    """What a file is."""

    FILE = "file"
    DIR = "dir"
    SYMLINK = "symlink"


class FilesystemEventType(Enum):
    """What happened to a file."""

    CHMOD = "chmod"
    CREATE = "create"
    REMOVE = "remove"
    RENAME = "rename"
    WRITE = "write"


_EVENTS = {"attributes": "chmod", "created": "create", "removed": "remove", "written": "write"}


@dataclass
class WriteInfo:
    """What is at a path; `type` is None unless it is a file, a directory or a link."""

    name: str
    type: FileType | None
    path: str


@dataclass
class EntryInfo(WriteInfo):
    """A file, as the guest's kernel described it; owner and group by the names that the guest has for them."""

    size: int
    mode: int
    permissions: str
    owner: str
    group: str
    modified_time: datetime
    symlink_target: str | None = None


@dataclass
class FilesystemEvent:
    """Something that happened in a directory."""

    name: str
    type: FilesystemEventType
    entry: EntryInfo | None = None


class WatchHandle:
    """A directory that is watched."""

    def __init__(
        self, changes: Watch, on_event: Callable[[FilesystemEvent], object] | None = None,
        on_exit: Callable[[BaseException | None], object] | None = None,
    ) -> None:  # fmt: skip
        self._changes = changes
        self._events: list[FilesystemEvent] = []
        self._lock = threading.Lock()
        self._stopped = False
        self._why: BaseException | None = None
        self._on_event = on_event or self._add
        self._on_exit = on_exit
        threads.spawn(None, "watch", self._watch)

    def _add(self, event: FilesystemEvent) -> None:
        with self._lock:
            self._events.append(event)

    def _watch(self) -> None:
        try:
            with translated():
                for change in self._changes:
                    self._on_event(FilesystemEvent(change.name, FilesystemEventType(_EVENTS[change.kind])))
        except Exception as error:  # of `on_event`, too
            self._why = error
            self._changes.close()
        if self._on_exit is not None:
            self._on_exit(self._why)

    def get_new_events(self, request_timeout: float | None = None) -> list[FilesystemEvent]:
        """What has happened since the last call.

        :raises SandboxException: the watch was stopped, or has ended by an error
        """
        if self._stopped:
            raise SandboxException("the watch was stopped")
        why = self._why  # first, as the events before it are all there then
        with self._lock:
            events, self._events = self._events, []
        if why is not None and not events:
            raise why
        return events

    def stop(self, request_timeout: float | None = None) -> None:
        """Watch no more; idempotent."""
        self._stopped = True
        self._changes.close()


class Filesystem:
    """Files: ``sandbox.files``.

    `request_timeout` is in seconds, 60 if None; 0: no limit. `gzip`, `use_octet_stream` and `stream_idle_timeout` are
    for HTTP, and have no effect.
    """

    def __init__(self, files: Files) -> None:
        self._files = files

    if TYPE_CHECKING:
        # fmt: off
        @overload
        def read(self, path: str, format: Literal["text"] = ..., user: str | None = ...,
                 request_timeout: float | None = ..., gzip: bool = ..., stream_idle_timeout: float | None = ...,
                 ) -> str: ...
        @overload
        def read(self, path: str, format: Literal["bytes"], user: str | None = ...,
                 request_timeout: float | None = ..., gzip: bool = ..., stream_idle_timeout: float | None = ...,
                 ) -> bytearray: ...
        @overload
        def read(self, path: str, format: Literal["stream"], user: str | None = ...,
                 request_timeout: float | None = ..., gzip: bool = ..., stream_idle_timeout: float | None = ...,
                 ) -> Iterator[bytes]: ...
        # fmt: on

    def read(
        self, path: str, format: str = "text", user: str | None = None, request_timeout: float | None = None,
        gzip: bool = False, stream_idle_timeout: float | None = None,
    ) -> str | bytearray | Iterator[bytes]:  # fmt: skip
        """What is in a file: as ``text`` (what is not UTF-8 is replaced), ``bytes`` or ``stream``, which is in pieces.

        :raises FileNotFoundException: the file does not exist
        """
        if format not in ("text", "bytes", "stream"):
            raise InvalidArgumentException(f"format {format}: must be text, bytes or stream")
        limit = _seconds(request_timeout)
        if format == "stream":
            pieces = self._files.stream(path, user=user, timeout=limit)
            with translated():  # an error is told here, not by the first piece
                first = next(pieces, b"")
            return _stream(first, pieces)
        with translated():
            data = self._files.read_bytes(path, user=user, timeout=limit)
        return data.decode(errors="replace") if format == "text" else bytearray(data)

    def write(
        self, path: str, data: Data, user: str | None = None, request_timeout: float | None = None, gzip: bool = False,
        use_octet_stream: bool | None = None, metadata: dict[str, str] | None = None,
    ) -> WriteInfo:  # fmt: skip
        """Make a file, or replace what is in it; directories above it are made.

        :param metadata: refused: files have none here
        """
        if metadata:
            raise InvalidArgumentException("metadata: is not supported here")
        limit = _seconds(request_timeout)
        with translated():
            self._files.write(path, data, user=user, timeout=limit)
            entry = self._files.stat(path, follow=True, user=user, timeout=limit)
        return WriteInfo(entry.name, _type(entry), entry.path)

    def write_files(
        self, files: Sequence[Any], user: str | None = None, request_timeout: float | None = None, gzip: bool = False,
        use_octet_stream: bool | None = None, metadata: dict[str, str] | None = None,
    ) -> list[WriteInfo]:  # fmt: skip
        """Likewise of each ``{"path": ..., "data": ...}``."""
        return [self.write(each["path"], each["data"], user, request_timeout, metadata=metadata) for each in files]

    def exists(self, path: str, user: str | None = None, request_timeout: float | None = None) -> bool:
        """Whether there is such a file."""
        with translated():
            return self._files.exists(path, user=user, timeout=_seconds(request_timeout))

    def get_info(self, path: str, user: str | None = None, request_timeout: float | None = None) -> EntryInfo:
        """One file; of a symbolic link the link.

        :raises FileNotFoundException: the file does not exist
        """
        with translated():
            return _infos(self._files, [self._files.stat(path, user=user, timeout=_seconds(request_timeout))])[0]

    def remove(self, path: str, user: str | None = None, request_timeout: float | None = None) -> None:
        """Remove a file, or a directory with all that is in it; it need not exist."""
        with translated(), contextlib.suppress(FileNotFoundError):
            self._files.remove(path, user=user, timeout=_seconds(request_timeout))

    def rename(
        self, old_path: str, new_path: str, user: str | None = None, request_timeout: float | None = None
    ) -> EntryInfo:
        """Give a file another path, in place of what is there; directories above that are made."""
        with translated():
            if above := posixpath.dirname(new_path):
                self._files.make_dir(above, user=user, timeout=_seconds(request_timeout))
            self._files.rename(old_path, new_path, user=user, timeout=_seconds(request_timeout))
        return self.get_info(new_path, user, request_timeout)

    def make_dir(self, path: str, user: str | None = None, request_timeout: float | None = None) -> bool:
        """Make a directory and those above it; whether it was not there.

        :raises InvalidArgumentException: what is there is not a directory
        """
        limit = _seconds(request_timeout)
        with translated():
            there = self._files.exists(path, user=user, timeout=limit)
            try:
                self._files.make_dir(path, user=user, timeout=limit)
            except FileExistsError as error:
                raise InvalidArgumentException(str(error)) from error
        return not there

    def watch_dir(
        self, path: str, user: str | None = None, request_timeout: float | None = None, recursive: bool = False,
        include_entry: bool = False, allow_network_mounts: bool = False,
    ) -> WatchHandle:  # fmt: skip
        """Watch a directory.

        :param recursive: refused, as `include_entry` is: the directory itself is watched, and its names told
        """
        refuse_watch(recursive, include_entry)
        with translated():
            return WatchHandle(self._files.watch(path, user=user))

    def list(
        self, path: str, depth: int | None = 1, user: str | None = None, request_timeout: float | None = None
    ) -> list[EntryInfo]:
        """What is in a directory, and with a `depth` of more than 1 in those within it."""
        if depth is not None and depth < 1:
            raise InvalidArgumentException(f"depth {depth}: must be at least 1")
        limit, found = _seconds(request_timeout), []
        with translated():
            ahead = [(path, depth or 1)]
            while ahead:
                directory, deep = ahead.pop(0)
                for entry in self._files.list(directory, user=user, timeout=limit):
                    found.append(entry)
                    if entry.type == "dir" and deep > 1:
                        ahead.append((entry.path, deep - 1))
            return _infos(self._files, found)


def _infos(files: Files, entries: list[Entry]) -> list[EntryInfo]:
    owners = _names(files, "/etc/passwd") if any(entry.uid for entry in entries) else {}
    groups = _names(files, "/etc/group") if any(entry.gid for entry in entries) else {}
    return [
        EntryInfo(
            entry.name, _type(entry), entry.path, entry.size, entry.mode, stat.filemode(entry.mode)[1:],
            owners.get(entry.uid, str(entry.uid)) if entry.uid else "root",
            groups.get(entry.gid, str(entry.gid)) if entry.gid else "root",
            datetime.fromtimestamp(entry.modified, UTC), entry.target,
        )
        for entry in entries
    ]  # fmt: skip


def _names(files: Files, path: str) -> dict[int, str]:
    # Of users or groups, by number; an image need not have any.
    try:
        lines = files.read_bytes(path, length=1 << 20).decode(errors="replace").splitlines()
    except OSError:
        return {}
    found: dict[int, str] = {}
    for line in lines:
        name, _, number, *_ = (*line.split(":"), "", "", "")
        if number.isascii() and number.isdigit() and len(number) < 11:
            found.setdefault(int(number), name)
    return found


def refuse_watch(recursive: bool, include_entry: bool) -> None:
    """Refuse what cannot be watched here."""
    for name, value in (("recursive", recursive), ("include_entry", include_entry)):
        if value:
            raise InvalidArgumentException(f"{name}: is not supported: a watch covers one directory and tells names")


def _seconds(timeout: float | None) -> float:
    return DEFAULT_TIMEOUT if timeout is None else timeout or 1e9


def _type(entry: Entry) -> FileType | None:
    return FileType(entry.type) if entry.type != "other" else None


def _stream(first: bytes, pieces: Iterator[bytes]) -> Iterator[bytes]:
    if first:
        yield first
    with translated():
        yield from pieces
