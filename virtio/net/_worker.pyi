# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable, Sequence

from virtio._limiter import RateLimiter
from virtio._worker import QueueWorker
from virtio.device import VirtioDevice
from virtio.net._policy import Policy
from virtio.net.mmds import Endpoint
from virtio.net.resolver import Resolver

class NetWorker(QueueWorker):
    rx_limiter: RateLimiter
    tx_limiter: RateLimiter
    def __init__(
        self,
        device: VirtioDevice,
        indices: Sequence[int],
        notify_fds: Sequence[int],
        on_failure: Callable[[Exception], None],
        name: str | None = None,
        *,
        fd: int,
        stream: bool,
        pair: int,
        rx_limiter: RateLimiter,
        tx_limiter: RateLimiter,
        mmds: Endpoint | None = None,
        policy: Policy | None = None,
        resolver: Resolver | None = None,
        pcap: int = -1,
    ) -> None: ...
    @property
    def stats(self) -> dict[str, int]: ...
