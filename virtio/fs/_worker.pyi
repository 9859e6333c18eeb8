# SPDX-License-Identifier: Apache-2.0
from typing import Self

from virtio._worker import QueueWorker

class Backlog:
    def __new__(cls, queue_size: int) -> Self: ...

class FsThread(QueueWorker):
    @property
    def stats(self) -> dict[str, int]: ...

class FsWorker(FsThread): ...
class FsHelper(FsThread): ...
