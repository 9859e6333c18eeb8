# SPDX-License-Identifier: Apache-2.0
"""Guest RAM that a page fault handler brings: examples/uffd_handler.py, in a process of its own, from a file."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vmm import undertaker
from vmm.errors import SnapshotError
from vmm.memory import GuestMemory, MemoryFile, spans
from vmm.uffd import HandlerError

HANDLER = Path(__file__).parents[2] / "examples/uffd_handler.py"
PAGE = 4096
SIZE = 8 << 20
Start = Callable[[bytes], str]


@pytest.fixture
def handler(tmp_path: Path) -> Iterator[Start]:
    """Starts one over these contents, and says where; in the end it must have ended by itself, without a word."""
    started: list[subprocess.Popen[bytes]] = []

    def start(contents: bytes) -> str:
        path = tmp_path / f"handler{len(started)}"
        (tmp_path / "memory").write_bytes(contents)
        started.append(subprocess.Popen([sys.executable, HANDLER, path, tmp_path / "memory"], stderr=subprocess.PIPE))
        end = time.monotonic() + 20
        while not path.exists():
            assert time.monotonic() < end and started[-1].poll() is None
            time.sleep(0.005)
        return str(path)

    yield start
    for process in started:
        try:
            assert process.communicate(timeout=20)[1] == b""
            assert process.returncode == 0
        finally:
            process.kill()
            process.wait()


def _contents() -> bytes:
    return random.Random(7).randbytes(SIZE)


def test_pages_come_from_the_file_and_are_the_guests_own(handler: Start) -> None:
    contents = _contents()
    with GuestMemory(SIZE, handler=handler(contents)) as memory:
        assert memory.read(SIZE // 2 + 5, 3 * PAGE) == contents[SIZE // 2 + 5 :][: 3 * PAGE]
        memory.write(PAGE + 1, b"written")
        assert memory.read(PAGE, PAGE) == contents[PAGE : PAGE + 1] + b"written" + contents[PAGE + 8 : 2 * PAGE]
        # By the kernel, as disks and taps do.
        source, sink = os.pipe()
        os.write(sink, b"k" * 64)
        assert os.readv(source, [memory.slice(17 * PAGE, 64)]) == 64
        assert memory.read(17 * PAGE, PAGE) == b"k" * 64 + contents[17 * PAGE + 64 : 18 * PAGE]
        os.close(source)
        os.close(sink)


def test_what_was_given_back_is_zeros(handler: Start) -> None:
    contents = _contents()
    with GuestMemory(SIZE, handler=handler(contents)) as memory:
        assert memory.read(0, 4 * PAGE) == contents[: 4 * PAGE]
        assert memory.discard(memory.slice(PAGE - 5, 2 * PAGE + 10)) == 2 * PAGE
        assert memory.discard(memory.slice(SIZE - PAGE, PAGE)) == PAGE, "one that nobody has touched"
        assert memory.read(0, 4 * PAGE) == contents[:PAGE] + bytes(2 * PAGE) + contents[3 * PAGE : 4 * PAGE]
        assert memory.read(SIZE - 2 * PAGE, 2 * PAGE) == contents[-2 * PAGE : -PAGE] + bytes(PAGE)
        memory.write(PAGE, b"again")
        assert memory.read(PAGE, PAGE) == b"again" + bytes(PAGE - 5)


def test_giving_back_while_others_wait_for_pages(handler: Start) -> None:
    contents = _contents()
    with GuestMemory(SIZE, handler=handler(contents)) as memory:
        half = SIZE // 2

        def balloon() -> None:
            for at in range(half, SIZE, PAGE):
                memory.discard(memory.slice(at, PAGE))

        thread = threading.Thread(target=balloon)
        thread.start()
        seen = bytearray()
        for at in range(0, half, PAGE):
            # Off the GIL, so that both wait at once.
            out = os.memfd_create("seen")
            os.pwrite(out, memory.slice(at, PAGE), 0)
            seen += os.pread(out, PAGE, 0)
            os.close(out)
        thread.join()
        assert seen == contents[:half]
        assert memory.read(half, half) == bytes(half)


def test_a_freeze_has_all_brought(handler: Start) -> None:
    contents = bytearray(_contents())
    path = handler(bytes(contents))
    with GuestMemory(SIZE, handler=path) as memory:
        memory.write(5 * PAGE, b"mine")
        memory.discard(memory.slice(8 * PAGE, PAGE))
        contents[5 * PAGE : 5 * PAGE + 4] = b"mine"
        contents[8 * PAGE : 9 * PAGE] = bytes(PAGE)
        assert memory.written() == spans(SIZE)
        pieces = memory.freeze()
        with GuestMemory(SIZE, pieces=pieces) as copy:
            assert copy.read(0, SIZE) == contents
            assert memory.read(0, SIZE) == contents
            memory.write(0, b"later")
            assert memory.written() == [(0, PAGE)]
            memory.discard(memory.slice(0, PAGE))
            assert memory.read(0, PAGE) == bytes(PAGE)
            assert copy.read(0, SIZE) == contents


def test_a_freeze_that_fails_leaves_it_as_it_was(handler: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = _contents()
    with GuestMemory(SIZE, handler=handler(contents)) as memory:
        with monkeypatch.context() as patch:
            patch.setattr("vmm.memory.copy_pages", _no_room)
            with pytest.raises(OSError, match="No space"):
                memory.freeze()
        memory.write(0, b"mine")
        assert memory.freeze()
        assert memory.read(0, SIZE) == b"mine" + contents[4:]


def _no_room(*_: object) -> int:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("none", "No such file or directory"),
        ("plain", "Connection refused"),
        ("x" * 200, "File name too long"),
        ("a\0b", "Invalid argument"),
    ],
)
def test_without_a_handler_there_is_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("plain").touch()
    undertaker.wait()  # for what earlier tests have closed
    before = sorted(os.listdir("/proc/self/fd"))
    with pytest.raises(HandlerError, match=text) as caught:
        GuestMemory(SIZE, handler=path)
    assert caught.value.step == "connect"
    assert str(caught.value).startswith("page fault handler: connect ")
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_huge_pages_have_no_handler() -> None:
    with pytest.raises(SnapshotError, match="huge pages"):
        GuestMemory(SIZE, huge=True, handler="none")


def test_the_message_is_firecrackers(tmp_path: Path) -> None:
    import json

    size = (3 << 30) + (2 << 20)  # two regions
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "handler"))
        listener.listen()
        with GuestMemory(size, handler=str(tmp_path / "handler")) as memory:
            peer, _ = listener.accept()
            with peer:
                data, descriptors, _, _ = socket.recv_fds(peer, 1 << 16, 4)
                uffd = MemoryFile(descriptors[0])
                assert len(descriptors) == 1 and not os.get_blocking(uffd.fd)
                assert os.readlink(f"/proc/self/fd/{uffd.fd}") == "anon_inode:[userfaultfd]"
                assert json.loads(data) == [
                    {
                        "base_host_virt_addr": memory.host_address(gpa, length), "size": length, "offset": offset,
                        "page_size": PAGE, "page_size_kib": PAGE,
                    }
                    for (gpa, length), offset in zip(spans(size), (0, 3 << 30), strict=True)
                ]  # fmt: skip
            assert memory.size == size


TOUCHER = """
import os, sys
from vmm.memory import GuestMemory
memory = GuestMemory(int(sys.argv[2]), handler=sys.argv[1])
print(memory.read(0, 1)[0], flush=True)
os.read(0, 1)
print("touches", flush=True)
print(memory.read(memory.size - 4096, 1)[0])  # holds the GIL while it waits
"""
LAST = b"pyvmm: the page fault handler has ended: guest memory is incomplete, so the VM ends\n"


@pytest.mark.parametrize("touched", [True, False])
def test_a_handler_that_dies_ends_the_machine_by_one_line(tmp_path: Path, touched: bool) -> None:
    (tmp_path / "memory").write_bytes(b"\x05" * SIZE)
    path = tmp_path / "handler"
    handler = subprocess.Popen([sys.executable, HANDLER, path, tmp_path / "memory"])
    while not path.exists():
        time.sleep(0.005)
    words: list[str | Path] = [sys.executable, "-c", TOUCHER, path, str(SIZE)]
    pipe = subprocess.PIPE
    toucher = subprocess.Popen(words, cwd=HANDLER.parents[1], stdin=pipe, stdout=pipe, stderr=pipe)
    assert toucher.stdin is not None and toucher.stdout is not None and toucher.stderr is not None
    try:
        assert toucher.stdout.readline() == b"5\n"
        handler.send_signal(signal.SIGSTOP)
        if touched:
            toucher.stdin.write(b"\n")
            toucher.stdin.flush()
            assert toucher.stdout.readline() == b"touches\n"
            time.sleep(0.05)
        handler.kill()
        assert toucher.wait(20) == 1
        assert (toucher.stdout.read(), toucher.stderr.read()) == (b"", LAST)
    finally:
        for process in (handler, toucher):
            process.kill()
            process.communicate()


def test_a_handler_that_serves_on_without_its_connection_is_left_alone(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "handler"))
        listener.listen()
        with GuestMemory(SIZE, handler=str(tmp_path / "handler")):
            vmm, _ = listener.accept()
            _, (fd,), _, _ = socket.recv_fds(vmm, 1 << 16, 1)
            vmm.close()
            time.sleep(0.05)
            os.close(fd)


def test_without_a_thread_there_is_no_memory_either(
    handler: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = handler(_contents())
    before = sorted(os.listdir("/proc/self/fd"))
    monkeypatch.setattr("vmm.threads.spawn", _no_thread)
    with pytest.raises(HandlerError, match=r"page fault handler: send .*: Resource temporarily unavailable"):
        GuestMemory(SIZE, handler=path)
    assert sorted(os.listdir("/proc/self/fd")) == before


def _no_thread(*_: object, **__: object) -> None:
    raise RuntimeError("can't start new thread")


def test_a_device_file_that_cannot_be_used_is_not_needed() -> None:
    if os.geteuid():
        pytest.skip("LAYER MISSING: root")
    code = "from vmm import _uffd; import os; os.close(_uffd.create())"
    words = 'mount --bind /dev/null /dev/userfaultfd && exec "$0" -c "$1"'
    if os.path.exists("/dev/userfaultfd"):
        subprocess.run(["unshare", "-m", "sh", "-ec", words, sys.executable, code], cwd=HANDLER.parents[1], check=True)
