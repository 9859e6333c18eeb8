# SPDX-License-Identifier: Apache-2.0
"""Frames that this process itself sends to a guest: answers to datagrams, and ICMP errors for dropped frames.

Sources: RFC 768 (UDP), RFC 791 (IPv4), RFC 1071 (checksums), RFC 792 and RFC 4443 (ICMP).
"""

from __future__ import annotations

import _socket as socket  # which imports more
import struct

MAPPED = bytes(10) + b"\xff\xff"  # before an IPv4 address: the same as an IPv6 one
# Type and code of ICMP messages.
NO_PORT = (3, 3)
_PROHIBITED = {4: (3, 13), 6: (1, 1)}
IPV4 = struct.Struct(">BBHHHBBH4s4s")
UDP = struct.Struct(">HHHH")


def datagram(asked: bytes, port: int, data: bytes, identity: int) -> bytes:
    """The answer to a UDP datagram.

    :param asked: its frame, from the Ethernet header to that of UDP
    :param port: source port of the question
    """
    source, target = asked[30:34], asked[26:30]
    size = 8 + len(data)
    segment = UDP.pack(int.from_bytes(asked[36:38], "big"), port, size, 0) + data
    segment = with_checksum(segment, 6, source + target + struct.pack(">HH", 17, size))
    return asked[6:12] + asked[:6] + b"\x08\0" + ipv4(17, source, target, segment, identity)


def unreachable(head: bytes, kind: int = 0, code: int = 0) -> bytes:
    """The ICMP message for the sender of a packet, as if it came from where the packet was to go.

    :param head: the start of the packet's frame, at least its headers
    :param kind: the ICMP type for an IPv4 packet, with `code`; 0: prohibited, for IPv6, too
    """
    macs = head[6:12] + head[:6]
    if not kind:
        kind, code = _PROHIBITED[head[14] >> 4]
    if head[14] >> 4 == 4:
        message = with_checksum(struct.pack(">BBHI", kind, code, 0, 0) + head[14:42], 2)
        return macs + b"\x08\0" + ipv4(1, head[30:34], head[26:30], message, 0)
    addresses = head[38:54] + head[22:38]
    message = struct.pack(">BBHI", kind, code, 0, 0) + head[14:74]
    message = with_checksum(message, 2, addresses + struct.pack(">II", len(message), 58))
    return macs + b"\x86\xdd" + struct.pack(">IHBB", 6 << 28, len(message), 58, 64) + addresses + message


def ipv4(protocol: int, source: bytes, target: bytes, data: bytes, identity: int) -> bytes:
    """A packet without options, which no router may take apart."""
    ip = IPV4.pack(0x45, 0, 20 + len(data), identity, 0x4000, 64, protocol, 0, source, target)
    return with_checksum(ip, 10) + data


def with_checksum(packet: bytes, at: int, pseudo: bytes = b"") -> bytes:
    """`packet` with its checksum in the two bytes from `at`, which are 0; of its pseudo header, too."""
    return packet[:at] + checksum(pseudo + packet).to_bytes(2, "big") + packet[at + 2 :]


def checksum(data: bytes) -> int:
    """The complement of the sum of 16-bit words; never 0. Of what has its own in it, and is right: 0xFFFF."""
    # The ones' complement sum (RFC 1071) is the number that the words make, modulo 65535.
    return 0xFFFF - int.from_bytes(data + b"\0" * (len(data) & 1), "big") % 0xFFFF


def describe(head: bytes) -> str:
    """Where a frame was to go, for a message."""
    kind = int.from_bytes(head[12:14], "big")
    if kind == 0x0800:
        protocol, target, at = head[23], text(MAPPED + head[30:34]), 34
    elif kind == 0x86DD:
        protocol, target, at = head[20], socket.inet_ntop(socket.AF_INET6, head[38:54]), 54
    else:
        return f"frames of type {kind:#06x}"
    if protocol in (6, 17):
        return f"{target} port {int.from_bytes(head[at + 2 : at + 4], 'big')} ({'TCP' if protocol == 6 else 'UDP'})"
    return f"{target} ({'ICMP' if protocol in (1, 58) else f'protocol {protocol}'})"


def text(address: bytes) -> str:
    """An address of 16 bytes as people write it."""
    if address[:12] == MAPPED:
        return socket.inet_ntop(socket.AF_INET, address[12:])
    return socket.inet_ntop(socket.AF_INET6, address)
