# SPDX-License-Identifier: Apache-2.0
"""Micro-benchmarks of the serial port through the bus: ``pytest benches/test_serial.py``.

A round is ACCESSES accesses; those of an empty port are the price of the loop and the bus, to be taken off.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from devices._serial import Serial
from vmm.bus import Bus
from vmm.irq import IrqLine

ACCESSES = 20_000
PORT, EMPTY = 0x3F8, 0x2F8
THR, LSR = 0, 5
THRE = 0x20


@pytest.fixture
def serial() -> Iterator[Serial]:
    irq = IrqLine(4)
    serial = Serial(irq)
    yield serial
    serial.close()
    irq.close()


@pytest.fixture
def bus(serial: Serial) -> Bus:
    bus = Bus("pio", 1 << 16)
    bus.add(PORT, 8, serial, "serial")
    return bus


@pytest.mark.parametrize("port", [EMPTY, PORT], ids=["empty port", "serial"])
def test_wait_for_the_transmitter_and_send(benchmark: Any, bus: Bus, serial: Serial, port: int) -> None:
    """Half of the accesses read LSR, half write THR: a kernel's printk."""
    byte, status = bytearray(b"x"), bytearray(1)

    def send() -> None:
        access = bus.access
        for _ in range(ACCESSES // 2):
            access(port + LSR, status, False)
            access(port + THR, byte, True)

    def empty() -> None:
        if sent[0] and port == PORT:
            serial.wait_output()
        sent[0] = True

    sent = [False]
    benchmark.pedantic(send, setup=empty, rounds=50)
    benchmark.extra_info["ns an access"] = round(benchmark.stats.stats.median / ACCESSES * 1e9)


def test_a_boot_log_to_a_thread_that_drains(benchmark: Any, bus: Bus, serial: Serial) -> None:
    """30 KB of printk while the console's thread takes the output; a write wakes that thread only if it sleeps."""
    taken: list[int] = []

    def drain() -> None:
        while data := serial.wait_output():
            taken.append(len(data))

    thread = threading.Thread(target=drain)
    thread.start()
    byte, status = bytearray(b"x"), bytearray(1)

    def log() -> None:
        access = bus.access
        for _ in range(30_000):
            access(PORT + LSR, status, False)
            while not status[0] & THRE:
                access(PORT + LSR, status, False)
            access(PORT + THR, byte, True)

    benchmark.pedantic(log, rounds=20)
    serial.close()
    thread.join()
    assert sum(taken) == 20 * 30_000
    benchmark.extra_info["bytes a wake-up"] = round(sum(taken) / len(taken))


def test_paste_of_64_kib(benchmark: Any, bus: Bus, serial: Serial) -> None:
    """A guest that serves its interrupts as Linux does, 16 bytes each, in a loop of Python."""
    data = random.Random(1).randbytes(1 << 16)
    one = bytearray(1)

    def get(register: int) -> int:
        bus.access(PORT + register, one, False)
        return one[0]

    for register, value in ((2, 0x81), (3, 3), (1, 1), (4, 0x0B)):
        bus.access(PORT + register, bytearray([value]), True)

    def paste() -> None:
        feeder = threading.Thread(target=serial.feed, args=(data,))
        feeder.start()
        taken = bytearray()
        while len(taken) < len(data):
            while not get(2) & 1:
                while get(LSR) & 1:
                    taken.append(get(THR))
        feeder.join()
        assert taken == data

    benchmark.pedantic(paste, rounds=3)
