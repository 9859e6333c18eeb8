# SPDX-License-Identifier: Apache-2.0
from virtio._worker import QueueWorker

class VsockSockets(QueueWorker):
    @property
    def connections(self) -> int: ...
    @property
    def stats(self) -> dict[str, int]: ...
