# SPDX-License-Identifier: Apache-2.0
"""Sandboxes on a real kernel: commands, files, copies, and how each ends, by what the guest's programs say."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import io
import json
import os
import random
import socket
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.linux import kernels
from tests.virtio.test_net import read_pcap
from tests.waiting import until
from vmm import Sandbox, undertaker
from vmm.errors import ConfigError, HostError, SnapshotError
from vmm.sandbox import (
    AsyncSandbox,
    CommandKilled,
    CommandNotExecutable,
    CommandNotFound,
    CommandOutOfMemory,
    CommandTimeout,
    SandboxError,
    SandboxGone,
    attach,
    registry,
)
from vmm.sandbox.files import Watch

pytestmark = pytest.mark.timeout(900)  # the first one may build r3


@pytest.fixture(scope="module")
def sandbox(runtime: Path) -> Iterator[Sandbox]:
    """One for the tests that leave it as it is."""
    with Sandbox("busybox", memory="192M", env={"COLOUR": "blue"}) as made:
        yield made


def test_a_command_has_status_streams_environment_and_directory(sandbox: Sandbox) -> None:
    result = sandbox.run("echo $COLOUR $SHAPE; pwd; echo bad >&2; exit 7", env={"SHAPE": "round"}, cwd="/etc")
    assert (result.stdout, result.stderr, result.exit_code) == ("blue round\n/etc\n", "bad\n", 7)
    assert sandbox.run(["printf", "%s|", "a b", "", "c\nd"]).stdout == "a b||c\nd|"
    assert sandbox.run("hostname").stdout.strip() == sandbox.name
    assert abs(int(sandbox.run("date +%s").stdout) - time.time()) < 5


def test_the_agent_answers_any_client_that_writes_json(sandbox: Sandbox) -> None:
    def ask(text: bytes) -> tuple[bytes, bytes]:
        stream.sendall(len(text).to_bytes(4, "little") + text)
        kind = stream.recv(1, socket.MSG_WAITALL)
        length = int.from_bytes(stream.recv(4, socket.MSG_WAITALL), "little")
        return kind, stream.recv(length, socket.MSG_WAITALL) if length else b""

    with socket.socket(socket.AF_UNIX) as stream:
        stream.settimeout(30)
        stream.connect(registry.socket_of(sandbox.name))
        stream.sendall(b"CONNECT 521\n")
        assert stream.recv(64).startswith(b"OK ")
        for invalid in (
            b"",
            b"{}",
            b'{"verb":"stat"',
            b"run\0arg=true\0",
            b'{"verb":{}}',
            b'{"verb":"run","arg":["\\u0000"]}',
        ):
            assert ask(invalid) == (b"f", b"\x16\0\0\0request")
        assert ask(b'{"verb":"dance"}') == (b"f", b"\x26\0\0\0dance")
        line = ["sh", "-c", 'printf %s "$0" >/tmp/$0', "na\u00efve \U0001f600\udcff"]
        assert ask(json.dumps({"verb": "run", "arg": line, "nostdin": True, "quiet": True}).encode()) == (
            b"x",
            bytes(3),
        )
    assert sandbox.files.read_bytes("/tmp/na\u00efve \U0001f600\udcff") == b"na\xc3\xafve \xf0\x9f\x98\x80\xff"
    with pytest.raises(ConfigError, match=r"^arg \\ud800: must be text without a NUL byte$"):
        sandbox.run(["echo", "\ud800"])
    with pytest.raises(ConfigError, match=r"^request of 8\d\d\d values and .*: must be at most 8192 values"):
        sandbox.run(["echo", *("x" for _ in range(8192))])


def test_standard_input_and_binary_output_arrive_whole(sandbox: Sandbox) -> None:
    data = random.Random(1).randbytes(1_500_000)
    result = sandbox.run("tee /tmp/data | sha256sum >&2; cat /tmp/data", input=data)
    assert result.stderr.split()[0] == hashlib.sha256(data).hexdigest()
    assert result.stdout_bytes == data
    assert sandbox.run("cat").stdout == ""  # its input is closed
    assert sandbox.run("head -c 3", input=data).exit_code == 0  # one that does not read it all


@pytest.mark.parametrize(
    ("command", "status", "error"),
    [
        ("no-such-program", 127, CommandNotFound),
        (["no-such-program"], 127, CommandNotFound),
        (["/no/such/program"], 127, CommandNotFound),
        (["/etc/passwd"], 126, CommandNotExecutable),
        (["/tmp"], 126, CommandNotExecutable),
        ("kill -TERM $$", 128 + 15, CommandKilled),
    ],
)
def test_a_command_that_fails_says_why(
    sandbox: Sandbox, command: str | list[str], status: int, error: type[Exception]
) -> None:
    assert sandbox.run(command).exit_code == status
    with pytest.raises(error):
        sandbox.run(command, check=True)


@pytest.mark.parametrize(
    ("cwd", "user", "problem"),
    [
        ("/nope", "root", "does not exist in the guest"),
        ("/etc/passwd", "root", "is not a directory in the guest"),
        ("/root", "nobody", "the command's user may not enter it"),
        ("/" + "a" * 5000, "root", "File name too long"),
    ],
)
def test_a_directory_that_is_none_is_told(sandbox: Sandbox, cwd: str, user: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=f"^cwd {cwd[:99]}.*{problem}$"):
        sandbox.run("true", cwd=cwd, user=user)
    bad = _pyvmm("exec", "-u", user, "-w", cwd, sandbox.name, "true")
    assert (bad.returncode, bad.stderr.count(b"\n")) == (2, 1) and problem.encode() in bad.stderr, bad
    assert sandbox.run(["cwd=/nope"]).exit_code == 127  # a program of this name is not taken for a directory


def test_more_memory_than_the_host_has_is_refused(runtime: Path) -> None:
    most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
    for memory in (f"{most + 1}M", (most + 1) << 20):
        with pytest.raises(ConfigError, match=rf"^memory {memory}: must be at most {most}M, the memory of this host$"):
            Sandbox("busybox", memory=memory)


def test_a_directory_and_a_user_of_all_commands_are_checked_at_the_start(runtime: Path, tmp_path: Path) -> None:
    values: list[tuple[dict[str, str | int], str]] = [
        ({"cwd": "/sys/nope"}, "^cwd /sys/nope: does not exist in the guest$"),
        ({"cwd": "/etc/passwd"}, "^cwd /etc/passwd: is not a directory in the guest$"),
        ({"cwd": "/root", "user": "nobody"}, "^cwd /root: the command's user may not enter it$"),
        ({"user": "nobody-here"}, "^user nobody-here: the guest does not have this user or group$"),
        ({"user": "root:nobody-here"}, "^user root:nobody-here: the guest does not have"),
        ({"user": -1}, "^user -1: the guest does not have"),
    ]
    for given, problem in values:
        with pytest.raises(ConfigError, match=problem):
            Sandbox("busybox", memory="64M", **given)  # type: ignore[arg-type]  # values of several types
    tmp_path.chmod(0o755)
    with Sandbox("busybox", memory="64M", cwd="/mnt/in", user="nobody:tty", mounts={"/mnt/in": tmp_path}) as sandbox:
        assert sandbox.run("pwd; id -u; id -g").stdout.split() == ["/mnt/in", "65534", "5"]
    with Sandbox("busybox", memory="64M", cwd="/new/below") as sandbox:  # as docker run --workdir makes it
        assert sandbox.run("pwd; ls").stdout == "/new/below\n"


def test_a_timeout_kills_what_the_command_had_started(sandbox: Sandbox) -> None:
    with pytest.raises(CommandTimeout) as caught:
        sandbox.run("echo begun; sleep 4321 & sleep 4321", timeout=0.5)
    assert caught.value.result is not None and caught.value.result.stdout == "begun\n"
    deadline = time.monotonic() + 10
    while "4321" in sandbox.run("ps").stdout:
        assert time.monotonic() < deadline


def test_output_without_end_is_bounded_and_told(sandbox: Sandbox) -> None:
    result = sandbox.run("yes | head -c 300000", limit=1000)
    assert result.truncated and len(result.stdout_bytes) == 1000
    assert not sandbox.run("yes | head -c 1000", limit=1000).truncated


def test_what_is_left_in_the_background_holds_nobody_up(sandbox: Sandbox) -> None:
    result = sandbox.run("echo before; sleep 77 &", timeout=20)
    assert result.stdout == "before\n"
    assert "sleep 77" in sandbox.run("ps").stdout
    sandbox.run("pkill -f 'sleep 77'")


def test_users_groups_and_limits_are_the_kernels(sandbox: Sandbox) -> None:
    assert "uid=65534(nobody) gid=65534(nogroup)" in sandbox.run("id", user="nobody").stdout
    assert "uid=1234 gid=5(tty)" in sandbox.run("id", user="1234:tty").stdout
    assert sandbox.run("grep CapEff /proc/self/status", user="nobody").stdout.split()[1] == "0" * 16
    assert sandbox.run("ulimit -n; ulimit -f", limits={"nofile": 33, "fsize": 2048}).stdout.split() == ["33", "4"]
    assert sandbox.run("while :; do :; done", limits={"cpu": 1}, timeout=60).signal in (24, 9)
    with pytest.raises(ConfigError, match=r"nobody-here.*does not have this user"):
        sandbox.run("id", user="nobody-here")
    with pytest.raises(ConfigError, match="nofile"):
        sandbox.run("id", limits={"nofiles": 3})


def test_a_time_limit_is_a_number(sandbox: Sandbox) -> None:
    with pytest.raises(ConfigError, match=r"timeout.*nan"):
        sandbox.run("true", timeout=float("nan"))
    assert [sandbox.run("true", timeout=seconds).exit_code for seconds in (float("inf"), 1e300, None)] == [0, 0, 0]
    with pytest.raises(CommandTimeout, match=r"not done within 0\.1 s$"):
        sandbox.run("sleep 50", timeout=0.1)


def test_a_command_that_ends_the_vm_has_the_reason(runtime: Path) -> None:
    with Sandbox("busybox", memory="64M") as sandbox, pytest.raises(SandboxGone, match="the sandbox has ended"):
        sandbox.run("poweroff -f; sleep 60")


def test_a_copy_goes_on_with_its_originals_connection(sandbox: Sandbox, tmp_path: Path) -> None:
    background = sandbox.exec("read line; echo $line")  # which ends in a copy, and not here
    sandbox.run("true")
    sandbox.snapshot(str(tmp_path / "snapshot"))
    for copy in (*sandbox.fork(2), Sandbox.restore(str(tmp_path / "snapshot"))):
        with copy:
            assert copy.run("hostname; ps | grep -c 'rea[d] line'; true").stdout == f"{copy.name}\n0\n"
            assert copy.machine.vsock is not None and copy.machine.vsock.stats["opened_by_host"] == 0
            copy.files.write("/tmp/some", b"x" * 1_000_000)
            assert copy.files.read_bytes("/tmp/some") == b"x" * 1_000_000
    background.stdin.write(b"on\n")
    assert background.stdout.read(3) == b"on\n" and background.wait().exit_code == 0


def test_a_read_only_sandbox(runtime: Path, tmp_path: Path) -> None:
    paths = "/etc/passwd /root/a /tmp/a /var/tmp/a /run/a /mnt/a /dev/null"
    write = f"for each in {paths}; do echo 1 2>/dev/null >>$each && echo $each; done"
    with Sandbox("busybox", memory="128M", read_only=True, mounts={"/mnt": str(tmp_path)}) as sandbox:
        assert sandbox.run(write).stdout.split() == ["/tmp/a", "/var/tmp/a", "/run/a", "/mnt/a", "/dev/null"]
        with pytest.raises(OSError, match="Read-only file system"):
            sandbox.files.write("/etc/passwd", b"")
        assert sandbox.files.read("/etc/passwd").startswith("root:")  # what is there stays
        assert sandbox.run("rm /bin/sh").exit_code == 1 and sandbox.run("exit 3").exit_code == 3
    with Sandbox("busybox", memory="128M") as sandbox:
        sandbox.files.write("/srv/data/before", b"kept")
        sandbox.make_read_only("/srv/data")
        (copy,) = sandbox.fork()
        with copy:
            assert copy.files.read("/srv/data/before") == "kept"
            copy.files.write("/srv/data/more", b"x")
            assert copy.run("echo >/srv/more").exit_code == 1 and copy.run("echo >/tmp/more").exit_code == 1
        with pytest.raises(SandboxError, match=r"read-only: /etc/passwd/below: Not a directory"):
            sandbox.make_read_only("/etc/passwd/below")


def test_files_tell_the_reason_of_the_vms_end(runtime: Path) -> None:
    with Sandbox("busybox", memory="64M") as sandbox:
        changes = sandbox.files.watch("/tmp")
        with pytest.raises(SandboxGone, match="the sandbox has ended"):
            sandbox.run("poweroff -f; sleep 60")
        with pytest.raises(SandboxGone, match="the sandbox has ended"):
            next(changes)
    with Sandbox("busybox", memory="64M") as sandbox:
        sandbox.run("(sleep 0.2; poweroff -f) </dev/null >/dev/null 2>&1 &")
        with pytest.raises(SandboxGone, match="the sandbox has ended"):
            sandbox.files.read_bytes("/dev/zero", length=1 << 40)


def test_commands_share_a_connection_and_get_nothing_of_each_other(sandbox: Sandbox) -> None:
    def agent() -> int:
        return int(sandbox.run("echo $PPID").stdout)

    data = bytes(3_000_000)
    first = agent()
    assert sandbox.run(["no-such-program"], input="abc").exit_code == 127
    assert sandbox.run("cat", input="abc").stdout == "abc"
    assert agent() == first
    assert sandbox.run("head -c 3", input=data).exit_code == 0  # what it did not read is no request
    assert sandbox.run(["no-such-program"], input=data).exit_code == 127
    with sandbox.exec("exit 3") as process:
        assert process.wait(10).exit_code == 3
        with pytest.raises(SandboxGone):
            process.resize(1, 1)
    assert sandbox.run("pwd").stdout == sandbox.run("pwd; sleep 7 & exec >&- 2>&-").stdout
    assert sandbox.run(["id", "-u"], user="nobody").stdout + sandbox.run(["id", "-u"]).stdout == "65534\n0\n"


def test_a_connection_that_was_killed_meanwhile_is_no_loss(sandbox: Sandbox) -> None:
    with pytest.raises(SandboxGone, match="closed the connection"):
        sandbox.run("kill -9 $PPID")
    for user in (None, "nobody"):
        with sandbox.exec("echo $PPID; exec sleep 8765", user=user) as process:
            parent = process.stdout.readline(10).decode()
            sandbox.run(f"kill -9 {parent}", check=True)
            until(lambda: "sleep 8765" not in sandbox.run("ps").stdout)  # its command ends with it
    with sandbox.exec("echo $PPID; exec sleep 8765", keep=True) as process:
        parent = process.stdout.readline(10).decode()
        sandbox.run(f"kill -9 {parent}", check=True)
        assert "sleep 8765" in sandbox.run("ps").stdout
        sandbox.run("pkill -f 'sleep 8765'")
    with sandbox.exec("read line; kill -9 $line") as process:
        process.stdin.write(sandbox.run("echo $PPID").stdout)  # the idle one
        until(lambda: not any(channel.quiet for channel in sandbox._link._idle))
        assert process.wait(10).exit_code == 0
    assert sandbox.run("echo there").stdout == "there\n"


def test_a_terminal_has_a_size_keys_and_an_end(sandbox: Sandbox) -> None:
    with sandbox.exec("stty size; read line; stty size; echo got $line; cat", terminal=(30, 100)) as process:
        assert process.stdout.readline(10) == b"30 100\r\n"
        process.resize(40, 120)
        process.stdin.write("word\n")
        assert process.stdout.readline(10) == b"word\r\n"  # the terminal's echo
        assert process.stdout.readline(10) == b"40 120\r\n"
        assert process.stdout.readline(10) == b"got word\r\n"
        process.stdin.close()
        assert process.wait(10).exit_code == 0


def test_a_handle_is_like_popen(sandbox: Sandbox) -> None:
    with sandbox.exec(["cat"]) as process:
        assert process.poll() is None
        process.stdin.write(b"one\ntwo\n")
        assert process.stdout.readline(10) == b"one\n"
        assert process.stdout.readline(10) == b"two\n"
        process.stdin.close()
        assert process.wait(10).exit_code == 0 and process.poll() == 0
    with sandbox.exec("trap 'echo caught; exit 3' TERM; echo ready; while :; do sleep 0.01; done") as process:
        assert process.stdout.readline(10) == b"ready\n"
        process.terminate()
        assert process.wait(10).exit_code == 3
    with sandbox.exec(["sleep", "100"]) as process:
        with pytest.raises(CommandTimeout):
            process.wait(0.01)
        process.kill()
        assert process.wait(10).signal == 9


def test_orphans_are_reaped(sandbox: Sandbox) -> None:
    sandbox.run("for i in 1 2 3 4 5; do (true &) ; done")
    end = time.monotonic() + 10
    while " Z " in sandbox.run("ps -o pid,stat,comm").stdout:
        assert time.monotonic() < end


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


def test_files_fail_as_the_kernel_says(sandbox: Sandbox) -> None:
    files = sandbox.files
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


def test_a_tcp_port_of_the_guest_is_reached(sandbox: Sandbox) -> None:
    with pytest.raises(ConnectionRefusedError):
        sandbox.connect(8080)
    with sandbox.exec("nc -l -p 8080 -e cat") as _server:
        for _ in range(1000):
            try:
                stream = sandbox.connect(8080)
                break
            except ConnectionRefusedError:
                time.sleep(0.01)
        with stream:
            stream.sendall(b"through\n")
            assert stream.recv(100) == b"through\n"
            stream.shutdown(socket.SHUT_WR)
            assert stream.recv(100) == b""


@pytest.mark.parametrize("gib", [2, 4])
def test_memory_of_several_gigabytes(runtime: Path, gib: int) -> None:
    # A kernel maps whole GiB by one entry each where CPUID says so, which not every KVM can walk.
    with Sandbox("busybox", memory=f"{gib}G", boot_timeout=20) as big:
        total = int(big.run("grep MemTotal /proc/meminfo | tr -dc 0-9").stdout)
        assert (gib << 20) * 0.95 < total < gib << 20


def test_out_of_memory_is_told(runtime: Path) -> None:
    with Sandbox("busybox", memory="64M") as small:
        with pytest.raises(CommandOutOfMemory):
            small.run("echo 1 >/proc/sys/vm/overcommit_memory; dd if=/dev/zero of=/dev/null bs=99M count=1", check=True)
        assert small.run("echo alive").stdout == "alive\n"
        with pytest.raises(OSError) as caught:  # and a full disk is
            small.files.write("/big", bytes(80 << 20))
        assert caught.value.errno == errno.ENOSPC


def test_files_that_fill_the_memory_end_neither_the_agent_nor_the_vm(runtime: Path) -> None:
    with Sandbox("busybox", memory="128M") as small:
        small.run("mkdir /big; mount -t tmpfs -o size=2G big /big", check=True)
        for size in ("1M", "4k"):
            with pytest.raises(CommandOutOfMemory):
                small.run(f"dd if=/dev/zero of=/big/file bs={size}", check=True)
            assert small.run("echo alive").stdout == "alive\n"
            small.files.remove("/big/file")
        with pytest.raises(OSError) as caught:
            small.files.write("/big/file", bytes(200 << 20))
        assert caught.value.errno == errno.ENOMEM
        small.run("rm /big/file", check=True)
        small.files.write("/big/file", bytes(30 << 20))
        assert small.run("cat /proc/self/oom_score_adj", user="nobody").stdout == "0\n"


def test_processes_without_end_leave_room_for_the_next_command(runtime: Path) -> None:
    group = "/sys/fs/cgroup/commands"
    with Sandbox("busybox", memory="128M") as small:
        with pytest.raises(CommandTimeout):
            small.run("b() { b | b & }; b; while :; do :; done", timeout=3)
        assert small.run("true", timeout=120).exit_code == 0
        # In sessions of their own, they outlive the command.
        small.files.write("/bomb", "setsid sh /bomb & setsid sh /bomb & sleep 1000")
        with pytest.raises(CommandTimeout):
            small.run("sh /bomb; while :; do :; done", timeout=3)
        until(lambda: "max 0" not in small.files.read(f"{group}/pids.events"))
        assert small.run("echo on; cat /proc/self/cgroup", timeout=120).stdout.startswith("on\n")
        small.run(f"echo max >{group}/pids.max", timeout=120, check=True)  # root's to change
        assert small.run(f"echo 1 >{group}/cgroup.kill", timeout=120).signal == 9
        until(lambda: small.files.read(f"{group}/pids.current") == "0\n")
        assert small.run("cat /proc/self/cgroup", user="nobody").stdout == "0::/commands\n"


def test_copies_go_their_own_way(sandbox: Sandbox) -> None:
    sandbox.run("echo common >/tmp/word; sleep 555 &")
    copies = sandbox.fork(2)
    try:
        names = {each.run("hostname").stdout.strip() for each in (sandbox, *copies)}
        assert len(names) == 3
        dice = {each.run("head -c 8 /dev/urandom | hexdump").stdout for each in (sandbox, *copies)}
        assert len(dice) == 3
        copies[0].files.write("/tmp/word", "mine")
        assert [each.files.read("/tmp/word") for each in (sandbox, *copies)] == ["common\n", "mine", "common\n"]
        assert "sleep 555" in copies[1].run("ps").stdout
        (grandchild,) = copies[0].fork()
        with grandchild:
            assert grandchild.files.read("/tmp/word") == "mine"
    finally:
        for copy in copies:
            copy.close()
        sandbox.run("pkill -f 'sleep 555'")


def test_a_mount_goes_on_in_copies_and_snapshots(runtime: Path, tmp_path: Path) -> None:
    shared, saved = tmp_path / "shared", str(tmp_path / "saved")
    (shared / "dir").mkdir(parents=True)
    (shared / "dir/file").write_text("the host's\n")
    mounts: dict[str, str | Path | tuple[str | Path, str]] = {"/host": shared, "/ro": (shared, "ro")}
    # A program with a file, a directory and its working directory on the mount.
    waits = "cd /host/dir; exec 5<file 6>>log; while read -r word; do cat <&5 >&6; cat file; echo $word; done"
    with Sandbox("busybox", memory="64M", mounts=mounts) as sandbox:
        sandbox.run("cat /ro/dir/file; mkfifo /tmp/ask; (sleep 9999 >/tmp/ask &)", check=True)
        program = sandbox.exec(f"({waits}) </tmp/ask >/tmp/said", keep=True)
        until(lambda: (shared / "dir/log").exists())
        copies = sandbox.fork(2)
        sandbox.snapshot(saved)
        for number, each in enumerate((*copies, Sandbox.restore(saved))):
            with each:
                each.run(f"echo {number} >/tmp/ask", check=True)
                until(lambda: each.files.read("/tmp/said") == f"the host's\n{number}\n")  # noqa: B023  # called at once
                assert (shared / "dir/log").read_text() == "the host's\n" * (number + 1)
                each.run(f"echo {number} >/host/made{number}; ! echo x 2>/dev/null >/ro/new", check=True)
        assert sandbox.run("cat /host/made0 /ro/made1 /host/made2", check=True).stdout == "0\n1\n2\n"
        holder = sandbox.exec("echo x >/host/gone; exec 9</host/gone; rm /host/gone; touch /tmp/held; sleep 9999")
        until(lambda: sandbox.files.exists("/tmp/held"))
        for refused in (sandbox.fork, lambda: sandbox.snapshot(saved)):
            with pytest.raises(
                SnapshotError, match=f"has a file of {shared} open that it has removed .*; close it in the"
            ):
                refused()
        program.kill()
        holder.kill()
        until(lambda: sandbox.run("umount /host").exit_code == 0)
        (copy,) = sandbox.fork()
        with copy:
            assert copy.run("mount -t virtiofs mount0 /host && cat /host/made2").stdout == "2\n"


def test_a_snapshot_goes_on_and_has_its_time_limit(sandbox: Sandbox, tmp_path: Path) -> None:
    sandbox.files.write("/tmp/kept", "kept")
    for _ in range(2):  # the second takes the place of the first
        sandbox.snapshot(str(tmp_path / "shot"))
    with Sandbox.restore(str(tmp_path / "shot"), timeout=float("inf")) as again:
        assert again.files.read("/tmp/kept") == "kept"
        assert again.run("echo $COLOUR").stdout == "blue\n"
        again.set_timeout(None)
        again.set_timeout(0.3)
        with pytest.raises(SandboxGone, match=r"time limit of 0\.3 s"):
            again.run("sleep 100")
    with Sandbox.restore(str(tmp_path / "shot"), timeout=0.5) as again:
        with pytest.raises(SandboxGone, match=r"time limit of 0\.5 s"):
            again.run("sleep 100")
        with pytest.raises(SandboxGone, match=r"time limit of 0\.5 s"):
            again.publish(80)
    about = json.loads((tmp_path / "shot" / "sandbox.json").read_text())
    (tmp_path / "shot" / "sandbox.json").write_text(json.dumps({**about, "protocol": 1}))
    with pytest.raises(SnapshotError, match=r"shot: its agent speaks protocol 1, this pyvmm speaks 2$"):
        Sandbox.restore(str(tmp_path / "shot"))


def test_pause_holds_and_a_deadline_fires_all_the_same(sandbox: Sandbox) -> None:
    sandbox.pause()
    with pytest.raises(CommandTimeout):
        sandbox.run("true", timeout=0.05)
    sandbox.resume()
    assert sandbox.run("echo on").stdout == "on\n"


def test_the_end_of_a_vm_fails_every_call_at_once(runtime: Path) -> None:
    caught: list[BaseException] = []

    def call(work: object) -> None:
        try:
            work()  # type: ignore[operator]
        except BaseException as error:
            caught.append(error)

    with Sandbox("busybox", memory="64M") as mortal:
        process = mortal.exec("sleep 100")
        calls = [
            lambda: mortal.run("sleep 100", timeout=None), lambda: process.wait(),
            lambda: next(mortal.files.watch("/tmp")),
        ]  # fmt: skip
        threads = [threading.Thread(target=call, args=(each,)) for each in calls]
        for thread in threads:
            thread.start()
        mortal.run("(sleep 0.3; echo o >/proc/sysrq-trigger) >/dev/null 2>&1 &")
        for thread in threads:
            thread.join(30)
        assert len(caught) == 3 and all(type(each) is SandboxGone for each in caught), caught
        with pytest.raises(SandboxGone, match="has ended"):
            mortal.run("true")
        assert not mortal.running
        assert process.channel.fileno() == -1, "a command that is gone holds no descriptor"
        with pytest.raises(SandboxGone, match="has ended"):
            process.poll()


@pytest.mark.parametrize(
    ("way", "why"),
    [
        ("limit", "its time limit of 0.5 s is over"),
        ("stop", "requested"),
        ("panic", "panic"),
        ("reboot", "reset"),
        ("poweroff", "power-off"),
        ("close", "closed"),
    ],
)
def test_who_is_attached_hears_of_the_end_and_why(runtime: Path, way: str, why: str) -> None:
    # Its owner has not closed it, and is not told to: it may sleep, as a program that started it for others does.
    caught: list[BaseException] = []

    def call() -> None:
        try:
            attached.run("sleep 100", timeout=None)
        except BaseException as error:
            caught.append(error)

    with Sandbox("busybox", memory="64M") as mortal:
        attached = attach(mortal.name)
        attached.run("true")
        thread = threading.Thread(target=call)
        thread.start()
        words = {"panic": "echo c >/proc/sysrq-trigger", "reboot": "reboot -f", "poweroff": "poweroff -f"}
        if way in words:
            mortal.exec(f"sleep 0.2; {words[way]}", keep=True).close()
        elif way == "limit":
            mortal.set_timeout(0.5)
        else:
            time.sleep(0.2)
            mortal.machine.stop() if way == "stop" else mortal.close()
        thread.join(20)
        assert [type(each) for each in caught] == [SandboxGone], caught
        assert why in str(caught[0])
        with pytest.raises(SandboxGone, match=why):
            attached.run("true", timeout=None)
        with pytest.raises(ConfigError, match="is not a running" if way == "close" else f"is not running: .*{why}"):
            attach(mortal.name)
        if way != "close":
            listed = [json.loads(line) for line in _pyvmm("ps", "--json").stdout.splitlines()]
            assert next(each["state"] for each in listed if each["name"] == mortal.name) == "ended"
        for gone in (mortal.pause, mortal.resume, mortal.fork, lambda: mortal.set_timeout(9)):
            with pytest.raises(SandboxGone):
                gone()


def test_a_host_directory_is_mounted(runtime: Path, tmp_path: Path) -> None:
    (tmp_path / "in").write_text("from the host")
    with Sandbox(
        "busybox", memory="64M", mounts={"/host": (str(tmp_path), "ro"), "/work": str(tmp_path)}
    ) as with_mounts:
        assert with_mounts.files.read("/host/in") == "from the host"
        assert with_mounts.run("touch /host/x").exit_code == 1
        with_mounts.files.write("/work/out", "back")
    assert (tmp_path / "out").read_text() == "back"


def test_bad_input_is_one_line_and_leaves_nothing(runtime: Path, sandbox: Sandbox, tmp_path: Path) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    for settings, message in (
        ({"image": "no-such"}, "image oci:no-such: is not in the cache: run `pyvmm pull oci:no-such`"),
        ({"image": "busybox", "name": "a/b"}, "letters, digits"),
        ({"image": "busybox", "name": sandbox.name}, "another running sandbox"),
        ({"image": "busybox", "network": "host"}, "network host"),
        ({"image": "busybox", "timeout": 0}, "timeout"),
        ({"image": "busybox", "timeout": float("nan")}, "timeout nan"),
        ({"image": "busybox", "mounts": {"/x": ("/tmp",)}}, "mounts"),
        ({"image": "busybox", "memory": "1K"}, "memory"),
        ({"image": "busybox", "mounts": {"x": "/tmp"}}, "mounts"),
        ({"image": "busybox", "mounts": {"/x": str(tmp_path / "none")}}, "none"),
    ):
        with pytest.raises(ConfigError, match=message):
            Sandbox(**settings)
    with pytest.raises(ConfigError, match="count -1"):
        sandbox.fork(-1)
    with pytest.raises(ConfigError, match="timeout -1"):
        sandbox.set_timeout(-1)
    with pytest.raises(TypeError, match=r"^Sandbox\.set_timeout: timeout must be a number or None, not '5'$"):
        sandbox.set_timeout("5")  # type: ignore[arg-type]  # what is tested
    with pytest.raises(ConfigError, match="NUL"):
        sandbox.run(["a\0b"])
    with pytest.raises(ConfigError, match="at most"):
        sandbox.run(["true", *["x"] * 9000])
    with pytest.raises(SandboxError, match="did not come up"):
        Sandbox("busybox", memory="64M", kernel=kernels.kernel().path, boot_timeout=0.001)
    undertaker.wait()
    assert len(os.listdir("/proc/self/fd")) <= len(before)  # fewer: a connection that was kept may be closed
    assert [each["name"] for each in registry.all_running()] == [sandbox.name]


def _pyvmm(*words: str, input: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-m", "vmm", *words], input=input, capture_output=True, timeout=100)


def test_a_wrong_mount_is_told_in_the_words_of_the_command() -> None:
    for word in ("/work", "/work=", "work=.", "=."):
        bad = _pyvmm("sandbox", "--mount", word, "busybox", "true")
        assert bad.stderr.startswith(f"pyvmm sandbox: --mount {word}: must be PATH=DIR".encode()), bad
        assert (bad.returncode, bad.stderr.count(b"\n")) == (2, 1)


def test_the_commands_reach_a_sandbox_of_another_process(sandbox: Sandbox, tmp_path: Path) -> None:
    assert sandbox.name in _pyvmm("ps").stdout.decode()
    listed = [json.loads(line) for line in _pyvmm("ps", "--json").stdout.splitlines()]
    (own,) = (each for each in listed if each["pid"] == os.getpid())
    assert (own["name"], own["image"], own["state"]) == (sandbox.name, "busybox", "running")
    script = "cat; id -u; echo $SHAPE $COLOUR; exit 9"
    done = _pyvmm("exec", "-e", "SHAPE=round", "-u", "nobody", sandbox.name, "sh", "-c", script)
    assert (done.stdout, done.returncode) == (b"65534\nround blue\n", 9), done
    assert _pyvmm("exec", sandbox.name, "wc", "-c", input=b"x" * 300_000).stdout == b"300000\n"
    missing = _pyvmm("exec", "nobody", "id")
    assert missing.returncode == 2 and b"NAME nobody: is not a running sandbox" in missing.stderr
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "sub/data").write_bytes(b"\0\1")
    (tree / "sub/data").chmod(0o750)
    (tree / "link").symlink_to("sub/data")
    assert _pyvmm("cp", str(tree), f"{sandbox.name}:/tmp").returncode == 0
    assert sandbox.run("stat -c %a /tmp/tree/sub/data; readlink /tmp/tree/link").stdout == "750\nsub/data\n"
    assert _pyvmm("cp", f"{sandbox.name}:/tmp/tree", str(tmp_path / "back")).returncode == 0
    assert (tmp_path / "back/sub/data").read_bytes() == b"\0\1"
    assert os.stat(tmp_path / "back/sub/data").st_mode & 0o777 == 0o750
    assert os.readlink(tmp_path / "back/link") == "sub/data"
    sandbox.files.write("/tmp/tree/sub/data", b"new")
    before = os.stat(tmp_path / "back/sub/data").st_ino
    again = _pyvmm("cp", f"{sandbox.name}:/tmp/tree/sub/data", str(tmp_path / "back/sub/data"))
    assert os.stat(tmp_path / "back/sub/data").st_ino != before  # never half a file under its name
    assert again.returncode == 0 and (tmp_path / "back/sub/data").read_bytes() == b"new"
    for source, problem in (
        ("/tmp/tree", b"back/sub/data: File exists"),
        ("/dev/zero", b"/dev/zero: is not a file, directory or link"),
        ("/nowhere", b"/nowhere: No such file"),
    ):
        bad = _pyvmm("cp", f"{sandbox.name}:{source}", str(tmp_path / "back/sub/data"))
        assert bad.returncode and bad.stderr.count(b"\n") == 1 and problem in bad.stderr, bad
    bad = _pyvmm("cp", f"{sandbox.name}:/dev/zero", str(tmp_path / "zero"))
    assert bad.returncode == 1 and bad.stderr == b"pyvmm cp: /dev/zero: is not a file, directory or link\n"
    bad = _pyvmm("cp", "/dev/zero", f"{sandbox.name}:/tmp/zero")
    assert bad.returncode == 1 and bad.stderr == b"pyvmm cp: /dev/zero: is not a file, directory or link\n"
    assert sorted(os.listdir(tmp_path / "back/sub")) == ["data"]
    with open("/dev/full", "wb") as full:
        words = [sys.executable, "-m", "vmm", "exec", sandbox.name, "echo", "x"]
        bad = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=full, stderr=subprocess.PIPE)
    assert bad.returncode == 1 and bad.stderr == b"pyvmm exec: write standard output: No space left on device\n"
    assert b"required: NAME (see" in _pyvmm("exec").stderr


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


def test_the_async_twin_runs_many_at_once_and_hears_a_cancel(sandbox: Sandbox) -> None:
    async def scenario() -> None:
        twin = AsyncSandbox.of(sandbox)
        # More calls at once than an executor would have threads: each waits for a file that the last one makes.
        wait = "while [ ! -e /tmp/go ]; do sleep 0.01; done; echo went"
        calls = [asyncio.create_task(twin.run(wait)) for _ in range(12)]
        await twin.files.write("/tmp/go", "")
        assert [(await call).stdout for call in calls] == ["went\n"] * 12
        async with await twin.exec("cat; exit 4") as process:
            await process.write("one\ntwo\n")
            await process.close_stdin()
            assert [line async for line in process] == [b"one\n", b"two\n"]
            assert (await process.wait(10)).exit_code == 4
        task = asyncio.create_task(twin.run("echo >/tmp/there; sleep 8642", timeout=None))
        while not await twin.files.exists("/tmp/there"):
            pass
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while "8642" in (await twin.run("ps")).stdout:
            pass
        with pytest.raises(FileNotFoundError):
            await twin.files.read("/none")
        assert twin.commands is twin.commands and (await twin.commands.run("true")).exit_code == 0
        (copy,) = await twin.fork()
        async with asyncio.timeout(60):
            assert (await copy.run("echo copied")).stdout == "copied\n"
        await copy.close()

    asyncio.run(asyncio.wait_for(scenario(), 100))


def test_async_copies_are_context_managers(runtime: Path) -> None:
    async def scenario() -> None:
        async with await AsyncSandbox.create("busybox", memory="64M") as first:
            assert first.running and not first.why and first.time_left is None
            (copy,) = await first.fork(timeout=50)
            async with copy:
                assert (await copy.run("hostname")).stdout.strip() == copy.name != first.name
                assert 0 < (copy.time_left or 0) <= 50
            assert not copy.running and copy.why == "the sandbox was closed"
            with pytest.raises(ConfigError, match="timeout 0: must be more than 0 seconds"):
                await first.fork(timeout=0)

    asyncio.run(asyncio.wait_for(scenario(), 100))


def test_a_port_is_published_on_the_host(sandbox: Sandbox) -> None:
    data = random.Random(3).randbytes(400_000)
    sandbox.files.write("/tmp/served", data)
    with sandbox.exec("while :; do nc -l -p 8090 -e cat /tmp/served; done"), sandbox.publish(8090) as published:
        end = time.monotonic() + 30
        while True:  # until the guest listens the host's side is closed at once
            with socket.create_connection(published.address, timeout=30) as stream:
                received = b"".join(iter(partial(stream.recv, 1 << 16), b""))
            if received:
                break
            assert time.monotonic() < end
        assert received == data
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(published.address, timeout=5)
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(HostError):
        sandbox.publish(80, taken.getsockname()[1])


def test_the_command_publishes_ports(runtime: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for word, problem in (
            ("80", b"--publish 80: must be PORT:PORT or HOST:PORT:PORT"),
            ("x:80", b"--publish x:80: must be"),
            ("1:70000", b"--publish 1:70000: must be"),
            (f"{port}:80", b"listen on 127.0.0.1 port %d: Address already in use" % port),
        ):
            bad = _pyvmm("sandbox", "--memory", "64M", "--publish", word, "busybox", "true")
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


def test_a_port_of_the_host_is_provided_in_the_guest(sandbox: Sandbox) -> None:
    data = random.Random(4).randbytes(400_000)
    sandbox.files.write("/tmp/asked", data)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            for _ in range(2):
                stream, _ = server.accept()
                with stream:
                    asked = b"".join(iter(partial(stream.recv, 1 << 16), b""))
                    stream.sendall(hashlib.sha256(asked).hexdigest().encode() + asked)

        thread = threading.Thread(target=answer)
        thread.start()
        host_port = server.getsockname()[1]
        with sandbox.provide(host_port) as provided, sandbox.provide(host_port, 0) as other:
            assert provided.port == host_port != other.port
            for port in (provided.port, other.port):
                said = sandbox.run(f"nc 127.0.0.1 {port} </tmp/asked", user="nobody").stdout_bytes
                assert said == hashlib.sha256(data).hexdigest().encode() + data
            with pytest.raises(OSError, match="in use"):
                sandbox.provide(host_port)
        thread.join()
    for port in (provided.port, other.port):
        until(lambda: sandbox.run(f"nc 127.0.0.1 {port} </dev/null").exit_code == 1)  # noqa: B023
    with pytest.raises(ConfigError, match="1 to 65535"):
        sandbox.provide(0)


def test_a_network_by_passt_reaches_the_host_and_no_loopback(runtime: Path) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route:
        route.connect(("192.0.2.200", 9))  # sends nothing: asks which address of the host's goes out
        address = route.getsockname()[0]
    with socket.create_server((address, 0)) as server, Sandbox("busybox", memory="96M", network="user") as sandbox:
        server.settimeout(30)
        port = server.getsockname()[1]
        with sandbox.exec(["nc", address, str(port)]) as client:
            stream, _ = server.accept()
            with stream:
                stream.sendall(b"from outside\n")
                assert client.stdout.readline(30) == b"from outside\n"
        assert sandbox.run("ip -4 -o address show eth0").stdout.split()[3] == "10.0.2.15/24"
        with socket.create_server(("127.0.0.1", 0)) as hidden:
            assert sandbox.run(["nc", "-w", "1", "10.0.2.2", str(hidden.getsockname()[1])]).exit_code != 0
        assert sandbox.run("grep -c eth0 /proc/net/dev").stdout == "1\n"


def test_the_traffic_is_recorded(runtime: Path, tmp_path: Path) -> None:
    def recorded() -> list[bytes]:  # ICMP messages: their data is the pattern
        return [
            frame[23:24] for frame in read_pcap(file.read_bytes()) if frame[12:14] == b"\x08\0" and pattern in frame
        ]

    file, pattern = tmp_path / "traffic.pcap", b"\xa5" * 32
    ping = "ping -c 1 -W 1 -p a5 10.0.2.2"  # nobody need answer
    with Sandbox("busybox", memory="96M", network="user", pcap=file) as sandbox:
        sandbox.run(ping)
        until(lambda: b"\x01" in recorded())
        (copy,) = sandbox.fork()
        sandbox.snapshot(str(tmp_path / "saved"))
        size = file.stat().st_size
        for each in (copy, Sandbox.restore(str(tmp_path / "saved"))):
            with each:
                each.run(ping)
        assert file.stat().st_size >= size and recorded()  # a copy did not make it anew
    with pytest.raises(ConfigError, match=r"^pcap a\.pcap: needs a network"):
        Sandbox("busybox", pcap="a.pcap")
    words = ("sandbox", "--memory", "96M", "--network", "user", "--pcap", str(file), "busybox", *ping.split())
    _pyvmm(*words)
    assert b"\x01" in recorded()
    bad = _pyvmm("sandbox", "--network", "user", "--pcap", "/no/such/file", "busybox", "true")
    assert (bad.returncode, bad.stderr.count(b"\n")) == (2, 1) and b"pcap /no/such/file: cannot be made" in bad.stderr
