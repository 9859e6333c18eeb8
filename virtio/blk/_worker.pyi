# SPDX-License-Identifier: Apache-2.0
from collections.abc import Sequence

from virtio._limiter import RateLimiter
from virtio._worker import QueueWorker
from virtio.blk.device import Disk

MAX_DISCARD_SECTORS: int
MAX_WRITE_ZEROES_SECTORS: int

class Backend:
    def __init__(self, disk: Disk, serial: bytes, limiter: RateLimiter, *, unsafe: bool, use_uring: bool) -> None: ...
    def change(self, workers: Sequence[BlockWorker], size: int, fd: int = -1, block_device: bool = False) -> None: ...

class BlockWorker(QueueWorker):
    @property
    def stats(self) -> dict[str, int]: ...
