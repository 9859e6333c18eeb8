# SPDX-License-Identifier: Apache-2.0
"""The program that starts copies of a VMM and takes their times."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benches.peers.firecracker import Missing
from benches.peers.start import Starter

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="LAYER MISSING: cc")

SERVER = r"""
import socket, sys, time
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
client = listener.accept()[0]
for number in range(2):
    asked = client.recv(4096)
    client.sendall(b"HTTP/1.1 200 \r\nContent-Length: 5\r\n\r\n")
    time.sleep(0.01)
    client.sendall(b"hello")
print(asked.decode(), flush=True)
"""


def test_times_of_copies_with_a_socket(tmp_path: Path) -> None:
    command = ["python3", "-c", SERVER, f"{tmp_path}/%d.sock"]
    asked = [("GET", "/", None), ("PUT", "/copy/%%", {"a": 1})]
    lives = Starter(tmp_path).run(3, command, requests=asked, mark="c")
    assert len(lives) == 3
    for life in lives:
        assert 0 < life.connected < life.answers[0] <= life.asked <= life.mark <= life.end
        assert life.answers[0] > 10 and 10 < life.answers[1] < life.end


def test_a_copy_is_killed_at_its_mark(tmp_path: Path) -> None:
    (life,) = Starter(tmp_path).run(1, ["sh", "-c", "printf x; exec sleep 60"], hold=1)
    assert 0 < life.mark <= life.end < 10_000


def test_a_copy_without_its_mark_is_missing(tmp_path: Path) -> None:
    with pytest.raises(Missing, match="no sign of its guest"):
        Starter(tmp_path).run(2, ["true"])
