# SPDX-License-Identifier: Apache-2.0
"""What an owner has made is undone, whatever fails."""

from __future__ import annotations

import os
from functools import partial

import pytest

from vmm.closing import Closers


def test_a_call_that_raises_keeps_no_other_from_being_made() -> None:
    done: list[int] = []
    closers = Closers()
    closers.append(lambda: done.append(1))
    closers.append(lambda: os.close(1 << 20))
    closers.append(lambda: done.append(2))
    with pytest.raises(OSError, match="Bad file"):
        closers.close()
    assert done == [2, 1] and not closers
    closers.close()
    assert done == [2, 1]


def test_many_calls_are_made_and_the_first_failure_is_raised() -> None:
    done: list[int] = []

    def fail(number: int) -> None:
        done.append(number)
        raise OSError(number, "no more")

    with pytest.raises(OSError, match="4999"):
        Closers(partial(fail, number) for number in range(5000)).close()
    assert len(done) == 5000
