# SPDX-License-Identifier: Apache-2.0
"""``pinger.py ADDRESS COUNT``: pings it so often, then tells the guest's driver to end; for a network namespace."""

from __future__ import annotations

import socket
import struct
import sys
import time


def checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF


def main(address: str, count: int) -> None:
    """:raises AssertionError: an answer is wrong; :raises OSError: it does not come"""
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as end:
        end.settimeout(0.2)
        number, deadline = 0, time.monotonic() + 20
        while number < count:
            ping = struct.pack(">BBHHH", 8, 0, 0, 77, number) + bytes(2 * (number % 700))
            ping = ping[:2] + struct.pack(">H", checksum(ping)) + ping[4:]
            end.sendto(ping, (address, 0))
            try:
                kind, _, _, identifier, answered = struct.unpack_from(">BBHHH", end.recv(4096)[20:])
            except OSError:
                if number or time.monotonic() > deadline:
                    raise
                continue  # its driver is not up yet
            if (kind, identifier, answered) == (0, 77, number):
                number += 1
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as end:
        end.sendto(b"end", (address, 9))


main(sys.argv[1], int(sys.argv[2]))
