# SPDX-License-Identifier: Apache-2.0
"""Python's HTTP client on a unix socket: for every layer's tests."""

from __future__ import annotations

import http.client
import os
import socket
from pathlib import Path

from tests.waiting import PATIENCE


class Connection(http.client.HTTPConnection):
    """A connection to the socket at `path`, of whatever length."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=PATIENCE)
        self._path = path

    def connect(self) -> None:
        """Connect."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(PATIENCE)
        directory = os.open(self._path.parent, os.O_PATH)  # pytest's own directory's name fills most of 108 bytes
        try:
            self.sock.connect(f"/proc/self/fd/{directory}/{self._path.name}")
        finally:
            os.close(directory)
