# SPDX-License-Identifier: Apache-2.0
"""Guest memory from Python: numpy views, and the life of a mapping. Reads and writes: test_queue.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from vmm.memory import HOLE_END, HOLE_START, GuestMemory

MIB = 1 << 20


@pytest.fixture
def ram() -> Iterator[GuestMemory]:
    with GuestMemory(64 * MIB) as memory:
        yield memory


@pytest.fixture
def large() -> Iterator[GuestMemory]:
    """RAM on both sides of the hole below 4 GiB. The host allocates only pages that are touched."""
    with GuestMemory(HOLE_START + 64 * MIB) as memory:
        yield memory


@pytest.mark.parametrize("dtype", ["u1", "<u8"])
def test_view(benchmark: Any, ram: GuestMemory, dtype: str) -> None:
    view = benchmark(ram.view, 0x1000, 4096, dtype)
    assert view.nbytes == 4096


def test_view_sum_of_1_mib(benchmark: Any, ram: GuestMemory) -> None:
    """The cost for a program of viewing guest RAM as a numpy array."""
    view = ram.view(MIB, MIB, "<u8")
    ram.write(MIB, b"\1" + bytes(7))
    assert benchmark(view.sum) == 1


def test_read_above_the_hole(benchmark: Any, large: GuestMemory) -> None:
    assert benchmark(large.read, HOLE_END + 0x1000, 8) == bytes(8)


@pytest.mark.parametrize("size", [128 * MIB, HOLE_START + 64 * MIB], ids=["128 MiB", "around the hole"])
def test_map_and_close(benchmark: Any, size: int) -> None:
    benchmark(lambda: GuestMemory(size).close())
