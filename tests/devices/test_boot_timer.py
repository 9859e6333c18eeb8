# SPDX-License-Identifier: Apache-2.0
"""The boot timer: its line, and what writes none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from devices.boot_timer import MOST, BootTimer
from tests.logs import forget_log
from vmm import logger


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "log"
    path.touch()
    logger.configure(log_path=str(path), show_level=True)
    yield path
    forget_log()


def write(timer: BootTimer, data: bytes, offset: int = 0) -> None:
    timer.write(offset, memoryview(data))


def test_line_is_firecrackers(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = {"monotonic_ns": [5_000_000_000, 5_008_551_999], "process_time_ns": [1_000_000, 3_999_999]}
    for name, values in clocks.items():
        monkeypatch.setattr(f"time.{name}", lambda values=values: values.pop(0))
    write(BootTimer(), b"\x7b")
    # As Firecracker 1.12.1 wrote it, after the time.
    assert log.read_text().split(" ", 1)[1] == (
        "[anonymous-instance:main:INFO] Guest-boot-time =   8551 us 8 ms,   2999 CPU us 2 CPU ms\n"
    )


@pytest.mark.parametrize(("data", "offset"), [(b"\x7c", 0), (b"\x7b", 1), (b"\x7b\0\0\0", 0), (b"\x7b\0", 0)])
def test_other_writes_are_ignored(log: Path, data: bytes, offset: int) -> None:
    write(BootTimer(), data, offset)
    assert log.read_text() == ""


def test_reads_as_zero() -> None:
    data = bytearray(b"\xff" * 4)
    BootTimer().read(0, memoryview(data))
    assert data == bytes(4)


def test_guest_cannot_flood_the_log(log: Path) -> None:
    timer = BootTimer()
    for _ in range(1000):
        write(timer, b"\x7b")
    assert log.read_text().count("Guest-boot-time") == MOST
