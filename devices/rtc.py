# SPDX-License-Identifier: Apache-2.0
"""The PC's real-time clock and its battery-backed bytes: an MC146818 with the host's UTC and no alarm.

Source: Motorola MC146818A data sheet; Linux include/linux/mc146818rtc.h, drivers/rtc/rtc-mc146818-lib.c.
"""

from __future__ import annotations

import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR = 0x00, 0x02, 0x04, 0x06, 0x07, 0x08, 0x09
REG_A, REG_B, REG_C, REG_D = 0x0A, 0x0B, 0x0C, 0x0D
CENTURY = 0x32  # not in the chip: the byte that the FADT's CENTURY field names
_TIME = (SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY)

A_UPDATE_IN_PROGRESS = 0x80
A_32KHZ_1024HZ = 0x26
B_SET = 0x80  # the guest writes the time; the clock stands still
B_BINARY = 0x04  # else BCD
B_24_HOURS = 0x02
D_VALID = 0x80
HOUR_PM = 0x80

BASE_MEMORY, EXTENDED_MEMORY, EXTENDED_MEMORY_2 = 0x15, 0x17, 0x30  # KiB, 16 bits each
MEMORY_ABOVE_16M = 0x34  # units of 64 KiB, 16 bits
MEMORY_ABOVE_4G = 0x5B  # units of 64 KiB, 24 bits
_HOLE = 3 << 30  # RAM below 4 GiB ends here at most


class Rtc:
    """Bus device of two ports: offset 0 takes the register's index, offset 1 is the register.

    Update-in-progress never sets: a driver reads the seconds again to see whether the clock ticked between.
    A time that the guest sets is kept as its distance from the host's clock, for as long as the VM lives.

    :param memory: bytes of guest RAM, for the sizes that firmware looks up; 0 leaves them 0
    :param clock: seconds since 1970 UTC
    """

    __slots__ = ("_clock", "_index", "_offset", "_ram")

    def __init__(self, memory: int = 0, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._offset = 0.0
        self._index = REG_D
        self._ram = bytearray(128)
        self._ram[REG_A] = A_32KHZ_1024HZ
        self._ram[REG_B] = B_24_HOURS
        self._ram[REG_D] = D_VALID
        low = min(memory, _HOLE)
        extended = min(max(low - (1 << 20), 0) >> 10, 0xFFFF)
        for register, width, value in (
            (BASE_MEMORY, 2, min(low >> 10, 640)),
            (EXTENDED_MEMORY, 2, extended),
            (EXTENDED_MEMORY_2, 2, extended),
            (MEMORY_ABOVE_16M, 2, max(low - (16 << 20), 0) >> 16),
            (MEMORY_ABOVE_4G, 3, min((memory - low) >> 16, 0xFFFFFF)),
        ):
            self._ram[register : register + width] = value.to_bytes(width, "little")

    def save(self) -> dict[str, Any]:
        """The index, the bytes, and how far the guest's time is from the host's, in seconds."""
        return {"index": self._index, "ram": bytes(self._ram), "offset": self._offset}

    def restore(self, state: dict[str, Any]) -> None:
        if len(state["ram"]) != len(self._ram):
            raise ValueError(f"{len(state['ram'])} bytes of RAM")
        self._index = int(state["index"]) & 0x7F
        self._ram = bytearray(state["ram"])
        self._offset = float(state["offset"])

    def read(self, offset: int, data: memoryview) -> None:
        """Answer the register last named; the index port itself is write-only and reads as 0xff."""
        if self._index in _TIME and not self._ram[REG_B] & B_SET:
            self._show_time()
        for at in range(len(data)):
            data[at] = self._ram[self._index] if offset + at == 1 else 0xFF

    def write(self, offset: int, data: memoryview) -> None:
        """Take an index or a register's value; bit 7 of the index masks NMI on a PC and nothing here."""
        for at, value in enumerate(data):
            if offset + at == 0:
                self._index = value & 0x7F
            elif offset + at == 1:
                self._put(self._index, value)

    def _put(self, register: int, value: int) -> None:
        ram = self._ram
        if register in _TIME:
            if ram[REG_B] & B_SET:
                ram[register] = value
            else:
                self._show_time()
                ram[register] = value
                self._set_time()
        elif register == REG_B:
            was_set = ram[REG_B] & B_SET
            if value & B_SET and not was_set:
                self._show_time()
            ram[REG_B] = value
            if was_set and not value & B_SET:
                self._set_time()
        elif register == REG_A:
            ram[REG_A] = value & ~A_UPDATE_IN_PROGRESS
        elif register not in (REG_C, REG_D):
            ram[register] = value

    def _show_time(self) -> None:
        now = time.gmtime(self._clock() + self._offset)
        ram, encode = self._ram, self._encode
        hour = encode(now.tm_hour)
        if not ram[REG_B] & B_24_HOURS:
            hour = encode(now.tm_hour % 12 or 12) | (HOUR_PM if now.tm_hour >= 12 else 0)
        ram[SECONDS] = encode(now.tm_sec)
        ram[MINUTES] = encode(now.tm_min)
        ram[HOURS] = hour
        ram[WEEKDAY] = encode((now.tm_wday + 1) % 7 + 1)  # Sunday is 1
        ram[DAY] = encode(now.tm_mday)
        ram[MONTH] = encode(now.tm_mon)
        ram[YEAR] = encode(now.tm_year % 100)
        ram[CENTURY] = encode(now.tm_year // 100 % 100)

    def _set_time(self) -> None:
        ram, decode = self._ram, self._decode
        hour = decode(ram[HOURS])
        if not ram[REG_B] & B_24_HOURS:
            hour = decode(ram[HOURS] & ~HOUR_PM) % 12 + (12 if ram[HOURS] & HOUR_PM else 0)
        year = decode(ram[CENTURY]) * 100 + decode(ram[YEAR])
        now = self._clock()
        try:
            days = _days(year, decode(ram[MONTH]), decode(ram[DAY]))
            then = ((days * 24 + hour) * 60 + decode(ram[MINUTES])) * 60 + decode(ram[SECONDS])
            if 0 < time.gmtime(then).tm_year < 10000:
                self._offset = then - now
        except (ValueError, OverflowError, OSError):
            pass  # no such date: the clock goes on as it was

    def _encode(self, value: int) -> int:
        return value if self._ram[REG_B] & B_BINARY else value // 10 << 4 | value % 10

    def _decode(self, value: int) -> int:
        return value if self._ram[REG_B] & B_BINARY else (value >> 4) * 10 + (value & 15)


def _days(year: int, month: int, day: int) -> int:
    # Since 1970; days past the month's end run into the next. By hand: a vCPU's thread has no file to import.
    if not (0 < year < 10000 and 0 < month < 13):
        raise ValueError("no such month")
    year, month = (year, month - 3) if month > 2 else (year - 1, month + 9)  # a year that begins in March
    return year * 365 + year // 4 - year // 100 + year // 400 + (153 * month + 2) // 5 + day - 1 - 719468
