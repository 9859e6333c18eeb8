# SPDX-License-Identifier: Apache-2.0
"""The metadata service as a guest finds it, ours and Firecracker 1.12.1's, each on /dev/kvm.

The guest is a bridge: the service is at one of its interfaces, this host's own TCP at the other.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.api.oracle import PYVMM, Process, firecracker
from tests.kvm.ring3 import kernel

ADDRESS = "169.254.169.254"
DOCUMENT = {
    "name": {"first": "John", "second": {"x": "y"}},
    "age": 43,
    "list": ["a", {"b": 1}],
    "number": 1.5e300,
    "true": True,
    "null": None,
    "empty": {},
    "nothing": "",
    "a/b": {"~": "\u00e9"},
    "large": "x" * 30_000,
}
TTL, TOKEN = "X-metadata-token-ttl-seconds", "X-metadata-token"
JSON = "Accept: application/json"

Answer = tuple[int, str, bytes]  # status, type, body


@contextlib.contextmanager
def vmm(command: Sequence[str], directory: Path, version: str) -> Iterator[Process]:
    """A VMM whose guest gives this host's network the service."""
    for name in ("service", "host"):
        subprocess.run(["ip", "tuntap", "add", name, "mode", "tap"], check=True)
        subprocess.run(["ip", "link", "set", name, "up"], check=True)
    subprocess.run(["ip", "addr", "add", "169.254.10.1/16", "dev", "host"], check=True)
    directory.mkdir(parents=True)
    try:
        with Process(command, directory) as process:
            process.await_socket()
            for path, body in [
                ("/boot-source", {"kernel_image_path": kernel("bridge"), "boot_args": ""}),
                ("/machine-config", {"vcpu_count": 1, "mem_size_mib": 32}),
                ("/network-interfaces/eth0", {"iface_id": "eth0", "host_dev_name": "service"}),
                ("/network-interfaces/eth1", {"iface_id": "eth1", "host_dev_name": "host"}),
                ("/mmds/config", {"network_interfaces": ["eth0"], "version": version}),
                ("/mmds", DOCUMENT),
                ("/actions", {"action_type": "InstanceStart"}),
            ]:  # fmt: skip
                answer = process.request("PUT", path, body)
                assert answer.status == 204, (path, answer)
            yield process
    finally:
        for name in ("service", "host"):
            subprocess.run(["ip", "link", "del", name], check=True)


def ask(line: str, *headers: str) -> Answer:
    """One request on a connection of its own."""
    with socket.create_connection((ADDRESS, 80), timeout=20) as sock:
        sock.sendall("\r\n".join([line, *headers, "", ""]).encode("latin-1"))
        got, size = b"", 1
        while len(got) < size and (data := sock.recv(65536)):
            got += data
            head, end, _ = got.partition(b"\r\n\r\n")
            if end:
                named = dict(each.split(b": ", 1) for each in head.split(b"\r\n")[1:])
                size = len(head) + 4 + int(named[b"Content-Length"])
    assert len(got) == size, got
    return int(head.split()[1]), named[b"Content-Type"].decode(), got[len(head) + 4 :]


def both(namespace: None, directory: Path, version: str, requests: Sequence[tuple[str, ...]]) -> Any:
    """Each request's answers: Firecracker's, then ours. ``TOKEN`` in a header stands for one that is valid."""
    answers: list[list[Answer]] = []
    for name, command in (("firecracker", (firecracker(),)), ("pyvmm", PYVMM)):
        with vmm(command, directory / name, version):
            token = ""
            if version == "V2":
                status, kind, body = ask("PUT /latest/api/token HTTP/1.1", f"{TTL}: 60")
                assert (status, kind, len(body)) == (200, "text/plain", 48)
                token = body.decode()
            answers.append([ask(*(word.replace("TOKEN", token) for word in words)) for words in requests])
    return zip(requests, *answers, strict=True)


PATHS = [
    "/", "//", "/name", "/name/", "//name///first", "/name/first", "/name/second", "/age", "/list", "/list/0",
    "/list/1", "/list/1/b", "/list/2", "/list/00", "/list/+0", "/list/-1", "/list/x", "/number", "/true", "/null",
    "/null/x", "/empty", "/nothing", "/a~1b", "/a~1b/~0", "/a~0b", "/a/b", "/nowhere", "/name?x", "/name#x", "/NAME",
    "/large", "/age/x", "/%6eame", "http://169.254.169.254/name", "http://x/name/first", "http://", "http://x", "foo",
]  # fmt: skip
ODD = [
    ("GET / HTTP/1.0",), ("GET / HTTP/1.2",), ("GET / HTTP/2.0",), ("get / HTTP/1.1",), ("POST / HTTP/1.1",),
    ("DELETE / HTTP/1.1",), ("HEAD / HTTP/1.1",), ("OPTIONS * HTTP/1.1",), ("PATCH / HTTP/1.1",), ("PUT / HTTP/1.1",),
    ("PUT /latest/api/token HTTP/1.1", f"{TTL}: 60"), ("GET /",), ("GET / HTTP/1.1", "no colon"),
    ("GET /\xff HTTP/1.1",), ("GET / HTTP/1.1", "Content-Length: x"),
    ("GET /name HTTP/1.1", "Accept: */*"), ("GET /name HTTP/1.1", "Accept: x"),
    ("GET /name HTTP/1.1", "Accept: text/plain"), ("GET /name HTTP/1.1", "accept:  application/json "),
    ("GET /name HTTP/1.1", "Accept: application/json, text/plain"), ("GET /name HTTP/1.1", "Host: a", "X: y"),
    ("GET /name HTTP/1.1", "Connection: close"), ("GET /name HTTP/1.1", "Content-Length: 0"),
    ("GET /name HTTP/1.1", f"{TTL}: bad", f"{TOKEN}: bad"),
]  # fmt: skip


def test_v1_answers_as_firecracker(namespace: None, tmp_path: Path) -> None:
    requests = [(f"GET {path} HTTP/1.1", *more) for path in PATHS for more in ([], [JSON])] + ODD
    for words, theirs, ours in both(namespace, tmp_path, "V1", requests):
        assert ours[0] == theirs[0], (words, theirs, ours)
        # What is no request at all we say in other words.
        if theirs[0] != 400:
            assert ours[2] == theirs[2], (words, theirs, ours)
        if ours[0] == 200 and JSON in words:
            assert ours[1] == theirs[1] == "application/json", words


def test_v2_answers_as_firecracker(namespace: None, tmp_path: Path) -> None:
    put = "PUT /latest/api/token HTTP/1.1"
    requests = [
        *((f"GET {path} HTTP/1.1", f"{TOKEN}: TOKEN", *more) for path in PATHS[:8] for more in ([], [JSON])),
        ("GET /name HTTP/1.1",), ("GET /nowhere HTTP/1.1",), ("GET /name HTTP/1.1", f"{TOKEN.lower()}: TOKEN"),
        *(("GET /name HTTP/1.1", f"{TOKEN}: {wrong}") for wrong in ("", "x", "a" * 48, "a" * 58, "TOKENa", "aTOKEN")),
        *((put, f"{TTL}: {ttl}") for ttl in ("0", "21601", "x", "", "-1", f"{1 << 32}", f"{(1 << 32) - 1}", "9" * 300)),
        (put,), (put, f"{TTL}: 5", "X-Forwarded-For: x"), (put, f"{TTL}: 0", "X-Forwarded-For: x"), ("PUT / HTTP/1.1",),
        ("PUT /latest/api/token/ HTTP/1.1", f"{TTL}: 5"), ("PUT /latest HTTP/1.1", f"{TTL}: 5"), ("PATCH / HTTP/1.1",),
        ("PATCH / HTTP/1.1", f"{TTL}: x"), ("GET /name HTTP/1.1", f"{TTL}: x", f"{TOKEN}: TOKEN"), ("POST / HTTP/1.1",),
    ]  # fmt: skip
    for words, theirs, ours in both(namespace, tmp_path, "V2", requests):
        assert (ours[0], ours[2]) == (theirs[0], theirs[2]), words
    tokens = [
        (put, f"{TTL}: 5"), (put, f"{TTL.lower()}: 21600"), (put, f"{TTL}: +1"),
        (put, f"{TTL}: 5", "Content-Length: 0"), ("PUT //latest/api//token HTTP/1.1", f"{TTL}: 5"),
        ("PUT http://x/latest/api/token HTTP/1.0", f"{TTL}: 5"),
    ]  # fmt: skip
    for words, theirs, ours in both(namespace, tmp_path / "tokens", "V2", tokens):
        assert (ours[:2], len(ours[2])) == (theirs[:2], len(theirs[2])) == ((200, "text/plain"), 48), words


def test_the_document_changes_while_the_guest_runs(namespace: None, tmp_path: Path) -> None:
    with vmm(PYVMM, tmp_path / "pyvmm", "V1") as process:
        assert ask("GET /name/first HTTP/1.1")[2] == b"John"
        assert process.request("PATCH", "/mmds", {"name": {"first": "Jane"}}).status == 204
        assert ask("GET /name/first HTTP/1.1")[2] == b"Jane"
        assert process.request("PUT", "/mmds", {"a": 1}).status == 204
        assert ask("GET /name/first HTTP/1.1")[0] == 404
        assert process.request("PUT", "/mmds/config", {"network_interfaces": ["eth0"]}).status == 400
