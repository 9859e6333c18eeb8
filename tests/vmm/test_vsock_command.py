# SPDX-License-Identifier: Apache-2.0
"""``pyvmm vsock`` against a VM's unix socket, played by the real device or by a bare socket."""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.virtio.vsock_driver import RCV, RESPONSE, RST, RW, SEND, SHUTDOWN, Vm
from vmm import vsock
from vmm.commands.vsock import bridge
from vmm.errors import ConfigError, HostError
from vmm.memory import GuestMemory

ROOT = Path(__file__).parents[2]


@pytest.fixture
def vm(tmp_path: Path) -> Iterator[Vm]:
    with GuestMemory(64 << 20) as ram:
        vm = Vm(tmp_path / "v.sock", ram)
        yield vm
        vm.close()


def start(*args: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "vmm", "vsock", *args],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT,
    )  # fmt: skip


def test_both_ways_and_half_close(vm: Vm) -> None:
    with start(vm.path, "52") as program:
        request = vm.receive()
        assert request.dst_port == 52
        vm.send(RESPONSE, 52, request.src_port)
        assert program.stdin and program.stdout
        program.stdin.write(b"question")
        program.stdin.close()
        assert vm.receive(RW).data == b"question"
        assert vm.receive(SHUTDOWN).flags == SEND
        vm.send(RW, 52, request.src_port, b"answer")
        vm.send(SHUTDOWN, 52, request.src_port, flags=RCV | SEND)
        assert program.stdout.read() == b"answer"
        assert program.wait(30) == 0


def test_port_that_nobody_listens_on(vm: Vm) -> None:
    with start(vm.path, "52") as program:
        vm.send(RST, 52, vm.receive().src_port)
        _, errors = program.communicate(timeout=30)
        assert program.returncode == 1
        assert errors.decode() == f"pyvmm vsock: connect to port 52 of the guest behind {vm.path}: Connection refused\n"


@pytest.mark.parametrize("args", [("missing", "52"), ("x" * 200, "52"), ("/dev/null/x", "52")])
def test_wrong_path_is_one_line(args: tuple[str, str]) -> None:
    with pytest.raises(ConfigError, match="PATH"):
        vsock.connect(args[0], int(args[1]))


def test_wrong_port_is_one_line() -> None:
    with start("v.sock", "http") as program:
        _, errors = program.communicate(timeout=30)
        assert (program.returncode, errors.count(b"\n")) == (2, 1)
        assert b"PORT http: must be a number from 0 to 4294967294" in errors


def test_socket_that_nobody_listens_on(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "dead"))
    with pytest.raises(HostError, match="refused"):
        vsock.connect(str(tmp_path / "dead"), 52)


def test_a_peer_that_echoes_more_than_all_buffers_hold() -> None:
    """Neither side may wait for the other to read first."""
    data = hashlib.shake_128(b"seed").digest(4 << 20)
    ours, theirs = socket.socketpair()
    source_read, source_write = os.pipe()
    sink_read, sink_write = os.pipe()
    received = bytearray()

    def echo() -> None:
        while chunk := theirs.recv(4096):
            theirs.sendall(chunk)
        theirs.shutdown(socket.SHUT_WR)

    def feed() -> None:
        with os.fdopen(source_write, "wb") as source:
            source.write(data)

    def drain() -> None:
        with os.fdopen(sink_read, "rb") as sink:
            received.extend(sink.read())

    threads = [threading.Thread(target=target) for target in (echo, feed, drain)]
    for thread in threads:
        thread.start()
    bridge(ours, source_read, sink_write)
    os.close(sink_write)
    for thread in threads:
        thread.join(30)
    assert bytes(received) == data
    os.close(source_read)
    ours.close()
    theirs.close()


def test_a_peer_that_goes_away() -> None:
    ours, theirs = socket.socketpair()
    source_read, source_write = os.pipe()
    sink_read, sink_write = os.pipe()
    os.write(source_write, b"never read")
    theirs.sendall(b"goodbye")
    theirs.close()
    bridge(ours, source_read, sink_write)  # with its standard input open still
    os.close(sink_write)
    assert os.read(sink_read, 100) == b"goodbye"
    for fd in (source_read, source_write, sink_read):
        os.close(fd)
    ours.close()
