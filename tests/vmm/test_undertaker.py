# SPDX-License-Identifier: Apache-2.0
"""What is closed in the background is closed, whatever fails."""

from __future__ import annotations

import os
import threading

import pytest

from vmm import undertaker

BAD = 1 << 20  # no descriptor has this number


def test_a_close_that_fails_is_not_the_last(capfd: pytest.CaptureFixture[str]) -> None:
    """A network's file system may say at a close that its disk is full. Who waits later does not wait for ever."""
    undertaker.bury(BAD)
    undertaker.sync_and_bury(BAD)
    undertaker.bury_from_finalizer(BAD)
    ours = os.dup(0)
    undertaker.bury(ours)
    undertaker.wait()
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(ours)
    assert capfd.readouterr() == ("", "")


def test_a_failure_to_write_is_told_to_who_waits() -> None:
    wait = undertaker.sync(BAD)
    with pytest.raises(OSError, match="Bad file"):
        wait()


def test_a_caller_that_closes_itself_meets_no_failure_either() -> None:
    hold = threading.Event()
    try:
        for _ in range(undertaker._MOST + 2):
            undertaker._do(hold.wait)
            if undertaker._queue.qsize() >= undertaker._MOST:
                break
        undertaker.bury(BAD)
    finally:
        hold.set()
    undertaker.wait()
