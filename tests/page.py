# SPDX-License-Identifier: Apache-2.0
"""A web server of this host's, for guests to reach over a network."""

from __future__ import annotations

import http.server
import socket


class Page(http.server.BaseHTTPRequestHandler):
    """The same for every path."""

    def do_GET(self) -> None:
        """Send it."""
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"the page\n")

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def own_address() -> str:
    """The host's own, on the network that it goes out by."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route:
        route.connect(("192.0.2.200", 9))
        found: str = route.getsockname()[0]
        return found
