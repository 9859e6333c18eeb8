# SPDX-License-Identifier: Apache-2.0
"""The rules of a network policy, from words as ``pypi.org:443`` and ``10.1.0.0/16``; the guest's addresses with one."""

from __future__ import annotations

import _socket as socket  # which imports more

from vmm.config import parse_count
from vmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    Network = tuple[bytes, int, int, int]  # an IPv6 address, the bits of its network, the first port and the last
    Name = tuple[str, int, int]

GUEST, GATEWAY, RESOLVER, BITS = "10.0.2.15", "10.0.2.2", "10.0.2.3", 24
PASST = ("-a", GUEST, "-n", str(BITS), "-g", GATEWAY, "-D", RESOLVER, "--no-dhcp-search")
_ALLOWED = "must be a name (pypi.org, *.pypi.org) or a network (10.1.0.0/16), and may end in :PORT or :FIRST-LAST"
_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-_")


def parse_rule(field: str, text: str) -> Network | Name:
    """What a word allows or denies; ports 0 to 0 are all.

    :raises ConfigError: the text is not a rule; the message names `field`
    """
    host, ports = text, ""
    if text.startswith("["):
        host, end, rest = text[1:].partition("]")
        ports = rest[1:]
        if not end or (rest and rest[0] != ":") or ":" not in host:
            raise ConfigError(field, text, _ALLOWED)
    elif text.count(":") == 1:
        host, _, ports = text.partition(":")
    if text.endswith(":") and not host.endswith("::"):
        raise ConfigError(field, text, _ALLOWED)
    first, dash, last = ports.partition("-")
    low = parse_count(f"{field} port", first, 1, 65535) if ports else 0
    high = parse_count(f"{field} port", last, low, 65535) if dash else low
    address, slash, bits = host.partition("/")
    if ":" in address or address.replace(".", "").isdigit():
        return *_network(field, text, address, bits if slash else None), low, high
    if slash:
        raise ConfigError(field, text, _ALLOWED)
    return _name(field, text, host), low, high


def _network(field: str, text: str, address: str, bits: str | None) -> tuple[bytes, int]:
    version, most = (socket.AF_INET6, 128) if ":" in address else (socket.AF_INET, 32)
    try:
        packed = socket.inet_pton(version, address)
    except (OSError, ValueError):  # ValueError: a NUL, or no UTF-8
        raise ConfigError(field, text, _ALLOWED) from None
    prefix = most if bits is None else parse_count(f"{field} network", bits, 0, most)
    number = int.from_bytes(packed, "big")
    if number & ((1 << most - prefix) - 1):
        network = socket.inet_ntop(version, (number >> most - prefix << most - prefix).to_bytes(most // 8, "big"))
        raise ConfigError(field, text, f"has host bits set; the network is {network}/{prefix}")
    return (packed, prefix) if most == 128 else (bytes(10) + b"\xff\xff" + packed, 96 + prefix)


def _name(field: str, text: str, name: str) -> str:
    name = name.removesuffix(".").lower()
    if name == "*":
        return name
    plain = name.removeprefix("*.")
    try:
        plain = plain if plain.isascii() else plain.encode("idna").decode("ascii")
    except UnicodeError:
        plain = ""
    labels = plain.split(".")
    if len(plain) > 253 or labels[-1].isdigit() or not all(
        0 < len(label) < 64 and _LETTERS.issuperset(label) for label in labels
    ):  # fmt: skip
        raise ConfigError(field, text, _ALLOWED)
    return f"*.{plain}" if name.startswith("*.") else plain


def rules(field: str, words: Sequence[str]) -> tuple[list[Network], list[Name]]:
    """The networks and the names among `words`.

    :raises ConfigError: a word is neither
    """
    networks: list[Network] = []
    names: list[Name] = []
    for word in words:
        rule = parse_rule(field, word)
        if len(rule) == 4:
            networks.append(rule)
        else:
            names.append(rule)
    return networks, names
