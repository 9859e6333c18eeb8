# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable, Sequence

from virtio.device import ActivateContext, VirtioDevice

def set_thread_name(name: str) -> None:
    """Name the calling thread for ``top -H``: its first 15 bytes."""

class QueueWorker:
    """A thread for some of a device's queues; base of the devices' Cython loops, used through the transport."""

    device: VirtioDevice
    name: str
    indices: tuple[int, ...]
    def __init__(
        self,
        device: VirtioDevice,
        indices: Sequence[int],
        notify_fds: Sequence[int],
        on_failure: Callable[[Exception], None],
        name: str | None = None,
    ) -> None: ...
    def start(self, context: ActivateContext) -> None:
        """Start the thread for the driver of `context`."""
    def begin(self) -> None:
        """Make ready for a driver, before the thread starts; for a subclass."""
    def stop(self, leaving: bool = False) -> None:
        """End the thread and wait for it; idempotent."""
    def forget(self) -> None:
        """The driver is gone, and with it what it began; the thread has stopped. For a subclass."""
    def close(self) -> None:
        """Stop the thread and give its file descriptors back; idempotent."""
    @property
    def notified(self) -> dict[int, int]:
        """How often the driver's notification woke this thread, by the queue's number."""
    def wake(self) -> None:
        """Make the thread call ``event(TOKEN_TIMER)`` soon; any thread."""
