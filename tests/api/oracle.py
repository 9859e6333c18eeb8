# SPDX-License-Identifier: Apache-2.0
"""Start Firecracker or ``pyvmm serve`` with a directory of its own, and talk to its socket in bytes."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from benches.peers import firecracker as peer

PYVMM = (sys.executable, "-c", "import sys; from vmm.commands.cli import entry; sys.exit(entry())", "serve")
ROOT = Path(__file__).parents[2]
TAPS = "".join(f"tuntap add tap{number} mode tap\n" for number in range(3))
# In a network namespace of its own, with the taps that requests name.
ALONE = ("unshare", "-n", "sh", "-c", f'printf "{TAPS}" | ip -batch - && exec "$0" "$@"')
PATIENCE = 10.0


def firecracker() -> str:
    """Path of the oracle; the layer is missing loudly where it or /dev/kvm cannot be had."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.fail("LAYER MISSING: api oracle: /dev/kvm is not there or not permitted", pytrace=False)
    try:
        return peer.firecracker()
    except peer.Missing as problem:
        pytest.fail(f"LAYER MISSING: api oracle: {problem}", pytrace=False)


class Answer(NamedTuple):
    """One response, and its bytes as they came."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    raw: bytes

    @property
    def json(self) -> Any:
        """The body as a value; None where there is no body."""
        return json.loads(self.body) if self.body else None


class Client:
    """One connection to a VMM's socket."""

    def __init__(self, path: Path | str) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(PATIENCE)
        self.sock.connect(str(path))
        self.rest = b""

    def send(self, data: bytes) -> None:
        """Send bytes, whatever they are."""
        self.sock.sendall(data)

    def receive(self, patience: float = PATIENCE) -> Answer | None:
        """The next response; None at the end of the connection, or when none has come after `patience` seconds."""
        self.sock.settimeout(patience)
        try:
            while b"\r\n\r\n" not in self.rest:
                if not (data := self.sock.recv(1 << 16)):
                    return None
                self.rest += data
            head, _, rest = self.rest.partition(b"\r\n\r\n")
            first, *lines = head.decode("latin-1").split("\r\n")
            headers = {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
            length = int(headers.get("Content-Length", 0))
            while len(rest) < length:
                if not (data := self.sock.recv(1 << 16)):
                    return None
                rest += data
        except (TimeoutError, ConnectionResetError):
            return None
        self.rest = rest[length:]
        return Answer(int(first.split()[1]), headers, rest[:length], head + b"\r\n\r\n" + rest[:length])

    def everything(self, patience: float = 0.3) -> tuple[bytes, bool]:
        """All bytes until nothing has come for `patience` seconds, and whether the connection was ended."""
        data, self.rest = self.rest, b""
        while select.select([self.sock], [], [], patience)[0]:
            try:
                chunk = self.sock.recv(1 << 16)
            except ConnectionResetError:
                return data, True
            if not chunk:
                return data, True
            data += chunk
        return data, False

    def request(self, method: str, path: str, body: bytes | None = None) -> Answer:
        """A request as most clients make one; `body` None: none, and no ``Content-Length``.

        :raises AssertionError: there was no response
        """
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n"
        if body is not None:
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        self.send(head.encode() + b"\r\n" + (body or b""))
        answer = self.receive()
        while answer is not None and answer.status == 100:
            answer = self.receive()
        assert answer is not None, f"no answer to {method} {path} {body!r}"
        return answer

    def close(self) -> None:
        """End the connection."""
        self.sock.close()


class Process:
    """A VMM in `directory`, its current directory; ended by ``close``.

    :param command: up to the options
    :param options: after ``--api-sock``
    :param output: name of the file that has what it prints
    """

    def __init__(
        self, command: Sequence[str], directory: Path, options: Sequence[str] = (), *, output: str = "output"
    ) -> None:
        self.command = command
        self.directory = directory
        self.socket = directory / "api.sock"
        self.output = directory / output
        words = [*command, "--api-sock", "api.sock", *options]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        with open(self.output, "wb") as printed:
            self.process = subprocess.Popen(
                words, cwd=directory, stdin=subprocess.DEVNULL, stdout=printed, stderr=printed,
                env={**os.environ, "PYTHONPATH": path},
            )  # fmt: skip
        self._client: Client | None = None

    def await_socket(self) -> None:
        """Wait until it listens, or has ended."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and self.process.poll() is None:
            with contextlib.suppress(OSError):
                Client(self.socket).close()
                return
            time.sleep(0.002)

    @property
    def client(self) -> Client:
        """A connection, kept; waits until it listens."""
        if self._client is None:
            self.await_socket()
            self._client = Client(self.socket)
        return self._client

    def request(self, method: str, path: str, body: object = None) -> Answer:
        """A request; a body is sent as JSON, unless it is bytes. A connection that was ended is made again."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        answer = self.client.request(method, path, data)
        if answer.headers.get("Connection") == "close":
            self.client.close()
            self._client = None
        return answer

    def wait(self, patience: float = PATIENCE) -> int:
        """The exit code."""
        return self.process.wait(patience)

    def close(self, number: int = signal.SIGKILL) -> None:
        """End it."""
        if self._client is not None:
            self._client.close()
        if self.process.poll() is None:
            self.process.send_signal(number)
            try:
                self.process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
