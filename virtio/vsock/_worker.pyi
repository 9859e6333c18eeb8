# SPDX-License-Identifier: Apache-2.0
from socket import socket

from virtio.vsock._sockets import VsockSockets

MAX_CONNECTIONS: int
MAX_WINDOW: int

class VsockWorker(VsockSockets):
    def save(self) -> list[tuple[int, ...]]: ...
    def keep(self, stream: socket, kept: tuple[int, ...], lost: list[tuple[int, int]]) -> None: ...
    def reset_transport(self) -> None: ...
