# SPDX-License-Identifier: Apache-2.0
"""The keyboard controller, asked as a driver asks it."""

from __future__ import annotations

import pytest

from devices.i8042 import I8042
from vmm.events import Stop, StopReason


def status(controller: I8042) -> int:
    data = bytearray(1)
    controller.command.read(0, memoryview(data))
    return data[0]


def command(controller: I8042, value: int, *parameter: int) -> int | None:
    """Send a command; return its answer, or None where the output buffer stays empty."""
    controller.command.write(0, memoryview(bytes((value,))))
    for byte in parameter:
        controller.data.write(0, memoryview(bytes((byte,))))
    if not status(controller) & 0x01:
        return None
    data = bytearray(1)
    controller.data.read(0, memoryview(data))
    assert not status(controller) & 0x01, "one read empties the buffer"
    return data[0]


def test_fresh_controller_is_empty_unlocked_and_tested() -> None:
    assert status(I8042()) == 0x14


@pytest.mark.parametrize(
    ("value", "parameter", "answer"),
    [
        (0xAA, (), 0x55),
        (0xAB, (), 0x00),
        (0xA9, (), 0x01),  # no mouse: its clock line is dead
        (0x20, (), 0x74),
        (0xC0, (), 0x00),
        (0xD0, (), 0x03),
        (0xD2, (0x5A,), 0x5A),
        (0xD3, (0x5A,), 0x5A),
        (0xD4, (0xF2,), None),
        (0xAD, (), None),
        (0xAE, (), None),
        (0xA7, (), None),
        (0xA8, (), None),
        (0xFF, (), None),  # pulses no line
        (0x00, (), None),
    ],
)
def test_command_is_answered(value: int, parameter: tuple[int, ...], answer: int | None) -> None:
    assert command(I8042(), value, *parameter) == answer


def test_aux_loop_answers_without_the_aux_bit() -> None:
    controller = I8042()
    controller.command.write(0, memoryview(b"\xd3"))
    controller.data.write(0, memoryview(b"\x5a"))
    assert status(controller) == 0x15


def test_command_register_reads_back_as_written() -> None:
    controller = I8042()
    assert command(controller, 0x60, 0x45) is None
    assert command(controller, 0x20) == 0x45
    assert command(controller, 0x7F, 0x99) is None
    assert command(controller, 0x3F) == 0x99
    assert command(controller, 0x20) == 0x45


def test_port_commands_show_in_the_command_register() -> None:
    controller = I8042()
    command(controller, 0xAE)
    assert command(controller, 0x20) == 0x64
    command(controller, 0xA8)
    assert command(controller, 0x20) == 0x44
    command(controller, 0xAD)
    command(controller, 0xA7)
    assert command(controller, 0x20) == 0x74


def test_self_test_sets_the_system_flag() -> None:
    controller = I8042()
    command(controller, 0x60, 0x00)
    assert status(controller) == 0x10
    assert command(controller, 0xAA) == 0x55
    assert status(controller) == 0x1C


def test_byte_for_the_absent_keyboard_vanishes() -> None:
    controller = I8042()
    controller.data.write(0, memoryview(b"\xf2"))
    assert status(controller) == 0x14


def test_command_cancels_one_that_waits_for_its_parameter() -> None:
    controller = I8042()
    controller.command.write(0, memoryview(b"\xd1"))
    assert command(controller, 0xAA) == 0x55
    controller.data.write(0, memoryview(b"\x00"))  # would reset as D1's parameter


@pytest.mark.parametrize("value", [0xFE, 0xF0, 0xFC])
def test_pulse_of_the_reset_line_ends_the_vm(value: int) -> None:
    with pytest.raises(Stop) as stop:
        command(I8042(), value)
    assert stop.value.reason is StopReason.RESET


def test_output_port_with_the_reset_line_low_ends_the_vm() -> None:
    controller = I8042()
    command(controller, 0xD1, 0x03)
    with pytest.raises(Stop) as stop:
        command(controller, 0xD1, 0x02)
    assert stop.value.reason is StopReason.RESET


def test_wide_read_answers_one_byte_of_the_controller() -> None:
    data = bytearray(4)
    I8042().command.read(0, memoryview(data))
    assert data == b"\x14\xff\xff\xff"
