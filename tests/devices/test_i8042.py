# SPDX-License-Identifier: Apache-2.0
"""The keyboard controller and its keyboard, asked as a driver asks them."""

from __future__ import annotations

import pytest

from devices.i8042 import I8042
from vmm.errors import VmmError
from vmm.exits import Stop, StopReason


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


def test_command_cancels_one_that_waits_for_its_parameter() -> None:
    controller = I8042()
    controller.command.write(0, memoryview(b"\xd1"))
    assert command(controller, 0xAA) == 0x55
    controller.data.write(0, memoryview(b"\x00"))  # would reset as D1's parameter


@pytest.mark.parametrize("value", [0xFE, 0xF0, 0xFC])
def test_pulse_of_the_reset_line_ends_the_vm(value: int) -> None:
    with pytest.raises(Stop) as stop:
        command(I8042(), value)
    assert stop.value.exit.reason is StopReason.RESET


def test_output_port_with_the_reset_line_low_ends_the_vm() -> None:
    controller = I8042()
    command(controller, 0xD1, 0x03)
    with pytest.raises(Stop) as stop:
        command(controller, 0xD1, 0x02)
    assert stop.value.exit.reason is StopReason.RESET


def test_wide_read_answers_one_byte_of_the_controller() -> None:
    data = bytearray(4)
    I8042().command.read(0, memoryview(data))
    assert data == b"\x14\xff\xff\xff"


# The keyboard

ENABLED = 0x05  # the system flag and the keyboard's interrupt, as Linux sets it with i8042.direct
TRANSLATED = ENABLED | 0x40


class Driver:
    """A controller whose keyboard is turned on, and the edges of its interrupt."""

    def __init__(self, ctr: int = TRANSLATED) -> None:
        self.edges = 0
        self.controller = I8042(self._edge)
        command(self.controller, 0x60, ctr)

    def _edge(self) -> None:
        self.edges += 1

    def tell(self, *values: int) -> bytes:
        """Send bytes to the keyboard; return what was read until the buffer is empty, a byte an interrupt."""
        answer = bytearray()
        for value in values:
            self.controller.data.write(0, memoryview(bytes((value,))))
            answer += self.read()
        return bytes(answer)

    def read(self) -> bytes:
        data = bytearray()
        while status(self.controller) & 0x01:
            assert self.edges == 1, "an edge for each byte"
            self.edges = 0
            byte = bytearray(1)
            self.controller.data.read(0, memoryview(byte))
            data += byte
        assert self.edges == 0
        return bytes(data)


@pytest.mark.parametrize(
    ("ctr", "told", "answer"),
    [
        (TRANSLATED, [0xF2], "fa ab41"),
        (ENABLED, [0xF2], "fa ab83"),
        (TRANSLATED, [0xFF], "fa aa"),
        (TRANSLATED, [0xED, 0x07], "fa fa"),
        (TRANSLATED, [0xF3, 0x00], "fa fa"),
        (ENABLED, [0xF0, 0x02], "fa fa"),
        (ENABLED, [0xF0, 0x00], "fa fa02"),
        (TRANSLATED, [0xF0, 0x00], "fa fa41"),
        (TRANSLATED, [0xF4], "fa"),
        (TRANSLATED, [0xEE], "ee"),
        (TRANSLATED, [0x00], "fe"),
    ],
)
def test_keyboard_answers_as_atkbd_wants(ctr: int, told: list[int], answer: str) -> None:
    assert Driver(ctr).tell(*told) == bytes.fromhex(answer)


@pytest.mark.parametrize(
    ("ctr", "codes"), [(TRANSLATED, "1d 38 e053 e0d3 b8 9d"), (ENABLED, "14 11 e071 e0f071 f011 f014")]
)
def test_ctrl_alt_del_is_pressed_and_let_go_of(ctr: int, codes: str) -> None:
    driver = Driver(ctr)
    driver.controller.press_ctrl_alt_del()
    assert driver.read() == bytes.fromhex(codes)


def test_keys_wait_until_the_keyboard_is_turned_on() -> None:
    driver = Driver(0x34)
    driver.controller.press_ctrl_alt_del()
    assert driver.read() == b""
    driver.controller.command.write(0, memoryview(b"\x60"))
    driver.controller.data.write(0, memoryview(bytes((ENABLED,))))
    assert len(driver.read()) == 11


def test_without_its_interrupt_keys_are_found_by_polling() -> None:
    driver = Driver(0x04)
    driver.controller.press_ctrl_alt_del()
    assert driver.edges == 0
    assert status(driver.controller) & 0x01


def test_keys_that_nobody_reads_fill_the_buffer() -> None:
    driver = Driver()
    for _ in range(4):
        driver.controller.press_ctrl_alt_del()
    with pytest.raises(VmmError, match="buffer is full"):
        driver.controller.press_ctrl_alt_del()
    assert driver.controller.stats["error_count"] == 1
    assert driver.read() == 4 * bytes.fromhex("1d38e053") + bytes.fromhex("e0d3b89d")


def test_command_is_answered_before_a_key_that_came_first() -> None:
    driver = Driver()
    driver.controller.press_ctrl_alt_del()
    driver.edges = 0
    assert read_answer(driver.controller, 0x20) == TRANSLATED
    driver.edges = 1
    assert driver.read() == bytes.fromhex("1d38e053e0d3b89d")


def read_answer(controller: I8042, value: int) -> int:
    controller.command.write(0, memoryview(bytes((value,))))
    data = bytearray(1)
    controller.data.read(0, memoryview(data))
    return data[0]


def test_keyboard_drops_keys_for_an_answer() -> None:
    driver = Driver()
    driver.controller.press_ctrl_alt_del()
    driver.edges = 0
    assert driver.tell(0xEE) == b"\xee" + bytes.fromhex("e0d3b89d")


def test_accesses_are_counted() -> None:
    controller = I8042()
    status(controller)
    controller.data.read(0, memoryview(bytearray(2)))
    controller.data.write(0, memoryview(b"\xee\0\0\0"))
    with pytest.raises(Stop):
        command(controller, 0xFE)
    assert controller.stats == {
        "error_count": 0, "missed_read_count": 1, "missed_write_count": 1, "read_count": 1, "reset_count": 1,
        "write_count": 1,
    }  # fmt: skip
