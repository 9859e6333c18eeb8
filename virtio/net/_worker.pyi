# SPDX-License-Identifier: Apache-2.0
from virtio._worker import QueueWorker

class NetWorker(QueueWorker):
    @property
    def stats(self) -> dict[str, int]: ...
