# SPDX-License-Identifier: Apache-2.0
from socket import socket

from virtio._worker import QueueWorker

COUNTERS: tuple[str, ...]
MAX_CONNECTIONS: int
MAX_WINDOW: int

class VsockWorker(QueueWorker):
    def save(self) -> list[tuple[int, ...]]: ...
    def keep(self, stream: socket, kept: tuple[int, ...], lost: list[tuple[int, int]]) -> None: ...
    def reset_transport(self) -> None: ...
    @property
    def connections(self) -> int: ...
    @property
    def counters(self) -> dict[str, int]: ...
