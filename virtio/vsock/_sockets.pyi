# SPDX-License-Identifier: Apache-2.0
from virtio._worker import QueueWorker

COUNTERS: tuple[str, ...]

class VsockSockets(QueueWorker):
    @property
    def connections(self) -> int: ...
    @property
    def counters(self) -> dict[str, int]: ...
