# SPDX-License-Identifier: Apache-2.0
"""Messages of the domain name system, as far as one question for addresses and its answer take.

Sources: RFC 1035, RFC 3596 (AAAA), RFC 6891 (EDNS), RFC 2308 (answers without a record); resolv.conf(5), hosts(5).
"""

from __future__ import annotations

import _socket as socket  # which imports more
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    # What connect(2) takes: an address and a port; of a link's own IPv6 address, 0 and the interface's number, too.
    Server = tuple[str, int] | tuple[str, int, int, int]

PORT = 53
A, CNAME, OPT, AAAA = 1, 5, 41, 28
NO_ERROR, BAD_FORMAT, FAILED, NO_SUCH_NAME, NOT_IMPLEMENTED = 0, 1, 2, 3, 4
MOST = 512  # bytes of an answer that every client takes
ROOM = 4096  # bytes of an answer that we take
SIZES = {A: 4, AAAA: 16}
_HEAD = struct.Struct(">HHHHHH")
_RECORD = struct.Struct(">HHIH")
_QR, _OPCODE, _TC, _RD, _RA, _RCODE = 0x8000, 0x7800, 0x0200, 0x0100, 0x0080, 0x000F
_INTERNET = 1
_LETTERS = frozenset(b"abcdefghijklmnopqrstuvwxyz0123456789-_")


class Question:
    """What a client asks.

    :ivar number: number of the message, repeated in its answer
    :ivar name: the name, in lower case, without the last dot
    :ivar kind: type of the records
    :ivar text: the question as it was asked, whose letters the answer has to have
    :ivar error: what is wrong with it, a response code; 0: nothing
    """

    __slots__ = ("error", "kind", "name", "number", "recursive", "text")

    def __init__(
        self, number: int, name: str, kind: int, text: bytes, *, recursive: bool = True, error: int = 0
    ) -> None:
        self.number = number
        self.name = name
        self.kind = kind
        self.text = text
        self.recursive = recursive
        self.error = error


def read_question(data: bytes) -> Question:
    """Of a client's message.

    :raises ValueError: the question cannot be answered
    """
    if len(data) < _HEAD.size:
        raise ValueError("shorter than a message")
    number, flags, questions, _, _, _ = _HEAD.unpack_from(data)
    if flags & _QR:
        raise ValueError("an answer")
    recursive = bool(flags & _RD)
    if flags & _OPCODE:
        return Question(number, "", 0, b"", recursive=recursive, error=NOT_IMPLEMENTED)
    try:
        if questions != 1:
            raise ValueError("not one question")
        name, at = read_name(data, _HEAD.size, pointers=False)
        kind, class_ = struct.unpack_from(">HH", data, at)
    except (ValueError, struct.error):
        return Question(number, "", 0, b"", recursive=recursive, error=BAD_FORMAT)
    text = data[_HEAD.size : at + 4]
    error = 0 if class_ == _INTERNET else NOT_IMPLEMENTED
    return Question(number, name, kind, text, recursive=recursive, error=error)


def answer(question: Question, error: int = NO_ERROR, addresses: Sequence[bytes] = (), ttl: int = 0) -> bytes:
    """The message for the client: at most `MOST` bytes, with as many of the addresses as ``fitting`` says."""
    addresses = addresses[: fitting(question.kind, len(question.text))]
    flags = _QR | _RD * question.recursive | _RA | error
    head = _HEAD.pack(question.number, flags, bool(question.text), len(addresses), 0, 0)
    records = [b"\xc0\x0c" + _RECORD.pack(question.kind, _INTERNET, ttl, len(each)) + each for each in addresses]
    return b"".join((head, question.text, *records))


def fitting(kind: int, size: int) -> int:
    """How many addresses there is room for in an answer to a question of `size` bytes."""
    return (MOST - _HEAD.size - size) // (12 + SIZES.get(kind, 4))


def query(number: int, name: str, kind: int, *, plain: bool = False) -> bytes:
    """A question of ours for a nameserver.

    :param plain: without EDNS
    """
    labels = b"".join(bytes([len(label)]) + label.encode("ascii") for label in name.split(".") if label)
    question = _HEAD.pack(number, _RD, 1, 0, 0, not plain) + labels + b"\0" + struct.pack(">HH", kind, _INTERNET)
    return question if plain else question + b"\0" + _RECORD.pack(OPT, ROOM, 0, 0)


def read_answer(data: bytes, number: int, name: str, kind: int) -> tuple[int, list[bytes], int]:
    """The response code, the addresses and their time to live in seconds, of the answer to ``query``.

    :raises ValueError, struct.error: this is not that answer, or it is invalid or cut short
    """
    found, flags, questions, count, _, _ = _HEAD.unpack_from(data)
    if found == number and flags & _QR and not questions and flags & _RCODE in (BAD_FORMAT, NOT_IMPLEMENTED):
        return flags & _RCODE, [], 0  # by who could not read the question
    if found != number or not flags & _QR or flags & _OPCODE or questions != 1:
        raise ValueError("not the answer")
    asked, at = read_name(data, _HEAD.size)
    if (asked, *struct.unpack_from(">HH", data, at)) != (name, kind, _INTERNET):
        raise ValueError("the answer to something else")
    at += 4
    aliases: dict[str, tuple[str, int]] = {}
    addresses: dict[str, list[tuple[bytes, int]]] = {}
    for _ in range(count):
        owner, at = read_name(data, at)
        this, class_, ttl, size = _RECORD.unpack_from(data, at)
        at += _RECORD.size
        if at + size > len(data):
            raise ValueError("cut short")
        ttl = 0 if ttl >> 31 else ttl  # RFC 2181, section 8
        if class_ == _INTERNET and this == CNAME:
            aliases.setdefault(owner, (read_name(data, at)[0], ttl))
        elif class_ == _INTERNET and this == kind and size == SIZES[kind]:
            addresses.setdefault(owner, []).append((data[at : at + size], ttl))
        at += size
    least = 0x7FFF_FFFF
    for _ in range(len(aliases)):
        if name in addresses or name not in aliases:
            break
        name, ttl = aliases[name]
        least = min(least, ttl)
    records = addresses.get(name, [])
    least = min([least, *(ttl for _, ttl in records)])
    code = flags & _RCODE
    if flags & _TC and not records and code == NO_ERROR:
        code = FAILED  # what there is was cut off
    return code, list(dict.fromkeys(address for address, _ in records)), least if records else 0


def read_name(data: bytes, at: int, *, pointers: bool = True) -> tuple[str, int]:
    """A name in lower case, without its last dot, and where it ends in `data`.

    :raises ValueError: the name is invalid, or has a byte that host names cannot have
    """
    labels: list[str] = []
    end = -1
    size = 0
    while True:
        if at >= len(data):
            raise ValueError("a name that is cut short")
        length = data[at]
        if length == 0:
            return ".".join(labels), end if end >= 0 else at + 1
        if length & 0xC0 == 0xC0 and pointers and at + 1 < len(data):
            target = (length & 0x3F) << 8 | data[at + 1]
            end = end if end >= 0 else at + 2
            if target >= at:
                raise ValueError("a name that points forward")  # so each pointer leads back, and there is an end
            at = target
            continue
        label = data[at + 1 : at + 1 + length].lower()
        size += 1 + length
        if length & 0xC0 or len(label) < length or size > 254 or not _LETTERS.issuperset(label):
            raise ValueError("a name with an invalid label")
        labels.append(label.decode("ascii"))
        at += 1 + length


def nameservers() -> list[Server]:
    """Those of the host, as a program of its user asks them."""
    found = [words[1] for words in _lines("/etc/resolv.conf") if words[0] == "nameserver" and len(words) > 1]
    return [server for text in found if (server := _server(text))] or [("127.0.0.1", PORT)]


def _server(text: str) -> Server | None:
    # fe80::1%eth0, or %2: what a router tells of itself on an IPv6 network is an address of the link.
    address, percent, scope = text.partition("%")
    if not _packed(address) or not percent:
        return (address, PORT) if _packed(address) else None
    try:
        index = int(scope) if scope.isascii() and scope.isdigit() else socket.if_nametoindex(scope)
    except (OSError, ValueError):
        return None  # there is no such interface
    return (address, PORT, 0, index) if ":" in address and index >> 32 == 0 else None


def host_names() -> dict[str, list[bytes]]:
    """The addresses of names that the host has in its own file."""
    found: dict[str, list[bytes]] = {}
    for words in _lines("/etc/hosts"):
        if address := _packed(words[0]):
            for name in words[1:]:
                found.setdefault(name.lower(), []).append(address)
    return found


def _packed(text: str) -> bytes:
    # Empty: not an address. connect(2) of a name would look it up.
    try:
        return socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)
    except OSError:
        return b""


def _lines(path: str) -> list[list[str]]:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = file.read().splitlines()
    except OSError:
        return []
    return [words for line in lines if (words := line.partition("#")[0].split())]
