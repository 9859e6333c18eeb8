# SPDX-License-Identifier: Apache-2.0
"""``pyvmm exec`` on streams, to an agent that is no VM's."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

from tests.vmm.test_sandbox_host import STARTED, frame

PROGRAM = """
import sys
from vmm.commands.exec import connect
from vmm.sandbox.channel import Link
from vmm.sandbox import Session
with Session(Link(sys.argv[1]), {"env": {}, "cwd": None, "user": None}).exec("x") as process:
    sys.exit(connect(process, terminal=False))
"""


def _take(listener: socket.socket) -> tuple[socket.socket, bytes]:
    # A connection, and its request.
    stream, _ = listener.accept()
    stream.settimeout(20)
    assert stream.recv(64) == b"CONNECT 521\n"
    stream.sendall(b"OK 1\n")
    return stream, stream.recv(1 << 16)


def test_a_signal_is_passed_on_while_the_command_does_not_read(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "v"))
        listener.listen()
        listener.settimeout(20)
        said, says = os.pipe()
        words = [sys.executable, "-c", PROGRAM, str(tmp_path / "v")]
        with subprocess.Popen(words, stdin=said) as program, open(says, "wb", buffering=0) as source:
            os.close(said)
            command, _ = _take(listener)
            with command:
                command.sendall(STARTED)
                os.set_blocking(says, False)
                quiet = time.monotonic()
                while time.monotonic() - quiet < 0.3:  # all buffers are full
                    if source.write(bytes(1 << 16)):
                        quiet = time.monotonic()
                program.send_signal(signal.SIGTERM)
                other, request = _take(listener)
                with other:
                    assert b'"signal":15' in request
                    other.sendall(frame(b"k"))
                command.sendall(frame(b"x", struct.pack("<BBB", 1, 15, 0)))
                assert program.wait(20) == 143
