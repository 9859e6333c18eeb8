# SPDX-License-Identifier: Apache-2.0
"""Landlock alone, without filters: what a thread without files cannot reach, and what it still can."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vmm import _seccomp

ROOT = Path(__file__).parents[2]
TRY = """
import json, os, signal, socket, sys, threading
from vmm import _seccomp, threads
os.chdir(sys.argv[1])
open("file", "w").close()
os.mkdir("there")
held = os.open("file", os.O_RDWR)
tcp = socket.create_server(("127.0.0.1", 0))
unix, abstract = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
unix.bind("socket"), unix.listen()
abstract.bind("\\0" + sys.argv[1]), abstract.listen()
told = {}
attempts = {
    "read": lambda: os.open("file", os.O_RDONLY),
    "write": lambda: os.open("file", os.O_WRONLY),
    "create": lambda: os.open("new", os.O_CREAT | os.O_RDWR),
    "list": lambda: os.listdir("."),
    "mkdir": lambda: os.mkdir("d"),
    "symlink": lambda: os.symlink("a", "b"),
    "mkfifo": lambda: os.mkfifo("f"),
    "rename": lambda: os.rename("file", "there/file"),
    "link": lambda: os.link("file", "there/link"),
    "device": lambda: os.open("/dev/kvm", os.O_RDWR),
    "by its descriptor": lambda: os.open(f"/proc/self/fd/{held}", os.O_RDWR),
    "unlink": lambda: os.unlink("file"),
    "rmdir": lambda: os.rmdir("there"),
    "connect": lambda: socket.create_connection(tcp.getsockname()),
    "bind": lambda: socket.create_server(("127.0.0.1", 0)),
    "abstract socket": lambda: socket.socket(socket.AF_UNIX).connect("\\0" + sys.argv[1]),
    "signal the parent": lambda: os.kill(os.getppid(), 0),
    "unix socket": lambda: socket.socket(socket.AF_UNIX).connect("socket"),
    "held": lambda: (os.write(held, b"x"), os.ftruncate(held, 0)),
    "signal a thread": lambda: signal.pthread_kill(threading.main_thread().ident, 0),
}
def work():
    _seccomp.confine(sys.argv[2] == "no files")
    for name, attempt in attempts.items():
        try:
            attempt()
            told[name] = "done"
        except OSError as error:
            told[name] = "refused" if error.errno in (1, 13, 18) else str(error)
thread = threading.Thread(target=work)
thread.start()
thread.join()
print(json.dumps(told))
"""
NETWORK = {"connect", "bind", "abstract socket", "signal the parent"}
KEPT = {"unix socket", "held", "signal a thread"}


def _told(directory: Path, level: str) -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, "-c", TRY, str(directory), level], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert done.returncode == 0, done.stderr
    told: dict[str, str] = json.loads(done.stdout)
    return told


@pytest.fixture(autouse=True)
def _kernel() -> None:
    if _seccomp.landlock() < 6:
        pytest.skip("LAYER MISSING: Landlock ABI 6, Linux 6.12")


def test_a_thread_without_files_opens_makes_and_removes_none(tmp_path: Path) -> None:
    told = _told(tmp_path, "no files")
    assert {name for name, what in told.items() if what == "done"} == KEPT
    assert {what for name, what in told.items() if name not in KEPT} == {"refused"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "socket", "there"]


def test_a_thread_with_files_has_them_and_no_network(tmp_path: Path) -> None:
    told = _told(tmp_path, "files")
    assert {name for name, what in told.items() if what == "refused"} == NETWORK
    assert told["rename"] == "done", "to another directory, too"
