# SPDX-License-Identifier: Apache-2.0
"""How sandboxes are copied, saved, held and ended, and who hears of the end."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from pathlib import Path

import pytest

from tests.forked import fork
from tests.linux.command import pyvmm
from tests.waiting import until
from vmm import Sandbox
from vmm.errors import ConfigError, SnapshotError
from vmm.sandbox import AsyncSandbox, CommandTimeout, SandboxGone, attach, registry

pytestmark = pytest.mark.timeout(900)  # the first one may build r3


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


@pytest.mark.parametrize("before", [True, False])
def test_an_interrupt_as_a_copy_is_made_leaves_the_devices_at_work(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    first, calls = sandbox.machine.virtio[0], []
    go_on = first.go_on

    def interrupted() -> None:
        calls.append(before)
        if len(calls) > 1 or not before:
            go_on()
        if len(calls) == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(first, "go_on", interrupted)
        sandbox.fork()
    assert sandbox.run("echo on", timeout=10).stdout == "on\n"


def test_a_command_that_goes_on_gets_nothing_that_was_not_sent(sandbox: Sandbox) -> None:
    sandbox.files.write("/tmp/cut", "")
    process = sandbox.exec("cat >/tmp/cut", keep=True)
    process.stdin.write("whole")
    process.channel.send_some(b"i" + (1000).to_bytes(4, "little") + b"part")
    process.close()
    until(lambda: sandbox.files.read("/tmp/cut"))
    time.sleep(0.3)
    assert sandbox.files.read("/tmp/cut") == "whole"
    sandbox.run(f"kill {process.pid}", check=True)


def test_a_forked_child_uses_a_sandbox_and_does_not_end_it(sandbox: Sandbox) -> None:
    def work() -> int:
        with sandbox:
            return sandbox.run("exit 7", timeout=20).exit_code

    sandbox.run("true")
    with sandbox.exec("cat") as process:
        children = []
        for _ in range(3):
            if not (child := fork()):
                status = 1
                try:
                    status = work()
                finally:
                    os._exit(status)
            children.append(child)
        assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [7, 7, 7]
        assert sandbox.run("echo on", timeout=20).stdout == "on\n"
        assert process.communicate("word", timeout=20).stdout == "word"


def test_a_copys_snapshot_has_the_copys_time_limit(sandbox: Sandbox, tmp_path: Path) -> None:
    saved = str(tmp_path / "saved")
    (copy,) = sandbox.fork(timeout=500)
    with copy:
        assert [each["timeout"] for each in registry.all_running() if each["name"] == copy.name] == [500]
        copy.snapshot(saved)
        with Sandbox.restore(saved) as again:
            assert again.time_left is not None and again.time_left < 500
        copy.set_timeout(None)
        copy.snapshot(saved)
        with Sandbox.restore(saved) as again:
            assert again.time_left is None


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
    with Sandbox.restore(str(tmp_path / "shot"), record=True) as again:
        assert again.run("true").exit_code == 0
        again.machine.record_touched(str(tmp_path / "shot"))
    assert (tmp_path / "shot/memory.touched").stat().st_size > 1000, "Linux has touched hundreds of pages"
    with Sandbox.restore(str(tmp_path / "shot"), timeout=0.5) as again:
        with pytest.raises(SandboxGone, match=r"time limit of 0\.5 s"):
            again.run("sleep 100")
        with pytest.raises(SandboxGone, match=r"time limit of 0\.5 s"):
            again.publish(80)
    about = json.loads((tmp_path / "shot" / "sandbox.json").read_text())
    (tmp_path / "shot" / "sandbox.json").write_text(json.dumps({**about, "protocol": 1}))
    with pytest.raises(SnapshotError, match=r"shot: its agent speaks protocol 1, this pyvmm speaks 3$"):
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
            listed = [json.loads(line) for line in pyvmm("ps", "--json").stdout.splitlines()]
            assert next(each["state"] for each in listed if each["name"] == mortal.name) == "ended"
        for gone in (mortal.pause, mortal.resume, mortal.fork, lambda: mortal.set_timeout(9)):
            with pytest.raises(SandboxGone):
                gone()


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
