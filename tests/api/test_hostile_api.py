# SPDX-License-Identifier: Apache-2.0
"""Clients that send nonsense, half of a request, a thousand connections, or nothing; and a guest that notices none."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.api.oracle import PYVMM, Client, Process
from tests.kvm.guests import write_guest
from tests.kvm.ring3 import kernel
from vmm.api.server import MAX_CONNECTIONS, MAX_HEAD, Server
from vmm.commands.serve import MAX_PAYLOAD
from vmm.errors import ConfigError
from vmm.unix_socket import Listener

HALT = "1: hlt\njmp 1b"


def bind(path: str) -> Listener:
    """As ``pyvmm serve`` makes its socket."""
    return Listener("--api-sock", path, 128)


@pytest.fixture
def echo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, Server]]:
    """A server in this process that answers with what it was asked, and has no patience."""
    path = tmp_path / "api.sock"

    def answer(method: str, path: str, body: bytes) -> tuple[int, bytes, tuple[str, ...]]:
        return 200, json.dumps([method, path, len(body)]).encode() + bytes(1 << 20 if path == "/long" else 0), ()

    monkeypatch.setattr("vmm.api.server.REQUEST_SECONDS", 0.2)
    server = Server(bind(str(path)), answer, MAX_PAYLOAD)
    server.start()
    yield path, server
    server.close()
    assert not path.exists()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A VM that is configured and not started; it has to live to the end."""
    directory = tmp_path_factory.mktemp("served")
    (directory / "disk").write_bytes(bytes(1 << 20))
    with Process(PYVMM, directory) as process:
        process.await_socket()
        kernel = {"kernel_image_path": write_guest(directory, HALT)}
        drive = {"drive_id": "d", "path_on_host": "disk", "is_root_device": False}
        assert process.request("PUT", "/boot-source", kernel).status == 204
        assert process.request("PUT", "/drives/d", drive).status == 204
        yield process
        assert process.process.poll() is None
        assert Client(process.socket).request("GET", "/").status == 200


def ask(path: Path, data: bytes) -> bytes:
    """What comes for `data` until the connection ends or nothing more comes."""
    client = Client(path)
    with contextlib.suppress(OSError):
        client.send(data)
    found, _ = client.everything()
    client.close()
    return found


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"\r\n\r\ngarbage\r\n\r\n", b'"error"'),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b'"error"'),
        (b"DELETE / HTTP/1.1\r\n\r\n", b'"error"'),
        (b"GET / HTTP/3.7\r\n\r\n", b'"error"'),
        (b"PUT / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", b'"error"'),
        (b"PUT / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", b'"error"'),
        (b"PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", b"Transfer-Encoding"),
        (b"PUT / HTTP/1.1\r\nExpect: the-worst\r\nContent-Length: 1\r\n\r\n", b"Expect"),
        (b"PUT / HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % (MAX_PAYLOAD + 1), b"larger than the limit of 51200"),
        (b"GET / HTTP/1.1\r\nX: " + b"y" * MAX_HEAD + b"\r\nZ: z\r\n", b"larger than the limit of"),
        (b"GET / HTTP/1.1\r\nContent-Length: 1\r\n" + b"X: y\r\n" * MAX_HEAD, b"larger than the limit of"),
        (b"GET / HTTP/1.1\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n", b"Upgrade"),
    ],
)
def test_what_is_no_request_is_answered_and_ends_its_connection(
    echo: tuple[Path, Server], data: bytes, says: bytes
) -> None:
    answer = ask(echo[0], data)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"Connection: close" in answer
    assert says in answer
    assert Client(echo[0]).request("GET", "/after").json == ["GET", "/after", 0]


def test_requests_one_after_the_other_and_in_pieces(echo: tuple[Path, Server]) -> None:
    client = Client(echo[0])
    data = b"GET /a HTTP/1.1\r\n\r\nPUT /b HTTP/1.1\r\nContent-Length: 3\r\n\r\nabcGET http://host/c HTTP/1.0\r\n\r\n"
    for byte in data:
        client.send(bytes([byte]))
    assert [client.receive().json for _ in range(3)] == [["GET", "/a", 0], ["PUT", "/b", 3], ["GET", "/c", 0]]  # type: ignore[union-attr]


def test_bytes_beyond_ascii_stay_as_they_are_however_they_come(tmp_path: Path) -> None:
    text = "ä€"

    def answer(method: str, path: str, body: bytes) -> tuple[int, bytes, tuple[str, ...]]:
        return 200, json.dumps([path, body.decode()]).encode(), ()

    server = Server(bind(str(tmp_path / "api.sock")), answer, MAX_PAYLOAD)
    server.start()
    body = text.encode()
    head = f"PUT /{text} HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    plain = b"PUT /b HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body)
    pieces = [bytes([byte]) for byte in b"\r\n" + head + body], [head + body + plain, body], [head, body, plain, body]
    try:
        for each in pieces:
            client = Client(tmp_path / "api.sock")
            for piece in each:
                client.send(piece)
                time.sleep(0.01)
            for path in ["/" + text, "/b"][: 1 if len(each) > 4 else 2]:
                answered = client.receive()
                assert answered is not None and answered.json == [path, text]
            client.close()
    finally:
        server.close()


@pytest.mark.parametrize(
    ("target", "path"),
    [("http://a/b/c", "/b/c"), ("http://a", "/"), ("/a://b/c", "/a://b/c"), ("/b?c=http://d/e", "/b?c=http://d/e")],
)
def test_only_a_whole_uri_has_a_host(echo: tuple[Path, Server], target: str, path: str) -> None:
    assert Client(echo[0]).request("GET", target).json == ["GET", path, 0]


def test_a_client_that_asks_first_may_go_on(echo: tuple[Path, Server]) -> None:
    answer = ask(echo[0], b"PUT /b HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\nabc")
    assert answer.startswith(b"HTTP/1.1 100 ")
    assert b'["PUT", "/b", 3]' in answer


@pytest.mark.parametrize("data", [b"GET / HT", b"PUT / HTTP/1.1\r\nContent-Length: 9\r\n\r\nhal"])
def test_half_a_request_is_not_waited_for_for_ever(echo: tuple[Path, Server], data: bytes) -> None:
    client = Client(echo[0])
    client.send(data)
    assert client.sock.recv(1) == b""  # the end
    idle = Client(echo[0])
    time.sleep(0.5)
    assert idle.request("GET", "/idle").json == ["GET", "/idle", 0], "one that has asked nothing may take its time"
    time.sleep(0.5)
    assert idle.request("GET", "/idle").json == ["GET", "/idle", 0]


def test_an_answer_that_nobody_takes_holds_up_nobody(echo: tuple[Path, Server]) -> None:
    client = Client(echo[0])
    client.send(b"GET /long HTTP/1.1\r\n\r\n")
    assert Client(echo[0]).request("GET", "/x").status == 200
    time.sleep(0.6)
    with pytest.raises((AssertionError, ConnectionError, ValueError)):
        answer = client.receive()
        assert answer is not None and len(answer.body) > 1 << 20


def test_of_ten_silent_connections_the_oldest_makes_room(echo: tuple[Path, Server]) -> None:
    held = [Client(echo[0]) for _ in range(MAX_CONNECTIONS)]
    assert held[0].request("GET", "/").status == 200  # it has asked, so it keeps its place
    more = [Client(echo[0]) for _ in range(2)]
    assert all(client.request("GET", "/").status == 200 for client in more)
    assert held[1].receive() is None and held[2].receive() is None
    assert held[0].request("GET", "/").status == 200 and held[-1].request("GET", "/").status == 200


def test_more_connections_at_work_than_allowed(echo: tuple[Path, Server]) -> None:
    held = [Client(echo[0]) for _ in range(MAX_CONNECTIONS)]
    for client in held:
        client.send(b"GET /long HTTP/1.1\r\n\r\n")
    time.sleep(0.05)
    assert b"503" in ask(echo[0], b"")
    held.pop().close()
    for _ in range(100):  # until the server has seen it
        if b"200" in ask(echo[0], b"GET / HTTP/1.1\r\n\r\n")[:16]:
            break
    else:
        pytest.fail("a place that was given up is not given to another")


def test_who_asks_very_much_at_once_waits_behind_who_asks_little(tmp_path: Path) -> None:
    asked: list[str] = []

    def answer(method: str, path: str, body: bytes) -> tuple[int, bytes, tuple[str, ...]]:
        asked.append(path)
        time.sleep(0.002)
        return 200, bytes(2000), ()

    server = Server(bind(str(tmp_path / "s")), answer, MAX_PAYLOAD)
    server.start()
    flood, polite = Client(tmp_path / "s"), Client(tmp_path / "s")
    many = b"GET /flood HTTP/1.1\r\n\r\n" * (1 << 11)
    pouring = threading.Thread(target=flood.sock.sendall, args=(many,), daemon=True)
    try:
        pouring.start()
        slowest = 0.0
        for number in range(20):
            begun = time.monotonic()
            assert polite.request("GET", f"/{number}").status == 200
            slowest = max(slowest, time.monotonic() - begun)
        assert slowest < 0.2, "one request of each client, and then the next client's turn"
        time.sleep(0.3)
        assert len(asked) < 20 + 300, "nothing is done for who takes no answer"
        for _ in range(1 << 11):  # once it reads, all of its requests are answered
            reply = flood.receive()
            assert reply is not None and len(reply.body) == 2000
    finally:
        server.close()


def test_without_a_descriptor_left_it_answers_one_and_does_not_spin(tmp_path: Path) -> None:
    program = """
import os, resource, sys, time
from vmm.api.server import Server
from vmm.unix_socket import Listener
server = Server(Listener("socket", sys.argv[1], 128), lambda method, path, body: (200, b'{}', ()), 1 << 10)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
taken = []
try:
    while True:
        taken.append(os.dup(0))
except OSError:
    print(len(taken), flush=True)
server.start()
sys.stdin.readline()
print(time.process_time(), flush=True)
sys.stdin.readline()
for fd in taken:
    os.close(fd)
print(flush=True)
sys.stdin.readline()
server.close()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "s")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdout.readline()
        for _ in range(3):  # one at a time, by the spare
            client = Client(tmp_path / "s")
            assert client.request("GET", "/").status == 200
            client.close()
        busy = Client(tmp_path / "s")
        busy.send(b"GET / HT")
        late = [Client(tmp_path / "s") for _ in range(3)]
        for client in late:
            client.send(b"GET / HTTP/1.1\r\n\r\n")
        time.sleep(1)
        process.stdin.write("\n")
        process.stdin.flush()
        assert float(process.stdout.readline()) < 0.6, "it waits, it does not spin"
        busy.close()
        for client in late:
            reply = client.receive()
            assert reply is not None and reply.status == 200
        process.stdin.write("\n\n")
        process.stdin.flush()
        assert process.wait(5) == 0
    finally:
        process.kill()
        process.wait()


def test_a_thousand_connections(served: Process) -> None:
    sockets = []
    for _ in range(1000):
        sock = socket.socket(socket.AF_UNIX)
        sock.setblocking(False)
        with contextlib.suppress(OSError):  # the backlog may be full
            sock.connect(str(served.socket))
        sockets.append(sock)
    for sock in sockets:
        sock.close()
    for _ in range(200):
        with contextlib.suppress(BlockingIOError):  # it is still
            if b"200" in ask(served.socket, b"GET / HTTP/1.1\r\n\r\n")[:16]:
                return
        time.sleep(0.01)
    pytest.fail("it does not come back")


_words = st.sampled_from([b"GET / HTTP/1.1\r\n", b"\r\n\r\n", b"Content-Length: 7\r\n"])


@given(st.lists(st.binary(max_size=300) | _words))
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_bytes(served: Process, pieces: list[bytes]) -> None:
    with contextlib.closing(Client(served.socket)) as client, contextlib.suppress(OSError):
        for piece in pieces:
            client.send(piece)
    assert served.process.poll() is None


_json: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
PATHS = (
    "/boot-source", "/machine-config", "/drives/d", "/drives/new", "/network-interfaces/n", "/vsock", "/balloon",
    "/entropy", "/logger", "/metrics", "/mmds/config", "/fs/work", "/actions", "/cpu-config", "/serial", "/vm",
)  # fmt: skip
FIELDS = (
    "kernel_image_path", "vcpu_count", "mem_size_mib", "drive_id", "path_on_host", "is_root_device", "iface_id",
    "host_dev_name", "guest_cid", "uds_path", "amount_mib", "deflate_on_oom", "rate_limiter", "tag", "shared_dir",
)  # fmt: skip


@given(
    st.sampled_from(("PUT", "PATCH")),
    st.sampled_from(PATHS),
    _json | st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=5), _json, max_size=5),
)
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
def test_nothing_of_a_refused_request_is_applied(served: Process, method: str, path: str, body: object) -> None:
    before = served.request("GET", "/vm/config").body
    answer = served.request(method, path, json.dumps(body).encode())
    assert answer.status in (204, 400)
    if answer.status == 400:
        assert served.request("GET", "/vm/config").body == before
        assert answer.json["fault_message"]


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("/machine-config", {"vcpu_count": 33, "mem_size_mib": 64}, ("vcpu_count", "33", "1 to 32")),
        ("/machine-config", {"vcpu_count": "two", "mem_size_mib": 64}, ("vcpu_count", '"two"', "int")),
        ("/machine-config", {"vcpu_count": 1}, ("mem_size_mib",)),
        ("/machine-config", {"vcpu_count": 1, "mem_size_mib": 64, "cores": 1}, ("cores", "allowed", "vcpu_count")),
        ("/boot-source", {"kernel_image_path": "/nowhere"}, ("kernel", "/nowhere", "No such file")),
        ("/drives/d", {"drive_id": "d", "path_on_host": "/nowhere", "is_root_device": False}, ("/nowhere", "No such")),
        (
            "/drives/d",
            {"drive_id": "d", "path_on_host": "disk", "is_root_device": False, "io_engine": "Fast"},
            ("io_engine", "Fast", "Async, Sync"),
        ),
        ("/vsock", {"guest_cid": 2, "uds_path": "v"}, ("guest_cid", "2", "3 to")),
        ("/vsock", {"guest_cid": 3, "uds_path": "/nowhere/v"}, ("uds_path", "/nowhere/v", "No such")),
        ("/balloon", {"amount_mib": 5000, "deflate_on_oom": True}, ("amount_mib", "5000")),
        ("/fs/a", {"tag": "a", "shared_dir": "/nowhere"}, ("shared_dir", "/nowhere", "directory")),
        ("/mmds/config", {"network_interfaces": ["x"], "ipv4_address": "1.1.1.1"}, ("1.1.1.1", "link local")),
        # JSON can say what no name of the host's can have.
        ("/boot-source", {"kernel_image_path": "a\0b"}, ("a\0b", "embedded null")),
        ("/drives/d", {"drive_id": "d", "path_on_host": "a\0b", "is_root_device": False}, ("path_on_host", "NUL")),
        (
            "/drives/d",
            {
                "drive_id": "d",
                "path_on_host": "disk",
                "is_root_device": False,
                "image_format": "qcow2",
                "backing_file": "a\0b",
            },
            ("backing_file", "NUL"),
        ),
        ("/network-interfaces/n", {"iface_id": "n", "host_dev_name": "a\0b"}, ("host_dev_name", "NUL")),
        ("/network-interfaces/n", {"iface_id": "n", "host_dev_name": "tap0", "pcap": "a\0b"}, ("pcap", "NUL")),
        ("/vsock", {"guest_cid": 3, "uds_path": "a\0b"}, ("uds_path", "NUL")),
        ("/fs/a", {"tag": "a", "shared_dir": "a\0b"}, ("shared_dir", "NUL")),
        ("/logger", {"log_path": "a\0b"}, ("log_path", "embedded null")),
        ("/metrics", {"metrics_path": "a\0b"}, ("metrics_path", "embedded null")),
        ("/serial", {"serial_out_path": "a\0b"}, ("serial_out_path", "embedded null")),
        ("/snapshot/load", {"snapshot_path": "a\0b", "mem_file_path": "m"}, ("snapshot_path", "NUL")),
    ],
)
def test_a_refusal_names_the_field_the_value_and_what_is_allowed(
    served: Process, path: str, body: object, says: tuple[str, ...]
) -> None:
    answer = served.request("PUT", path, body)
    assert answer.status == 400
    for word in says:
        assert word in answer.json["fault_message"]


def test_a_guest_at_work_notices_nothing(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    config = {
        "boot-source": {"kernel_image_path": kernel("blk"), "boot_args": "test=3 depth=32 count=20000 rounds=6"},
        "machine-config": {"vcpu_count": 1, "mem_size_mib": 32},
        "drives": [{"drive_id": "d", "path_on_host": "disk", "is_root_device": False}],
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    over = threading.Event()

    def attack(path: Path) -> None:
        while not over.is_set():
            for data in (b"GET / HT", b"x" * 100, b"PUT /vm HTTP/1.1\r\nContent-Length: 5\r\n\r\nju"):
                with contextlib.suppress(OSError):
                    sock = socket.socket(socket.AF_UNIX)
                    sock.settimeout(1)
                    sock.connect(str(path))
                    sock.send(data)
                    held.append(sock)
            if len(held) > 200:
                held.pop(0).close()

    held: list[socket.socket] = []
    with Process(PYVMM, tmp_path, ["--config-file", "config.json"]) as process:
        process.await_socket()
        attackers = [threading.Thread(target=attack, args=(process.socket,)) for _ in range(2)]
        for thread in attackers:
            thread.start()
        try:
            assert process.wait(60) == 0
        finally:
            over.set()
            for thread in attackers:
                thread.join()
        assert process.output.read_bytes().count(b"ticks=") == 6
        with pytest.raises(OSError):  # a call after the VM has died
            Client(process.socket).request("GET", "/")


def test_a_live_socket_is_refused_and_a_stale_one_replaced(tmp_path: Path, served: Process) -> None:
    with pytest.raises(ConfigError, match="in use by another program"):
        bind(str(served.socket))
    stale = tmp_path / "stale"
    bind(str(stale)).socket.close()
    assert stale.exists()
    bind(str(stale)).close()
    assert not stale.exists()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is not a socket"):
        bind(str(tmp_path / "file"))


def test_a_socket_has_its_name_once_it_listens(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    refused: list[OSError] = []
    over = threading.Event()

    def knock() -> None:
        while not over.is_set():
            with socket.socket(socket.AF_UNIX) as client:
                try:
                    client.connect(path)
                except FileNotFoundError:
                    continue
                except OSError as error:
                    refused.append(error)

    knocker = threading.Thread(target=knock)
    knocker.start()
    for _ in range(300):
        listener = bind(path)
        Path(path).unlink()  # its name goes first
        listener.close()
    over.set()
    knocker.join()
    assert not [error for error in refused if isinstance(error, ConnectionRefusedError)], len(refused)
    assert list(tmp_path.iterdir()) == []


def test_a_socket_without_a_path_and_one_with_a_long_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--api-sock: is empty"):
        bind("")
    longest = str(tmp_path / "s").ljust(107, "s")
    listener = bind(longest)
    assert Path(longest).is_socket()
    listener.close()
    with pytest.raises(ConfigError, match="too long"):
        bind(longest + "s")


def test_sigterm_ends_it_and_leaves_nothing(tmp_path: Path) -> None:
    with Process(PYVMM, tmp_path) as process:
        process.await_socket()
        assert process.request("PUT", "/vsock", {"guest_cid": 3, "uds_path": "v"}).status == 204
        kernel_path = {"kernel_image_path": write_guest(tmp_path, HALT)}
        assert process.request("PUT", "/boot-source", kernel_path).status == 204
        assert process.request("PUT", "/actions", {"action_type": "InstanceStart"}).status == 204
        process.process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 0
        assert not process.socket.exists()
        assert not (tmp_path / "v").exists()


def test_sigterm_while_a_request_makes_the_machine_ends_that_too(tmp_path: Path) -> None:
    program = """
import time
from vmm.commands.cli import entry
from vmm.machine import machine

class Machine(machine.Machine):
    def __init__(self, *words, **more):
        super().__init__(*words, **more)
        print("made", flush=True)
        time.sleep(1)

    def close(self):
        super().close()
        print("closed", flush=True)

machine.Machine = Machine
entry()
"""
    with Process((sys.executable, "-c", program, "serve"), tmp_path, ["--no-seccomp"]) as process:
        process.await_socket()
        kernel_path = {"kernel_image_path": write_guest(tmp_path, HALT)}
        assert process.request("PUT", "/boot-source", kernel_path).status == 204
        process.client.send(b'PUT /actions HTTP/1.1\r\nContent-Length: 32\r\n\r\n{"action_type": "InstanceStart"}')
        while b"made" not in process.output.read_bytes():
            assert process.process.poll() is None
        process.process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
        assert b"closed" in process.output.read_bytes()


def test_a_start_that_failed_leaves_the_next_one_its_socket_device(tmp_path: Path) -> None:
    (tmp_path / "junk").write_bytes(b"no kernel")
    start = {"action_type": "InstanceStart"}
    with Process(PYVMM, tmp_path) as process:
        process.await_socket()
        assert process.request("PUT", "/vsock", {"guest_cid": 3, "uds_path": "v"}).status == 204
        assert process.request("PUT", "/boot-source", {"kernel_image_path": "junk"}).status == 204
        assert process.request("PUT", "/actions", start).status == 400
        assert process.request("PUT", "/boot-source", {"kernel_image_path": write_guest(tmp_path, HALT)}).status == 204
        assert process.request("PUT", "/actions", start).status == 204
        Client(tmp_path / "v").close()


def test_who_cannot_be_watched_is_refused_alone(tmp_path: Path) -> None:
    class Poll:  # as at the limit of /proc/sys/fs/epoll/max_user_watches
        def __init__(self, poll: Any) -> None:
            self.poll, self.modify, self.close = poll.poll, poll.modify, poll.close
            self.full = True

        def register(self, *words: Any) -> None:
            if self.full:
                self.full = False
                raise OSError(28, "No space left on device")
            watch(*words)

    server = Server(bind(str(tmp_path / "s")), lambda method, path, body: (200, b"{}", ()), MAX_PAYLOAD)
    watch = server._poll.register
    server._poll = Poll(server._poll)  # type: ignore[assignment]  # a stand-in that fails
    server.start()
    try:
        assert ask(tmp_path / "s", b"GET / HTTP/1.1\r\n\r\n") == b""
        assert b"200" in ask(tmp_path / "s", b"GET / HTTP/1.1\r\n\r\n")
    finally:
        server.close()


def test_a_start_at_any_moment_of_our_own_start(tmp_path: Path) -> None:
    # InstanceStart meets the imports, KVM's part of the VM and the filters, which are made behind the first answer.
    for number in range(8):
        directory = tmp_path / str(number)
        directory.mkdir()
        with Process(PYVMM, directory) as process:
            process.await_socket()
            kernel_path = {"kernel_image_path": write_guest(directory, HALT)}
            assert process.request("PUT", "/boot-source", kernel_path).status == 204
            time.sleep(number * 0.005)
            assert process.request("PUT", "/actions", {"action_type": "InstanceStart"}).status == 204
            process.process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 0
