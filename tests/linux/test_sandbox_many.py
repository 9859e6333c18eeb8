# SPDX-License-Identifier: Apache-2.0
"""Sandboxes one after the other, and several at once, leave nothing; benches/sandboxes.py is for many of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from benches import sandboxes

pytestmark = pytest.mark.timeout(900)  # the first one may build r3


def test_made_forked_and_closed_ones_leave_nothing(runtime: Path) -> None:
    first, after, _, _ = sandboxes.churn(4)
    assert not after.exceeds(first), (first, after)


def test_several_at_once_leave_nothing(runtime: Path) -> None:
    before, during, after, _ = sandboxes.crowd(2)
    assert during.exceeds(before)
    assert not after.exceeds(before), (before, after)
