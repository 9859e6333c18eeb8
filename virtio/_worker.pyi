# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable, Sequence

from virtio.device import ActivateContext, VirtioDevice

class QueueWorker:
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
    def start(self, context: ActivateContext) -> None: ...
    def begin(self) -> None: ...
    def stop(self, leaving: bool = False) -> None: ...
    def forget(self) -> None: ...
    def close(self) -> None: ...
    @property
    def notified(self) -> dict[int, int]: ...
    def wake(self) -> None: ...

class Worker(QueueWorker):
    def __init__(
        self,
        device: VirtioDevice,
        indices: Sequence[int],
        notify_fds: Sequence[int],
        on_failure: Callable[[Exception], None],
        name: str | None = None,
    ) -> None: ...
    def serve_only(self, index: int) -> None: ...
