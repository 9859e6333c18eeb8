# SPDX-License-Identifier: Apache-2.0
"""The few words of AML that a DSDT of plain devices needs: each function returns encoded bytes.

Source: ACPI 6.5 chapter 20 (AML) and section 6.4 (resource descriptors).
"""

from __future__ import annotations

import struct

LOCAL0 = b"\x60"


def _sized(op: bytes, body: bytes) -> bytes:
    """Return ``op``, PkgLength, ``body``; the length counts its own bytes. Section 20.2.4."""
    length = len(body) + 1
    if length < 1 << 6:
        return op + bytes((length,)) + body
    for more in (1, 2, 3):
        length = len(body) + 1 + more
        if length < 1 << (4 + 8 * more):
            return op + bytes((more << 6 | length & 15,)) + (length >> 4).to_bytes(more, "little") + body
    raise ValueError("an AML package holds at most 256 MiB")


def integer(value: int) -> bytes:
    """Encode `value`, 0 to 2^64 - 1, in its shortest form."""
    if value in (0, 1):
        return bytes((value,))  # ZeroOp, OneOp
    for prefix, code in ((0x0A, "B"), (0x0B, "<H"), (0x0C, "<I"), (0x0E, "<Q")):
        if value < 1 << 8 * struct.calcsize(code):
            return bytes((prefix,)) + struct.pack(code, value)
    raise ValueError(f"{value:#x} does not fit in 64 bits")


def string(text: str) -> bytes:
    """Encode `text`, ASCII without NUL."""
    return b"\x0d" + text.encode("ascii") + b"\0"


def eisa_id(text: str) -> bytes:
    """Encode a device id as ``PNP0501``, three letters and four hexadecimal digits. Section 19.3.4."""
    letters = 0
    for letter in text[:3]:
        letters = letters << 5 | ord(letter) - 0x40
    return b"\x0c" + struct.pack(">HH", letters, int(text[3:], 16))  # a DWord constant, bytes as on the EISA bus


def package(*elements: bytes) -> bytes:
    """Encode a Package of at most 255 `elements`."""
    return _sized(b"\x12", bytes((len(elements),)) + b"".join(elements))


def name(segment: str, value: bytes) -> bytes:
    """Encode ``Name (segment, value)``; shorter segments are filled up with ``_``."""
    return b"\x08" + segment.ljust(4, "_").encode("ascii") + value


def scope(path: str, *body: bytes) -> bytes:
    """Encode ``Scope (path) {...}`` for one segment from the root, as ``\\_SB``."""
    return _sized(b"\x10", b"\\" + path[1:].ljust(4, "_").encode("ascii") + b"".join(body))


def device(segment: str, *body: bytes) -> bytes:
    """Encode ``Device (segment) {...}``; `segment` has four characters."""
    return _sized(b"\x5b\x82", segment.encode("ascii") + b"".join(body))


def byte_port(region: str, field: str, port: int) -> bytes:
    """Encode a SystemIO OperationRegion of one byte, and a Field of 8 bits over it. Section 20.2.5.2."""
    name, byte_access_no_lock_preserve = region.encode("ascii"), b"\x01"
    head = b"\x5b\x80" + name + b"\x01" + integer(port) + integer(1)
    return head + _sized(b"\x5b\x81", name + byte_access_no_lock_preserve + field.encode("ascii") + b"\x08")


def method(segment: str, arguments: int, *terms: bytes) -> bytes:
    """Encode ``Method (segment, arguments, Serialized) {...}``."""
    return _sized(b"\x14", segment.encode("ascii") + bytes((arguments | 8,)) + b"".join(terms))


def store(source: str, target: bytes) -> bytes:
    """Encode ``Store (source, target)`` of a named object."""
    return b"\x70" + source.encode("ascii") + target


def notify_if(value: bytes, bit: int, segment: str, code: int) -> bytes:
    """Encode ``If (value & bit) { Notify (segment, code) }``."""
    test = b"\x7b" + value + integer(bit) + b"\0"
    return _sized(b"\xa0", test + b"\x86" + segment.encode("ascii") + integer(code))


def resources(*descriptors: bytes) -> bytes:
    """Encode ``ResourceTemplate () {...}``, the value of ``_CRS``."""
    body = b"".join(descriptors) + b"\x79\0"  # the end tag, with a checksum of 0: not checked
    return _sized(b"\x11", integer(len(body)) + body)


def io(port: int, size: int) -> bytes:
    """Encode ``IO (Decode16, port, port, 1, size)``. Section 6.4.2.5."""
    return struct.pack("<BBHHBB", 0x47, 1, port, port, 1, size)


def memory32_fixed(base: int, size: int) -> bytes:
    """Encode ``Memory32Fixed (ReadWrite, base, size)``. Section 6.4.3.4."""
    return struct.pack("<BHBII", 0x86, 9, 1, base, size)


def interrupt(gsi: int) -> bytes:
    """Encode ``Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive) {gsi}``. Section 6.4.3.6."""
    return struct.pack("<BHBBI", 0x89, 6, 0x03, 1, gsi)
