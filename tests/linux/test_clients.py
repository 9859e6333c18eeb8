# SPDX-License-Identifier: Apache-2.0
"""Firecracker clients that others wrote, unmodified, boot a Linux by the socket."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

# The session's first test here waits for every scenario.
pytestmark = pytest.mark.timeout(1800)

Scenario = Callable[[str], dict[str, Any]]


def _found(scenario: Scenario, client: str) -> dict[str, Any]:
    result = scenario("clients")
    assert result["stdout"], result["stderr"][-3000:]
    found: dict[str, Any] = json.loads(result["stdout"])[client]
    if found.get("failed", "").startswith(("Missing", "PullError")):
        pytest.fail(f"LAYER MISSING: clients: {found['failed']}", pytrace=False)
    assert "failed" not in found, found["failed"]
    return found


def test_firecracker_python(scenario: Scenario) -> None:
    found = _found(scenario, "firecracker-python")
    root, sectors, pinged, metadata = found["agent"]
    assert root.startswith("/dev/root / ext4 rw") and sectors == "32768"
    assert pinged == "1"
    assert metadata == "said by the host"
    assert found["paused"][1] == "Paused" and found["resumed"][1] == "Running"
    assert found["agent_again"] == root
    assert found["deleted"].endswith(" is deleted") and found["left"] == ["snapshots"]


def test_smolvm(scenario: Scenario) -> None:
    found = _found(scenario, "smolvm")
    root, sectors = found["agent"]
    assert root.startswith("/dev/root / ext4 rw") and sectors == "32768"
    assert (found["before"], found["paused"], found["after"]) == ("Not started", "Paused", "Running")
    assert found["agent_again"] == root
