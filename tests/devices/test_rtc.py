# SPDX-License-Identifier: Apache-2.0
"""The clock, read and set as a driver does it."""

from __future__ import annotations

import time

import pytest

from devices.rtc import Rtc

AFTERNOON = 1709215149.75  # Thursday 29 February 2024, 13:59:09 UTC


class Clock:
    def __init__(self, now: float = AFTERNOON) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def get(rtc: Rtc, register: int) -> int:
    rtc.write(0, memoryview(bytes((register,))))
    data = bytearray(1)
    rtc.read(1, memoryview(data))
    return data[0]


def put(rtc: Rtc, register: int, value: int) -> None:
    rtc.write(0, memoryview(bytes((register,))))
    rtc.write(1, memoryview(bytes((value,))))


def shown(rtc: Rtc) -> tuple[int, ...]:
    """Century, year, month, day, weekday, hours, minutes, seconds."""
    return tuple(get(rtc, register) for register in (0x32, 9, 8, 7, 6, 4, 2, 0))


def test_time_is_bcd_and_24_hours() -> None:
    assert shown(Rtc(clock=Clock())) == (0x20, 0x24, 0x02, 0x29, 5, 0x13, 0x59, 0x09)


def test_binary_mode() -> None:
    rtc = Rtc(clock=Clock())
    put(rtc, 0x0B, 0x06)
    assert shown(rtc) == (20, 24, 2, 29, 5, 13, 59, 9)


@pytest.mark.parametrize(
    ("hours_later", "hours"), [(0, 0x81), (-1, 0x92), (-2, 0x11), (-12, 0x01), (-13, 0x12), (10, 0x91)]
)
def test_12_hour_mode(hours_later: int, hours: int) -> None:
    rtc = Rtc(clock=Clock(AFTERNOON + hours_later * 3600))
    put(rtc, 0x0B, 0x00)
    assert get(rtc, 4) == hours
    put(rtc, 0x04, hours)
    assert get(rtc, 4) == hours, "writing what it shows changes nothing"


def test_sunday_is_1_and_saturday_7() -> None:
    assert get(Rtc(clock=Clock(AFTERNOON + 2 * 86400)), 6) == 7
    assert get(Rtc(clock=Clock(AFTERNOON + 3 * 86400)), 6) == 1


def test_control_registers_say_a_working_clock() -> None:
    rtc = Rtc()
    assert [get(rtc, register) for register in (0x0A, 0x0B, 0x0C, 0x0D)] == [0x26, 0x02, 0x00, 0x80]


def test_update_in_progress_and_the_read_only_registers_cannot_be_written() -> None:
    rtc = Rtc()
    for register in (0x0A, 0x0C, 0x0D):
        put(rtc, register, 0xFF)
    assert [get(rtc, register) for register in (0x0A, 0x0C, 0x0D)] == [0x7F, 0x00, 0x80]


def test_time_set_by_the_guest_goes_on_from_there() -> None:
    clock = Clock()
    rtc = Rtc(clock=clock)
    put(rtc, 0x0B, 0x82)
    for register, value in ((0, 0x58), (2, 0x59), (4, 0x23), (7, 0x31), (8, 0x12), (9, 0x99), (0x32, 0x19)):
        put(rtc, register, value)
    clock.now += 5
    assert shown(rtc) == (0x19, 0x99, 0x12, 0x31, 5, 0x23, 0x59, 0x58), "SET holds the clock"
    put(rtc, 0x0B, 0x02)
    assert shown(rtc) == (0x19, 0x99, 0x12, 0x31, 6, 0x23, 0x59, 0x58)
    clock.now += 2
    assert shown(rtc) == (0x20, 0x00, 0x01, 0x01, 7, 0x00, 0x00, 0x00)


def test_single_register_set_without_stopping_the_clock() -> None:
    rtc = Rtc(clock=Clock())
    put(rtc, 4, 0x20)
    assert shown(rtc) == (0x20, 0x24, 0x02, 0x29, 5, 0x20, 0x59, 0x09)


@pytest.mark.parametrize(("register", "value"), [(8, 0x13), (8, 0x00), (8, 0xFF)])
def test_month_that_does_not_exist_leaves_the_time(register: int, value: int) -> None:
    rtc = Rtc(clock=Clock())
    put(rtc, register, value)
    assert shown(rtc) == (0x20, 0x24, 0x02, 0x29, 5, 0x13, 0x59, 0x09)


def test_it_is_utc_whatever_the_hosts_time_zone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        assert get(Rtc(clock=Clock()), 4) == 0x13
    finally:
        monkeypatch.undo()
        time.tzset()


def test_index_drops_the_nmi_bit() -> None:
    assert get(Rtc(), 0x8D) == 0x80


def test_battery_backed_bytes_keep_what_is_written() -> None:
    rtc = Rtc()
    put(rtc, 0x0F, 0x0A)
    put(rtc, 0x7F, 0x55)
    assert (get(rtc, 0x0F), get(rtc, 0x7F), get(rtc, 0x40)) == (0x0A, 0x55, 0)


def test_word_access_is_two_bytes() -> None:
    rtc = Rtc()
    rtc.write(0, memoryview(b"\x50\x77"))
    data = bytearray(2)
    rtc.read(0, memoryview(data))
    assert data == b"\xff\x77"


@pytest.mark.parametrize(
    ("memory", "base", "extended", "above_16m", "above_4g"),
    [
        (0, 0, 0, 0, 0),
        (1 << 20, 640, 0, 0, 0),
        (8 << 20, 640, 7168, 0, 0),
        (128 << 20, 640, 65535, 1792, 0),
        (5 << 30, 640, 65535, 0xBF00, 0x8000),
        (1 << 44, 640, 65535, 0xBF00, 0xFFFFFF),
    ],
)
def test_memory_sizes(memory: int, base: int, extended: int, above_16m: int, above_4g: int) -> None:
    rtc = Rtc(memory)

    def word(register: int) -> int:
        return get(rtc, register) | get(rtc, register + 1) << 8

    assert (word(0x15), word(0x17), word(0x30), word(0x34)) == (base, extended, extended, above_16m)
    assert word(0x5B) | get(rtc, 0x5D) << 16 == above_4g
