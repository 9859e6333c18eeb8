# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable, Sequence
from typing import Self

from virtio._limiter import RateLimiter
from virtio._worker import QueueWorker
from virtio.device import VirtioDevice
from virtio.fs._share import Share

class Backlog:
    """What the threads of a share hand one another."""

    def __new__(cls, queue_size: int) -> Self: ...

class FsThread(QueueWorker):
    """What both kinds of thread of a share have: an entry into its credentials, and the way of a reply."""

    @property
    def stats(self) -> dict[str, int]:
        """Counters of this thread, by name."""

class FsWorker(FsThread):
    """The thread of some queues of a share."""

    def __init__(
        self,
        device: VirtioDevice,
        indices: Sequence[int],
        notify_fds: Sequence[int],
        on_failure: Callable[[Exception], None],
        share: Share,
        backlog: Backlog,
        name: str,
        limiter: RateLimiter,
    ) -> None: ...

class FsHelper(FsThread):
    """A thread for requests that may wait long: fsync, syncfs, fallocate, copies, reads of what is not in memory."""

    def __init__(
        self,
        device: VirtioDevice,
        on_failure: Callable[[Exception], None],
        share: Share,
        backlog: Backlog,
        name: str,
        limiter: RateLimiter,
    ) -> None: ...
