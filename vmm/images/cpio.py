# SPDX-License-Identifier: Apache-2.0
"""An initramfs archive: cpio, "newc" format, the same bytes for the same content.

Source: kernel Documentation/driver-api/early-userspace/buffer-format.rst.
"""

from __future__ import annotations

import posixpath
import stat
from typing import NamedTuple

_NAME_MAX = 4096  # kernel init/initramfs.c do_header() skips names longer than PATH_MAX


class _Entry(NamedTuple):
    mode: int
    data: bytes
    device: tuple[int, int]


class Archive:
    """A tree of files to be written as one archive; owner root, time zero, parent directories made as needed.

    Paths are absolute in the guest; a leading slash may be left out. An entry added again replaces the first,
    so that a caller can override a file. Entries come out sorted by path: directories before what is in them.
    """

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}

    def __contains__(self, path: str) -> bool:
        return _normal(path) in self._entries

    def directory(self, path: str) -> None:
        """Add a directory.

        :raises ValueError: the path exists, or one above it is not a directory
        """
        self._add(path, stat.S_IFDIR | 0o755)

    def file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """Add a regular file that holds ``data``.

        :raises ValueError: as ``directory``, or the file is 4 GiB or more
        """
        if len(data) >> 32:
            raise ValueError(f"{path}: {len(data)} bytes do not fit in the archive, the limit is 4 GiB - 1")
        self._add(path, stat.S_IFREG | mode, data)

    def symlink(self, path: str, target: str) -> None:
        """Add a symbolic link to ``target``, which need not exist."""
        self._add(path, stat.S_IFLNK | 0o777, target.encode())

    def console(self) -> None:
        """Add /dev/console, which the kernel opens for /init before devtmpfs is mounted."""
        self._add("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))

    def to_bytes(self) -> bytes:
        """Return the archive, padded to 512 bytes as cpio does."""
        out = bytearray()
        for inode, (path, entry) in enumerate(sorted(self._entries.items()), start=1):
            links = 2 if stat.S_ISDIR(entry.mode) else 1
            _write(out, path, inode, entry.mode, links, entry.data, entry.device)
        _write(out, "TRAILER!!!", 0, 0, 1, b"", (0, 0))
        return bytes(out) + bytes(-len(out) % 512)

    def _add(self, path: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        name = _normal(path)
        if not name or len(name.encode()) >= _NAME_MAX:
            raise ValueError(f"{path!r} is not a path that an archive can hold")
        parent = posixpath.dirname(name)
        if parent and parent not in self._entries:
            self.directory(parent)
        if parent and not stat.S_ISDIR(self._entries[parent].mode):
            raise ValueError(f"{path}: /{parent} is not a directory")
        old = self._entries.get(name)
        if old and stat.S_ISDIR(old.mode) != stat.S_ISDIR(mode):
            raise ValueError(f"{path}: a directory and a file of that name")
        self._entries[name] = _Entry(mode, data, device)


def _normal(path: str) -> str:
    return posixpath.normpath("/" + path).lstrip("/")


def _write(out: bytearray, path: str, inode: int, mode: int, links: int, data: bytes, device: tuple[int, int]) -> None:
    name = path.encode() + b"\0"
    # ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
    fields = (inode, mode, 0, 0, links, 0, len(data), 0, 0, *device, len(name), 0)
    out += b"070701" + b"".join(b"%08X" % field for field in fields) + name
    out += bytes(-len(out) % 4)
    out += data
    out += bytes(-len(out) % 4)
