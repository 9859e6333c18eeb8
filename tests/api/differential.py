# SPDX-License-Identifier: Apache-2.0
"""Firecracker and pyvmm side by side: both started alike, their answers compared, docs/api-differences.md read."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.api import requests
from tests.api.oracle import ALONE, PYVMM, ROOT, Answer, Process, firecracker
from tests.api.requests import GETS, Request
from vmm.testing import tiny_elf

HALT = bytes((0xFA, 0xF4, 0xEB, 0xFD))  # cli; hlt; jmp to the hlt
DIFFERENCES = ROOT / "docs" / "api-differences.md"
_HEADERS = ("Server", "Connection", "Content-Type", "Deprecation")

Pair = tuple[Process, Process]


class Field(NamedTuple):
    """A line of the table of fields: what is told of in one of the two only."""

    name: str
    theirs: str
    ours: str
    why: str


class Row(NamedTuple):
    """A line of docs/api-differences.md."""

    pattern: str
    example: str
    when: str
    theirs: str
    ours: str
    why: str


def table(name: str) -> list[list[str]]:
    """The cells of one table."""
    text = DIFFERENCES.read_text().partition(f"<!-- {name} -->")[2].partition("<!-- end -->")[0]
    lines = [re.split(r"(?<!\\)\|", line.strip().strip("|")) for line in text.strip().splitlines()[2:]]
    return [[cell.strip().strip("`").replace("\\|", "|") for cell in line] for line in lines]


ROWS = [Row(*line) for line in table("differences")]
FIELDS = [Field(*line) for line in table("fields")]


def kind(answer: Answer | None) -> str:
    """What an answer means."""
    if answer is None:
        return "dies"
    if answer.status < 400:
        return str(answer.status)
    body = answer.body.decode()
    if body.startswith('{ "error": "'):
        return f"{answer.status} error"
    assert list(answer.json) == ["fault_message"], f"an error body is a fault_message: {body}"
    message = re.sub(r" \[[^]]*\]", "", answer.json["fault_message"])
    if message.startswith(("Invalid request method and/or path", "Unrecognized ", "Missing snapshot operation")):
        return f"{answer.status} path"
    if not message.startswith("An error occurred when deserializing the json body of a request: "):
        return f"{answer.status} {message.partition(': ')[0]}"
    field = re.search(r"(missing|unknown) [^`]*field `([^`]*)`", message)
    return f"{answer.status} json " + (f"{field[1]} {field[2]}" if field else "value")


def send(process: Process, request: Request) -> Answer | None:
    """The answer to a request; None: the VMM ended instead."""
    try:
        return process.request(request.method, request.path, request.body)
    except (AssertionError, OSError):
        process.process.wait(5)
        return None


def state(process: Process) -> str:
    """What the VM does."""
    answer = send(process, GETS[0])
    return "" if answer is None else answer.json["state"]


def difference(request: Request, theirs: Answer | None, ours: Answer | None) -> str | None:
    """What differs between two answers."""
    if kind(theirs) != kind(ours):
        return f"{kind(theirs)} | {kind(ours)}"
    if theirs is None or ours is None:
        return None
    for name in _HEADERS:
        if theirs.headers.get(name) != ours.headers.get(name):
            return f"{name}: {theirs.headers.get(name)} | {ours.headers.get(name)}"
    if theirs.status == 200 and _told(request, theirs) != _told(request, ours):
        return f"{theirs.body.decode()} | {ours.body.decode()}"
    return None


def _told(request: Request, answer: Answer) -> str:
    if request.path.strip("/") != "vm/config":
        return answer.body.decode()
    names = [field.name for field in FIELDS]
    return json.dumps({name: value for name, value in answer.json.items() if name not in names})


def means(answer: Answer | None, pattern: str) -> bool:
    """Whether `pattern`, of docs/api-differences.md, says what an answer means."""
    message = "" if answer is None or answer.status < 400 else f"{answer.status} {answer.json['fault_message']}"
    return bool(re.fullmatch(pattern, kind(answer)) or re.fullmatch(pattern, message))


def allowed(request: Request, theirs: Answer | None, ours: Answer | None, when: str) -> bool:
    """Whether docs/api-differences.md says that it may be."""
    return any(
        re.search(row.pattern, str(request))
        and (row.when == "any" or re.fullmatch(row.when, when))
        and means(theirs, row.theirs)
        and means(ours, row.ours)
        for row in ROWS
    )


def furnish(directory: Path, code: bytes = HALT) -> None:
    """What requests name: a tiny guest, disks, a log."""
    directory.mkdir()
    for name in requests.GUEST_FILES:
        (directory / name).write_bytes(b"")
    (directory / "kernel").write_bytes(tiny_elf(code))
    (directory / "junk").write_bytes(b"no kernel")
    (directory / "initrd").write_bytes(b"0707")
    for name, size in (("a.img", 1 << 20), ("b.img", 1 << 21), ("odd.img", 1000)):
        os.truncate(directory / name, size)
    (directory / "dir").mkdir()


def files(process: Process) -> list[str]:
    """The names in its directory."""
    return sorted(path.name for path in process.directory.iterdir())


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Callable[..., Pair]]:
    """Starts Firecracker and pyvmm, each in a directory and a network namespace of its own."""
    started: list[Process] = []
    number = itertools.count()

    def start(
        options: Sequence[str] = (),
        *,
        wait: bool = True,
        code: bytes = HALT,
        prepare: Callable[[Path], object] = lambda _: None,
    ) -> Pair:
        close()
        made = []
        for name, command in (("theirs", [firecracker()]), ("ours", [*PYVMM])):
            directory = tmp_path / f"{name}{next(number)}"
            furnish(directory, code)
            prepare(directory)
            made.append(Process([*ALONE, *command], directory, options))
            started.append(made[-1])
        if wait:
            for process in made:
                process.await_socket()
        return made[0], made[1]

    def close() -> None:
        for process in started:
            process.process.kill()
        for process in started:
            process.close()
            output = process.output.read_text(errors="replace")
            assert "Traceback" not in output and "Internal error" not in output, output
        started.clear()

    yield start
    close()
