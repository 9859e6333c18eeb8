# SPDX-License-Identifier: Apache-2.0
"""No access of any width at any offset makes a device raise anything but Stop."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices.boot_timer import BootTimer
from devices.exit_port import ExitPort
from devices.i8042 import I8042
from devices.power import AcpiPower
from devices.pvpanic import PvPanic
from devices.rtc import Rtc
from vmm.bus import Bus
from vmm.exits import Stop

if TYPE_CHECKING:
    from vmm.bus import BusDevice

ACCESSES = st.lists(
    st.tuples(
        st.integers(0, 7),
        st.sampled_from([1, 2, 4, 8]),
        st.booleans(),
        st.one_of(st.integers(0, 255), st.integers(0, (1 << 64) - 1)),
    ),
    max_size=40,
)


def machine() -> Bus:
    """Return a bus with every device, 16 bytes wide each, at 0, 16, ...: all offsets can be reached."""
    bus, i8042 = Bus("pio", 1 << 16), I8042()
    devices: tuple[BusDevice, ...] = (
        ExitPort(), AcpiPower(), PvPanic(), Rtc(), i8042.data, i8042.command, BootTimer(),
    )  # fmt: skip
    for index, device in enumerate(devices):
        bus.add(index * 16, 16, device, str(index))
    return bus


@pytest.mark.parametrize("at", range(0, 112, 16))
@given(accesses=ACCESSES)
def test_only_stop_is_raised(at: int, accesses: list[tuple[int, int, bool, int]]) -> None:
    bus = machine()
    for offset, width, is_write, value in accesses:
        data = bytearray((value & (1 << 8 * width) - 1).to_bytes(width, "little"))
        with contextlib.suppress(Stop):
            assert bus.access(at + offset, data, is_write)
        assert len(data) == width


@given(
    st.lists(st.tuples(st.sampled_from([0, 2, 4, 6, 7, 8, 9, 0x0B, 0x32]), st.integers(0, 255)), max_size=30),
    st.floats(-(2.0**33), 2.0**40),
)
def test_clock_survives_any_setting(writes: list[tuple[int, int]], later: float) -> None:
    now = 1.7e9
    rtc = Rtc(clock=lambda: now)
    for step, (register, value) in enumerate(writes):
        if step == len(writes) // 2:
            now += later
        rtc.write(0, memoryview(bytes((register, value))))
        for shown in (0, 2, 4, 6, 7, 8, 9, 0x32):
            rtc.write(0, memoryview(bytes((shown,))))
            rtc.read(1, memoryview(bytearray(1)))


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 255)), max_size=64))
def test_i8042_takes_any_stream(stream: list[tuple[bool, int]]) -> None:
    controller = I8042()
    for is_command, byte in stream:
        port = controller.command if is_command else controller.data
        with contextlib.suppress(Stop):
            port.write(0, memoryview(bytes((byte,))))
        port.read(0, memoryview(bytearray(1)))
