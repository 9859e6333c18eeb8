# SPDX-License-Identifier: Apache-2.0
"""``pyvmm sandbox``, ``exec``, ``cp`` and ``ps``, as a user types them."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from tests.linux.command import pyvmm
from vmm import Sandbox

pytestmark = pytest.mark.timeout(900)  # the first one may build r3


def test_a_wrong_mount_is_told_in_the_words_of_the_command() -> None:
    for word in ("/work", "/work=", "work=.", "=."):
        bad = pyvmm("sandbox", "--mount", word, "busybox", "true")
        assert bad.stderr.startswith(f"pyvmm sandbox: --mount {word}: must be PATH=DIR".encode()), bad
        assert (bad.returncode, bad.stderr.count(b"\n")) == (2, 1)


def test_the_commands_reach_a_sandbox_of_another_process(sandbox: Sandbox, tmp_path: Path) -> None:
    assert sandbox.name in pyvmm("ps").stdout.decode()
    listed = [json.loads(line) for line in pyvmm("ps", "--json").stdout.splitlines()]
    (own,) = (each for each in listed if each["pid"] == os.getpid())
    assert (own["name"], own["image"], own["state"]) == (sandbox.name, "busybox", "running")
    script = "cat; id -u; echo $SHAPE $COLOUR; exit 9"
    done = pyvmm("exec", "-e", "SHAPE=round", "-u", "nobody", sandbox.name, "sh", "-c", script)
    assert (done.stdout, done.returncode) == (b"65534\nround blue\n", 9), done
    assert pyvmm("exec", sandbox.name, "wc", "-c", input=b"x" * 300_000).stdout == b"300000\n"
    missing = pyvmm("exec", "nobody", "id")
    assert missing.returncode == 2 and b"NAME nobody: is not a running sandbox" in missing.stderr
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "sub/data").write_bytes(b"\0\1")
    (tree / "sub/data").chmod(0o750)
    (tree / "link").symlink_to("sub/data")
    assert pyvmm("cp", str(tree), f"{sandbox.name}:/tmp").returncode == 0
    assert sandbox.run("stat -c %a /tmp/tree/sub/data; readlink /tmp/tree/link").stdout == "750\nsub/data\n"
    assert pyvmm("cp", f"{sandbox.name}:/tmp/tree", str(tmp_path / "back")).returncode == 0
    assert (tmp_path / "back/sub/data").read_bytes() == b"\0\1"
    assert os.stat(tmp_path / "back/sub/data").st_mode & 0o777 == 0o750
    assert os.readlink(tmp_path / "back/link") == "sub/data"
    sandbox.files.write("/tmp/tree/sub/data", b"new")
    before = os.stat(tmp_path / "back/sub/data").st_ino
    again = pyvmm("cp", f"{sandbox.name}:/tmp/tree/sub/data", str(tmp_path / "back/sub/data"))
    assert os.stat(tmp_path / "back/sub/data").st_ino != before  # never half a file under its name
    assert again.returncode == 0 and (tmp_path / "back/sub/data").read_bytes() == b"new"
    for source, problem in (
        ("/tmp/tree", b"back/sub/data: File exists"),
        ("/dev/zero", b"/dev/zero: is not a file, directory or link"),
        ("/nowhere", b"/nowhere: No such file"),
    ):
        bad = pyvmm("cp", f"{sandbox.name}:{source}", str(tmp_path / "back/sub/data"))
        assert bad.returncode and bad.stderr.count(b"\n") == 1 and problem in bad.stderr, bad
    bad = pyvmm("cp", f"{sandbox.name}:/dev/zero", str(tmp_path / "zero"))
    assert bad.returncode == 1 and bad.stderr == b"pyvmm cp: /dev/zero: is not a file, directory or link\n"
    bad = pyvmm("cp", "/dev/zero", f"{sandbox.name}:/tmp/zero")
    assert bad.returncode == 1 and bad.stderr == b"pyvmm cp: /dev/zero: is not a file, directory or link\n"
    assert sorted(os.listdir(tmp_path / "back/sub")) == ["data"]
    with open("/dev/full", "wb") as full:
        words = [sys.executable, "-m", "vmm", "exec", sandbox.name, "echo", "x"]
        bad = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=full, stderr=subprocess.PIPE)
    assert bad.returncode == 1 and bad.stderr == b"pyvmm exec: write standard output: No space left on device\n"
    assert b"required: NAME (see" in pyvmm("exec").stderr


def test_the_command_is_a_sandbox_on_a_terminal(runtime: Path) -> None:
    import pty

    pid, fd = pty.fork()
    if not pid:
        os.execv(sys.executable, [sys.executable, "-m", "vmm", "sandbox", "--memory", "64M", "busybox"])
    termios.tcsetwinsize(fd, (33, 99))
    said = b""

    def until(word: bytes) -> None:
        nonlocal said
        while word not in said:
            said += os.read(fd, 4096)

    until(b"# ")
    os.write(fd, b"stty size; tty; exit 5\r")
    until(b"/dev/pts/0")
    assert b"33 99" in said
    with contextlib.suppress(OSError):
        while os.read(fd, 4096):
            pass
    os.close(fd)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 5


def test_the_command_publishes_ports(runtime: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for word, problem in (
            ("80", b"--publish 80: must be PORT:PORT or HOST:PORT:PORT"),
            ("x:80", b"--publish x:80: must be"),
            ("1:70000", b"--publish 1:70000: must be"),
            (f"{port}:80", b"listen on 127.0.0.1 port %d: Address already in use" % port),
        ):
            bad = pyvmm("sandbox", "--memory", "64M", "--publish", word, "busybox", "true")
            assert bad.returncode in (1, 2) and problem in bad.stderr and bad.stderr.count(b"\n") == 1, bad
    # It goes on until the answer is here: a sandbox ends with its command, and what is on its way is lost.
    words = ["--publish", f"127.0.0.1:{port}:80", "busybox", "sh", "-c", "nc -l -p 80 -e echo hi; exec cat"]
    command = [sys.executable, "-m", "vmm", "sandbox", "--memory", "64M", *words]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        said = b""
        while not said and process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 30) as stream:
                said = stream.recv(100)
        process.communicate(timeout=60)
        assert (said, process.returncode) == (b"hi\n", 0)
