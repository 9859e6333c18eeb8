# SPDX-License-Identifier: Apache-2.0
"""What an owner has made is undone, whatever fails."""

from __future__ import annotations

import os

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
