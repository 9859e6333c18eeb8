# SPDX-License-Identifier: Apache-2.0
"""Programs as those written for E2B's SDK, by another import."""

from __future__ import annotations

import asyncio
import contextlib
import io
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vmm import Sandbox as Native
from vmm.sandbox import CommandError, CommandTimeout
from vmm.sandbox.e2b import (
    ALL_TRAFFIC,
    AsyncSandbox,
    CommandExitException,
    FileNotFoundException,
    FilesystemEventType,
    FileType,
    InvalidArgumentException,
    NotEnoughSpaceException,
    NotFoundException,
    PtySize,
    Sandbox,
    SandboxException,
    SandboxNotFoundException,
    SandboxNotRunningException,
    SandboxState,
    TimeoutException,
)
from vmm.sandbox.e2b.sandbox import settings_of

pytestmark = pytest.mark.timeout(900)  # the first one may build r3


@pytest.fixture(scope="module")
def sbx(runtime: Path) -> Iterator[Sandbox]:
    """A sandbox of the module's."""
    with Sandbox.create("busybox", timeout=600, metadata={"user": "7"}, envs={"COLOUR": "blue"}, memory="128M") as made:
        yield made


def _until(done: Callable[[], Any]) -> Any:
    end = time.monotonic() + 20
    while not (found := done()):
        assert time.monotonic() < end
        time.sleep(0.005)
    return found


def test_commands(sbx: Sandbox) -> None:
    result = sbx.commands.run("echo $COLOUR $SIZE; pwd; echo no >&2", envs={"SIZE": "big"}, cwd="/tmp")
    assert (result.stdout, result.stderr, result.exit_code, result.error) == ("blue big\n/tmp\n", "no\n", 0, None)
    with pytest.raises(CommandExitException) as failed:
        sbx.commands.run("echo out; echo err >&2; exit 3")
    error = failed.value
    assert (error.stdout, error.stderr, error.exit_code, error.error) == ("out\n", "err\n", 3, "exit status 3")
    assert isinstance(error, SandboxException) and isinstance(error, CommandError)
    heard: list[str] = []
    sbx.commands.run("printf 'caf\\303'; sleep 0.05; printf '\\251\\n'", on_stdout=heard.append)
    assert "".join(heard) == "caf\u00e9\n"  # a letter that came in two pieces
    with pytest.raises(TimeoutException) as late:
        sbx.commands.run("sleep 1000", timeout=0.2)
    assert isinstance(late.value, CommandTimeout)
    assert sbx.commands.run("true", timeout=0).exit_code == 0
    with pytest.raises(InvalidArgumentException, match="user"):
        sbx.commands.run("true", user="nobody-of-that-name")


def test_commands_in_the_background(sbx: Sandbox) -> None:
    handle = sbx.commands.run("while read -r line; do echo got $line; done; echo end >&2", background=True, stdin=True)
    assert [each.pid for each in sbx.commands.list()] == [handle.pid]
    assert sbx.commands.list()[0].args[-1].startswith("while")
    sbx.commands.send_stdin(handle.pid, "one\n")
    assert next(iter(handle)) == ("got one\n", None, None)
    handle.send_stdin(b"two\n")
    handle.close_stdin()
    assert sbx.commands.connect(handle.pid) is handle
    heard: list[str] = []
    result = handle.wait(on_stdout=heard.append)
    assert heard == ["got two\n"] and result.stdout == "got one\ngot two\n" and result.stderr == "end\n"
    assert not handle.kill() and sbx.commands.list() == []
    sleeper = sbx.commands.run("sleep 1000", background=True)
    assert sbx.commands.kill(sleeper.pid)
    with pytest.raises(CommandExitException, match="SIGKILL"):
        sleeper.wait()
    assert not sbx.commands.kill(999_999)
    brief = sbx.commands.run("true", background=True)
    _until(lambda: brief.pid not in [each.pid for each in sbx.commands.list()])  # though nobody has read of its end
    assert not sbx.commands.kill(brief.pid) and brief.wait().exit_code == 0
    with pytest.raises(NotFoundException):
        sbx.commands.connect(999_999)
    forgotten = sbx.commands.run("sleep 0.05; echo on >/tmp/forgotten", background=True)
    forgotten.disconnect()
    _until(lambda: sbx.files.exists("/tmp/forgotten"))


def test_files(sbx: Sandbox) -> None:
    files = sbx.files
    written = files.write("/work/a/text", "caf\u00e9\n")
    assert (written.name, written.type, written.path) == ("text", FileType.FILE, "/work/a/text")
    assert (
        files.read("/work/a/text") == "caf\u00e9\n" and files.read("/work/a/text", format="bytes") == b"caf\xc3\xa9\n"
    )
    assert b"".join(files.read("/work/a/text", format="stream")) == b"caf\xc3\xa9\n"
    both = files.write_files([{"path": "/work/b", "data": b"b"}, {"path": "/work/c", "data": io.StringIO("c")}])
    assert [each.name for each in both] == ["b", "c"]
    files.write("/home/mine", b"", user="root")
    sbx.commands.run("chown nobody:tty /work/b; chmod 640 /work/b; ln -s b /work/link")
    entries = {each.path: each for each in files.list("/work", depth=2)}
    assert sorted(entries) == ["/work/a", "/work/a/text", "/work/b", "/work/c", "/work/link"]
    entry = entries["/work/b"]
    assert (entry.owner, entry.group, entry.permissions, entry.size) == ("nobody", "tty", "rw-r-----", 1)
    assert entries["/work/link"].type == FileType.SYMLINK and entries["/work/link"].symlink_target == "b"
    assert entries["/work/a"].type == FileType.DIR and abs(entry.modified_time.timestamp() - time.time()) < 60
    assert files.rename("/work/b", "/work/new").path == "/work/new" and not files.exists("/work/b")
    assert files.make_dir("/work/d/e") and not files.make_dir("/work/d/e")
    for missing in (files.read, files.get_info, files.list, files.watch_dir):
        with pytest.raises(FileNotFoundException, match="/nowhere"):
            missing("/nowhere")
    files.remove("/nowhere")
    with pytest.raises(FileNotFoundException):
        files.read("/nowhere", format="stream")
    assert list(files.read("/dev/null", format="stream")) == []
    for call, path in ((files.make_dir, "/work/new"), (files.list, "/work/new"), (files.read, "/work")):
        with pytest.raises(InvalidArgumentException, match=path):
            call(path)
    assert files.rename("/work/new", "/work/far/away").path == "/work/far/away"
    with pytest.raises(NotEnoughSpaceException):
        files.write("/dev/full", b"x")
    with pytest.raises(InvalidArgumentException, match="depth 0"):
        files.list("/", depth=0)
    watch = files.watch_dir("/work")
    files.write("/work/seen", b"")
    events: list[Any] = []

    def two_events() -> bool:
        events.extend(watch.get_new_events())
        return len(events) > 1

    _until(two_events)
    assert (events[0].name, events[0].type) == ("seen", FilesystemEventType.CREATE)
    watch.stop()
    with pytest.raises(SandboxException, match="stopped"):
        watch.get_new_events()
    files.remove("/work")


def test_a_terminal(sbx: Sandbox) -> None:
    terminal = sbx.pty.create(PtySize(rows=24, cols=80))
    sbx.pty.resize(terminal.pid, PtySize(rows=30, cols=90))
    sbx.pty.send_stdin(terminal.pid, b"stty size; exit\n")
    said: list[bytes] = []
    terminal.wait(on_pty=said.append)
    assert b"30 90\r\n" in b"".join(said)
    assert not sbx.pty.kill(terminal.pid)


def test_a_sandbox_has_a_life(sbx: Sandbox) -> None:
    info = sbx.get_info()
    assert (info.sandbox_id, info.template_id, info.metadata) == (sbx.sandbox_id, "busybox", {"user": "7"})
    assert (info.state, info.cpu_count, info.memory_mb) == (SandboxState.RUNNING, 1, 128)
    assert info.end_at is not None and 500 < (info.end_at - info.started_at).total_seconds() < 700
    assert sbx.pause() and not sbx.pause() and sbx.get_info().state == SandboxState.PAUSED
    assert sbx.connect() is sbx and sbx.get_info().state == SandboxState.RUNNING
    assert [each.sandbox_id for each in Sandbox.list().next_items()] == [sbx.sandbox_id]
    again = Sandbox.connect(sbx.sandbox_id)  # as another process does
    assert again.commands.run("echo $COLOUR").stdout == "blue\n" and again.get_info().template_id == "busybox"
    with pytest.raises(InvalidArgumentException, match="only the process that made it"):
        again.kill()
    again.native.close()
    with pytest.raises(SandboxNotFoundException):
        Sandbox.connect("no-such")
    (copy,) = sbx.fork()
    assert copy.sandbox_id != sbx.sandbox_id and copy.is_running()
    copy.set_timeout(0.2)
    with pytest.raises(SandboxNotRunningException, match=r"time limit of 0\.2 s"):
        copy.commands.run("sleep 1000")
    assert not copy.is_running() and not copy.kill()
    assert isinstance(sbx.native, Native) and sbx.native.machine.state == "Running"
    assert isinstance(sbx.native.commands.run("true").exit_code, int)


def test_a_port_is_reached_by_its_host(sbx: Sandbox) -> None:
    server = sbx.commands.run("nc -l -p 8080 -e cat", background=True)
    host, port = sbx.get_host(8080).split(":")
    assert sbx.get_host(8080) == f"{host}:{port}"

    def answered() -> bool:
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 10) as stream:
            stream.sendall(b"ping")
            return stream.recv(4) == b"ping"
        return False

    _until(answered)
    server.kill()


def test_the_network_is_what_was_said() -> None:
    def network(*, internet: bool | None = None, **words: Any) -> Any:
        return settings_of(None, None, None, internet, words, {"api_key": "x", "secure": True})["network"]

    assert network() == "none" and network(internet=True) == "user"
    assert network(deny_out=[ALL_TRAFFIC]) == network(allow_out=[]) == "none"
    policy = network(allow_out=["pypi.org", "10.1.0.0/16"], deny_out=[ALL_TRAFFIC])
    assert [str(each) for each in policy.allow] == ["pypi.org", "10.1.0.0/16"] and not policy.deny
    policy = network(deny_out=["10.0.0.0/8"])
    assert [str(each) for each in policy.allow] == [ALL_TRAFFIC] and [str(each) for each in policy.deny] == [
        "10.0.0.0/8"
    ]
    refused: tuple[Any, ...] = ({"rules": {}}, {"allow_out": lambda context: []}, {"allow_out": ["a b"]})
    for bad in refused:
        with pytest.raises(InvalidArgumentException, match="network"):
            network(**bad)
    with pytest.raises(InvalidArgumentException, match="mcp"):
        settings_of(None, None, None, None, None, {"mcp": {}})
    with pytest.raises(InvalidArgumentException, match="oci:no-such"):
        Sandbox.create("no-such")


def test_the_async_twin(sbx: Sandbox) -> None:
    async def main() -> None:
        async with await AsyncSandbox.create("busybox", memory="128M") as twin:
            heard: list[str] = []

            async def hear(text: str) -> None:
                heard.append(text)

            result = await twin.commands.run("echo hello", on_stdout=hear)
            assert heard == ["hello\n"] and result.stdout == "hello\n"
            handle = await twin.commands.run("cat; exit 4", background=True, stdin=True, on_stdout=heard.append)
            await twin.commands.send_stdin(handle.pid, "more\n")
            while len(heard) < 2:
                await asyncio.sleep(0.005)
            assert handle.exit_code is None and handle.stdout == "more\n"
            assert await twin.commands.connect(handle.pid) is handle
            await handle.close_stdin()
            with pytest.raises(CommandExitException):
                await handle.wait()
            assert [handle.exit_code, handle.error] == [4, "exit status 4"]
            task = asyncio.create_task(twin.commands.run("echo >/tmp/there; sleep 7531", timeout=None))
            # The program may have begun before the host knows of it.
            while not (there := [each.pid for each in await twin.commands.list() if each.args[-1].endswith("7531")]):
                await asyncio.sleep(0.005)
            (alone,) = there
            while not await twin.files.exists("/tmp/there"):
                await asyncio.sleep(0.005)
            with pytest.raises(NotFoundException):  # which another task waits for
                await twin.commands.connect(alone)
            task.cancel()
            await asyncio.wait([task])
            assert "7531" not in (await twin.commands.run("sleep 0.05; ps; true")).stdout
            await twin.files.write("/tmp/file", b"data")
            assert await twin.files.read("/tmp/file") == "data"
            assert [piece async for piece in await twin.files.read("/tmp/file", format="stream")] == [b"data"]
            events: list[Any] = []
            ended = asyncio.Event()
            watch = await twin.files.watch_dir("/tmp", events.append, lambda _: ended.set())
            await twin.files.remove("/tmp/file")
            while not events:
                await asyncio.sleep(0.005)
            await watch.stop()
            await ended.wait()
            pieces: list[bytes] = []
            terminal = await twin.pty.create(PtySize(24, 80), pieces.append)
            await twin.pty.send_stdin(terminal.pid, b"exit\n")
            await terminal.wait()
            assert pieces and await twin.is_running()
            (copy,) = await twin.fork(count=1)
            assert await copy.kill() and not await copy.kill()
        assert not await twin.is_running()

    asyncio.run(main())
    _until(lambda: not {"sandbox call", "watch"} & {thread.name for thread in threading.enumerate()})
