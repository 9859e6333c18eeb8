# SPDX-License-Identifier: Apache-2.0
from virtio._worker import QueueWorker

COUNTERS: tuple[str, ...]

class VsockWorker(QueueWorker):
    def reset_transport(self) -> None: ...
    @property
    def connections(self) -> int: ...
    @property
    def counters(self) -> dict[str, int]: ...
