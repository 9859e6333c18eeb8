# SPDX-License-Identifier: Apache-2.0
"""What is closed in the background is closed, whatever fails."""

from __future__ import annotations

import mmap
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


def test_a_process_that_ends_leaves_it_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """What must be written is written, and its owner alone lets go of a mapping that is closed at once."""
    monkeypatch.setattr(undertaker, "_leaving", False)
    monkeypatch.setattr(undertaker, "_do", lambda task: pytest.fail("a thread was made for it"))
    undertaker.leave()
    ours = os.dup(0)
    soon, at_once = mmap.mmap(-1, 4096), mmap.mmap(-1, 4096)
    undertaker.bury(ours)
    undertaker.close_mapping(soon, at_once=False)
    undertaker.close_mapping(at_once, at_once=True)
    undertaker.bury_pages(1, 4096)  # no such address: it is not looked at
    os.close(ours)
    assert (soon.closed, at_once.closed) == (False, True)
    soon.close()
    done: list[object] = []
    monkeypatch.setattr(undertaker, "_do", done.append)
    undertaker.sync_and_bury(0)
    assert len(done) == 1
