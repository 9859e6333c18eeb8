# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable, Sequence

from virtio._limiter import RateLimiter
from virtio._worker import QueueWorker
from virtio.device import VirtioDevice

MAX_DISCARD_SECTORS: int
MAX_WRITE_ZEROES_SECTORS: int

class Backend:
    limiter: RateLimiter
    def __init__(
        self,
        fd: int,
        size: int,
        serial: bytes,
        limiter: RateLimiter,
        *,
        read_only: bool,
        block_device: bool,
        direct: bool,
        unsafe: bool,
        use_uring: bool,
        discard_block: int = 0,
    ) -> None: ...
    def change(self, workers: Sequence[BlockWorker], size: int, fd: int = -1, block_device: bool = False) -> None: ...

class BlockWorker(QueueWorker):
    def __init__(
        self,
        device: VirtioDevice,
        indices: Sequence[int],
        notify_fds: Sequence[int],
        on_failure: Callable[[Exception], None],
        name: str | None = None,
        *,
        backend: Backend,
        size: int,
    ) -> None: ...
    @property
    def stats(self) -> dict[str, int]: ...
