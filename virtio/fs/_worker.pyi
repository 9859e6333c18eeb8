# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable, Sequence
from typing import Self

from virtio._limiter import RateLimiter
from virtio._worker import QueueWorker
from virtio.device import VirtioDevice
from virtio.fs._share import Share

class Backlog:
    def __new__(cls, queue_size: int) -> Self: ...

class FsThread(QueueWorker):
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
    @property
    def stats(self) -> dict[str, int]: ...

class FsWorker(FsThread): ...

class FsHelper(FsThread):
    def __init__(
        self,
        device: VirtioDevice,
        on_failure: Callable[[Exception], None],
        share: Share,
        backlog: Backlog,
        name: str,
        limiter: RateLimiter,
    ) -> None: ...
