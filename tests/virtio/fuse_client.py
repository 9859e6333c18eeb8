# SPDX-License-Identifier: Apache-2.0
"""A FUSE client for the tests: what a guest's kernel sends to a virtio-fs device, through its real rings."""

from __future__ import annotations

import errno
import os
import select
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from virtio.fs.device import ShareDevice
from virtio.mmio import VirtioMmio
from virtio.testing import Allocator, Buffer, MmioDriver
from vmm.irq import IrqLine
from vmm.memory import GuestMemory

# linux/fuse.h
LOOKUP, FORGET, GETATTR, SETATTR, READLINK, SYMLINK, MKNOD, MKDIR, UNLINK, RMDIR = 1, 2, 3, 4, 5, 6, 8, 9, 10, 11
RENAME, LINK, OPEN, READ, WRITE, STATFS, RELEASE, FSYNC = 12, 13, 14, 15, 16, 17, 18, 20
SETXATTR, GETXATTR, LISTXATTR, REMOVEXATTR, FLUSH, INIT, OPENDIR, READDIR = 21, 22, 23, 24, 25, 26, 27, 28
RELEASEDIR, FSYNCDIR, GETLK, SETLK, SETLKW, ACCESS, CREATE, INTERRUPT = 29, 30, 31, 32, 33, 34, 35, 36
BMAP, DESTROY, IOCTL, POLL, BATCH_FORGET, FALLOCATE, READDIRPLUS, RENAME2 = 37, 38, 39, 40, 42, 43, 44, 45
LSEEK, COPY_FILE_RANGE, SETUPMAPPING, REMOVEMAPPING, SYNCFS, TMPFILE = 46, 47, 48, 49, 50, 51
ROOT = 1

IN_HEADER = struct.Struct("<IIQQIIIHH")  # len, opcode, unique, nodeid, uid, gid, pid, total_extlen, padding
OUT_HEADER = struct.Struct("<IiQ")  # len, error, unique
ATTR = struct.Struct("<6Q10I")
ENTRY = struct.Struct("<4Q2I")  # nodeid, generation, entry_valid, attr_valid, nanoseconds of both; then ATTR
INIT_OUT = struct.Struct("<4IHHIIHHI28x")
DIRENT = struct.Struct("<QQII")
SETATTR_IN = struct.Struct("<II8Q3I2I2II")  # see setattr()
# INIT flags
ASYNC_READ, ATOMIC_O_TRUNC, BIG_WRITES, WRITEBACK_CACHE = 1 << 0, 1 << 3, 1 << 5, 1 << 16
NO_OPEN_SUPPORT, NO_OPENDIR_SUPPORT = 1 << 17, 1 << 24
MAP_ALIGNMENT, HANDLE_KILLPRIV_V2, INIT_EXT, HAS_INODE_DAX = 1 << 26, 1 << 28, 1 << 30, 1 << 33
# What Linux 6.1 offers where there is a DAX window: all, and without those for which files may stay unopened.
ALL_FLAGS = 0x2_7FFF_FFFB
LINUX_FLAGS = ALL_FLAGS & ~(NO_OPEN_SUPPORT | NO_OPENDIR_SUPPORT)
FATTR_MODE, FATTR_UID, FATTR_GID, FATTR_SIZE, FATTR_ATIME, FATTR_MTIME, FATTR_FH = (1 << i for i in range(7))
FATTR_ATIME_NOW, FATTR_MTIME_NOW, FATTR_KILL_SUIDGID = 1 << 7, 1 << 8, 1 << 11
OUT_ROOM = 8192


class Attr(NamedTuple):
    ino: int
    size: int
    blocks: int
    atime: int
    mtime: int
    ctime: int
    atimensec: int
    mtimensec: int
    ctimensec: int
    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    blksize: int
    flags: int


class Entry(NamedTuple):
    nodeid: int
    valid: int
    attr: Attr


class FuseError(OSError):
    """The errno that the device answered."""

    def __init__(self, number: int) -> None:
        super().__init__(number, os.strerror(number))


def entry(data: bytes) -> Entry:
    """Decode a ``fuse_entry_out``."""
    nodeid, _, valid, *_ = ENTRY.unpack_from(data)
    return Entry(nodeid, valid, Attr(*ATTR.unpack_from(data, ENTRY.size)))


class FuseClient:
    """The driver of a share behind `transport`; ``init`` is exchanged unless told otherwise.

    :param irq: tells of interrupts; None: KVM takes them, and the client looks at its rings without pause
    :param settings: parameters of ``MmioDriver.bring_up``
    """

    def __init__(
        self, transport: VirtioMmio, ram: GuestMemory, allocator: Allocator, irq: IrqLine | None, *, init: bool = True,
        flags: int = LINUX_FLAGS, **settings: Any,
    ) -> None:  # fmt: skip
        self.transport = transport
        self.ram = ram
        self.irq = irq
        self.driver = MmioDriver(transport, allocator)
        self.driver.bring_up(**settings)
        self.base = self.driver.allocator.next
        self.unique = 0
        self.uid = self.gid = 0
        self.written = 0
        self.init_reply: tuple[int, ...] = ()
        if init:
            self.init(flags)

    # Raw requests

    def buffer(self, data: bytes | int, *, device_writes: bool = False, queue: int = 1) -> Buffer:
        return self.driver.queues[queue].buffer(data, device_writes=device_writes)

    def submit(self, buffers: Sequence[Buffer], *, queue: int = 1, indirect: bool = True) -> int:
        """One chain through the ring; the length in its used entry."""
        ring = self.driver.queues[queue]
        ring.want_interrupt()
        head = ring.add_indirect(buffers) if indirect else ring.add(buffers)
        self.driver.kick(queue)
        while not (done := ring.reap()):
            if self.irq is not None:
                assert select.select([self.irq.fd], [], [], 30)[0], "no interrupt came"
                self.irq.take()
            ring.want_interrupt()
        assert [h for h, _ in done] == [head]
        self.written = done[0][1]
        return self.written

    def header(self, opcode: int, nodeid: int, size: int, *, length: int | None = None) -> bytes:
        self.unique += 1
        total = IN_HEADER.size + size if length is None else length
        return IN_HEADER.pack(total, opcode, self.unique, nodeid, self.uid, self.gid, 77, 0, 0)

    def ask(
        self, opcode: int, nodeid: int, body: bytes = b"", *, room: int = OUT_ROOM, queue: int = 1,
        length: int | None = None,
    ) -> bytes:  # fmt: skip
        """A request in two buffers, a reply in two; the reply's payload.

        :raises FuseError: the device answered so
        """
        self.driver.allocator.next = self.base  # a request at a time: the memory is free again
        parts = [self.buffer(self.header(opcode, nodeid, len(body), length=length))]
        if body:
            parts.append(self.buffer(body))
        head = self.buffer(b"\xee" * 16, device_writes=True)
        data = self.buffer(b"\xee" * room, device_writes=True)
        written = self.submit([*parts, head, *([data] if room else [])], queue=queue)
        return self.reply(written, head, data if room else None)

    def reply(self, written: int, head: Buffer, data: Buffer | None) -> bytes:
        """Judge a reply's header and return its payload."""
        size, error, unique = OUT_HEADER.unpack(self.ram.read(head.addr, 16))
        assert unique == self.unique
        assert size == written >= 16
        if error:
            assert size == 16
            raise FuseError(-error)
        if data is None:
            assert size == 16
            return b""
        assert self.ram.read(data.addr + size - 16, data.size - (size - 16)) == b"\xee" * (data.size - (size - 16))
        return self.ram.read(data.addr, size - 16)

    def silent(self, opcode: int, nodeid: int, body: bytes, *, queue: int = 0) -> None:
        """A request without a reply."""
        self.driver.allocator.next = self.base
        assert self.submit([self.buffer(self.header(opcode, nodeid, len(body)) + body)], queue=queue) == 0

    # The operations

    def init(self, flags: int = LINUX_FLAGS, *, major: int = 7, minor: int = 37) -> tuple[int, ...]:
        """(major, minor, max_readahead, flags, max_background, congestion, max_write, time_gran, max_pages,
        map_alignment, flags2) as the device answers."""
        body = struct.pack("<5I44x", major, minor, 131072, flags & 0xFFFF_FFFF, flags >> 32)
        self.init_reply = INIT_OUT.unpack(self.ask(INIT, 0, body))
        return self.init_reply

    @property
    def flags(self) -> int:
        return self.init_reply[3] | self.init_reply[10] << 32

    def lookup(self, name: str | bytes, parent: int = ROOT) -> Entry:
        return entry(self.ask(LOOKUP, parent, os.fsencode(name) + b"\0"))

    def walk(self, path: str) -> Entry:
        found, parent = None, ROOT
        for name in path.split("/"):
            found = self.lookup(name, parent)
            parent = found.nodeid
        assert found is not None
        return found

    def forget(self, nodeid: int, count: int = 1) -> None:
        self.silent(FORGET, nodeid, struct.pack("<Q", count))

    def getattr(self, nodeid: int) -> Attr:
        return Attr(*ATTR.unpack_from(self.ask(GETATTR, nodeid, bytes(16)), 16))

    def setattr(self, nodeid: int, valid: int, *, fh: int = 0, size: int = 0, atime: int = 0, mtime: int = 0,
                mode: int = 0, uid: int = 0, gid: int = 0) -> Attr:  # fmt: skip
        body = struct.pack("<IIQQQQQQIIIIIIII", valid, 0, fh, size, 0, atime, mtime, 0, 0, 0, 0, mode, 0, uid, gid, 0)
        return Attr(*ATTR.unpack_from(self.ask(SETATTR, nodeid, body), 16))

    def open(self, nodeid: int, flags: int = os.O_RDONLY, *, open_flags: int = 0) -> int:
        return int(struct.unpack_from("<Q", self.ask(OPEN, nodeid, struct.pack("<II", flags, open_flags)))[0])

    def open_flags(self, nodeid: int, flags: int = os.O_RDONLY) -> int:
        """How the guest is to use a file that it opens, FOPEN_*."""
        fh, open_flags = struct.unpack_from("<QI", self.ask(OPEN, nodeid, struct.pack("<II", flags, 0)))
        self.release(nodeid, fh)
        return int(open_flags)

    def opendir(self, nodeid: int = ROOT) -> int:
        return int(struct.unpack_from("<Q", self.ask(OPENDIR, nodeid, bytes(8)))[0])

    def release(self, nodeid: int, fh: int, *, opcode: int = RELEASE) -> None:
        self.ask(opcode, nodeid, struct.pack("<QIIQ", fh, 0, 0, 0))

    def create(self, name: str, flags: int = os.O_RDWR | os.O_CREAT, *, parent: int = ROOT, mode: int = 0o644,
               opcode: int = CREATE) -> tuple[Entry, int]:  # fmt: skip
        body = struct.pack("<4I", flags, mode, 0, 0) + os.fsencode(name) + b"\0"
        data = self.ask(opcode, parent, body)
        return entry(data), int(struct.unpack_from("<Q", data, ENTRY.size + ATTR.size)[0])

    def make(self, opcode: int, name: str, fixed: bytes = b"", *, parent: int = ROOT, rest: bytes = b"") -> Entry:
        return entry(self.ask(opcode, parent, fixed + os.fsencode(name) + b"\0" + rest))

    def mkdir(self, name: str, mode: int = 0o755, *, parent: int = ROOT) -> Entry:
        return self.make(MKDIR, name, struct.pack("<II", mode, 0), parent=parent)

    def read(self, nodeid: int, fh: int, size: int, offset: int = 0) -> bytes:
        return self.ask(READ, nodeid, struct.pack("<QQIIQII", fh, offset, size, 0, 0, 0, 0), room=size)

    def write(
        self, nodeid: int, fh: int, data: bytes, offset: int = 0, *, write_flags: int = 0, flags: int = 0
    ) -> int:  # fmt: skip
        """`flags`: what the file has at this moment, as fcntl(F_GETFL) tells."""
        body = struct.pack("<QQIIQII", fh, offset, len(data), write_flags, 0, flags, 0) + data
        return int(struct.unpack_from("<I", self.ask(WRITE, nodeid, body))[0])

    def readdir(
        self, nodeid: int, fh: int, offset: int = 0, *, size: int = 4096, queue: int = 1
    ) -> list[tuple[str, int, int]]:
        """(name, offset of the next, type) of each entry."""
        body = struct.pack("<QQIIQII", fh, offset, size, 0, 0, 0, 0)
        data = self.ask(READDIR, nodeid, body, room=size, queue=queue)
        return [(name, off, kind) for name, off, kind, _ in dirents(data, plus=False)]

    def setupmapping(self, nodeid: int, foffset: int, size: int, moffset: int, flags: int = 2) -> None:
        """Flags: 1 to write, 2 to read. Linux sends no handle either."""
        self.ask(SETUPMAPPING, nodeid, struct.pack("<5Q", (1 << 64) - 1, foffset, size, flags, moffset))

    def removemapping(self, *ranges: tuple[int, int]) -> None:
        body = b"".join(struct.pack("<QQ", *one) for one in ranges)
        self.ask(REMOVEMAPPING, ROOT, struct.pack("<I", len(ranges)) + body)

    def readdirplus(self, nodeid: int, fh: int, offset: int = 0, *, size: int = 4096) -> list[tuple[str, int, Entry]]:
        data = self.ask(READDIRPLUS, nodeid, struct.pack("<QQIIQII", fh, offset, size, 0, 0, 0, 0), room=size)
        return [(name, off, found) for name, off, _, found in dirents(data, plus=True) if found is not None]

    def list(self, nodeid: int = ROOT, *, size: int = 4096) -> list[str]:
        fh = self.opendir(nodeid)
        names: list[str] = []
        offset = 0
        while found := self.readdir(nodeid, fh, offset, size=size):
            names += [name for name, _, _ in found]
            offset = found[-1][1]
        self.release(nodeid, fh, opcode=RELEASEDIR)
        return names

    def rename(self, old: str, new: str, *, flags: int | None = None, parent: int = ROOT, newdir: int = ROOT) -> None:
        names = os.fsencode(old) + b"\0" + os.fsencode(new) + b"\0"
        if flags is None:
            self.ask(RENAME, parent, struct.pack("<Q", newdir) + names)
        else:
            self.ask(RENAME2, parent, struct.pack("<QII", newdir, flags, 0) + names)


class FuseVm(FuseClient):
    """A guest with one share, without KVM.

    :param settings: parameters of :class:`virtio.fs.device.ShareDevice`
    """

    RAM = 16 << 20

    def __init__(self, path: Path | str, *, init: bool = True, flags: int = LINUX_FLAGS, **settings: Any) -> None:
        self.log: list[str] = []
        self.device = ShareDevice("share", os.fspath(path), **settings)
        ram, self.line = GuestMemory(self.RAM), IrqLine(5)
        transport = VirtioMmio(self.device, ram, self.line, warn=self.log.append)
        super().__init__(transport, ram, Allocator(0x1000, self.RAM - 0x1000), self.line, init=init, flags=flags)

    def close(self) -> None:
        self.transport.close()
        self.device.close()
        self.line.close()
        self.ram.close()

    def __enter__(self) -> FuseVm:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def dirents(data: bytes, *, plus: bool) -> list[tuple[str, int, int, Entry | None]]:
    """Decode the entries of READDIR or READDIRPLUS."""
    found, at = [], 0
    while at < len(data):
        known = None
        if plus:
            known = entry(data[at:])
            at += ENTRY.size + ATTR.size
        _, off, size, kind = DIRENT.unpack_from(data, at)
        found.append((os.fsdecode(data[at + 24 : at + 24 + size]), off, kind, known))
        at += 24 + (size + 7 & ~7)
    return found


def code(error: int) -> str:
    """The name of an errno, for a readable failure."""
    return errno.errorcode.get(error, str(error))
