# SPDX-License-Identifier: Apache-2.0
"""Firecracker 1.12.1 is the oracle: both get the same requests, and what they answer and what comes of it agrees.

All that may differ is in docs/api-differences.md. PYVMM_DIFFERENTIAL=N runs N random sequences, not the usual few.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.api import requests
from tests.api.differential import ROWS, Pair, Row, allowed, difference, files, kind, means, pair, send, state
from tests.api.oracle import Client, Process
from tests.api.requests import CONFIG, GETS, KERNEL, START, Request, put

__all__ = ["pair"]

EXAMPLES = int(os.environ.get("PYVMM_DIFFERENTIAL", "0"))
# What the examples of docs/api-differences.md find, from "not started" on.
SETUP = (
    put("/drives/a", {"drive_id": "a", "path_on_host": "a.img", "is_root_device": False, "is_read_only": False}),
    put("/network-interfaces/a", {"iface_id": "a", "host_dev_name": "tap0"}),
    put("/balloon", {"amount_mib": 10, "deflate_on_oom": False}),
)


def play(theirs: Process, ours: Process, sequence: Sequence[Request]) -> None:
    """Send `sequence` to both and compare, until they are allowed to differ in what they have done."""
    when = "Not started"
    sent: list[Request] = []

    def both(request: Request) -> bool:
        # Whether they did the same.
        answers = send(theirs, request), send(ours, request)
        if found := difference(request, *answers):
            texts = "\n".join(answer.body.decode() if answer else "" for answer in answers)
            story = "\n".join(map(str, sent))
            assert allowed(request, *answers, when), f"{when}: {request}: {found}\n{texts}\nafter\n{story}"
        return None not in answers and len({answer.status < 300 for answer in answers if answer}) == 1

    for request in sequence:
        if not both(request):
            return
        sent.append(request)
        if request.method != "GET":
            assert both(CONFIG)
            when = state(theirs)
    for request in GETS:
        assert both(request)
    assert files(theirs) == files(ours), "\n".join(map(str, sent))


@settings(
    max_examples=EXAMPLES or 60,
    derandomize=not EXAMPLES,
    database=None,
    print_blob=True,
    report_multiple_bugs=False,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
@pytest.mark.timeout(max(300, EXAMPLES * 3))
@given(sequence=requests.sequences())
def test_same_answers_and_same_state(pair: Callable[..., Pair], sequence: list[Request]) -> None:
    play(*pair(), sequence)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.when}: {row.example}")
def test_every_allowed_difference_is_one(pair: Callable[..., Pair], row: Row) -> None:
    theirs, ours = pair()
    *before, request = map(requests.parse, row.example.split(" ;; "))
    start = (KERNEL, START) if row.when.startswith("Running") and START not in before else ()
    for one in (*SETUP, *start, *before):
        assert kind(send(theirs, one)) == kind(send(ours, one)) == "204", one
    answers = send(theirs, request), send(ours, request)
    assert re.search(row.pattern, str(request)), "the example does not match the pattern"
    texts = [answer.body.decode() if answer else "" for answer in answers]
    assert means(answers[0], row.theirs) and means(answers[1], row.ours), f"{texts}"
    assert difference(request, *answers), "there is no difference any more"


_DRIVE = {"path_on_host": "a.img", "is_root_device": False, "is_read_only": True}
_VSOCK = {"guest_cid": 3, "uds_path": "v.sock"}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/vsock/x", _VSOCK),
        ("/vsock/x", {**_VSOCK, "vsock_id": "other"}),
        ("/vsock/", _VSOCK),
        ("/drives/ä", {"drive_id": "ä", **_DRIVE}),
        ("/drives/naïve_1", {"drive_id": "naïve_1", **_DRIVE}),
        ("/drives/ä", {"drive_id": "ö", **_DRIVE}),
        ("/drives/☃", {"drive_id": "☃", **_DRIVE}),
        ("/drives/%C3%A4", {"drive_id": "ä", **_DRIVE}),
        ("/drives/%~C3%~A4", {"drive_id": "ä", **_DRIVE}),
        ("/network-interfaces/ñ", {"iface_id": "ñ", "host_dev_name": "tap0"}),
        ("/mmds/config", {"network_interfaces": [], "ipv4_address": ""}),
        ("/boot-source", {"kernel_image_path": "kernel", "boot_args": "a\nnaïve\t"}),
    ],
    ids=str,
)
def test_same_answers_to_what_is_seldom_asked(pair: Callable[..., Pair], path: str, body: dict[str, object]) -> None:
    data = json.dumps(body, ensure_ascii=False).encode()
    line = f"PUT {path} HTTP/1.1\r\nContent-Length: {len(data)}\r\n\r\n".encode()
    answers, both = [], pair()
    for process in both:
        client = Client(process.socket)
        client.send(line + data)
        answers.append(client.receive())
        client.close()
    assert kind(answers[0]) == kind(answers[1])
    told = [send(process, CONFIG) for process in both]
    assert difference(CONFIG, *told) is None


@pytest.mark.parametrize(
    "sequence",
    [
        [
            *(put(f"/network-interfaces/{name}", {"iface_id": name, "host_dev_name": tap})
              for name, tap in (("a", "tap0"), ("b", "tap1"), ("c", "tap2"), ("a", "tap0"))),
        ],
        [put("/vsock", _VSOCK), put("/boot-source", {"kernel_image_path": "junk"}), START, KERNEL, START],
    ],
    ids=["an interface once more", "a second start"],
)  # fmt: skip
def test_same_answers_to_what_is_said_twice(pair: Callable[..., Pair], sequence: list[Request]) -> None:
    play(*pair(), sequence)


@pytest.mark.parametrize(
    "first",
    [
        START, KERNEL, put("/cpu-config", {}), put("/entropy", {}), put("/vsock", _VSOCK), put("/mmds", {}),
        put("/machine-config", {"vcpu_count": 1, "mem_size_mib": 64}), put("/metrics", {"metrics_path": "metrics"}),
        Request("PATCH", "/machine-config", b'{"vcpu_count": 1}'), put("/logger", {}),
        put("/balloon", {"amount_mib": 0, "deflate_on_oom": False}), put("/mmds/config", {"network_interfaces": ["x"]}),
        put("/drives/a", {**_DRIVE, "drive_id": "a"}),
        put("/drives/a", {**_DRIVE, "drive_id": "a", "path_on_host": "x"}),
    ],
    ids=lambda first: str(first)[:40],
)  # fmt: skip
def test_what_comes_before_a_load(pair: Callable[..., Pair], first: Request) -> None:
    backend = {"backend_type": "File", "backend_path": "mem"}
    load = put("/snapshot/load", {"snapshot_path": "snap", "mem_backend": backend})
    both = pair()
    answers = [[send(process, request) for request in (first, load)] for process in both]
    assert kind(answers[0][0]) == kind(answers[1][0])
    theirs, ours = (answer.json for _, answer in answers if answer is not None)
    assert theirs == ours


def test_a_target_that_is_no_utf_8_and_one_in_pieces(pair: Callable[..., Pair]) -> None:
    for process in pair():
        client = Client(process.socket)
        client.send(b"GET /\xff HTTP/1.1\r\n\r\n")
        answer = client.receive()
        assert answer is not None and kind(answer) == "400 error" and b"URI as UTF-8" in answer.body
        client.close()
        client = Client(process.socket)
        body = json.dumps({"drive_id": "ä", **_DRIVE}).encode()
        for byte in "PUT /drives/ä HTTP/1.1\r\n".encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body:
            client.send(bytes([byte]))
        answer = client.receive()
        assert answer is not None and answer.status == 204
        client.close()


@pytest.mark.parametrize(("count", "status"), [(18, 204), (19, 400)])
def test_as_many_devices(pair: Callable[..., Pair], count: int, status: int) -> None:
    for process in pair():
        assert send(process, KERNEL).status == 204  # type: ignore[union-attr]
        for number in range(count):
            body = {"drive_id": f"d{number}", **_DRIVE}
            assert process.request("PUT", f"/drives/d{number}", body).status == 204
        assert send(process, START).status == status  # type: ignore[union-attr]
