# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable, Sequence

from virtio._limiter import RateLimiter
from virtio._worker import QueueWorker
from virtio.device import VirtioDevice

MAX_DISCARD_SECTORS: int
MAX_WRITE_ZEROES_SECTORS: int

class Backend:
    """What the workers of one disk share: the file, its size, how it is to be treated."""

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
    ) -> None: ...
    def change(self, size: int, fd: int = -1, block_device: bool = False) -> None:
        """Between two requests, set `size` and, if given, put a duplicate of `fd` in the file's place.

        What is under way with io_uring ends on the file on which it began.

        :raises OSError: `fd` cannot be duplicated
        """

class BlockWorker(QueueWorker):
    """The thread of one queue of a block device."""

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
    def stats(self) -> dict[str, int]:
        """Counters of this queue by name."""
