# SPDX-License-Identifier: Apache-2.0
from virtio._worker import QueueWorker

COUNTERS: tuple[str, ...]

class VsockWorker(QueueWorker):
    """The thread of a :class:`virtio.vsock.device.Vsock`, from which it takes guest_cid and the listener."""

    def reset_transport(self) -> None:
        """Tell the driver that every connection is gone (§5.10.6.7); before ``start``."""
    @property
    def connections(self) -> int:
        """How many there are, open or on their way in or out."""
    @property
    def counters(self) -> dict[str, int]:
        """Everything counted since the device was made, by name."""
