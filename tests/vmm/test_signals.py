# SPDX-License-Identifier: Apache-2.0
"""The descriptor that wakes the main thread."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from vmm import signals


@pytest.fixture
def heard() -> Iterator[list[int]]:
    numbers: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: numbers.append(number))
    interval = sys.getswitchinterval()
    yield numbers
    sys.setswitchinterval(interval)
    signal.signal(signal.SIGUSR1, before)


def test_what_another_thread_took_before_the_bell_was_there_is_heard(heard: list[int]) -> None:
    other = threading.Thread(target=time.sleep, args=(60,), daemon=True)
    other.start()
    time.sleep(0.05)  # the other thread sleeps by then
    assert other.ident is not None
    with signals.Bell() as bell:
        # As it is before set_wakeup_fd's last step. This thread keeps the GIL, so nothing else tells it of the signal.
        signal.set_wakeup_fd(-1)
        sys.setswitchinterval(30)
        signal.pthread_kill(other.ident, signal.SIGUSR1)
        end = time.monotonic() + 0.1
        while time.monotonic() < end:
            pass
        assert bell.wait(lambda: bool(heard), 30)
        assert time.monotonic() < end + 15  # and not when the 30 s were over


def test_a_month_is_waited_for_in_parts() -> None:
    rung: list[int] = []
    with signals.Bell() as bell:

        def ring() -> None:
            rung.append(1)
            bell.ring()

        other = threading.Timer(0.05, ring)
        other.start()
        assert bell.wait(lambda: bool(rung), 90 * 86400)
        other.join()


def test_one_that_rings_late_writes_to_nobodys_descriptor() -> None:
    with signals.Bell() as bell:
        pass
    out, into = os.pipe()  # of the same numbers
    bell.ring()
    assert not select.select([out], [], [], 0)[0]
    os.close(into)
    os.close(out)
    bell.ring()
