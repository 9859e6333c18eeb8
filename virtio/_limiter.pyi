# SPDX-License-Identifier: Apache-2.0
Bucket = tuple[int, int, int]

class RateLimiter:
    """Limits bytes and operations a second; shared by the queues of a device, changeable while it runs."""

    throttled: int
    @property
    def is_limited(self) -> bool:
        """Whether there is any limit."""
    def __init__(self, bandwidth: Bucket | None = None, ops: Bucket | None = None) -> None: ...
    def update(self, bandwidth: Bucket | None = None, ops: Bucket | None = None) -> None:
        """Replace the buckets that are given, full; ``(0, 0, 0)`` takes a limit away; None leaves it. Any thread."""
    def ask(self, nbytes: int, ops: int = 1) -> int:
        """Take tokens for `ops` operations of `nbytes` together; 0, or the nanoseconds to wait before asking again."""
