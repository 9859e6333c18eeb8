# SPDX-License-Identifier: Apache-2.0
"""A guest that says it panicked."""

from __future__ import annotations

import pytest

from devices.pvpanic import PvPanic
from vmm.exits import Stop, StopReason


def test_it_offers_panicked_and_crashloaded() -> None:
    data = bytearray(1)
    PvPanic().read(0, memoryview(data))
    assert data == b"\x03"


@pytest.mark.parametrize("value", [b"\x01", b"\x03", b"\xff"])
def test_panicked_ends_the_vm(value: bytes) -> None:
    with pytest.raises(Stop) as stop:
        PvPanic().write(0, memoryview(value))
    assert stop.value.exit.reason is StopReason.PANIC
    assert stop.value.exit.status == 81


@pytest.mark.parametrize("value", [b"\x00", b"\x02", b"\x04", b"\xfc"])
def test_event_that_is_no_panic_or_that_a_crash_kernel_takes_over_is_ignored(value: bytes) -> None:
    PvPanic().write(0, memoryview(value))
