# SPDX-License-Identifier: Apache-2.0
"""The reasons for which a VM stops: what users of an ``Enum`` do with them."""

from __future__ import annotations

import copy
import pickle

import pytest

from vmm import Stop, StopReason
from vmm.exits import _REASONS


def test_there_is_one_of_each_reason() -> None:
    for reason in _REASONS.values():
        assert getattr(StopReason, reason.name) is StopReason(reason.value) is reason
        assert pickle.loads(pickle.dumps(reason)) is copy.deepcopy(reason) is reason
        assert repr(reason) == f"StopReason.{reason.name}"


def test_unknown_reason_says_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"^'tired' is not a stop reason; allowed: power-off, reset, "):
        StopReason("tired")


def test_a_stop_needs_a_reason() -> None:
    with pytest.raises(TypeError, match=r"Stop: reason must be a StopReason, such as .*, not 'enough'"):
        Stop("enough")  # type: ignore[arg-type]
    assert Stop(StopReason.GUEST_EXIT, 3).exit.status == 3
