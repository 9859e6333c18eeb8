# SPDX-License-Identifier: Apache-2.0
"""The layers of a container image, merged into one tree of names; nothing is unpacked.

A tree says of each file where its bytes are: in which layer's tar, and at which offset. Names are followed inside the
tree alone, so no layer reaches a file of the host.

Source: OCI Image Format Specification 1.1, layer.md: "Applying Changesets", "Whiteouts".
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, Self, cast

from vmm.errors import line
from vmm.images.host import PullError

MAX_ENTRIES = 1 << 20
MAX_LINKS = 40  # symbolic links in one path, as Linux has it
MAX_PATH = 4095  # bytes
_MAX_HEADER = 1 << 20  # bytes of the extended headers of a member: names and attributes; and of where its pieces are
_MAX_COMMON = 16  # keys of headers that are about all members: each member gets them
_WEIGHT = 256  # bytes of names and attributes that take as much memory, or time, as a file
_EXTENDED = (
    tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK,
)  # fmt: skip
DAMAGED = (tarfile.TarError, ValueError, OverflowError, EOFError, RecursionError, IndexError)  # by tarfile
_WHITEOUT, _OPAQUE = ".wh.", ".wh..wh..opq"
_XATTR = "SCHILY.xattr."
# What a squashfs can hold. An overlay's own marks would mean something else below another overlay.
_XATTRS = ("user.", "trusted.", "security.")
_NO_XATTRS = ("trusted.overlay.", "user.overlay.")
_KINDS = (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)


class Inode:
    """What one or more names stand for: its header as it will be written, and where its bytes are."""

    __slots__ = ("header", "source")

    def __init__(self, header: tarfile.TarInfo) -> None:
        self.header = header
        self.source: tuple[tarfile.TarFile, tarfile.TarInfo] | None = None  # the layer, and its member

    def open(self) -> BinaryIO:
        """The bytes of a file; of no bytes where it has none."""
        if self.source is None:
            return io.BytesIO()
        archive, member = self.source
        return cast("BinaryIO", archive.extractfile(member))


class Node:
    """A name in the tree."""

    __slots__ = ("children", "inode", "layer")

    def __init__(self, inode: Inode, layer: int) -> None:
        self.inode = inode
        self.layer = layer
        self.children: dict[str, Node] | None = {} if inode.header.isdir() else None


class _Map:
    # What tarfile reads a sparse file's map from, as if it was a TarFile, too.

    def __init__(self, archive: tarfile.TarFile) -> None:
        self.fileobj = self
        self.offset = 0
        self._file = cast("BinaryIO", archive.fileobj)
        self._left = _MAX_HEADER
        self.tell = self._file.tell

    def read(self, size: int) -> bytes:
        self._left -= size
        if self._left < 0:
            raise PullError(f"a sparse map of more than {_MAX_HEADER} bytes")
        return self._file.read(size)


class Header(tarfile.TarInfo):
    """A header of a tar whose maker is not trusted. What tarfile would read whole has limits.

    ``pax_headers`` has only the attributes that a squashfs can hold.

    :raises ReadError: a header is damaged, which tarfile takes for the end of the archive
    :raises PullError: the extended headers of a member, or the map of a sparse file, are longer than 1 MiB; a member
        ends before its beginning, where tarfile would go on for ever
    """

    __slots__ = ()

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if buf.strip(b"\0"):
                raise tarfile.ReadError(str(error)) from None
            raise  # the end

    # TarInfo's own ways to read a header, which no stub has.

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        ahead = 0
        if self.type in _EXTENDED:  # tarfile goes on to the next header before it forgets this one
            ahead = self.size + getattr(archive, "ahead", 0)
            if self.size < 0 or ahead > _MAX_HEADER:
                raise PullError(f"an extended header of {ahead} bytes; at most {_MAX_HEADER} are read")
        archive.ahead = ahead  # type: ignore[attr-defined]  # ours, kept with the archive
        if len(archive.pax_headers) > _MAX_COMMON:
            raise PullError(f"a header for all files with more than {_MAX_COMMON} keys")
        member = cast("tarfile.TarInfo", super()._proc_member(archive))  # type: ignore[misc]
        if archive.offset < member.offset_data:
            raise PullError(f"{line(member.name)} has {archive.offset - member.offset_data} bytes")
        return member

    def _proc_sparse(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        limited = _Map(archive)
        super()._proc_sparse(limited)  # type: ignore[misc]
        archive.offset = limited.offset
        return self

    def _proc_gnusparse_10(self, next: tarfile.TarInfo, headers: dict[str, str], archive: tarfile.TarFile) -> None:
        super()._proc_gnusparse_10(next, headers, _Map(archive))  # type: ignore[misc]

    def _apply_pax_info(self, pax_headers: dict[str, str], encoding: str, errors: str) -> None:
        super()._apply_pax_info(pax_headers, encoding, errors)  # type: ignore[misc]
        self.pax_headers = {key: value for key, value in pax_headers.items() if _is_attribute(key)}


def _is_attribute(key: str) -> bool:
    name = key.removeprefix(_XATTR)
    return name != key and name.startswith(_XATTRS) and not name.startswith(_NO_XATTRS)


class Tree:
    """The merged tree; layers are added from the lowest to the highest.

    :param limit: bytes of all files in it
    """

    def __init__(self, limit: int) -> None:
        self.root = Node(Inode(_implicit()), -1)
        self._limit = limit
        self._bytes = 0
        self._entries = 0
        self._layer = -1

    def add(self, what: str, tar: BinaryIO, size: int) -> None:
        """Apply a layer.

        :param what: its name in an error
        :param tar: the uncompressed archive, which stays open as long as the tree is used
        :raises PullError: the layer is damaged, or has an entry that a file system cannot hold
        """
        self._layer += 1
        if not size:
            return
        try:
            archive = tarfile.open(fileobj=tar, mode="r:", tarinfo=Header, errors="surrogateescape")
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # it would keep all
                self._count(_weight(member))
                if member.isreg() and member.offset_data + _stored(member) > size:
                    raise PullError(f"it ends in the middle of {line(member.name)}")
                self._apply(archive, member)
                # Only where its bytes are is needed from here on.
                member.name = member.linkname = ""
                member.pax_headers = {}
        except PullError as error:
            raise PullError(f"{what}: {error}") from None
        except DAMAGED as error:
            raise PullError(f"{what} is not a valid tar archive: {line(error)}") from None

    def walk(self) -> Iterator[tuple[str, Inode]]:
        """Yield every name below the root, without a slash in front, and what it stands for; a directory first.

        :raises PullError: the names are too long together: by links a short name in a layer is one that is long here
        """
        pending = [("", self.root)]
        left = MAX_ENTRIES * _WEIGHT
        while pending:
            path, node = pending.pop()
            if path:
                yield path, node.inode
            for name in sorted(node.children or (), reverse=True):
                pending.append((f"{path}/{name}" if path else name, (node.children or {})[name]))
                left -= len(pending[-1][0])
                if left < 0:
                    raise PullError(f"the image has names of more than {MAX_ENTRIES * _WEIGHT} bytes")

    def read(self, path: str, limit: int = 1 << 20) -> bytes:
        """Return a small file's bytes; empty if there is no such file."""
        node = self._find(_parts(path))
        if node is None:
            return b""
        with node.inode.open() as file:
            return file.read(limit)

    def _apply(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        parts = _parts(member.name)
        if not parts:
            if member.isdir():
                self.root.inode = Inode(_header(member))
            return
        name = parts[-1]
        if name.startswith(_WHITEOUT):
            # they hide what is in the layers below, and nothing of their own
            parent = self._find(parts[:-1])
            if parent is None or parent.children is None:
                return
            if name == _OPAQUE:
                for child in list(parent.children):
                    self._hide(parent.children, child)
            elif not name.startswith(".wh..wh.") and name[4:] in parent.children:
                self._hide(parent.children, name[4:])
            return
        above = self._find(parts[:-1], make=True)
        if above is None or above.children is None:
            raise PullError(f"{line('/'.join(parts[:-1]))} is not a directory, but has files in it")
        siblings = above.children
        if member.islnk():
            target = self._find(_parts(member.linkname), follow=False)
            if target is None or target.children is not None:
                raise PullError(
                    f"{line(member.name)} is a hard link to {line(member.linkname)}, which is not a file in it"
                )
            siblings[name] = Node(target.inode, self._layer)
            return
        inode = Inode(_header(member))
        if member.isreg():
            self._bytes += member.size
            if self._bytes > self._limit:
                raise PullError(f"its files are larger than {self._limit >> 20} MiB")
            inode.source = (archive, member) if member.size else None
        there = siblings.get(name)
        if there is not None and there.children is not None and member.isdir():
            there.inode, there.layer = inode, self._layer
        else:
            siblings[name] = Node(inode, self._layer)

    def _count(self, weight: int = 1) -> None:
        self._entries += weight
        if self._entries > MAX_ENTRIES:
            raise PullError(f"the image has more than {MAX_ENTRIES} files")

    def _hide(self, siblings: dict[str, Node], name: str) -> None:
        # a name of a lower layer goes, with all below it that this layer did not bring
        node = siblings[name]
        for child in list(node.children or ()):
            self._hide(node.children or {}, child)
        if node.layer < self._layer and not node.children:
            del siblings[name]

    def _find(self, parts: list[str], *, follow: bool = True, make: bool = False) -> Node | None:
        # as a process whose root the tree is would; a dangling link's target is made, too
        pending = parts[::-1]
        trail = [self.root]
        links = 0
        while pending:
            name = pending.pop()
            if name == "..":
                trail = trail[:-1] or [self.root]
                continue
            children = trail[-1].children
            if children is None:
                return None
            node = children.get(name)
            if node is None:
                if not make:
                    return None
                self._count()
                node = children[name] = Node(Inode(_implicit()), self._layer)
            if node.inode.header.issym() and (pending or follow):
                links += 1
                if links > MAX_LINKS:
                    raise PullError(f"{line('/'.join(parts))} has more than {MAX_LINKS} symbolic links in it")
                target = node.inode.header.linkname
                self._count(len(target) // _WEIGHT)  # or a short name could be hours of work
                if target.startswith("/"):
                    trail = [self.root]
                pending += [part for part in target.split("/") if part not in ("", ".")][::-1]
            else:
                trail.append(node)
        return trail[-1]


def _parts(path: str) -> list[str]:
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise PullError(f"the name {line(path)} contains ..")
    if "\0" in path or len(path) > MAX_PATH or any(len(part.encode(errors="surrogateescape")) > 255 for part in parts):
        raise PullError(f"the name {line(path)} cannot be a file name")
    return parts


def _stored(member: tarfile.TarInfo) -> int:
    # bytes in the archive; of a sparse file only the pieces are there
    if member.sparse is None:
        return member.size
    pieces: list[tuple[int, int]] = member.sparse  # type: ignore[assignment]
    pieces = [piece for piece in pieces if piece[1]]
    at = 0
    for offset, size in pieces:
        if not at <= offset <= offset + size <= member.size:
            raise PullError(f"{line(member.name)} has a damaged sparse map")
        at = offset + size
    member.sparse = pieces  # type: ignore[assignment]
    return sum(size for _, size in pieces)


def _weight(member: tarfile.TarInfo) -> int:
    # as how many files it counts: what is kept of it takes memory
    attributes = sum(len(key) + len(value) for key, value in member.pax_headers.items())
    pieces = len(member.sparse or ())
    return 1 + len(member.pax_headers) + pieces + (len(member.name) + len(member.linkname) + attributes) // _WEIGHT


def _header(member: tarfile.TarInfo) -> tarfile.TarInfo:
    # numbers as a squashfs has them; owners by number alone
    if not (member.isreg() or member.type in _KINDS):
        raise PullError(f"{line(member.name)} has an unknown file type: {member.type!r}")
    if member.size < 0:
        raise PullError(f"{line(member.name)} has {member.size} bytes")
    header = tarfile.TarInfo()
    header.type = tarfile.REGTYPE if member.isreg() else member.type
    header.mode = member.mode & 0o7777
    header.mtime = min(max(int(member.mtime), 0), 0xFFFFFFFF)
    header.uid, header.gid = member.uid, member.gid
    if not (0 <= header.uid < 1 << 32 and 0 <= header.gid < 1 << 32):
        raise PullError(f"{line(member.name)} has the owner {header.uid}:{header.gid}")
    if member.isreg():
        header.size = member.size
    if member.issym():
        header.linkname = member.linkname
        if not member.linkname or "\0" in member.linkname or len(member.linkname) > MAX_PATH:
            raise PullError(f"{line(member.name)} is a symbolic link to an invalid name")
    if member.ischr() or member.isblk():
        header.devmajor, header.devminor = member.devmajor, member.devminor
        if not (0 <= header.devmajor < 1 << 12 and 0 <= header.devminor < 1 << 20):
            raise PullError(f"{line(member.name)} has the device number {header.devmajor}:{header.devminor}")
    header.pax_headers = member.pax_headers
    return header


def _implicit() -> tarfile.TarInfo:
    # of a directory that no layer has, but a file in it
    header = tarfile.TarInfo()
    header.type, header.mode = tarfile.DIRTYPE, 0o755
    return header
