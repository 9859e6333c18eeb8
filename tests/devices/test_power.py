# SPDX-License-Identifier: Apache-2.0
"""Power off and reset by ACPI's ports, and that the tables name the same ports."""

from __future__ import annotations

import pytest

from boot import acpi
from devices import power
from devices.power import AcpiPower
from vmm.bus import Bus
from vmm.exits import Stop, StopReason


def ports() -> Bus:
    bus = Bus("pio", 1 << 16)
    bus.add(0x600, 3, AcpiPower(), "power")
    return bus


def test_sleep_type_5_with_enable_powers_off() -> None:
    with pytest.raises(Stop) as stop:
        ports().access(0x600, bytearray(b"\x34"), True)
    assert stop.value.exit.reason is StopReason.POWEROFF
    assert stop.value.exit.status == 0


def test_reset_value_resets() -> None:
    with pytest.raises(Stop) as stop:
        ports().access(0x602, bytearray(b"\x01"), True)
    assert stop.value.exit.reason is StopReason.RESET
    assert stop.value.exit.status == 80


@pytest.mark.parametrize(
    ("port", "value"),
    [
        (0x600, 0x14),  # S5 without SLP_EN
        (0x600, 0x20),  # SLP_EN with type 0
        (0x600, 0x30),
        (0x600, 0x3C),
        (0x600, 0x00),
        (0x601, 0x80),  # WAK_STS is cleared before a sleep
        (0x601, 0x34),
        (0x602, 0x00),
        (0x602, 0x34),
    ],
)
def test_anything_else_is_ignored(port: int, value: int) -> None:
    assert ports().access(port, bytearray((value,)), True)


@pytest.mark.parametrize("port", [0x600, 0x601, 0x602])
def test_ports_read_as_zero(port: int) -> None:
    data = bytearray(b"\xee")
    assert ports().access(port, data, False)
    assert data == b"\0"


def test_tables_and_device_agree() -> None:
    for constant in ("SLEEP_CONTROL", "SLEEP_STATUS", "RESET", "RESET_VALUE", "SLEEP_TYPE_S5"):
        assert getattr(acpi, constant) == getattr(power, constant), constant
