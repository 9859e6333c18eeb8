# SPDX-License-Identifier: Apache-2.0
"""The file system device (§5.11): a directory of the host in the guest, served here, without a daemon."""

from __future__ import annotations

import os
import struct

from virtio import spec
from virtio._limiter import RateLimiter
from virtio.device import VirtioDevice
from virtio.fs._saved import nameless, restore, save
from virtio.fs._share import Share, file_system, stores_files
from virtio.fs._worker import Backlog, FsHelper, FsWorker
from vmm.budget import KEPT, dax_slots, raise_descriptor_limit
from vmm.closing import Closers
from vmm.errors import ConfigError, HostError, SnapshotError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from virtio._limiter import Bucket
    from virtio._worker import QueueWorker

DAX_ALIGNMENT = 2 << 20
# So that a request of 256 pages, the most that Linux sends, fits with its headers.
QUEUE_SIZE = 1024
_CONFIG = struct.Struct("<36sI")  # §5.11.4: tag, num_request_queues
# Requests that wait for the host's disk at once, at least.
_HELPERS = 4
_DAX_LIMIT = "and limits exclude one another: DAX accesses are not counted"


class ShareDevice(VirtioDevice):
    """A virtio-fs device over a directory; owns the descriptors by which it is reached.

    The parameters are those of ``vmm.config.devices.ShareConfig``, which has checked their ranges.

    :param tag: the tag by which the guest mounts it, 1 to 36 bytes
    :param path: the directory; later changes of this path itself do not matter
    :param read_only: nothing that the guest sends changes anything below the directory
    :param cache: ``auto``: the guest believes what it was told for a second; ``always``: for a day, and it keeps
        what it writes until it has to write it, so nobody else may change the files; ``none``: it asks each time
    :param submounts: what is mounted below the directory is shown, too, as mounts of the guest's; otherwise such a
        mount point is refused with EXDEV. File systems that store no files, as proc, are refused in any case
    :param threads: request queues, each with a thread, 1 to 32
    :param squash: ``(uid, gid)`` of every access; needs root. None: as root, files belong to the guest's users;
        otherwise every access is that of the VMM's own user
    :param dax: bytes of the DAX window, a multiple of 2 MiB; 0: none. Whoever has the VM shows ``window`` to the guest
        and says where in ``shm_regions[0]``
    :param limiter: limits bytes read, written, copied and allocated, and requests that do so, change or sync; not
        with ``dax``, where a guest sends no requests
    :param name: name of the threads
    :raises ConfigError: the directory, or a parameter on this host, cannot be used
    """

    device_type = spec.TYPE_FS
    thread_kind = "fs"

    def __init__(
        self,
        tag: str,
        path: str,
        *,
        read_only: bool = False,
        cache: str = "auto",
        threads: int = 1,
        squash: tuple[int, int] | None = None,
        submounts: bool = False,
        dax: int = 0,
        limiter: RateLimiter | None = None,
        name: str = "virtio-fs",
    ) -> None:
        super().__init__()
        if squash is not None and os.geteuid() != 0:
            raise ConfigError(
                "share squash", "{}:{}".format(*squash), "needs root; otherwise every access is made as your user"
            )
        self.tag = tag
        self.path = path
        self.name = name
        self.limiter = limiter or RateLimiter()
        if dax and any(self.limiter.buckets):
            raise ConfigError("share dax", dax, _DAX_LIMIT)
        self.queue_sizes = (QUEUE_SIZE,) * (1 + threads)
        self.config = _CONFIG.pack(tag.encode(), threads)
        if raise_descriptor_limit() < 2 * KEPT:
            raise ConfigError("share", path, f"needs RLIMIT_NOFILE of {2 * KEPT} or more")
        self._closers = Closers()
        try:
            try:
                root = self._open(path)
                f_type = file_system(root)  # a network's may have lost its server
            except OSError as error:
                raise ConfigError("share", path, f"cannot be used: {error.strerror}") from None
            if not stores_files(f_type):
                problem = f"is on a kernel pseudo file system (type {f_type:#x}); share one that stores files"
                raise ConfigError("share", path, problem)
            try:
                proc = self._open("/proc/self/fd")  # held, so that a jail without /proc is as good
            except OSError as error:
                raise HostError(error.errno or 0, "open /proc/self/fd") from None
            if dax:
                self._take_slots(dax)
            try:
                self.share = Share(
                    root, f_type, proc, read_only=read_only, cache=cache, squash=squash, submounts=submounts, dax=dax
                )
            except (OSError, MemoryError):
                raise ConfigError("share dax", dax, "bytes exceed this host's address space") from None
        except BaseException:
            self._closers.close()
            raise
        self._closers.append(self.share.clear)
        self.window = self.share.window
        self.below = root, not read_only

    def _open(self, path: str) -> int:
        fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._closers.append(lambda: os.close(fd))
        return fd

    def _take_slots(self, dax: int) -> None:
        slots = dax // DAX_ALIGNMENT
        if not dax_slots().ask(slots):
            left = (dax_slots().limit - dax_slots().used) * DAX_ALIGNMENT >> 20
            problem = f"bytes need more mappings and descriptors than this process may have; at most {left}M"
            raise ConfigError("share dax", dax, problem)
        self._closers.append(lambda: dax_slots().put_back(slots))

    @property
    def stats(self) -> dict[str, int]:
        """Counters by name, with what the guest holds now."""
        return super().stats | self.share.stats | {"throttled": self.limiter.throttled}

    def make_workers(self, notify_fds: Sequence[int], on_failure: Callable[[Exception], None]) -> Sequence[QueueWorker]:
        """A thread a request queue, the first with the queue of forgets too, and helpers for what waits for a disk."""
        self._workers = []
        self.backlog = Backlog(QUEUE_SIZE)
        groups = [(0, 1), *((index,) for index in range(2, len(notify_fds)))]
        for number, group in enumerate(groups):
            fds = [notify_fds[index] for index in group]
            name = f"{self.name}.{number}" if number else self.name
            self._workers.append(FsWorker(self, group, fds, on_failure, name))
        for _ in range(max(_HELPERS, len(groups))):
            self._workers.append(FsHelper(self, (), (), on_failure, f"{self.name}.slow"))
        return tuple(self._workers)

    def set_rate_limit(self, bandwidth: Bucket | None = None, ops: Bucket | None = None) -> None:
        """Replace the buckets that are given; ``(0, 0, 0)`` takes a limit away. While the guest runs, or before."""
        if self.window and any(bucket is not None and bucket[0] and bucket[2] for bucket in (bandwidth, ops)):
            raise ConfigError("share dax", self.tag, _DAX_LIMIT)
        self._limit(self.limiter, bandwidth, ops)

    @property
    def unsavable(self) -> str:  # type: ignore[override]  # a property in place of the attribute: it changes
        """Why it cannot be saved now: a DAX window is mounted, or the guest has a file open that has no name."""
        if not self.share.mounted:
            return ""
        if self.window is not None:
            return f"the guest has mounted {self.path} with a DAX window; unmount it in the guest first"
        if number := nameless(self.share):
            return (
                f"the guest has a file of {self.path} open that it has removed (inode {number}); close it in the guest"
            )
        return ""

    def save(self) -> dict[str, Any]:
        """What the guest knows of the directory: files by their names, and those that it has open.

        :raises SnapshotError: see ``unsavable``
        """
        if why := self.unsavable:
            raise SnapshotError(self.name, why)
        return save(self.share) if self.share.mounted else {}

    def restore(self, state: dict[str, Any]) -> None:
        """Take that over, of the same directory or another one. A file that is not there is one that was removed.

        :raises ValueError: the state is invalid
        """
        if state:
            restore(self.share, state)

    def reset(self) -> None:
        """Close what the guest had open and forget what it knew."""
        self.share.clear()

    def close(self) -> None:
        """Give the descriptors back; idempotent. The transport is closed before."""
        self._closers.close()
