# SPDX-License-Identifier: Apache-2.0
"""Commands in sandboxes on a real kernel: streams, users, limits, memory; and what a sandbox is made of."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import os
import random
import socket
import time
from pathlib import Path

import pytest

from tests.linux import kernels
from tests.linux.command import pyvmm
from tests.waiting import until
from vmm import Sandbox, undertaker
from vmm.errors import ConfigError
from vmm.sandbox import (
    AsyncSandbox,
    CommandKilled,
    CommandNotExecutable,
    CommandNotFound,
    CommandOutOfMemory,
    CommandTimeout,
    SandboxError,
    SandboxGone,
    registry,
)

pytestmark = pytest.mark.timeout(900)  # the first one may build r3


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
    bad = pyvmm("exec", "-u", user, "-w", cwd, sandbox.name, "true")
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
    user, group = "u" * 32, "g" * 32  # the longest that useradd and groupadd make
    added = f"echo {user}:x:77:77::/:/bin/sh >>/etc/passwd; echo {group}:x:78: >>/etc/group"
    sandbox.run(f"cp -p /etc/passwd /etc/group /tmp; {added}", check=True)
    assert sandbox.run("id -u; id -g", user=f"{user}:{group}").stdout == "77\n78\n"
    with pytest.raises(ConfigError, match="does not have this user or group"):
        sandbox.run("id", user=f"root:{'0' * 300}5")
    sandbox.run("mv /tmp/passwd /tmp/group /etc", check=True)
    assert sandbox.run("grep CapEff /proc/self/status", user="nobody").stdout.split()[1] == "0" * 16
    assert sandbox.run("ulimit -n; ulimit -f", limits={"nofile": 33, "fsize": 2048}).stdout.split() == ["33", "4"]
    assert sandbox.run("while :; do :; done", limits={"cpu": 1}, timeout=60).signal in (24, 9)
    with pytest.raises(ConfigError, match=r"nobody-here.*does not have this user"):
        sandbox.run("id", user="nobody-here")
    with pytest.raises(ConfigError, match="nofile"):
        sandbox.run("id", limits={"nofiles": 3})
    with pytest.raises(ConfigError, match=r"limits .*: one is more than the guest's kernel allows"):
        sandbox.run("id", limits={"nofile": 1 << 40})


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


def test_the_last_words_on_a_terminal_are_heard(sandbox: Sandbox) -> None:
    for _ in range(5):
        with sandbox.exec("seq 1 10000", terminal=(24, 80)) as process:
            assert process.wait(30).stdout.endswith("\r\n10000\r\n")


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
            full = small.run("echo alive")  # may find no memory either, and then says so
            assert full.stdout == "alive\n" or full.out_of_memory
            small.files.remove("/big/file")
            assert small.run("echo alive", check=True).stdout == "alive\n"
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
        ({"image": "busybox", "mounts": {Path("/x"): "/tmp"}}, "mounts"),
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
