# SPDX-License-Identifier: Apache-2.0
"""A guest of the console's tests, played by the test at the registers of a serial port."""

from __future__ import annotations

import time

from devices._serial import Serial
from vmm.irq import IrqLine

PATIENCE = 20.0  # seconds; never reached where things work
THR, LSR = 0, 5
THRE = 0x20


class Guest:
    """A guest that polls its serial port, and takes no input until it is asked to."""

    def __init__(self) -> None:
        self.irq = IrqLine(4)
        self.serial = Serial(self.irq)

    def _read(self, register: int) -> int:
        data = bytearray(1)
        self.serial.read(register, memoryview(data))
        return data[0]

    def write(self, text: bytes) -> None:
        for byte in text:
            deadline = time.monotonic() + PATIENCE
            while not self._read(LSR) & THRE:
                assert time.monotonic() < deadline, "nobody takes the output"
                time.sleep(0.001)
            self.serial.write(THR, memoryview(bytes([byte])))

    def write_until_it_is_stopped(self) -> None:
        while self._read(LSR) & THRE:
            self.serial.write(THR, memoryview(b"x"))

    def read(self, count: int) -> bytes:
        taken = bytearray()
        deadline = time.monotonic() + PATIENCE
        while len(taken) < count and time.monotonic() < deadline:
            if self._read(LSR) & 1:
                taken.append(self._read(0))
                deadline = time.monotonic() + PATIENCE
        return bytes(taken)

    def close(self) -> None:
        self.serial.close()
        self.irq.close()
