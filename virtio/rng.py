# SPDX-License-Identifier: Apache-2.0
"""The entropy device (§5.4): the host's random numbers for the guest."""

from __future__ import annotations

import os
import time

from virtio import spec
from virtio.device import VirtioDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from virtio._limiter import RateLimiter
    from vmm._fastpath import Chain

# As in Firecracker: what one request gets at most, however large its buffers.
REQUEST_MAX = 64 << 10
_NAP = 0.05  # seconds that a throttled worker sleeps before it looks whether it is to stop


class Entropy(VirtioDevice):
    """A virtio entropy device.

    :param limiter: limits bytes and requests; kept, and changeable while the guest runs; None: no limit
    :param name: name of the worker's thread

    ``stats``: ``bytes`` given to the guest; ``bad_requests`` have no buffer to fill, or one that is not to be filled.
    Source: Linux getrandom(2), the pool of /dev/urandom, which is never empty once the host has booted.
    """

    thread_kind = "device"
    device_type = spec.TYPE_ENTROPY
    queue_sizes = (256,)

    def __init__(self, *, limiter: RateLimiter | None = None, name: str = "virtio-rng") -> None:
        super().__init__()
        self.name = name
        self.limiter = limiter
        self.counters["bytes"] = 0

    @property
    def stats(self) -> dict[str, int]:
        return self.counters | ({"throttled": self.limiter.throttled} if self.limiter else {})

    def process(self, queue_index: int) -> None:
        self.drain(self.context.queues[queue_index], self._serve)

    def _serve(self, chain: Chain) -> int:
        self.counters["requests"] += 1
        if chain.readable_bytes or not chain.writable_bytes:  # §5.4.6.1: the driver must not
            self.counters["bad_requests"] += 1
            return 0
        wanted = min(chain.writable_bytes, REQUEST_MAX)
        if not self._granted(wanted):
            wanted = 1  # §5.4.6.2: at least one. Linux waits for ever for the next after an answer of 0 bytes
        written = chain.scatter(os.urandom(wanted))
        self.counters["bytes"] += written
        return written

    def _granted(self, size: int) -> bool:
        """Wait until the limiter grants `size` bytes; False: this thread is to stop meanwhile."""
        while self.limiter is not None and (wait_ns := self.limiter.ask(size)):
            if self.context.stopping:
                return False
            time.sleep(min(wait_ns / 1e9, _NAP))
        return True
