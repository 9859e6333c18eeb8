# SPDX-License-Identifier: Apache-2.0
"""The host's side of a sandbox against agents that lie: each call ends, by an error of ours, with bounded memory."""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import json
import os
import random
import re
import signal
import socket
import stat
import struct
import subprocess
import sys
import tarfile
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.waiting import until
from vmm import Sandbox
from vmm.errors import ConfigError, SnapshotError, VmmError
from vmm.images import Image
from vmm.sandbox import AgentError, CommandTimeout, SandboxGone, Session, guest, registry
from vmm.sandbox.archive import pack, unpack
from vmm.sandbox.channel import F_ENTRY, PROTOCOL, Link
from vmm.sandbox.e2b import Sandbox as E2B
from vmm.sandbox.e2b import SandboxException, WatchHandle
from vmm.sandbox.e2b.files import _names

Answer = Callable[[socket.socket], None]
ABOUT: dict[str, Any] = {"env": {}, "cwd": None, "user": None}


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Callable[[bytes | Answer], Session]]:
    """A session whose agent answers every request with those bytes, and then ends the connection or does as told."""
    listeners: list[socket.socket] = []

    def make(answer: bytes | Answer) -> Session:
        path = str(tmp_path / f"v{len(listeners)}")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen()
        listeners.append(listener)

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    stream, _ = listener.accept()
                    with stream, contextlib.suppress(OSError):
                        assert stream.recv(64) == b"CONNECT 521\n"
                        stream.sendall(b"OK 1024\n")
                        stream.recv(1 << 20)
                        if callable(answer):
                            answer(stream)
                        else:
                            stream.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        return Session(Link(path), ABOUT)

    yield make
    for listener in listeners:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def frame(kind: bytes, data: bytes = b"") -> bytes:
    return kind + struct.pack("<I", len(data)) + data


STARTED = frame(b"p", b"\x05\0\0\0")


def test_what_an_agent_says_is_what_comes_back(agent: Callable[[bytes], Session]) -> None:
    said = STARTED + frame(b"o", b"out") + frame(b"e", b"err") + frame(b"x", b"\0\x03\0")
    result = agent(said).run("x", timeout=5)
    assert (result.stdout, result.stderr, result.exit_code, result.signal) == ("out", "err", 3, None)
    assert agent(STARTED + frame(b"x", b"\1\x09\1")).run("x").cause == "killed because the sandbox was out of memory"


@pytest.mark.parametrize(
    "said",
    [
        b"z\0\0\0\0",  # no type of ours
        b"o" + struct.pack("<I", 1 << 31),  # a size beyond any frame
        frame(b"p", b"\1"),
        STARTED + STARTED,
        STARTED + frame(b"x", b"\0"),
        STARTED + frame(b"x", bytes(1000)),
        STARTED + frame(b"f", struct.pack("<I", 2)),
        frame(b"f", b""),
        STARTED + frame(b"k"),
        STARTED + frame(b"n", bytes(40)),
        frame(b"i", b"x"),
    ],
    ids=lambda said: repr(said[:12]),
)
def test_a_frame_that_cannot_be_is_an_error(agent: Callable[[bytes], Session], said: bytes) -> None:
    with pytest.raises(AgentError):
        agent(said).run("x", timeout=5)


@pytest.mark.parametrize("said", [b"", STARTED, STARTED + b"o\5\0", STARTED + frame(b"o", b"abc")])
def test_an_agent_that_leaves_is_told_at_once(agent: Callable[[bytes], Session], said: bytes) -> None:
    with pytest.raises(SandboxGone):
        agent(said).run("x", timeout=None)


def test_a_watch_tells_lost_changes_goes_on_and_ends(agent: Callable[[bytes], Session]) -> None:
    lost, made = (frame(b"c", struct.pack("<I", mask) + name) for mask, name in ((0x4000, b""), (0x100, b"file")))
    changes = agent(STARTED + lost + made + frame(b"k") + made).files.watch("/x", timeout=5)
    with pytest.raises(OSError, match="changes were lost"):
        next(changes)
    assert [(change.name, change.kind) for change in changes] == [("file", "created")]
    with pytest.raises(AgentError):
        agent(made).files.watch("/x", timeout=5)
    handle = WatchHandle(agent(STARTED + made + lost).files.watch("/x", timeout=5))
    seen = []
    with pytest.raises(SandboxException, match="changes were lost"):
        while True:
            seen += [event.name for event in handle.get_new_events()]
    assert seen == ["file"]
    handle.stop()
    made_one = threading.Event()

    def stop(_: object) -> None:
        made_one.wait(10)
        own.stop()

    ends: list[BaseException | None] = []
    own = WatchHandle(agent(STARTED + made + frame(b"k")).files.watch("/x", timeout=5), stop, ends.append)
    made_one.set()
    until(lambda: ends == [None])


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"env": {"": "x"}}, "^env: must be a name, not empty"),
        ({"env": {"a=b": "x"}}, "^env a=b: must be a name, not empty, without ="),
        ({"env": {"a\0b": "x"}}, r"^env a\\x00b: must be a name"),
        ({"env": {"a": "x\0"}}, r"^env a=x\\x00: must not have a NUL byte$"),
        ({"cwd": "work"}, "^cwd work: must be an absolute path of the guest$"),
        ({"cwd": ""}, "^cwd: must be an absolute path of the guest$"),
        ({"room": "0%"}, "^room 0%: must be a size, more than 0"),
    ],
    ids=repr,
)
def test_a_wrong_value_is_told_before_a_vm_is_made(values: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        Sandbox("an image that nobody has", **values)


def test_a_port_is_a_number_that_a_port_can_have(tmp_path: Path) -> None:
    session = Session(Link(str(tmp_path / "v")), ABOUT)
    calls: list[Callable[[Any], object]] = [session.publish, session.provide, session.connect]
    for call in calls:
        for port in ("80", True, 80.0, None):
            with pytest.raises(TypeError, match=rf"^Sandbox\.\w+: (host_)?port must be a whole number, not {port!r}$"):
                call(port)
        for number in (0, -1, 70_000):
            with pytest.raises(ConfigError, match=rf"port {number}: must be 1 to 65535$"):
                call(number)
    with pytest.raises(ConfigError, match=r"^host_port 70000: must be 1 to 65535, or 0 for any free one$"):
        session.publish(80, 70_000)
    with pytest.raises(ConfigError, match=r"^port 70000: must be 1 to 65535, or 0 for any free one$"):
        session.provide(80, 70_000)
    with pytest.raises(ConfigError, match=r"^host ::1: must be an IPv4 address of this host"):
        session.publish(80, host="::1")
    with pytest.raises(TypeError, match=r"^Sandbox: timeout must be a number or None, not '5'$"):
        session.files.read("/etc/passwd", timeout="5")  # type: ignore[call-overload]  # what is tested


def test_a_server_that_speaks_first_is_heard_whole(agent: Callable[[bytes], Session]) -> None:
    with agent(frame(b"k") + b"220 hello\r\n").connect(25, timeout=5) as stream, stream.makefile("rb") as said:
        assert said.read() == b"220 hello\r\n"


def test_an_agent_that_is_silent_meets_the_deadline(agent: Callable[[Answer], Session]) -> None:
    def listen(stream: socket.socket) -> None:
        while stream.recv(1 << 16):
            pass

    session = agent(listen)
    for call in (
        lambda: session.run("x", timeout=0.02), lambda: session.files.read("x", timeout=0.02),
        lambda: session.files.write("x", bytes(8 << 20), timeout=0.02), lambda: session.connect(80, timeout=0.02),
        lambda: next(session.files.watch("x", timeout=0.02)),
    ):  # fmt: skip
        with pytest.raises(CommandTimeout):
            call()


def test_a_look_at_a_command_that_says_nothing_is_no_wait(
    agent: Callable[[Answer], Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(stream: socket.socket) -> None:
        stream.sendall(frame(b"p", struct.pack("<I", 7)))
        while stream.recv(1 << 16):
            pass

    with agent(started).exec("x", timeout=None) as process:
        late = itertools.count(time.monotonic(), 60)  # a thread that gets no processor for a minute
        with monkeypatch.context() as patch:
            patch.setattr("vmm.sandbox.channel.time", SimpleNamespace(monotonic=lambda: next(late)))
            assert process.poll() is None


def test_a_flood_takes_no_more_memory_than_was_allowed(agent: Callable[[Answer], Session]) -> None:
    piece = frame(b"o", bytes(60_000)) * 16

    def flood(stream: socket.socket) -> None:
        stream.sendall(STARTED)
        for _ in range(60):
            stream.sendall(piece)
        stream.sendall(frame(b"x", b"\0\0\0"))

    session = agent(flood)
    tracemalloc.start()
    try:
        result = session.run("x", limit=100_000, timeout=20)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert result.truncated and len(result.stdout_bytes) == 100_000
    assert peak < 8 << 20


def test_a_command_that_has_ended_keeps_no_buffer(agent: Callable[[Answer], Session]) -> None:
    over = threading.Event()

    def answer(stream: socket.socket) -> None:
        stream.sendall(frame(b"p", struct.pack("<I", 7)) + frame(b"o", b"hello") + frame(b"x", bytes(3)))
        over.wait(60)  # the connection is kept for the next command

    session = agent(answer)
    ended = []
    tracemalloc.start(1)
    try:
        ended.append(session.exec(["x"]))
        assert tracemalloc.get_traced_memory()[0] > 1 << 19, "the buffer is not seen here"
        assert ended[0].communicate().stdout == "hello"
        assert tracemalloc.get_traced_memory()[0] < 1 << 18
    finally:
        tracemalloc.stop()
        over.set()
        session.close()


def test_a_file_is_no_longer_than_was_asked(agent: Callable[[Answer], Session]) -> None:
    def flood(stream: socket.socket) -> None:
        while True:
            stream.sendall(frame(b"d", bytes(60_000)))

    with pytest.raises(AgentError, match="read /x: the guest sent more than 10 bytes"):
        agent(flood).files.read_bytes("/x", length=10, timeout=20)


def test_a_directory_has_no_endless_names(agent: Callable[[Answer], Session], monkeypatch: pytest.MonkeyPatch) -> None:
    def flood(stream: socket.socket) -> None:
        while True:
            stream.sendall(frame(b"n", struct.pack("<IIIIQq", 0o120777, 0, 0, 1, 0, 0) + b"a\0" + b"t" * 200_000))

    monkeypatch.setattr("vmm.sandbox.files._ENTRIES_SIZE", 1 << 20)
    with pytest.raises(AgentError, match="list /x: the guest sent more than 1048576 entries, or too long ones"):
        agent(flood).files.list("/x", timeout=20)


def test_values_of_file_calls_are_one_line(agent: Callable[[bytes], Session]) -> None:
    files = agent(b"").files
    with pytest.raises(TypeError, match="Files: mode must be a whole number, not '0644'"):
        files.write("/x", "", mode="0644")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="mode 0o100000: must be 0 to 0o7777"):
        files.chmod("/x", 0o100000)
    with pytest.raises(ConfigError, match="format json: must be text or bytes"):
        files.read("/x", "json")  # type: ignore[call-overload]
    with pytest.raises(ConfigError, match="offset, length -1, None: must be 0 or more"):
        files.read_bytes("/x", offset=-1)


@pytest.mark.parametrize("name", [b"..", b".", b"a/b", b"/etc/passwd"])
def test_a_name_that_leaves_its_directory_is_refused(agent: Callable[[bytes], Session], name: bytes) -> None:
    entry = struct.pack("<IIIIQq", 0o100644, 0, 0, 1, 0, 0) + name + b"\0"
    with pytest.raises(AgentError, match="name"):
        agent(frame(b"n", entry) + frame(b"k")).files.list("/x")


def tree(*members: tuple[str, int, str]) -> bytes:
    """What an agent sends of (name, type, link or contents)."""
    said = b""
    for name, kind, what in members:
        size = len(what) if kind == stat.S_IFREG else 0
        target = b"" if kind == stat.S_IFREG else what.encode()
        said += frame(b"n", struct.pack("<IIIIQq", kind | 0o777, 0, 0, 1, size, 0) + name.encode() + b"\0" + target)
        said += frame(b"d", what.encode()) if size else b""
    return said


TOP = (".", stat.S_IFDIR, "")
OUT = "../outside"


def copy_of(agent: Callable[[Answer], Session], said: bytes, target: Path) -> None:
    """Copy a directory from an agent that sends that."""
    whole = frame(b"n", struct.pack("<IIIIQq", 0o040755, 0, 0, 1, 0, 0) + b"\0") + frame(b"k")

    def answer(stream: socket.socket) -> None:
        stream.sendall(whole)
        if stream.recv(1 << 16):
            stream.sendall(said + frame(b"k"))

    agent(answer).files.copy_out("/x", str(target), timeout=5)


@pytest.mark.parametrize(
    ("members", "error"),
    [
        ([TOP, ("a", stat.S_IFLNK, OUT), ("a/evil", stat.S_IFREG, "x")], AgentError),
        ([TOP, ("a", stat.S_IFLNK, f"{OUT}/evil"), ("a", stat.S_IFREG, "x")], FileExistsError),
        ([TOP, ("a", stat.S_IFLNK, OUT), ("a", stat.S_IFDIR, "")], FileExistsError),
        ([TOP, ("a", stat.S_IFDIR, ""), ("a", stat.S_IFLNK, OUT)], FileExistsError),
        ([TOP, ("a", stat.S_IFREG, "x"), ("a/evil", stat.S_IFREG, "x")], AgentError),
        ([TOP, (f"{OUT}/evil", stat.S_IFREG, "x")], AgentError),
        ([TOP, (f"./{OUT}/evil", stat.S_IFREG, "x")], AgentError),
        ([TOP, ("a/../../outside/evil", stat.S_IFREG, "x")], AgentError),
        ([TOP, ("/evil", stat.S_IFREG, "x")], AgentError),
        ([TOP, ("./evil", stat.S_IFREG, "x")], AgentError),
        ([TOP, ("", stat.S_IFREG, "x")], AgentError),
        ([TOP, ("a", stat.S_IFLNK, "x\0y")], AgentError),
        ([TOP, ("a/" * 300, stat.S_IFDIR, "")], AgentError),
        ([("a", stat.S_IFREG, "x")], AgentError),
        ([(".", stat.S_IFREG, "x")], AgentError),
        ([(".", stat.S_IFLNK, OUT)], AgentError),
        ([], AgentError),
    ],
)
def test_a_copy_to_the_host_stays_in_its_directory(
    agent: Callable[[Answer], Session], tmp_path: Path, members: list[tuple[str, int, str]], error: type[Exception]
) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "in").mkdir()
    with pytest.raises(error):
        copy_of(agent, tree(*members), tmp_path / "in/copy")
    assert list((tmp_path / "outside").iterdir()) == []
    assert {path.name for path in (tmp_path / "in").iterdir()} <= {"copy"}


def test_a_copy_to_the_host_has_files_directories_and_links_alone(
    agent: Callable[[Answer], Session], tmp_path: Path
) -> None:
    (tmp_path / "secret").touch(0o600)
    kinds = (0, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK, 0o170000)
    others = [(f"{kind:o}", kind, "../../secret") for kind in kinds]
    copy_of(agent, tree(TOP, ("a", stat.S_IFREG, "x"), *others), tmp_path / "copy")
    assert (tmp_path / "copy/a").read_bytes() == b"x"
    assert all(
        stat.S_ISREG(path.lstat().st_mode) and path.stat().st_nlink == 1 for path in (tmp_path / "copy").iterdir()
    )
    assert (tmp_path / "secret").stat().st_nlink == 1


def test_a_copy_that_is_damaged(
    agent: Callable[[Answer], Session], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmm.sandbox.channel._PATIENCE", 0.01)  # there is no VM whose end could explain an error
    whole = tree(TOP, *((f"{number}", stat.S_IFREG, "data" * number) for number in range(0, 600, 100)))
    rng = random.Random(3)
    damaged = [whole[: rng.randrange(len(whole))] for _ in range(20)]
    for _ in range(60):
        changed = bytearray(whole)
        for _ in range(rng.randrange(1, 5)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        damaged.append(bytes(changed))
    refused = 0
    for number, said in enumerate(damaged):
        (tmp_path / f"{number}").mkdir()
        try:
            copy_of(agent, said, tmp_path / f"{number}/copy")
        except (VmmError, OSError):
            refused += 1
        assert {path.name for path in (tmp_path / f"{number}").iterdir()} <= {"copy"}
    assert refused > 10  # what is changed in a file is the file


@pytest.mark.parametrize(("size", "sent"), [(1 << 60, 4), (3, 4), (5, 4), (0, 4), (1, 0)])
def test_a_file_has_the_size_that_was_said(
    agent: Callable[[bytes | Answer], Session], tmp_path: Path, size: int, sent: int
) -> None:
    entry = struct.pack("<IIIIQq", stat.S_IFREG | 0o644, 0, 0, 1, size, 0) + b"a\0"
    said = tree(TOP) + frame(b"n", entry) + (frame(b"d", bytes(sent)) if sent else b"")
    with pytest.raises(AgentError, match=f"sent 'a' in another size than {size} bytes"):
        copy_of(agent, said, tmp_path / "copy")
    with pytest.raises(AgentError, match=f"sent 'a' in another size than {size} bytes"):
        list(agent(said + frame(b"k")).files.get_archive("/x"))


def archive(*members: tuple[str, bytes]) -> bytes:
    """A tar of (name, type)."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        for name, kind in members:
            info = tarfile.TarInfo(name)
            info.type = kind
            tar.addfile(info)
    return made.getvalue()


def test_a_tar_that_says_it_is_huge_or_has_no_end_is_refused(agent: Callable[[bytes], Session]) -> None:
    top = archive((".", tarfile.DIRTYPE))[:512]
    huge = tarfile.TarInfo("./a")
    huge.size = 1 << 70
    tars: dict[str, Iterable[bytes]] = {"huge": [top + huge.tobuf(tarfile.GNU_FORMAT) + bytes(1024)]}
    huge.type, huge.size = tarfile.GNUTYPE_SPARSE, 0
    sparse = bytearray(huge.tobuf(tarfile.GNU_FORMAT))
    sparse[482] = 1  # a block with more pieces follows
    sparse[148:156] = b" " * 8
    sparse[148:156] = b"%06o\0 " % sum(sparse)
    block = b"%011o\0%011o\0" % (1, 1) * 21 + b"\1" + bytes(7)
    taken: list[int] = []

    def endless(kind: str) -> Iterator[bytes]:
        for number in range(200):
            taken.append(number)
            if kind == "pieces":  # of a sparse file: each block of them says that another follows
                yield top + bytes(sparse) if number == 0 else block * 512
            else:
                records = (b"15 %010d=\n" % (number * 4096 + key) for key in range(4096))
                header = tarfile.TarInfo("more")
                header.type, header.size = tarfile.XGLTYPE, 15 * 4096
                yield header.tobuf(tarfile.USTAR_FORMAT) + b"".join(records)
                yield archive((f"./{number}" if number else ".", tarfile.DIRTYPE))[:512]

    tars |= {kind: endless(kind) for kind in ("pieces", "keys")}
    tars["later"] = [archive(("a", tarfile.DIRTYPE))[:512], b"no header".ljust(512)]
    tars["cut"] = [archive(("a", tarfile.DIRTYPE))[:512], b"no header"]
    for name, pieces in tars.items():
        taken.clear()
        with pytest.raises(OSError) as refused:
            agent(frame(b"k")).files.put_archive("/x", pieces)
        assert (refused.value.errno, refused.value.filename) == (errno.EBADMSG, "/x"), name
        assert len(taken) < 20


def test_random_answers_end_in_an_error_of_ours(
    agent: Callable[[Answer], Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmm.sandbox.channel._PATIENCE", 0.01)  # there is no VM whose end could explain an error
    rng = random.Random(7)

    def answer(stream: socket.socket) -> None:
        for _ in range(rng.randrange(1, 6)):
            kind = rng.choice(b"poexdnckfz").to_bytes(1, "little")
            data = rng.randbytes(rng.choice((0, 1, 3, 4, 8, 40, 41, 60)))
            said = bytearray(frame(kind, data))
            if rng.random() < 0.3:
                said[rng.randrange(len(said))] = rng.randrange(256)
            stream.sendall(said)

    session = agent(answer)
    calls: list[Callable[[], object]] = [
        lambda: session.run("x", timeout=2), lambda: session.files.read("x", "bytes", timeout=2),
        lambda: session.files.list("x", timeout=2), lambda: session.files.stat("x", timeout=2),
        lambda: session.files.write("x", b"data", timeout=2), lambda: session.connect(1, timeout=2).close(),
        lambda: next(session.files.watch("x", timeout=2), None),
    ]  # fmt: skip
    for number in range(700):
        try:
            calls[number % len(calls)]()
        except (VmmError, OSError):
            pass
        session.close()


@pytest.mark.parametrize(
    ("name", "pull"),
    [
        ("python:3.12", "oci:python:3.12"),
        ("host/x", "oci:host/x"),
        ("python", "oci:python"),
        ("debian", "debian"),
        ("oci:x", "oci:x"),
    ],
)
def test_an_image_that_is_not_here_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, pull: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=f"run `pyvmm pull {pull}`"):
        guest.find_image(name)


def test_a_snapshot_with_a_damaged_time_limit_is_one_line(tmp_path: Path) -> None:
    about = {"timeout": "soon", "image": "x", "protocol": PROTOCOL, **ABOUT}
    for text in json.dumps(about), "[" * 100_000:
        (tmp_path / "sandbox.json").write_text(text)
        with pytest.raises(SnapshotError, match="is not a snapshot of a sandbox"):
            Sandbox.restore(str(tmp_path))


@pytest.mark.parametrize("timeout", [float("inf"), 1e12])
def test_a_sandbox_that_never_ends_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, timeout: float) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with contextlib.closing(registry.Place("box", {**ABOUT, "image": "x", "began": 0.0, "timeout": timeout})):
        assert [each.end_at for each in E2B.list().next_items()] == [None]


def test_names_of_users_that_cannot_be_are_left_out(agent: Callable[[bytes], Session]) -> None:
    line = b"x:x:" + b"9" * 5000 + b":\nnobody:x:65534:\n"
    assert _names(agent(frame(b"d", line) + frame(b"k")).files, "/etc/passwd") == {65534: "nobody"}


def test_a_name_is_claimed_once_and_a_killed_owner_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    place = registry.Place("box", {**ABOUT, "image": "x", "began": 0.0})
    with pytest.raises(ConfigError, match="another running sandbox"):
        registry.Place("box", ABOUT)
    assert [each["name"] for each in registry.all_running()] == ["box"]
    pid = os.fork()
    if not pid:
        registry.Place("orphan", ABOUT)
        os._exit(0)
    os.waitpid(pid, 0)
    assert (tmp_path / "pyvmm/sandboxes/orphan").exists()
    assert [each["name"] for each in registry.all_running()] == ["box"]
    assert not (tmp_path / "pyvmm/sandboxes/orphan").exists()
    place.close()
    assert registry.all_running() == []
    with pytest.raises(ConfigError, match="running: none"):
        registry.about("box")


def test_the_next_start_removes_what_a_killed_process_has_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    program = """
import os, signal, sys
from vmm.sandbox import registry
for name in sys.argv[1:]:
    registry.Place(name, {}).tell("the guest was switched off")
print(sorted(os.listdir(registry.root())), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""

    def left(*names: str) -> str:
        done = subprocess.run([sys.executable, "-c", program, *names], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (-signal.SIGKILL, "")
        return done.stdout

    assert left("one", "two") == "['one', 'two']\n"
    assert left("three") == "['three']\n"
    registry.Place("four", ABOUT).close()
    assert left("five") == "['five']\n"  # and this process does not look again, but takes over the name
    place = registry.Place("five", ABOUT)
    assert [(each["name"], each["ended"]) for each in registry.all_running()] == [("five", "")]
    place.close()
    assert not list((tmp_path / "pyvmm/sandboxes").iterdir())


def test_a_name_whose_directory_cannot_be_written_is_free_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    before = {*os.listdir("/proc/self/fd")}  # of which some may be other tests', and closed soon
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(json, "dump", full)
        registry.Place("box", ABOUT)
    assert {*os.listdir("/proc/self/fd")} <= before
    registry.Place("box", ABOUT).close()


def test_two_threads_that_close_a_place_close_one_descriptor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    place = registry.Place("box", ABOUT)
    with registry._alone(registry.root()):
        threads = [threading.Thread(target=place.close) for _ in range(2)]
        for thread in threads:
            thread.start()
        time.sleep(0.1)  # until each waits, or is done
    others = [os.open("/", os.O_RDONLY) for _ in range(20)]
    for thread in threads:
        thread.join()
    for fd in others:
        os.close(fd)  # none of them was taken for the place's


def test_processes_that_start_list_and_end_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    program = """
from vmm.sandbox import registry
for _ in range(100):
    place = registry.Place(None, {"env": {}})
    assert place.name in [each["name"] for each in registry.all_running()]
    place.close()
"""
    command = [sys.executable, "-c", program]
    env = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
    processes = [subprocess.Popen(command, env=env, stderr=subprocess.PIPE) for _ in range(6)]
    assert [process.communicate()[1] for process in processes] == [b""] * 6
    assert not list((tmp_path / "pyvmm/sandboxes").iterdir())


def test_a_stock_kernel_on_a_software_kvm_is_refused_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guest, "runs_linux", lambda: False)
    monkeypatch.delenv("PYVMM_SANDBOX_KERNEL", raising=False)
    image = Image("busybox", "/k", "/i", "/r", "")
    with pytest.raises(ConfigError, match=r"kernel /k: a stock Linux does not run .* `pyvmm lab -- python3 PROGRAM`"):
        guest.kernel_and_initrd(image, None, str(tmp_path))


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"image": 5}, "Sandbox: image must be a string or an Image, not 5"),
        ({"memory": 1.5}, "Sandbox: memory must be a whole number or a string, not 1.5"),
        ({"env": ["A=b"]}, "Sandbox: env must be a mapping of strings to strings or None, not ['A=b']"),
        ({"timeout": "1"}, "Sandbox: timeout must be a number or None, not '1'"),
        ({"name": object()}, "Sandbox: name must be a string or None, not an object"),
    ],
)
def test_a_sandbox_refuses_values_of_another_type(values: dict[str, Any], told: str) -> None:
    with pytest.raises(TypeError, match=re.escape(told)):
        Sandbox(**values)


def test_an_image_with_a_typing_error_is_found() -> None:
    with pytest.raises(ConfigError, match=r"^image oci:busybx: .*; did you mean busybox\?$"):
        Sandbox("busybx")


def test_a_command_and_a_file_refuse_values_of_another_type(agent: Callable[[bytes | Answer], Session]) -> None:
    session: Any = agent(b"")
    calls: list[tuple[Callable[[], object], str]] = [  # type checkers refuse these, too
        (lambda: session.run(None), "Sandbox.run: command must be a string or a list of strings or paths, not None"),
        (lambda: session.exec(["ls", 5]), "Sandbox.exec: command must be a string or a list of strings or paths"),
        (lambda: session.run("ls", env={"PORT": 80}), "env must be a mapping of strings to strings or None"),
        (lambda: session.run("ls", cwd=5), "Sandbox.run: cwd must be a string or a path or None, not 5"),
        (lambda: session.files.write(None, "x"), "not NoneType"),
        (lambda: session.files.list(3), "not int"),
    ]
    for call, told in calls:
        with pytest.raises(TypeError, match=re.escape(told)):
            call()


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_a_copy_from_the_host_follows_no_link_that_comes_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    # As a guest does that has the directory in a mount.
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/key").write_text("secret")
    (tmp_path / "tree").mkdir()
    place = tmp_path / "tree/place"
    place.touch() if kind == "file" else place.mkdir()
    look = os.lstat

    def lstat(path: str, **settings: Any) -> os.stat_result:
        found = look(path, **settings)
        if os.path.basename(path) == "place":
            place.unlink() if kind == "file" else place.rmdir()
            place.symlink_to("../secret/key" if kind == "file" else "../secret")
        return found

    with monkeypatch.context() as patch, pytest.raises(OSError, match=str(place)):
        patch.setattr(os, "lstat", lstat)
        assert b"secret" not in b"".join(pack(str(tmp_path / "tree")))


def test_a_copy_from_the_host_leaves_out_what_has_gone_meanwhile(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).write_bytes(bytes(1 << 20))
    pieces = pack(str(tmp_path))
    first = next(pieces)
    (tmp_path / "b").unlink()
    assert re.findall(rb"n.{36}([a-c.])\0", first + b"".join(pieces), re.DOTALL) == [b".", b"a", b"c"]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        next(pack(str(tmp_path / "nowhere")))


@pytest.mark.parametrize("at", [0, 1])
def test_a_copy_to_the_host_follows_no_link_that_comes_meanwhile(
    agent: Callable[[Answer], Session], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    outside, copy = tmp_path / "outside", tmp_path / "copy"
    (outside / "b").mkdir(parents=True)
    outside.chmod(0o755)
    place = [copy / "a", copy / "a/b"][at]
    make = os.mkdir

    def mkdir(path: str, *args: Any, **settings: Any) -> None:
        make(path, *args, **settings)
        if os.path.basename(path) == "b":
            place.rename(tmp_path / "aside")
            place.symlink_to(outside)

    members = [TOP, ("a", stat.S_IFDIR, ""), ("a/b", stat.S_IFDIR, ""), ("a/b/evil", stat.S_IFREG, "x")]
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(os, "mkdir", mkdir)
        copy_of(agent, tree(*members), copy)
    assert [path.name for path in outside.rglob("*")] == ["b"]
    assert stat.S_IMODE(outside.stat().st_mode) == 0o755


def test_a_time_limit_whose_thread_could_not_be_made_is_no_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    sandbox = Sandbox.__new__(Sandbox)
    sandbox._begin({}, None, None)
    stopped = threading.Event()
    sandbox.machine = SimpleNamespace(stop=stopped.set, close=stopped.set)  # type: ignore[assignment]  # a stand-in
    with sandbox:
        with monkeypatch.context() as patch, pytest.raises(RuntimeError):
            patch.setattr("vmm.threads.threading.Thread.start", none_left)
            sandbox.set_timeout(0.01)
        sandbox.set_timeout(0.01)
        assert stopped.wait(10)


def none_left(thread: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def test_who_is_attached_is_told_whether_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    place = registry.Place("box", {**ABOUT, "image": "none", "began": 0, "timeout": None})
    attached = E2B.connect("box")
    assert attached.is_running()
    place.close()
    assert not attached.is_running()


def test_a_watch_ends_with_what_its_callback_raises(agent: Callable[[bytes], Session]) -> None:
    made = frame(b"c", struct.pack("<I", 0x100) + b"file")
    ends: list[BaseException | None] = []
    seen: dict[str, None] = {}
    session = agent(STARTED + made + made)
    handle = WatchHandle(session.files.watch("/x", timeout=5), lambda event: seen[event.name], ends.append)
    until(lambda: ends)
    assert isinstance(ends[0], KeyError) and not session._link._open
    handle.stop()


def test_a_copy_of_one_file_follows_no_link_that_comes_meanwhile(
    agent: Callable[[bytes], Session], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret").write_text("secret")
    place = tmp_path / "place"
    place.touch()
    look = os.lstat

    def lstat(path: str) -> os.stat_result:
        found = look(path)
        place.unlink()
        place.symlink_to("secret")
        return found

    with monkeypatch.context() as patch, pytest.raises(OSError, match=str(place)):
        patch.setattr(os, "lstat", lstat)
        agent(frame(b"k")).files.copy_in(str(place), "/x")


def test_a_directory_that_comes_in_a_files_place_leaves_no_descriptor(
    agent: Callable[[bytes], Session], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "tree/place"
    look = os.lstat

    def lstat(path: str, **settings: Any) -> os.stat_result:
        found = look(path, **settings)
        if os.path.basename(path) == "place":
            place.unlink()
            place.mkdir()
        return found

    (tmp_path / "tree").mkdir()
    files = agent(frame(b"k")).files
    copies: list[Callable[[], object]] = [
        lambda: list(pack(str(tmp_path / "tree"))), lambda: files.copy_in(str(place), "/x"),
    ]  # fmt: skip
    for copy in copies:
        place.touch()
        before = len(os.listdir("/proc/self/fd"))
        with monkeypatch.context() as patch, pytest.raises(IsADirectoryError, match="place"):
            patch.setattr(os, "lstat", lstat)
            copy()
        assert len(os.listdir("/proc/self/fd")) == before
        place.rmdir()


def test_a_path_may_be_one_of_pathlib(agent: Callable[[Answer], Session], tmp_path: Path) -> None:
    entry = frame(b"n", struct.pack("<IIIIQq", 0o100644, 0, 0, 1, 0, 0) + b"\0") + frame(b"k")

    def answer(stream: socket.socket) -> None:
        stream.sendall(entry)
        stream.recv(1 << 16)

    assert agent(answer).files.stat(Path("/etc/file")).name == "file"  # type: ignore[arg-type]  # what is tested
    with pytest.raises(FileExistsError, match="copy/a"):
        copy_of(agent, tree(TOP, ("a", stat.S_IFDIR, ""), ("a", stat.S_IFDIR, "")), tmp_path / "copy")
    with pytest.raises(FileExistsError, match="copy"):
        unpack(iter([(F_ENTRY, memoryview(tree(TOP)[5:]))]), tmp_path / "copy")  # type: ignore[arg-type]  # what is tested
