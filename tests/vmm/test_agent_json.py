# SPDX-License-Identifier: Apache-2.0
"""The agent's reader of JSON beside Python's: of the same text both read the same parameters, or refuse it."""

from __future__ import annotations

import json
import random
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

AGENT = Path(__file__).parents[2] / "vmm" / "sandbox" / "agent"
MOST = 8192  # values
PROGRAM = """
#include "agent.h"
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int main(void)
{
    static struct request request;
    uint32_t length;
    while (fread(&length, sizeof length, 1, stdin) == 1) {
        char *text = malloc(length + 1);
        if (fread(text, 1, length, stdin) != length)
            return 1;
        text[length] = 0;
        int error = parse_request(text, length, &request);
        uint32_t count = error ? 0 : (uint32_t)request.count;
        fwrite(&error, sizeof error, 1, stdout);
        fwrite(&count, sizeof count, 1, stdout);
        for (uint32_t i = 0; i < count; i++) {
            fwrite(request.parameters[i].key, 1, strlen(request.parameters[i].key) + 1, stdout);
            fwrite(request.parameters[i].value, 1, strlen(request.parameters[i].value) + 1, stdout);
        }
        fflush(stdout);
        free(text);
    }
    return 0;
}
"""


class Reader:
    """json.c in a process that ends at the first access outside of a text."""

    def __init__(self, program: Path) -> None:
        self.process = subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def read(self, text: bytes) -> list[tuple[bytes, bytes]] | int:
        """The parameters, or the error."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(struct.pack("<I", len(text)) + text)
        self.process.stdin.flush()
        error, count = struct.unpack("<iI", self.process.stdout.read(8))
        words = [self._word() for _ in range(2 * count)]
        return error or list(zip(words[::2], words[1::2], strict=True))

    def _word(self) -> bytes:
        assert self.process.stdout
        word = bytearray()
        while (byte := self.process.stdout.read(1)) != b"\0":
            assert byte, "json.c has ended"
            word += byte
        return bytes(word)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    directory = tmp_path_factory.mktemp("json")
    (directory / "main.c").write_text(PROGRAM)
    command = ["gcc", "-D_GNU_SOURCE", "-fsanitize=address,undefined", "-fno-sanitize-recover", "-g", f"-I{AGENT}"]
    subprocess.run([*command, "main.c", str(AGENT / "json.c"), "-o", "reader"], cwd=directory, check=True)
    reader = Reader(directory / "reader")
    yield reader
    reader.process.communicate(timeout=30)
    assert reader.process.returncode == 0


def text_of(value: Any) -> bytes | None:
    match value:
        case True:
            return b"1"
        case False | None:
            return None
        case str() | Number():
            encoded = value.encode(errors="surrogateescape")
            if b"\0" in encoded:
                raise ValueError
            return encoded
    raise ValueError


class Number(str):
    """A number, as it was written."""


def refuse(word: str) -> None:
    raise ValueError(word)


def by_python(text: bytes) -> list[tuple[bytes, bytes]] | int:
    """The same by Python's json, for a request: one object, with texts that can be given to a program."""
    try:
        whole = json.loads(
            text.decode(errors="surrogateescape"), object_pairs_hook=lambda pairs: {"pairs": pairs}, parse_int=Number,
            parse_float=refuse, parse_constant=refuse,
        )  # fmt: skip
        if not isinstance(whole, dict):
            return 22
        found = []
        for key, value in whole["pairs"]:
            name = text_of(key)
            assert name is not None
            found += [(name, text_of(each)) for each in (value if isinstance(value, list) else [value])]
    except ValueError:
        return 22
    there = [(key, value) for key, value in found if value is not None]
    if len(there) > MOST:
        return 7
    return there if b"verb" in dict(there) else 22


def some_text(rng: random.Random) -> str:
    common, rare, never = "ab/=", '" \\\b\f\n\r\t\x7féß€\U0001f600\udc80\udcff\uffff', "\x1f\0\ud800"
    letters = common * 40 + rare * 8 + never
    return "".join(rng.choices(letters, k=rng.choice((0, 1, 2, 5, 40))))


def some_value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(12 if depth else 14)
    if kind < 6:
        return some_text(rng)
    if kind < 10:
        return rng.choice((0, -1, 7, 1 << 63, -(1 << 70), True, False, None))
    if kind == 10 and not rng.randrange(8):
        return rng.choice((1.5, {"a": 1}, float("nan"), [[]]))
    return "x" if depth else [some_value(rng, 1) for _ in range(rng.choice((0, 1, 2, 9)))]


def some_request(rng: random.Random) -> bytes:
    request = {some_text(rng): some_value(rng) for _ in range(rng.randrange(5))}
    request["verb"] = rng.choice(("run", "read", "x", 1, "", ["a"], some_value(rng)))
    indent, ascii_only = rng.choice((None, None, 0, 2)), rng.random() < 0.7
    text = json.dumps(request, indent=indent, ensure_ascii=ascii_only).encode(errors="surrogatepass")
    return text + rng.choice((b"", b"", b" ", b"\n", b"{}", b"\0"))


def test_damaged_and_whole_requests_are_read_as_python_reads_them(reader: Reader) -> None:
    rng = random.Random(20261130)
    taken = 0
    for _ in range(6000):
        text = bytearray(some_request(rng))
        for _ in range(rng.choice((0, 0, 1, 1, 3))):
            place = rng.randrange(len(text))
            match rng.randrange(4):
                case 0:
                    text[place] = rng.choice(b'{}[]",:\\u0-9etrue \x00\xff')
                case 1:
                    del text[place : place + rng.choice((1, 1, 4))]
                case 2:
                    text[place:place] = text[place : place + rng.choice((1, 6, 20))]
                case 3:
                    text[place:place] = rng.choice(
                        (b"\\ud83d", b"\\ude00", b"\\u0000", b"\\u20aC", b"true", b"-", b"00")
                    )
            text = text or bytearray(b" ")
        expected = by_python(bytes(text))
        taken += not isinstance(expected, int)
        assert reader.read(bytes(text)) == expected, bytes(text)
    assert 1000 < taken < 5000


@pytest.mark.parametrize(
    "text", [b"", b"{", b"{}", b'{"verb"', b'{"verb":', b'{"verb":"a', b'{"verb":"\\', b'{"verb":"\\u12']
)
def test_a_text_that_is_cut_is_refused(reader: Reader, text: bytes) -> None:
    assert reader.read(text) == 22


def test_values_are_counted(reader: Reader) -> None:
    request: dict[str, Any] = {"verb": "run", "arg": ["a"] * (MOST - 1), "quiet": False}
    found = reader.read(json.dumps(request).encode())
    assert isinstance(found, list) and len(found) == MOST
    request["quiet"] = True
    assert reader.read(json.dumps(request).encode()) == 7
