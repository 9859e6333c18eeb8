# SPDX-License-Identifier: Apache-2.0
"""Guest memory, interrupt lines and both queues for the virtio tests."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.virtio import queue_twin
from virtio.testing import Allocator
from vmm import _fastpath, threads
from vmm.irq import IrqLine
from vmm.jail import _seccomp
from vmm.memory import GuestMemory

RAM = 4 << 20


@pytest.fixture(params=["c", "py"])
def queue_class(request: pytest.FixtureRequest) -> Any:
    """``VirtQueue`` in C, then its Python twin."""
    return {"c": _fastpath.VirtQueue, "py": queue_twin.VirtQueue}[request.param]


@pytest.fixture
def ram() -> Iterator[GuestMemory]:
    with GuestMemory(RAM) as memory:
        yield memory


@pytest.fixture
def allocator() -> Allocator:
    return Allocator(0x1000, RAM - 0x1000)


@pytest.fixture
def irq() -> Iterator[IrqLine]:
    line = IrqLine(5)
    yield line
    line.close()


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    """What a test enters here, or gives a callback, ends with it."""
    with contextlib.ExitStack() as stack:
        yield stack


class LandlockAlone:
    """In place of ``vmm.jail.seccomp``'s guard: Landlock without filters, which a session of tests could not lose."""

    alone = False

    def confines(self) -> bool:
        return False

    def start(self, thread: threading.Thread) -> None:
        thread.start()

    def install(self, kind: str, below: tuple[int, bool] | None = None) -> None:
        if below is not None:
            _seccomp.confine(True, *below)


@pytest.fixture(autouse=True)
def _threads_of_shares_open_files_below_them(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the tests of shares do is done behind Landlock, where the kernel has it."""
    if request.path.name.startswith("test_fs"):
        monkeypatch.setattr(threads, "guard", LandlockAlone())
