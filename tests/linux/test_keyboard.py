# SPDX-License-Identifier: Apache-2.0
"""Debian's own keyboard driver hears Ctrl-Alt-Del; the boot timer, metrics and the log of such a VM."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(params=["acpi", "kata"])
def facts(request: pytest.FixtureRequest, scenario: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    result = scenario("keyboard")
    assert result["status"] == 0, result
    found: dict[str, Any] = json.loads(result["stdout"])[request.param]
    return found


def test_driver_finds_the_keyboard_and_reboots(facts: dict[str, Any]) -> None:
    assert 'N: Name="AT Translated Set 2 keyboard"' in facts["seen"]
    assert facts["end"] == "reset"


def test_guest_told_the_boot_timer(facts: dict[str, Any]) -> None:
    assert facts["timer"] == "0"
    assert re.fullmatch(
        r"\S+ \[keyboard:fc_vcpu 0:INFO\] Guest-boot-time = +\d+ us \d+ ms, +\d+ CPU us \d+ CPU ms\n", facts["log"]
    )


def test_last_line_of_metrics_has_the_guests_last_words(facts: dict[str, Any]) -> None:
    last = facts["metrics"][-1]
    assert last["i8042"]["reset_count"] == 1
    assert last["i8042"]["read_count"] >= 5  # the keys
    assert last["uart"]["write_count"] > 0
    assert last["vcpu"]["exit_mmio_write"] >= 1
    assert "pyvmm_i8042_reset_total 1\n" in facts["prometheus"]
