# SPDX-License-Identifier: Apache-2.0
"""Landlock alone, without filters: what a thread without files, and one of a share, cannot reach, and what they can."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vmm.jail import _seccomp

ROOT = Path(__file__).parents[2]
TRY = """
import json, os, signal, socket, sys, threading
from vmm.jail import _seccomp
from vmm import threads
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


# In place of the attempts above; the shared directory is `shared` of the directory that they are of.
SHARE = """
os.mkdir("shared"), os.mkdir("shared/d"), os.mkdir("shared/moved")
open("shared/in", "w").close(), open("shared/moved/file", "w").close()
os.symlink("../file", "shared/way out")
shared, moved = os.open("shared", os.O_PATH), os.open("shared/moved/file", os.O_PATH)
os.rename("shared/moved", "elsewhere")
outside = os.open("file", os.O_PATH)
attempts = {
    "read": lambda: os.open("shared/in", os.O_RDONLY),
    "read by a descriptor": lambda: os.open(f"/proc/self/fd/{os.open('shared/in', os.O_PATH)}", os.O_RDONLY),
    "list": lambda: os.listdir("shared/d"),
    "write": lambda: os.open("shared/in", os.O_WRONLY),
    "truncate": lambda: os.truncate("shared/in", 1),
    "create": lambda: os.close(os.open("shared/new", os.O_CREAT | os.O_EXCL | os.O_RDWR)),
    "rename to another directory": lambda: os.rename("shared/new", "shared/d/new"),
    "link in another directory": lambda: os.link("shared/in", "shared/d/link"),
    "link a file without a name": lambda: os.link(
        f"/proc/self/fd/{os.open('shared', os.O_TMPFILE | os.O_RDWR)}", "shared/d/named", src_dir_fd=shared),
    "fifo": lambda: os.mkfifo("shared/f"),
    "socket": lambda: os.mknod("shared/s", 0o140600),
    "symlink": lambda: os.symlink("a", "shared/l"),
    "unlink": lambda: os.unlink("shared/d/new"),
    "directory": lambda: (os.mkdir("shared/e"), os.rmdir("shared/e")),
    "read outside": lambda: os.open("file", os.O_RDONLY),
    "write outside": lambda: os.open("file", os.O_WRONLY),
    "outside by ..": lambda: os.open("../file", os.O_RDONLY, dir_fd=shared),
    "outside by a symbolic link": lambda: os.open("shared/way out", os.O_RDONLY),
    "outside by a descriptor": lambda: os.open(f"/proc/self/fd/{outside}", os.O_RDONLY),
    "what was moved out": lambda: os.open(f"/proc/self/fd/{moved}", os.O_RDONLY),
    "list outside": lambda: os.listdir("/"),
    "create outside": lambda: os.open("new", os.O_CREAT | os.O_RDWR),
    "rename to the outside": lambda: os.rename("shared/in", "in"),
    "rename from the outside": lambda: os.rename("file", "shared/file"),
    "link from the outside": lambda: os.link("file", "shared/link"),
    "unlink outside": lambda: os.unlink("file"),
    "truncate outside": lambda: os.truncate("file", 0),
    "memory": lambda: os.open("/proc/self/mem", os.O_RDWR),
    "connect": lambda: socket.create_connection(tcp.getsockname()),
}
def work():
    for name, attempt in attempts.items():
        try:
            attempt()
            told[name] = "done"
        except OSError as error:
            told[name] = "refused" if error.errno in (13, 18) else str(error)
class Alone:  # the guard's rules without its filters
    alone = False
    def confines(self): return False
    def start(self, thread): thread.start()
    install = lambda self, kind, below=None: seccomp.Filters.install(self, kind, below)
from vmm.jail import seccomp
_seccomp.install = lambda kind: None
threads.guard = Alone()
thread = threads.spawn("fs", "share", work, below=(shared, sys.argv[2] == "writable"))
thread.join()
print(json.dumps(told))
"""
OUTSIDE = {
    "read outside", "write outside", "outside by ..", "outside by a symbolic link", "outside by a descriptor",
    "what was moved out", "list outside", "create outside", "rename to the outside", "rename from the outside",
    "link from the outside", "unlink outside", "truncate outside", "memory", "connect",
}  # fmt: skip


def _told(directory: Path, level: str, code: str = TRY) -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, "-c", code, str(directory), level], capture_output=True, text=True, cwd=ROOT, timeout=60
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


@pytest.mark.parametrize("level", ["writable", "read-only"])
def test_a_thread_of_a_share_has_its_directory_alone(tmp_path: Path, level: str) -> None:
    told = _told(tmp_path, level, TRY.partition("attempts = {")[0] + SHARE)
    reads = {"read", "read by a descriptor", "list"}
    assert {name for name, what in told.items() if what == "done"} == (
        set(told) - OUTSIDE if level == "writable" else reads
    )
    assert {what for name, what in told.items() if name in OUTSIDE} == {"refused"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "file", "shared", "socket", "there"]
