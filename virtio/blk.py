# SPDX-License-Identifier: Apache-2.0
"""The block device (§5.2): a disk image or a host block device behind one queue, flush is fdatasync."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct

from virtio import spec
from virtio.device import VirtioDevice
from vmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vmm._fastpath import Chain

QUEUE_SIZE = 256
_IOV_MAX = 1024  # Linux UIO_MAXIOV: buffers that one preadv or pwritev takes
_FLOCK = struct.Struct("hhqqi4x")  # struct flock of x86-64: l_type, l_whence, l_start, l_len, l_pid


class Disk:
    """An open disk image or host block device, locked: many readers or one writer.

    :param path: a regular file or a block device, a positive multiple of 512 bytes long
    :param read_only: open it for reading, and let other readers in
    :raises ConfigError: it cannot be opened so, is something else, has another size, or is in use

    The lock is an open file description lock on the whole file, so QEMU's own image locks meet it too.
    ``size`` is in bytes. Source: Linux fcntl(2), "Open file description locks".
    """

    def __init__(self, path: str, *, read_only: bool = False) -> None:
        self.path = path
        self.read_only = read_only
        self.fd = -1
        try:
            self.fd = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK)
            self.size = self._measure()
            self._lock()
        except OSError as error:
            self.close()
            raise ConfigError("disk", path, self._explain(error)) from None
        except ConfigError:
            self.close()
            raise

    def _measure(self) -> int:
        mode = os.fstat(self.fd).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            kind = "a directory" if stat.S_ISDIR(mode) else "neither a file nor a block device"
            raise ConfigError("disk", self.path, f"is {kind}; a disk is a file or a block device")
        size = os.lseek(self.fd, 0, os.SEEK_END)
        if size == 0:
            raise ConfigError("disk", self.path, "is empty; a disk has a positive multiple of 512 bytes")
        if size % spec.BLK_SECTOR:
            raise ConfigError("disk", self.path, f"has {size} bytes; a disk has a multiple of 512")
        return size

    def _lock(self) -> None:
        kind = fcntl.F_RDLCK if self.read_only else fcntl.F_WRLCK
        try:
            fcntl.fcntl(self.fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, 0, 0, 0))
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise ConfigError("disk", self.path, self._in_use()) from None

    def _in_use(self) -> str:
        # An OFD lock has no owner in /proc/locks (pid -1); a classic lock of QEMU or a tool has.
        name = os.fstat(self.fd)
        inode = f"{os.major(name.st_dev):02x}:{os.minor(name.st_dev):02x}:{name.st_ino}"
        try:
            with open("/proc/locks") as locks:
                for fields in (line.split() for line in locks):
                    if inode in fields and (pid := int(fields[fields.index(inode) - 1])) > 0:
                        return f"is locked by process {pid}; one writer or several readers may have it"
        except (OSError, ValueError):
            pass  # no /proc, or a format of another kernel: say what is known
        return "is in use by another VM; one writer or several readers may have it (,ro)"

    def _explain(self, error: OSError) -> str:
        if error.errno == errno.EISDIR:
            return "is a directory; a disk is a file or a block device"
        refused = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
        if refused and not self.read_only and os.access(self.path, os.R_OK):
            return "cannot be opened for writing; add ,ro for a read-only disk"
        return f"cannot be opened: {os.strerror(error.errno or 0)}"

    def close(self) -> None:
        """Give the file and its lock back; idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Disk:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Request:
    """What the driver asks, as far as it can be judged without touching the disk.

    :ivar type: BLK_T_*
    :ivar offset: bytes from the disk's start, for IN and OUT
    :ivar data: buffers to fill or to write, in order
    :ivar length: their bytes
    :ivar status: view of the status byte, None where the driver gave none
    :ivar verdict: BLK_S_OK, or the status to answer without doing anything
    """

    __slots__ = ("data", "length", "offset", "status", "type", "verdict")

    def __init__(self, status: memoryview | None) -> None:
        self.type = -1
        self.offset = 0
        self.data: list[memoryview] = []
        self.length = 0
        self.status = status
        self.verdict = spec.BLK_S_IOERR


def parse(
    readable: Sequence[memoryview], writable: Sequence[memoryview], capacity: int, read_only: bool
) -> Request:
    """Judge a request (§5.2.6): pure, total for every input, reads the header once.

    :param readable: buffers the driver filled: header, then data of OUT; any framing (§2.7.4)
    :param writable: buffers to fill: data of IN and GET_ID, then the status byte
    :param capacity: of the disk, in sectors of 512 bytes
    """
    request = Request(writable[-1][-1:] if writable else None)
    header, out = _split(readable, spec.BLK_HEADER.size)
    if request.status is None or len(header) < spec.BLK_HEADER.size:
        return request
    room = [*writable[:-1], writable[-1][:-1]]
    if not len(room[-1]):
        room.pop()
    request.type, _, sector = spec.BLK_HEADER.unpack(header)
    match request.type:
        case spec.BLK_T_IN | spec.BLK_T_OUT:
            request.data, wrong = (room, out) if request.type == spec.BLK_T_IN else (out, room)
            request.length = sum(map(len, request.data))
            request.offset = sector * spec.BLK_SECTOR
            sectors, rest = divmod(request.length, spec.BLK_SECTOR)
            if wrong or rest or not sectors or sector + sectors > capacity:
                return request
            if request.type == spec.BLK_T_OUT and read_only:
                return request  # §5.2.6.2: a read-only device fails writes
        case spec.BLK_T_FLUSH:
            if out or room:
                return request
        case spec.BLK_T_GET_ID:
            request.data, request.length = room, sum(map(len, room))
            if out or request.length < spec.BLK_ID_BYTES:
                return request
        case _:
            request.verdict = spec.BLK_S_UNSUPP
            return request
    request.verdict = spec.BLK_S_OK
    return request


def _split(buffers: Sequence[memoryview], size: int) -> tuple[bytes, list[memoryview]]:
    """The first `size` bytes, copied, and what follows them."""
    head, rest = b"", []
    for buffer in buffers:
        taken = min(size - len(head), len(buffer))
        head += bytes(buffer[:taken])
        if taken < len(buffer):
            rest.append(buffer[taken:])
    return head, rest


class Block(VirtioDevice):
    """A virtio block device over `disk`.

    :param disk: open and locked; not owned
    :param serial: what GET_ID answers, at most 20 bytes
    :param name: of the worker's thread
    """

    device_type = spec.TYPE_BLOCK
    queue_sizes = (QUEUE_SIZE,)

    def __init__(self, disk: Disk, *, serial: str = "", name: str = "virtio-blk") -> None:
        super().__init__()
        self.name = name
        self.disk = disk
        self.serial = (serial or "pyvmm").encode()[: spec.BLK_ID_BYTES]
        self.counters |= {"bytes_read": 0, "bytes_written": 0, "flushes": 0, "io_errors": 0}
        self.features = spec.BLK_F_SEG_MAX | spec.BLK_F_BLK_SIZE | spec.BLK_F_FLUSH
        if disk.read_only:
            self.features |= spec.BLK_F_RO
        self.config = self._config_space()

    @property
    def capacity(self) -> int:
        """Sectors of 512 bytes."""
        return self.disk.size // spec.BLK_SECTOR

    def _config_space(self) -> bytes:
        # A request is a header, the data and a status byte, and no chain is longer than its queue.
        seg_max = QUEUE_SIZE - 2
        return spec.BLK_CONFIG.pack(self.capacity, 0, seg_max, 0, 0, 0, spec.BLK_SECTOR, *[0] * 12)

    def set_capacity(self, size: int) -> None:
        """Tell the driver that the disk has `size` bytes from now on; the backing file was changed before.

        :raises ConfigError: not a positive multiple of 512
        """
        if size <= 0 or size % spec.BLK_SECTOR:
            raise ConfigError("disk size", size, "must be a positive multiple of 512 bytes")
        self.disk.size = size
        self.publish_config(self._config_space())

    def process(self, queue_index: int) -> None:
        """Serve requests until the queue is empty."""
        self.drain(self.context.queues[queue_index], self._serve)

    def _serve(self, chain: Chain) -> int:
        request = parse(chain.readable, chain.writable, self.capacity, self.disk.read_only)
        self.counters["requests"] += 1
        written, status = 0, request.verdict
        if status != spec.BLK_S_OK:
            self.counters["bad_requests"] += 1
        else:
            try:
                written = self._execute(request)
            except OSError as error:
                status = spec.BLK_S_IOERR
                self.counters["io_errors"] += 1
                kind = f"{self.disk.path}: {errno.errorcode.get(error.errno or 0, error.errno)}"
                self.context.warn(kind, f"{self.name}: {self.disk.path}: {error.strerror}")
        if request.status is None:
            return 0
        request.status[0] = status
        # The length is of a prefix (§2.7.8.2): after an error not all before the status byte is written.
        return written + 1 if written + 1 == chain.writable_bytes else written

    def _execute(self, request: Request) -> int:
        """Do it; the bytes written to the guest before the status byte.

        :raises OSError: the host's error
        """
        match request.type:
            case spec.BLK_T_IN:
                self._transfer(os.preadv, request)
                self.counters["bytes_read"] += request.length
                return request.length
            case spec.BLK_T_OUT:
                self._transfer(os.pwritev, request)
                self.counters["bytes_written"] += request.length
                if not self.context.features & spec.BLK_F_FLUSH:
                    os.fdatasync(self.disk.fd)  # §5.2.6.2: a driver that cannot flush gets stable writes
            case spec.BLK_T_FLUSH:
                os.fdatasync(self.disk.fd)
                self.counters["flushes"] += 1
            case spec.BLK_T_GET_ID:
                left = self.serial.ljust(spec.BLK_ID_BYTES, b"\0")
                for buffer in request.data:
                    buffer[: len(left)] = left[: len(buffer)]
                    left = left[len(buffer) :]
                return spec.BLK_ID_BYTES
        return 0

    def _transfer(self, call: Callable[[int, list[memoryview], int], int], request: Request) -> None:
        buffers, offset = request.data, request.offset
        end = offset + request.length
        while True:
            done = call(self.disk.fd, buffers[:_IOV_MAX], offset)
            if done == 0:
                raise OSError(errno.EIO, f"the file ends before byte {end}")
            offset += done
            if offset == end:
                return
            while done >= len(buffers[0]):  # short, or more than _IOV_MAX buffers: go on where it stopped
                done -= len(buffers[0])
                buffers = buffers[1:]
            buffers = [buffers[0][done:], *buffers[1:]]
