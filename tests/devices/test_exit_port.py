# SPDX-License-Identifier: Apache-2.0
"""A guest that ends the VM with a status."""

from __future__ import annotations

import pytest

from devices.exit_port import ExitPort
from vmm.exits import Stop, StopReason


@pytest.mark.parametrize(
    ("written", "status"),
    [(b"\0", 0), (b"\x2a", 42), (b"\xff", 255), (b"\x07\x01", 7), (b"\x09\xff\xff\xff", 9)],
)
def test_low_byte_is_the_exit_status(written: bytes, status: int) -> None:
    with pytest.raises(Stop) as stop:
        ExitPort().write(0, memoryview(written))
    assert stop.value.exit.reason is StopReason.GUEST_EXIT
    assert stop.value.exit.status == status


def test_write_to_its_middle_is_ignored() -> None:
    ExitPort().write(1, memoryview(b"\x01"))


def test_it_reads_as_zero() -> None:
    data = bytearray(b"\xee" * 4)
    ExitPort().read(0, memoryview(data))
    assert data == b"\0\0\0\0"
