# SPDX-License-Identifier: Apache-2.0
"""Files of a sandbox: there and back, errors, links that a user leaves, watches."""

from __future__ import annotations

import errno
import hashlib
import io
import random
from collections.abc import Callable

import pytest

from vmm import Sandbox
from vmm.errors import ConfigError
from vmm.sandbox import CommandTimeout, SandboxError
from vmm.sandbox.files import Watch

pytestmark = pytest.mark.timeout(900)  # the first one may build r3


def test_files_there_and_back(sandbox: Sandbox) -> None:
    files = sandbox.files
    data = random.Random(2).randbytes(700_001)
    files.write("/data/deep/er/blob", data)
    assert sandbox.run("sha256sum /data/deep/er/blob").stdout.split()[0] == hashlib.sha256(data).hexdigest()
    assert files.read("/data/deep/er/blob", "bytes") == data
    assert files.read_bytes("/data/deep/er/blob", offset=699_999, length=10) == data[699_999:]
    files.write("/data/text", "a line\n", mode=0o640)
    files.write("/data/text", io.BytesIO(b"another\n"), append=True)
    assert files.read("/data/text") == "a line\nanother\n"
    files.write("/data/pieces", io.StringIO("caf\u00e9 " * 50_000))
    files.write("/data/pieces", ["\u00e9", b"\n"], append=True)
    assert files.read("/data/pieces") == "caf\u00e9 " * 50_000 + "\u00e9\n"
    files.remove("/data/pieces")
    with pytest.raises(TypeError, match="data of a file must be text, bytes"):
        files.write("/data/five", 5)  # type: ignore[arg-type]
    files.symlink("/data/link", "text")
    files.chown("/data/text", "nobody:tty")
    said = sandbox.run("stat -c '%n %a %u %g %s' /data/text; readlink /data/link").stdout
    assert said == "/data/text 640 65534 5 15\ntext\n"
    found = {entry.name: entry for entry in files.list("/data")}
    assert {name: entry.type for name, entry in found.items()} == {"deep": "dir", "text": "file", "link": "symlink"}
    assert found["link"].target == "text" and (found["text"].size, found["text"].uid) == (15, 65534)
    assert files.stat("/data/link", follow=True).type == "file"
    files.rename("/data/text", "/data/new")
    assert files.exists("/data/new") and not files.exists("/data/text")
    assert files.read("/proc/version").startswith("Linux ")
    files.remove("/data")
    assert sandbox.run("ls /data").exit_code == 1
    for number in range(60):
        files.write(f"/many/{number % 7}/{number}", b"")
    assert len(files.list("/many/3")) == 9
    files.remove("/many")
    assert not files.exists("/many")


def test_a_directory_is_made_where_no_file_is(sandbox: Sandbox) -> None:
    files = sandbox.files
    files.write("/made/file", "")
    files.symlink("/made/link", "nowhere")
    files.make_dir("/made")
    for name in ("file", "link"):
        with pytest.raises(FileExistsError, match=f"/made/{name}"):
            files.make_dir(f"/made/{name}")
    with pytest.raises(SandboxError, match="/made/file: File exists"):
        sandbox.make_read_only("/made/file")
    files.remove("/made")


def test_a_directory_is_removed_whatever_others_remove(sandbox: Sandbox) -> None:
    files = sandbox.files
    for _ in range(5):
        sandbox.run("mkdir -p /many; cd /many; for i in $(seq 1500); do : >$i; done", check=True)
        with sandbox.exec("cd /many; ls -r | xargs -n 20 rm -f") as other:
            files.remove("/many")
            other.wait(20)
    sandbox.run("mkdir -p -m 777 /mine/theirs; chmod 700 /mine/theirs; chown nobody /mine")
    with pytest.raises(PermissionError, match="/mine/theirs"):
        files.remove("/mine/theirs", user="nobody")
    files.remove("/mine")


def test_files_fail_as_the_kernel_says(sandbox: Sandbox) -> None:
    files = sandbox.files
    with pytest.raises(OSError, match="Invalid argument"):
        files.read_bytes("/proc/version", offset=1 << 64)
    with pytest.raises(FileNotFoundError, match="/nowhere"):
        files.read("/nowhere")
    with pytest.raises(IsADirectoryError):
        files.write("/etc", b"x" * 100_000)
    with pytest.raises(NotADirectoryError):
        files.list("/etc/passwd")
    with pytest.raises(PermissionError):
        files.write("/etc/mine", b"", user="nobody")
    with pytest.raises(OSError) as caught:
        files.write("/dev/full", b"x")
    assert caught.value.errno == errno.ENOSPC
    for call in (
        lambda: files.read("/etc/passwd", user="no-user"),
        lambda: files.write("/tmp/some", b"x" * 100_000, user="root:no-group"),
        lambda: files.watch("/tmp", user="no-user"),
        lambda: files.chown("/etc/passwd", "no-user"),
    ):
        with pytest.raises(ConfigError, match=r"no-(group|user).*the guest does not have"):
            call()
    sandbox.run("mkfifo /tmp/fifo")
    assert files.read("/tmp/fifo", timeout=10) == ""  # nobody is held up
    with pytest.raises(CommandTimeout):
        files.read("/dev/zero", "bytes", timeout=0.2)
    assert files.exists("/etc/passwd")  # and goes on


def test_a_directory_that_cannot_be_read_is_not_empty(sandbox: Sandbox) -> None:
    with sandbox.exec("mkdir /tmp/gone; cd /tmp/gone; rmdir /tmp/gone; echo ready; sleep 100") as process:
        assert process.stdout.readline(10) == b"ready\n"
        with pytest.raises(FileNotFoundError):
            sandbox.files.list(f"/proc/{process.pid}/cwd")
        with pytest.raises(FileNotFoundError):
            list(sandbox.files.get_archive(f"/proc/{process.pid}/cwd"))
    sandbox.run("mkdir -m 744 /tmp/listed; touch /tmp/listed/file", check=True)  # whose names alone others may read
    with pytest.raises(PermissionError, match="/tmp/listed"):
        sandbox.files.list("/tmp/listed", user="nobody")


def test_root_does_not_follow_what_a_user_has_left_in_tmp(sandbox: Sandbox) -> None:
    sandbox.run("ln -s /etc/passwd /tmp/innocent", user="nobody")
    with pytest.raises(PermissionError):
        sandbox.files.write("/tmp/innocent", b"gone")
    assert "root:" in sandbox.files.read("/etc/passwd")
    files = sandbox.files
    sandbox.run("ln -s /root /tmp/way; mkdir /tmp/mine; echo x >/tmp/mine/file", user="nobody", check=True)
    sandbox.run("mkdir -p /root/own/below /tmp/roots; echo y >/root/own/file; ln -s /root/own /tmp/short", check=True)
    calls: list[Callable[[], object]] = [
        lambda: files.write("/tmp/way/made", b""),
        lambda: files.write("/tmp//way/./own/below/made", b""),
        lambda: files.write("../tmp/way/own/above/made", b""),
        lambda: files.make_dir("/tmp/way/made"),
        lambda: files.remove("/tmp/way/own/file"),
        lambda: files.rename("/tmp/way/own/file", "/root/own/made"),
        lambda: files.rename("/root/own/file", "/tmp/way/own/made"),
        lambda: files.symlink("/tmp/way/made", "/"),
        lambda: files.chmod("/tmp/way/own/file", 0o777),
        lambda: files.chown("/tmp/way/own/file", "nobody"),
        lambda: files.read("/tmp/way/own/file"),
    ]
    for call in calls:
        with pytest.raises(PermissionError):
            call()
    assert sandbox.run("cd /root; find . | sort; ls /tmp/roots").stdout == ".\n./own\n./own/below\n./own/file\n"
    assert files.read("/tmp/mine/file") == "x\n"
    files.write("/tmp/short/below/new/file", "by root's own link")
    files.rename("own/below/new/file", "../tmp/roots/./file")
    files.rename("/tmp/roots/file", "own/back")
    assert files.read("/root/own/below/../back") == "by root's own link"
    files.remove("/root/own/")


def test_a_directory_is_watched(sandbox: Sandbox) -> None:
    sandbox.files.make_dir("/watched")
    changes = sandbox.files.watch("/watched", timeout=20)
    sandbox.run("echo x >/watched/file; rm /watched/file")
    seen = [(change.name, change.kind) for _, change in zip(range(3), changes, strict=False)]
    assert seen == [("file", "created"), ("file", "written"), ("file", "removed")]
    changes.close()


def test_a_watch_ends_with_its_directory_and_says_when_changes_were_lost(sandbox: Sandbox) -> None:
    def seen(changes: Watch) -> list[tuple[str, str]]:
        return [(change.name, change.kind) for change in changes]

    sandbox.files.make_dir("/watched/here")
    changes = sandbox.files.watch("/watched/here", timeout=30)
    sandbox.files.write("/watched/here/file", b"")
    sandbox.files.remove("/watched/here")
    assert seen(changes)[-2:] == [("file", "removed"), ("", "removed")]
    assert list(changes) == []
    sandbox.run("mkdir -p /watched/mount; mount -t tmpfs tmpfs /watched/mount", check=True)
    changes = sandbox.files.watch("/watched/mount", timeout=30)
    sandbox.run("umount /watched/mount", check=True)
    assert seen(changes) == []
    # Two changes for each file are more than the kernel's queue (16,384) and, as names are long, the connection hold.
    sandbox.files.make_dir("/watched/full")
    with sandbox.files.watch("/watched/full", timeout=120) as changes:
        make = f"cd /watched/full; i=0; while [ $i -lt 12000 ]; do >{'long' * 60}$i; i=$((i+1)); done"
        sandbox.run(make, timeout=120, check=True)
        with pytest.raises(OSError, match=r"changes were lost: .*'/watched/full'") as caught:
            seen(changes)
        assert caught.value.errno == errno.EOVERFLOW
        sandbox.files.write("/watched/full/last", b"")  # and it goes on
        assert ("last", "written") in ((change.name, change.kind) for change in changes)
