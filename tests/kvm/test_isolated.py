# SPDX-License-Identifier: Apache-2.0
"""Copies in processes of their own: they go on, share memory, are jailed, and end with whoever has asked for them."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from socket import AF_UNIX, SOCK_SEQPACKET, socketpair
from typing import Any

import pytest

from tests.kvm.guests import PATIENCE, write_guest
from tests.waiting import has_ended, until
from vmm import DriveConfig, Image, Machine, Pool, StopReason, undertaker
from vmm.config.devices import NetConfig, VsockConfig
from vmm.errors import HostError, SnapshotError, VmmError
from vmm.machine import isolated
from vmm.machine.isolated import Isolated
from vmm.machine.snapshot import child_of
from vmm.machine.snapshot_file import encode

MakeGuest = Callable[..., Machine]
ROOT = Path(__file__).parents[2]
# Counts until the byte at 0x200000 is not 0, then writes that to the serial port and ends with it.
GUEST = """
    xor ebx, ebx
1:  inc ebx
    mov [0x200004], ebx
    mov al, [0x200000]
    test al, al
    jz 1b
    mov dx, 0x3f8
    out dx, al
    mov dx, 0xf4
    out dx, al
    hlt
"""
IDLE = "1: hlt\njmp 1b"


def _fork(vm: Machine, count: int = 1, **settings: object) -> list[Isolated]:
    children = vm.fork(count, isolated=True, **settings)  # type: ignore[arg-type]
    assert all(isinstance(child, Isolated) for child in children)
    return children


def _wait_gone(*pids: int) -> None:
    # The kernel tells of the end of a process a moment before it forgets it.
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))


def test_each_goes_on_in_a_process_of_its_own_and_says_how_it_ended(tmp_path: Path, guest: MakeGuest) -> None:
    vm = guest(GUEST)
    vm.start()
    until(lambda: vm.memory.read(0x200004, 4) != bytes(4))
    vm.pause()
    vm.memory.write(0x200000, b"\x07")
    children = _fork(vm, 3, change=lambda config, number: config.replaced(console=f"file:{tmp_path}/said{number}"))
    assert len({os.getpid(), *(child.pid for child in children)}) == 4
    for number, child in enumerate(children):
        stop = child.wait(PATIENCE)
        assert stop is not None and (stop.reason, stop.code) == (StopReason.GUEST_EXIT, 7)
        assert child.state == "Stopped" and child.wait() is stop
        assert (tmp_path / f"said{number}").read_bytes() == b"\x07"
        child.close()
    vm.memory.write(0x200000, b"\x03")
    vm.resume()
    stop = vm.wait(PATIENCE)
    assert stop is not None and stop.code == 3, "nothing of the copies is here"


def test_it_is_held_goes_on_and_is_ended_as_a_machine_is(guest: MakeGuest) -> None:
    vm = guest(IDLE)
    vm.start()
    (child,) = _fork(vm)
    assert (child.state, child.wait(0.01)) == ("Running", None)
    child.pause()
    child.pause()
    assert child.state == "Paused"
    child.resume()
    assert child.state == "Running"
    with pytest.raises(VmmError, match="a machine can be started only once"):
        child.start()
    child.stop()
    child.stop()
    stop = child.wait(PATIENCE)
    assert stop is not None and stop.reason is StopReason.REQUESTED
    with pytest.raises(VmmError, match="the copy has ended"):
        child.pause()
    child.close()
    child.close()


def test_one_that_is_killed_is_told_and_the_others_go_on(guest: MakeGuest) -> None:
    vm = guest(IDLE)
    vm.start()
    first, second = _fork(vm, 2)
    os.kill(first.pid, signal.SIGKILL)
    with pytest.raises(VmmError, match=f"the copy's process {first.pid} was killed"):
        first.wait(PATIENCE)
    assert (second.state, vm.state) == ("Running", "Running")
    first.close()
    second.close()
    _wait_gone(second.pid)


def test_a_fork_server_that_was_killed_is_started_again(guest: MakeGuest) -> None:
    vm = guest(IDLE)
    vm.start()
    (first,) = _fork(vm)
    server = int(Path(f"/proc/{first.pid}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(server, signal.SIGKILL)
    until(lambda: has_ended(server))
    (second,) = _fork(vm)
    assert (first.state, second.state) == ("Running", "Running")
    first.close()
    second.close()


def test_a_time_limit_of_the_programs_own_sockets_is_not_ours(
    guest: MakeGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = guest(IDLE)
    vm.start()
    monkeypatch.setattr(isolated, "_server", None)  # it is started anew
    socket.setdefaulttimeout(0.01)
    try:
        (child,) = _fork(vm)
        with child:
            child.pause()
            child.resume()
    finally:
        socket.setdefaulttimeout(None)


def test_what_cannot_be_made_there_says_why_here(tmp_path: Path, guest: MakeGuest) -> None:
    (tmp_path / "ro").write_bytes(bytes(4096))
    vm = guest(IDLE, drives=[DriveConfig(str(tmp_path / "ro"), read_only=True)])
    (tmp_path / "ro").unlink()
    with pytest.raises(VmmError, match=r"ro: .*No such file or directory"):
        _fork(vm)
    with pytest.raises(SnapshotError, match="tap0: is a descriptor of this process"):
        _fork(guest(IDLE), change=lambda config, _: config.replaced(nets=[_tap()]))


def test_what_a_limit_on_files_cuts_short_is_said(guest: MakeGuest) -> None:
    vm = guest(IDLE)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(HostError, match="make a process for the copy: File too large"):
            _fork(vm)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_machine_that_writes_between_forks_has_further_copies(guest: MakeGuest) -> None:
    """What it wrote is a piece of RAM with one file's pieces on both sides: that file was closed in the copy."""
    vm = guest(GUEST)
    vm.start()
    for number in range(3):
        until(lambda: vm.memory.read(0x200004, 4) != bytes(4))
        vm.pause()
        vm.memory.write(0x200000, bytes([number + 5]))
        (child,) = _fork(vm)
        vm.memory.write(0x200000, bytes(8))
        vm.resume()
        with child:
            stop = child.wait(PATIENCE)
            assert stop is not None and (stop.reason, stop.code) == (StopReason.GUEST_EXIT, number + 5)


def _tap() -> NetConfig:
    return NetConfig(mode="fd", fd=0, id="tap0")


def test_each_has_disks_of_its_own(tmp_path: Path, guest: MakeGuest) -> None:
    (tmp_path / "disk").write_bytes(b"parent" * 1024)
    vm = guest(IDLE, drives=[DriveConfig(str(tmp_path / "disk"))])
    vm.start()
    own = [os.stat(f"/proc/{child.pid}/fd/{_disk(child, tmp_path)}").st_ino for child in _fork(vm, 2)]
    assert len({*own, (tmp_path / "disk").stat().st_ino}) == 3


def _disk(child: Isolated, place: Path) -> str:
    fds = Path(f"/proc/{child.pid}/fd")
    (disk,) = {fd.name for fd in fds.iterdir() if str(fd.readlink()).startswith(str(place))}
    return disk


def test_it_is_behind_filters_and_without_files_and_privileges(tmp_path: Path, guest: MakeGuest) -> None:
    vm = guest(IDLE, vsock=VsockConfig(3, str(tmp_path / "v")))
    vm.start()
    (child,) = _fork(vm)
    status = Path(f"/proc/{child.pid}/status").read_text()
    assert "Seccomp:\t2" in status
    assert (tmp_path / "v.0").is_socket()
    if os.geteuid():
        child.close()
        return  # namespaces are root's to make
    assert "NoNewPrivs:\t1" in status
    assert int(status.partition("CapEff:\t")[2][:16], 16) & ~2 == 0, "no more than to open files"
    top = tmp_path.relative_to("/").parts[0]
    assert os.listdir(f"/proc/{child.pid}/root") == [top], "the directory of its sockets, and nothing else"
    for kind in ("mnt", "net", "ipc"):
        assert os.readlink(f"/proc/{child.pid}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}")
    child.close()


def test_an_idle_one_takes_less_than_8_mib(guest: MakeGuest) -> None:
    vm = guest(IDLE, memory="64M")
    vm.start()
    children = _fork(vm, 3)
    for child in children:
        sizes = [line.split() for line in Path(f"/proc/{child.pid}/smaps_rollup").read_text().splitlines()[1:]]
        private = sum(int(words[1]) for words in sizes if words[0].startswith("Private_"))
        assert private < 8 << 10, f"{private} KiB"
        child.close()


def test_a_pool_over_processes(guest: MakeGuest) -> None:
    vm = guest(GUEST)
    vm.memory.write(0x200000, b"\x05")
    with Pool(vm, size=2, isolated=True) as pool:
        for _ in range(4):
            with pool.take(PATIENCE) as copy:
                assert isinstance(copy, Isolated)
                stop = copy.wait(PATIENCE)
                assert stop is not None and stop.code == 5


def test_nothing_is_left(guest: MakeGuest) -> None:
    vm = guest(IDLE)
    vm.start()
    counts = []
    for _ in range(3):
        pids = []
        for child in _fork(vm, 2):
            pids.append(child.pid)
            child.close()
        _wait_gone(*pids)
        undertaker.wait()
        counts.append(len(os.listdir("/proc/self/fd")))
    assert counts[1] == counts[2], "the first one has opened what is kept"


def test_they_end_with_whoever_has_asked_for_them(tmp_path: Path) -> None:
    code = (
        "import os, sys; from vmm import Machine; vm = Machine(kernel=sys.argv[1], memory='4M'); vm.start();"
        "print(*(child.pid for child in vm.fork(2, isolated=True)), flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, write_guest(tmp_path, IDLE)], cwd=ROOT, capture_output=True, text=True
    )
    pids = [int(word) for word in done.stdout.split()]
    assert len(pids) == 2, done.stderr
    _wait_gone(*pids)


def test_a_pool_does_not_give_what_was_killed_while_it_waited(guest: MakeGuest) -> None:
    vm = guest(IDLE)
    with Pool(vm, size=1, limit=2, isolated=True) as pool:
        for _ in range(3):
            assert pool.wait_until_full(PATIENCE)
            os.kill(pool._ready[0].pid, signal.SIGKILL)
            until(lambda: pool._ready[0].state == "Stopped")
            with pool.take(PATIENCE) as copy:
                assert copy.state == "Running"


def test_a_limit_of_processes_is_said_and_the_server_lives(guest: MakeGuest, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socketpair(AF_UNIX, SOCK_SEQPACKET)
    code = (
        "import os, sys; from vmm.machine import fork_server; fork = os.fork; left = [1]\n"
        "def scarce():\n"
        "    if left: raise BlockingIOError(left.pop() and 11, 'Resource temporarily unavailable')\n"
        "    return fork()\n"
        "os.fork = scarce; fork_server.main(int(sys.argv[1]))"
    )
    server = subprocess.Popen([sys.executable, "-c", code, str(theirs.fileno())], cwd=ROOT, pass_fds=[theirs.fileno()])
    theirs.close()
    monkeypatch.setattr(isolated, "_server", ours)
    monkeypatch.setattr(isolated, "_server_pid", os.getpid())
    vm = guest(IDLE)
    with pytest.raises(VmmError, match=r"^make a process for the copy: Resource temporarily unavailable$"):
        _fork(vm)
    (child,) = _fork(vm)
    assert Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[1] == str(server.pid)
    child.close()
    ours.close()
    assert server.wait(PATIENCE) == 0


def test_what_the_host_refuses_the_copy_is_said(guest: MakeGuest, monkeypatch: pytest.MonkeyPatch) -> None:
    vm = guest(IDLE)
    monkeypatch.setattr(os, "getcwd", lambda: "/nowhere")  # where the copy is to go
    with pytest.raises(VmmError, match=r"^/nowhere: No such file or directory$"):
        _fork(vm)


def test_an_image_stays_as_it_is_while_a_copy_is_made(guest: MakeGuest, monkeypatch: pytest.MonkeyPatch) -> None:
    image = guest(IDLE).freeze()
    before, seen = image.config, []

    def look(image: Image, *arguments: Any, **how: Any) -> bytes:
        seen.append(image.config)
        return encode(image, *arguments, **how)

    monkeypatch.setattr(isolated, "encode", look)
    child_of(image, lambda config, number: config.replaced(console="none", cpus=1), isolated=True)(0).close()
    assert len(seen) == 1 and seen[0] is before, "another thread may make a copy of it, too"


def test_who_waits_when_it_is_closed_is_told(guest: MakeGuest) -> None:
    vm = guest(IDLE)
    for _ in range(20):
        (child,) = _fork(vm)
        told: list[str] = []

        def wait(child: Isolated = child, told: list[str] = told) -> None:
            with pytest.raises(VmmError) as error:
                child.wait()
            told.append(str(error.value))

        waiting = [threading.Thread(target=wait) for _ in range(4)]
        for thread in waiting:
            thread.start()
        child.close()
        for thread in waiting:
            thread.join()
        assert told == [f"the copy's process {child.pid} was killed"] * 4


def test_its_socket_goes_with_it(tmp_path: Path, guest: MakeGuest) -> None:
    vm = guest(IDLE, vsock=VsockConfig(3, str(tmp_path / "v")))
    vm.start()
    first, second = _fork(vm, 2)
    assert sorted(path.name for path in tmp_path.glob("v*")) == ["v", "v.0", "v.1"]
    first.close()
    (tmp_path / "v.1").rename(tmp_path / "kept")
    (tmp_path / "v.1").write_bytes(b"somebody else's")
    second.close()
    assert sorted(path.name for path in tmp_path.glob("v*")) == ["v", "v.1"]


def test_an_answer_that_nobody_waited_for_is_not_the_next_ones(
    guest: MakeGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = guest(IDLE)
    vm.start()
    (child,) = _fork(vm)
    control = child._control

    class Interrupted:
        send = control.send

        def recv(self, size: int) -> bytes:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(child, "_control", Interrupted())
        with pytest.raises(KeyboardInterrupt):
            child.pause()
    with pytest.raises(VmmError, match="can be started only once"):
        child.start()
    child.close()


@pytest.mark.parametrize("seconds", [-1, -1e9])
def test_time_that_is_over_is_not_waited_for(guest: MakeGuest, seconds: float) -> None:
    (child,) = _fork(guest(IDLE))
    assert child.wait(seconds) is None
    child.stop()
    assert child.wait(1e9) is not None
    child.close()
