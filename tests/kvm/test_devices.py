# SPDX-License-Identifier: Apache-2.0
"""Drivers in ring 3 of a long-mode guest drive each device on /dev/kvm itself, and check what comes back."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.kvm.guests import PATIENCE
from tests.kvm.ring3 import Ring3, drive
from vmm.config.devices import BalloonConfig, DriveConfig, NetConfig, ShareConfig, VsockConfig

DISK = 1 << 20
SO_RCVBUFFORCE = 33


def make_disk(path: Path) -> Path:
    path.write_bytes(bytes(DISK))
    return path


def pattern(page: int) -> bytes:
    words = ((page * 512 + word + 1) * 0x9E3779B97F4A7C15 % (1 << 64) for word in range(512))
    return b"".join(word.to_bytes(8, "little") for word in words)


@pytest.mark.parametrize("engine", ["sync", "io_uring"])
@pytest.mark.parametrize(
    "ring", ["event_idx=1 indirect=1", "event_idx=0 indirect=0", "event_idx=1 indirect=0", "size=4 depth=1 indirect=0"]
)
def test_disk_is_written_flushed_and_read_back(tmp_path: Path, ring: str, engine: str) -> None:
    image = make_disk(tmp_path / "disk")
    drives = (DriveConfig(str(image), id="ring3", engine=engine),)
    words, stats = drive("blk", f"test=0 {ring}", drives=drives)
    assert words["id"] == ["ring3"]
    assert stats["virtio-blk0"]["requests"] == 2 * DISK // 4096 + 2
    data = image.read_bytes()
    assert all(data[page * 4096 :][:4096] == pattern(page) for page in range(DISK // 4096))


def test_every_queue_of_a_disk_works(tmp_path: Path) -> None:
    drives = (DriveConfig(str(make_disk(tmp_path / "disk")), queues=4),)
    for queue in range(4):
        drive("blk", f"test=0 queue={queue}", drives=drives)


@pytest.mark.parametrize("event_idx", [0, 1])
def test_interrupt_arrives_when_it_is_wanted_only(tmp_path: Path, event_idx: int) -> None:
    drives = (DriveConfig(str(make_disk(tmp_path / "disk"))),)
    words, _ = drive("blk", f"test=1 event_idx={event_idx}", drives=drives)
    assert words["interrupts"] == words["while polled"] == ["20"]


def test_driver_that_lies_to_one_disk_has_the_other_whole(tmp_path: Path) -> None:
    drives = [DriveConfig(str(make_disk(tmp_path / name))) for name in ("bad", "good")]
    _, stats = drive("blk", "test=2 rounds=8 count=100", drives=drives)
    assert stats["virtio-blk0"]["needs_reset"] == 8
    assert stats["virtio-blk1"]["needs_reset"] == 0
    assert stats["virtio-blk1"]["requests"] == DISK // 4096 + 2 * 8 * 100


def test_entropy_device_gives_random_numbers() -> None:
    words, stats = drive("small", "test=0", entropy=True)
    assert int(words["bytes"][0]) == stats["virtio-rng"]["bytes"] > 0


def test_balloon_and_reported_pages_are_the_hosts() -> None:
    words, stats = drive("small", "test=1", balloon=BalloonConfig(1))
    assert words["wanted"] == ["256"]
    assert [stats["virtio-balloon"][name] for name in ("inflated", "deflated", "reported")] == [256, 256, 64]
    assert stats["virtio-balloon"]["bytes_discarded"] >= (256 + 64) * 4096


class Server:
    """A unix socket that serves each connection on a thread, with ``serve(connection)``."""

    def __init__(self, path: Path, serve: Callable[[socket.socket], None]) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(path))
        self._socket.listen(64)
        self._serve = serve
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                threading.Thread(target=self._run, args=(connection,), daemon=True).start()

    def _run(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            self._serve(connection)

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def echo(connection: socket.socket) -> None:
    while data := connection.recv(1 << 16):
        connection.sendall(data)


@pytest.mark.parametrize("connections", [1, 8])
@pytest.mark.parametrize("ring", ["event_idx=1 indirect=1", "event_idx=0 indirect=0 chunk=65536", "chunk=1000"])
def test_guest_connects_and_all_comes_back(tmp_path: Path, ring: str, connections: int) -> None:
    path = tmp_path / "v"
    with contextlib.closing(Server(Path(f"{path}_7003"), echo)):
        words, stats = drive("vsock", f"test=0 connections={connections} {ring}", vsock=VsockConfig(52, str(path)))
    assert words["cid"] == ["52"]
    assert words["bytes"] == [str(connections << 20)]
    assert stats["virtio-vsock"]["bytes_tx"] == stats["virtio-vsock"]["bytes_rx"] == connections << 20
    assert stats["virtio-vsock"]["opened_by_guest"] == connections


@pytest.mark.parametrize("connections", [1, 8])
def test_host_connects_and_all_comes_back(tmp_path: Path, connections: int) -> None:
    path = tmp_path / "v"
    results: list[bool] = []

    def client(number: int) -> None:
        data = random.Random(number).randbytes(1 << 20)
        with socket.socket(socket.AF_UNIX) as end:
            end.settimeout(PATIENCE)
            end.connect(str(path))
            end.sendall(b"CONNECT 6000\n")
            with end.makefile("rb", 0) as unbuffered:
                assert unbuffered.readline().startswith(b"OK ")  # nothing at all: the guest refused
            sender = threading.Thread(target=end.sendall, args=(data,))
            sender.start()
            back = bytearray()
            while len(back) < len(data) and (part := end.recv(1 << 16)):
                back += part
            sender.join()
            results.append(bytes(back) == data)

    with Ring3("vsock", f"test=1 connections={connections}", vsock=VsockConfig(52, str(path))) as guest:
        ready = threading.Event()
        guest.vm.on_console(lambda data: ready.set())
        guest.start()
        assert ready.wait(PATIENCE)
        clients = [threading.Thread(target=client, args=(number,)) for number in range(connections)]
        for each in clients:
            each.start()
        for each in clients:
            each.join()
        words = guest.end()
    assert results == [True] * connections
    assert words["bytes"] == [str(connections << 20)]


@pytest.mark.parametrize("ring", ["event_idx=1 indirect=1", "event_idx=0 indirect=0"])
@pytest.mark.parametrize("dax", [0, 4 << 20])
def test_share_is_read_and_written(tmp_path: Path, ring: str, dax: int) -> None:
    data = random.Random(1).randbytes((3 << 20) + 12345)
    (tmp_path / "input").write_bytes(data)
    words, stats = drive("fs", ring, shares=[ShareConfig("tag", str(tmp_path), dax=dax)])
    assert words["size"] == words["written"] == [str(len(data))]
    assert (tmp_path / "output").read_bytes() == bytes(byte ^ 0xFF for byte in data)
    assert ("dax" in words) is bool(dax)
    # Through the window the guest has turned over the last byte of each 2 MiB of it.
    now = bytearray(data)
    if dax:
        for last in ((2 << 20) - 1, len(data) - 1):
            now[last] ^= 0xFF
    assert (tmp_path / "input").read_bytes() == now
    assert stats["virtio-fs0"]["needs_reset"] == 0


def icmp_checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF


@pytest.mark.parametrize("ring", ["event_idx=1 indirect=1", "event_idx=0 indirect=0 mergeable=0"])
def test_every_ping_is_answered(namespace: None, ring: str) -> None:
    """32 pings under way at once, 2,000 in all, of every size up to the MTU: what `ping -f` does."""
    config = NetConfig("ring3", mode="auto", address="10.99.0.1/24", mac="06:00:00:00:00:02")
    with Ring3("net", f"test=0 {ring}", nets=[config]) as guest:
        ready = threading.Event()
        guest.vm.on_console(lambda data: ready.set())
        guest.start()
        assert ready.wait(PATIENCE)
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as end:
            end.settimeout(PATIENCE)
            under_way: dict[int, bytes] = {}
            for number in range(2000):
                body = random.Random(number).randbytes(2 * (number % 736))
                ping = struct.pack(">BBHHH", 8, 0, 0, 77, number) + body
                ping = ping[:2] + struct.pack(">H", icmp_checksum(ping)) + ping[4:]
                end.sendto(ping, ("10.99.0.2", 0))
                under_way[number] = body
                while len(under_way) == 32 or (number == 1999 and under_way):
                    data = end.recv(4096)[20:]
                    kind, _, _, identifier, answered = struct.unpack_from(">BBHHH", data)
                    assert (kind, identifier, icmp_checksum(data)) == (0, 77, 0)
                    assert under_way.pop(answered) == data[8:]
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as end:
            end.sendto(b"end", ("10.99.0.2", 9))
        assert guest.end()["echoes"] == ["2000"]


def test_every_datagram_of_a_flood_arrives(namespace: None) -> None:
    config = NetConfig("ring3", mode="auto", address="10.99.0.1/24")
    with (
        Ring3("net", "test=1 count=10000", nets=[config]) as guest,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as end,
    ):
        end.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 64 << 20)
        end.bind(("10.99.0.1", 7))
        end.settimeout(PATIENCE)
        guest.start().end()
        assert all(end.recv(100) == bytes(64) for _ in range(10000))
        assert guest.vm.stats["virtio-net0"]["tx_packets"] >= 10000
