# SPDX-License-Identifier: Apache-2.0
"""The block device (§5.2): a disk image or a host block device; its loop is in ``virtio/blk/_worker.pyx``."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
import threading
import time

from virtio import spec
from virtio._limiter import RateLimiter
from virtio.blk._request import punch_hole
from virtio.blk._worker import MAX_DISCARD_SECTORS, MAX_WRITE_ZEROES_SECTORS, Backend, BlockWorker
from virtio.device import VirtioDevice, threads_for
from vmm.closing import Closing
from vmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from virtio._limiter import Bucket

QUEUE_SIZE = 256
# Linux linux/fs.h and linux/falloc.h
_BLKROGET, _BLKSSZGET, _BLKIOMIN, _BLKIOOPT, _BLKPBSZGET = 0x125E, 0x1268, 0x1278, 0x1279, 0x127B
_PAGE = 4096
# What hardly any raw disk begins with; LUKS is not here, as a raw disk may well be encrypted.
_OTHER_FORMATS = {
    b"QFI\xfb": "qcow2", b"KDMV": "VMDK", b"COWD": "VMDK", b"# Disk D": "VMDK", b"vhdxfile": "VHDX", b"conectix": "VHD",
    b"QED\0": "QED", b"<<< ": "VDI",
}  # fmt: skip
_PATIENCE = 0.3  # seconds: requests of io_uring, and the lock with them, outlive a VMM that was killed
_FLOCK = struct.Struct("hhqqi4x")  # struct flock of x86-64: l_type, l_whence, l_start, l_len, l_pid


class Disk(Closing):
    """An open disk image or host block device, locked: many readers or one writer.

    :param path: a regular file or a block device, a positive multiple of 512 bytes long
    :param read_only: open it for reading, and let other readers in
    :param direct: past the host's page cache
    :param image_format: ``raw``; None: the same, but what looks like qcow2, VMDK, ... is refused. It is never taken for
        anything else than raw: what a guest writes at the start of its disk must not change how that is read.
    :param any_size: it may be empty, or have some bytes more than a multiple of 512, which are left out
    :param discard_block: bytes, a power of two: the file gives back only whole blocks; 0: any range
    :raises ConfigError: the disk cannot be opened, is not a disk, has an invalid size, or is in use

    The lock is an open file description lock on the whole file, so QEMU's own image locks meet it too.
    ``size`` is in bytes, as is ``block_size``, the least that the host takes at a time.
    Source: Linux fcntl(2), "Open file description locks".
    """

    def __init__(
        self,
        path: str,
        *,
        read_only: bool = False,
        direct: bool = False,
        image_format: str | None = None,
        any_size: bool = False,
        discard_block: int = 0,
    ) -> None:
        self.path = path
        self.image_format = image_format
        self.discard_block = discard_block
        self.any_size = any_size
        self.read_only = read_only
        self.direct = direct
        self.fd = -1
        self.changing = threading.Lock()  # around what ends with `fd` being another file
        flags = os.O_RDONLY if read_only else os.O_RDWR
        try:
            self.fd = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK)
            self._must_be_a_disk()
            if image_format is None:
                self._must_not_look_like_another()  # first: of such an image the size says nothing
            self.size = self.measure()
            if self.block_device and not read_only and self._ask(_BLKROGET):  # opening it for writing succeeds
                raise ConfigError("disk", path, "is a read-only block device; add ,ro")
            self._lock()
            if direct:
                fcntl.fcntl(self.fd, fcntl.F_SETFL, os.O_NONBLOCK | os.O_DIRECT)
            self.block_size = self._least_block()
        except OSError as error:
            self.close()
            raise ConfigError("disk", path, self._explain(error)) from None
        except ConfigError:
            self.close()
            raise

    def _must_be_a_disk(self) -> None:
        mode = os.fstat(self.fd).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            kind = "a directory" if stat.S_ISDIR(mode) else "neither a file nor a block device"
            raise ConfigError("disk", self.path, f"is {kind}; a disk is a file or a block device")
        self.block_device = stat.S_ISBLK(mode)

    def _must_not_look_like_another(self) -> None:
        head = os.pread(self.fd, 8, 0)
        for magic, name in _OTHER_FORMATS.items():
            if head.startswith(magic):
                other = ", or add ,format=qcow2" if name == "qcow2" else ""
                advice = f"convert it by `qemu-img convert -O raw`{other}; ,format=raw takes it as it is"
                raise ConfigError("disk", self.path, f"is a {name} image; {advice}")

    def measure(self) -> int:
        """Bytes that it has now.

        :raises ConfigError: the file or its size is not a disk's
        """
        self._must_be_a_disk()
        size = os.lseek(self.fd, 0, os.SEEK_END)
        if self.any_size:
            return size & -spec.BLK_SECTOR
        if size == 0:
            raise ConfigError("disk", self.path, "is empty; a disk has a positive multiple of 512 bytes")
        if size % spec.BLK_SECTOR:
            raise ConfigError("disk", self.path, f"has {size} bytes; a disk has a multiple of 512")
        return size

    def _lock(self) -> None:
        kind = fcntl.F_RDLCK if self.read_only else fcntl.F_WRLCK
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                fcntl.fcntl(self.fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, 0, 0, 0))
                return
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
            if time.monotonic() > deadline:
                raise ConfigError("disk", self.path, self._in_use())
            time.sleep(0.005)

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

    def _least_block(self) -> int:
        if self.block_device:  # with the page cache, too: it takes ranges to be zeroed or discarded in its own sectors
            return self._ask(_BLKSSZGET)
        if not self.direct:
            return spec.BLK_SECTOR
        import mmap

        with mmap.mmap(-1, _PAGE) as page:  # page aligned, as direct I/O wants it
            for size in (spec.BLK_SECTOR, _PAGE):
                try:
                    os.preadv(self.fd, [memoryview(page)[:size]], 0)
                except OSError as error:
                    if error.errno != errno.EINVAL:
                        raise
                else:
                    return size
        raise ConfigError(
            "disk", self.path, "does not support direct I/O in blocks of 512 or 4096 bytes; leave ,direct out"
        )

    def _ask(self, request: int) -> int:
        return int.from_bytes(fcntl.ioctl(self.fd, request, bytes(4)), "little")

    def topology(self) -> tuple[int, int, int]:
        """What the host likes best, in bytes: its physical block, the least and the best transfer (0: any)."""
        if self.block_device:
            # Without direct I/O, the page cache reads a page to write a part of one.
            least = self.block_size if self.direct else max(self.block_size, _PAGE)
            return max(self._ask(_BLKPBSZGET), least), max(self._ask(_BLKIOMIN), least), self._ask(_BLKIOOPT)
        return _PAGE, _PAGE, 0

    def can_discard(self) -> bool:
        """Whether the host can give blocks back; asked where the file has none, after its end."""
        if self.read_only:
            return False
        if self.block_device:
            number = os.fstat(self.fd).st_rdev
            try:
                with open(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/queue/discard_max_bytes") as file:
                    return int(file.read()) > 0
            except (OSError, ValueError):
                return False  # a partition, or no /sys: nothing is lost but space
        return punch_hole(self.fd, os.lseek(self.fd, 0, os.SEEK_END), _PAGE) == 0

    def can_wait_aside(self) -> bool:
        """Whether a read that would have to wait says so (RWF_NOWAIT): without it io_uring takes a detour."""
        try:
            os.preadv(self.fd, [bytearray(1)], 0, os.RWF_NOWAIT)
        except OSError as error:
            return error.errno != errno.EOPNOTSUPP
        return True

    def _explain(self, error: OSError) -> str:
        if error.errno == errno.EISDIR:
            return "is a directory; a disk is a file or a block device"
        if error.errno == errno.EINVAL and self.direct:
            return "is on a file system without direct I/O; leave ,direct out"
        refused = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
        if refused and not self.read_only and os.access(self.path, os.R_OK):
            return "cannot be opened for writing; add ,ro for a read-only disk"
        return f"cannot be opened: {os.strerror(error.errno or 0)}"

    def close(self) -> None:
        """Give the file and its lock back; idempotent. Waits for who changes the disk."""
        with self.changing:
            fd, self.fd = self.fd, -1
            if fd >= 0:
                os.close(fd)


class Block(VirtioDevice):
    """A virtio block device over `disk`.

    :param disk: open and locked; not owned
    :param serial: answer to GET_ID, at most 20 bytes
    :param name: name of the device in messages, and of its threads
    :param queues: number of virtqueues
    :param threads: number of worker threads; 0: one for each queue, but no more than half of this process's CPUs
    :param engine: ``sync``: system calls; ``io_uring``; None: what is faster for the file
    :param unsafe: the guest is offered no flush, and one does nothing: what it wrote may be lost with the host
    :param limiter: limits all queues together; None: no limit
    :raises ConfigError: io_uring was asked for, and the kernel has none

    :ivar replaced: whether ``replace`` has given it another file or path since
    """

    device_type = spec.TYPE_BLOCK
    thread_kind = "blk"

    def __init__(
        self,
        disk: Disk,
        *,
        serial: str = "",
        name: str = "virtio-blk",
        queues: int = 1,
        threads: int = 0,
        engine: str | None = None,
        unsafe: bool = False,
        limiter: RateLimiter | None = None,
    ) -> None:
        super().__init__()
        self.counters["updates"] = 0
        self.name = name
        self.disk = disk
        self.queue_sizes = (QUEUE_SIZE,) * queues
        self._threads = threads_for(queues, threads)
        self.engine = self._choose(engine)
        self.features = spec.BLK_F_SEG_MAX | spec.BLK_F_BLK_SIZE | spec.BLK_F_TOPOLOGY
        if not unsafe:  # as in Firecracker: a guest that is offered none does not wait for any
            self.features |= spec.BLK_F_FLUSH
        if queues > 1:
            self.features |= spec.BLK_F_MQ
        if disk.read_only:
            self.features |= spec.BLK_F_RO
        else:
            self.features |= spec.BLK_F_WRITE_ZEROES | (spec.BLK_F_DISCARD if disk.can_discard() else 0)
            self.tolerated = spec.BLK_F_DISCARD  # without holes the answer is that it is unsupported
        self.limiter = limiter or RateLimiter()
        self.replaced = False
        # Only a thread that has a ring may enter one.
        self.thread_kind = "blk-uring" if self.engine == "io_uring" else "blk"
        self.backend = Backend(
            disk, (serial or "pyvmm").encode(), self.limiter, unsafe=unsafe, use_uring=self.engine == "io_uring"
        )
        self.config = self._config_space()

    def _choose(self, engine: str | None) -> str:
        if engine is None and not self.disk.can_wait_aside():
            return "sync"  # as on tmpfs before Linux 6.6: each request would go to a thread of the kernel's
        if engine != "sync":
            from vmm import _uring

            if not (refused := _uring.probe()):
                return "io_uring"
            if engine is not None:
                problem = f"the kernel refuses io_uring ({os.strerror(refused)}); use sync"
                raise ConfigError("engine", "io_uring", problem)
        return "sync"

    def make_workers(self, notify_fds: Sequence[int], on_failure: Callable[[Exception], None]) -> Sequence[BlockWorker]:
        """The queues are dealt out to the threads in turn."""
        number = self._threads
        self._workers = [
            BlockWorker(
                self, range(len(notify_fds))[thread::number], notify_fds[thread::number], on_failure,
                f"{self.name}.{thread}" if number > 1 else self.name,
            )
            for thread in range(number)
        ]  # fmt: skip
        return self._workers

    @property
    def stats(self) -> dict[str, int]:
        """Counters by name, of all queues together."""
        return super().stats | {"throttled": self.limiter.throttled}

    @property
    def capacity(self) -> int:
        """Sectors of 512 bytes."""
        return self.disk.size // spec.BLK_SECTOR

    def _config_space(self) -> bytes:
        # A request is a header, the data and a status byte, and no chain is longer than its queue.
        seg_max = QUEUE_SIZE - 2
        block = self.disk.block_size
        physical, least, best = self.disk.topology()
        return spec.BLK_CONFIG.pack(
            self.capacity, 0, seg_max, 0, 0, 0, block,
            max(0, (physical // block).bit_length() - 1), 0, min(least // block, 0xFFFF), best // block, 0,
            len(self.queue_sizes),
            MAX_DISCARD_SECTORS, 1, max(physical, self.disk.discard_block) // spec.BLK_SECTOR,
            MAX_WRITE_ZEROES_SECTORS, 1, 1,
        )  # fmt: skip

    def set_capacity(self, size: int) -> None:
        """Tell the driver that the disk has `size` bytes from now on; the backing file was changed before.

        :raises ConfigError: the size is not a positive multiple of 512
        """
        if size < (0 if self.disk.any_size else 1) or size % spec.BLK_SECTOR:
            raise ConfigError("disk size", size, "must be a positive multiple of 512 bytes")
        self.backend.change(self._workers, size)
        self.disk.size = size
        self._tell_size()

    def replace(self, path: str) -> None:
        """Go on with the file `path`, which may be the same, grown or shrunk; the driver is told its size.

        :raises ConfigError: the file is not a disk, or is in use, or the disk is closed; it stays as it was
        """
        with self.disk.changing:
            self._replace(self.disk, path)

    def _replace(self, disk: Disk, path: str) -> None:
        if disk.fd < 0:
            raise ConfigError("disk", disk.path, "is closed")
        if os.path.exists(path) and os.path.samestat(os.stat(path), os.fstat(disk.fd)):
            self.set_capacity(disk.measure())
            disk.path, self.replaced = path, True
            return
        with Disk(
            path, read_only=disk.read_only, direct=disk.direct, image_format=disk.image_format, any_size=disk.any_size
        ) as other:
            if other.block_size > disk.block_size:
                allowed = f"has blocks of {other.block_size} bytes; the guest was told {disk.block_size}"
                raise ConfigError("disk", path, allowed)
            self.backend.change(self._workers, other.size, other.fd, other.block_device)
            disk.path, disk.size, disk.block_device = path, other.size, other.block_device
            disk.discard_block = 0
        self.replaced = True
        self._tell_size()

    def _tell_size(self) -> None:
        self.counters["updates"] += 1
        self.publish_config(self._config_space())

    def set_rate_limit(self, bandwidth: Bucket | None = None, ops: Bucket | None = None) -> None:
        """Replace the buckets that are given; ``(0, 0, 0)`` takes a limit away. While the guest runs, or before."""
        self._limit(self.limiter, bandwidth, ops)

    def report(self, number: int, end: int, seen: int) -> None:
        """Warn of a request that the host failed; on a worker's thread, at the 1st, 2nd, 4th, 8th, ... of a kind.

        :param number: the host's error; 0: the file ends before byte `end`
        """
        problem = os.strerror(number) if number else f"the file ends before byte {end}"
        more = f" (seen {seen} times)" if seen > 1 else ""
        self.context.warn(f"{number} {seen}", f"{self.name}: {self.disk.path}: {problem}{more}")

    def report_no_ring(self, number: int) -> None:
        """Warn that a worker does without io_uring; before its thread starts."""
        self.context.warn("no ring", f"{self.name}: no io_uring, goes on with system calls: {os.strerror(number)}")
