# SPDX-License-Identifier: Apache-2.0
"""Bytes on the socket that are HTTP, nearly HTTP or nothing of the kind: Firecracker and pyvmm answer them alike.

All that may differ is in docs/api-differences.md.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import pytest

from tests.api.differential import Pair, kind, pair, table
from tests.api.oracle import Client, Process

__all__ = ["pair"]

ROUNDS = 60  # on another connection, after which a server has read all that came before; it serves one after the other
GET = b"GET /version HTTP/1.1\r\n"
PUT = b"PUT /machine-config HTTP/1.1\r\n"
BODY = b'{"vcpu_count": 1, "mem_size_mib": 128}'
LENGTH = b"Content-Length: %d\r\n" % len(BODY)
WHOLE = PUT + LENGTH + b"\r\n" + BODY


def _mmds(size: int) -> bytes:
    body = b'{"a": "' + b"x" * (size - 9) + b'"}'
    return b"PUT /mmds HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % size + body


BYTES = [
    *(b"%s /version HTTP/1.1\r\n\r\n" % method for method in (
        b"GET", b"DELETE", b"HEAD", b"OPTIONS", b"POST", b"TRACE", b"CONNECT", b"get", b"G", b"GETX", b"",
    )),
    *(line + b"\r\n\r\n" for line in (
        b"GET / HTTP/1.0", b"GET / HTTP/2.0", b"GET / HTTP/1.2", b"GET / HTTP", b"GET /", b"GET", b"",
        b"GET  / HTTP/1.1",
        b"GET / HTTP/1.1 ", b" GET / HTTP/1.1", b"GET /\tHTTP/1.1", b"GET / http/1.1", b"GET /\x80 HTTP/1.1",
        b"GET /a b HTTP/1.1", b"GET * HTTP/1.1", b"GET version HTTP/1.1", b"GET http://localhost/version HTTP/1.1",
        b"GET /a://b/version HTTP/1.1", b"GET /version?x=http://a/b HTTP/1.1",
        b"garbage", b"\r\n\r\nGET / HTTP/1.1",
    )),
    b"GET / HTTP/1.1\n\n", b"\r\n\r\n", b"GET /", GET, bytes(20), bytes(range(256)) + b"\r\n\r\n",
    *(b"GET /" + b"a" * size + b" HTTP/1.1\r\n\r\n" for size in (900, 2000, 100000)),
    *(GET + b"X-A: " + b"a" * size + b"\r\n\r\n" for size in (900, 2000, 100000)),
    GET + b"X-A: aaaaaaaaaaaaaaaaaaa\r\n" * 100 + b"\r\n",
    *(GET + header + b"\r\n\r\n" for header in (
        b"content-length: 0", b"Content-Length: -1", b"Content-Length: abc", b"Content-Length: ", b"Content-Length: +0",
        b"Content-Length: 0x0", b"Content-Length: 0\r\nContent-Length: 0", b"Content-Length: 4294967296",
        b"Content-Length: 99999999999999999999", b"Content-Length: 51201", b"X: y", b"No-Colon", b": empty", b"X:",
        b"X y: 1", b"X: \xff", b" folded: 1", b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity",
        b"Transfer-Encoding: gzip", b"Expect: 100-continue", b"Expect: 200", b"Connection: close",
        b"Connection: keep-alive", b"Connection: Upgrade\r\nUpgrade: websocket", b"Upgrade: h2c", b"Accept: text/html",
        b"Accept: */*", b"Accept-Encoding: gzip", b"Accept-Encoding: identity;q=0", b"Accept-Encoding: *;q=0",
        b"Content-Type: text/plain", b"Content-Type: application/xml", b"Server: x",
    )),
    *(PUT + header + b"\r\n" + LENGTH + b"\r\n" + BODY for header in (
        b"X: y", b"Transfer-Encoding: chunked", b"Expect: 100-continue", b"Connection: close",
        b"Content-Type: text/plain",
    )),
    WHOLE, WHOLE.replace(b"/1.1", b"/1.0"), PUT + b"\r\n" + BODY, PUT + LENGTH + b"\r\n" + BODY[:9],
    PUT + LENGTH + b"Content-Length: 3\r\n\r\n" + BODY, PUT + b"Content-Length: 51201\r\n\r\n{}",
    PUT + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    PUT + b"Expect: 100-continue\r\n" + LENGTH + b"\r\n",
    _mmds(51199), _mmds(51200),
    (GET + b"\r\n") * 5, (GET + b"\r\n") * 100, WHOLE + GET + b"\r\n", WHOLE * 3,
    GET + b"\r\nGET /nope HTTP/1.1\r\n\r\n" + GET + b"\r\n",
    GET + b"Content-Length: 2\r\n\r\n{}" + GET + b"\r\n", GET + b"\r\n" + GET, GET + b"\r\ngarbage",
]  # fmt: skip


def answers(process: Process, data: bytes) -> str:
    """What comes of `data`, up to the first answer that says it was no request, and whether it ended the connection."""
    client = Client(process.socket)
    client.sock.settimeout(None)
    try:
        client.send(data)
    except BrokenPipeError:
        pass
    for _ in range(ROUNDS):
        assert process.request("GET", "/").status == 200
    found = []
    while (answer := client.receive(0.02)) is not None:
        found.append("error" if b'"error"' in answer.body else kind(answer))
        if found[-1] == "error":
            break
    client.close()
    return ", ".join(found)


@pytest.fixture
def both(pair: Callable[..., Pair]) -> Pair:
    """The two, not started."""
    return pair(["--no-seccomp"])  # with it, Firecracker dies of a client that vanishes: SIGPIPE, and then SIGSYS


HTTP = {eval(cells[0], {"__builtins__": {}}): cells for cells in table("http")}


def test_same_answers_to_bytes(both: Pair) -> None:
    for data in BYTES:
        theirs, ours = (answers(process, data) for process in both)
        if data in HTTP:
            assert [theirs, ours] == HTTP[data][1:3], data[:200]
        else:
            assert theirs == ours, data[:200]
    assert set(HTTP) <= set(BYTES)


def test_no_more_than_ten_connections(both: Pair) -> None:
    begun = b"GET / HTTP/1.1\r\n"
    for process, refuses in zip(both, (True, False), strict=True):
        if process._client is not None:
            process._client.close()
        clients = [Client(process.socket) for _ in range(10)]
        for client in clients:
            assert client.request("GET", "/").status == 200
        # All ten are silent: Firecracker refuses the next, pyvmm lets the one go that was silent for the longest time.
        another = Client(process.socket)
        if not refuses:
            assert another.request("GET", "/").status == 200
            assert clients.pop(0).receive() is None
            clients.append(another)
            for client in clients:  # from here on nobody is silent
                client.send(begun)
            time.sleep(0.1)
            another = Client(process.socket)
        for client in (another, Client(process.socket)):
            refused = client.receive()
            assert refused is not None and refused.status == 503
            assert refused.body == b'{ "error": "Too many open connections" }'
            assert client.receive() is None
        clients[0].close()
        again = Client(process.socket)
        for _ in range(100):
            again.send(GET + b"\r\n")
            if (answer := again.receive()) is not None and answer.status == 200:
                break
            again = Client(process.socket)
        else:
            pytest.fail("a place that became free is not given away")
        for client in (*clients, again):
            client.close()


def test_a_payload_that_is_too_large_is_not_read(both: Pair) -> None:
    for process in both:
        client = Client(process.socket)
        client.send(_mmds(51201)[:100])
        answer = client.receive()
        assert answer is not None and answer.status == 400
        assert json.loads(answer.body, strict=False) == {
            "error": "Request payload with size 51201 is larger than the limit of 51200 allowed by server.\n"
            "All previous unanswered requests will be dropped."
        }
        client.close()
        assert process.request("GET", "/mmds").json == {}


def test_a_client_that_vanishes_costs_nobody_else(both: Pair) -> None:
    for process in both:
        for data in (GET[:9], GET + b"\r\n", WHOLE[:-5], WHOLE, (GET + b"\r\n") * 50):
            client = Client(process.socket)
            client.send(data)
            client.close()
        waiting = Client(process.socket)
        waiting.send(GET[:9])
        assert process.request("GET", "/version").status == 200
        waiting.send(GET[9:] + b"\r\n")
        answer = waiting.receive()
        assert answer is not None and answer.status == 200
        waiting.close()
