# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable, Sequence
from typing import Self

from virtio._worker import QueueWorker
from virtio.device import VirtioDevice

class Backlog:
    def __new__(cls, queue_size: int) -> Self: ...

class FsThread(QueueWorker):
    def __init__(
        self,
        device: VirtioDevice,
        indices: Sequence[int],
        notify_fds: Sequence[int],
        on_failure: Callable[[Exception], None],
        name: str,
        backlog: Backlog,
    ) -> None: ...
    @property
    def stats(self) -> dict[str, int]: ...

class FsWorker(FsThread): ...
class FsHelper(FsThread): ...
