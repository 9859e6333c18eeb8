# SPDX-License-Identifier: Apache-2.0
"""Random programs for the board's devices: cut at any access and continued by another device, they read the same."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from devices._serial import Serial
from devices.i8042 import I8042
from devices.rtc import Rtc
from vmm.errors import VmmError
from vmm.exits import Stop
from vmm.irq import IrqLine

PROGRAMS, ACCESSES = 40, 120
# Commands of controller and keyboard, and bytes that are neither.
KEYBOARD = (0x20, 0x60, 0xA7, 0xA8, 0xA9, 0xAA, 0xAB, 0xAD, 0xAE, 0xD0, 0xD1, 0xD2, 0xED, 0xEE, 0xF0, 0xF2, 0xF4, 0xFF)


class Board:
    """One device of a kind, and the ports at which a guest finds it."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.interrupts = 0
        self.irq = IrqLine(4)
        self.device: Any
        if kind == "rtc":
            self.device = Rtc(3 << 30, clock=lambda: 1_700_000_000.25)
            self.ports = [(self.device, 0), (self.device, 1)]
        elif kind == "i8042":
            self.device = I8042(self._interrupt)
            self.ports = [(self.device.data, 0), (self.device.command, 0)]
        else:
            self.device = Serial(self.irq)
            # Its input is what it sends itself, in loopback: no copy has what is on the wire from a host.
            self.ports = [(self.device, register) for register in range(8)]

    def _interrupt(self) -> None:
        self.interrupts += 1

    def close(self) -> None:
        if self.kind == "serial":
            self.device.close()
        self.irq.close()

    def step(self, rng: random.Random) -> tuple[str, int]:
        """One access, or one event of the host; what came of it."""
        what = rng.random()
        value = rng.choice(KEYBOARD) if self.kind == "i8042" and rng.random() < 0.7 else rng.randrange(256)
        device, offset = rng.choice(self.ports)
        if what < 0.05 and self.kind == "i8042":
            try:
                self.device.press_ctrl_alt_del()
            except VmmError:
                return "pressed", 0
            return "pressed", 1
        data = bytearray([value])
        if what < 0.55:
            try:
                device.write(offset, memoryview(data))
            except Stop:
                return "reset", 0
            if self.kind == "serial" and self.device.said:
                self.device.wait_output()
            return "write", 0
        device.read(offset, memoryview(data))
        return f"read {offset}", data[0]


def _run(kind: str, seed: int, cut: Callable[[], bool]) -> list[tuple[str, int]]:
    board = Board(kind)
    rng = random.Random(seed)
    said = []
    for _ in range(ACCESSES):
        said.append(board.step(rng))
        if cut():
            other = Board(kind)
            other.device.restore(msgspec.msgpack.decode(msgspec.msgpack.encode(board.device.save())))
            board.close()
            board = other
    board.close()
    return said


@pytest.mark.parametrize("kind", ["rtc", "i8042", "serial"])
def test_a_program_that_is_cut_reads_what_a_whole_one_does(kind: str) -> None:
    for seed in range(PROGRAMS):
        dice = random.Random(~seed)
        whole = _run(kind, seed, lambda: False)
        assert _run(kind, seed, lambda dice=dice: dice.random() < 0.3) == whole, f"seed {seed}"  # type: ignore[misc]
        assert any(word.startswith("read") and value not in (0, 0xFF) for word, value in whole)
