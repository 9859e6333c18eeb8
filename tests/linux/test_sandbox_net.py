# SPDX-License-Identifier: Apache-2.0
"""Ports of a sandbox and of its host, and a network by passt."""

from __future__ import annotations

import hashlib
import random
import socket
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from tests.linux.command import pyvmm
from tests.virtio.test_net import read_pcap
from tests.waiting import until
from vmm import Sandbox
from vmm.errors import ConfigError, HostError

pytestmark = pytest.mark.timeout(900)  # the first one may build r3


def connected(sandbox: Sandbox, port: int) -> socket.socket | None:
    """A connection; None: nobody listens."""
    try:
        return sandbox.connect(port)
    except ConnectionRefusedError:
        return None


def test_a_tcp_port_of_the_guest_is_reached(sandbox: Sandbox) -> None:
    assert connected(sandbox, 8080) is None
    with sandbox.exec("nc -l -p 8080 -e cat") as _server:
        with until(partial(connected, sandbox, 8080)) as stream:
            stream.sendall(b"through\n")
            assert stream.recv(100) == b"through\n"
            stream.shutdown(socket.SHUT_WR)
            assert stream.recv(100) == b""


def test_a_server_that_has_gone_costs_nothing_until_it_is_read(sandbox: Sandbox) -> None:
    def busy() -> int:
        """Ticks that the guest's processors have worked."""
        user, nice, system = sandbox.files.read("/proc/stat").split()[1:4]
        return int(user) + int(nice) + int(system)

    with sandbox.exec("echo ready; nc -l -p 8070 -e sh -c 'cat >/dev/null; head -c 900000 /dev/zero'") as process:
        process.stdout.readline(10)
        with until(partial(connected, sandbox, 8070)) as stream:
            stream.shutdown(socket.SHUT_WR)
            assert process.wait(10).exit_code == 0
            time.sleep(0.2)
            before = busy()
            time.sleep(1)
            assert busy() - before < 30
            assert len(b"".join(iter(partial(stream.recv, 1 << 16), b""))) == 900_000


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
    pyvmm(*words)
    assert b"\x01" in recorded()
    bad = pyvmm("sandbox", "--network", "user", "--pcap", "/no/such/file", "busybox", "true")
    assert (bad.returncode, bad.stderr.count(b"\n")) == (2, 1) and b"pcap /no/such/file: cannot be made" in bad.stderr
