# SPDX-License-Identifier: Apache-2.0
"""Kata's two drivers with a Linux booted by Kata's own kernel arguments: its disks, their order, its agent."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

# The session's first test here waits for every scenario.
pytestmark = pytest.mark.timeout(1800)

Scenario = Callable[[str], dict[str, Any]]


def _found(scenario: Scenario, runtime: str) -> dict[str, Any]:
    result = scenario("kata")
    assert result["stdout"], result["stderr"][-3000:]
    found: dict[str, Any] = json.loads(result["stdout"])[runtime]
    if "Missing" in found.get("failed", ""):
        pytest.fail(f"LAYER MISSING: kata: {found['failed']}", pytrace=False)
    assert "failed" not in found, (found["failed"], result["stderr"][-3000:])
    return found


def _disks(*sectors: int) -> str:
    # The root is read-only.
    return "|".join(f"vd{'abcdefghi'[i]} {size} {int(i == 0)}" for i, size in enumerate(sectors))


def test_go_runtime(scenario: Scenario) -> None:
    found = _found(scenario, "go")
    assert "OK" in found["greeting"]
    assert {"fc_api", "fc_vcpu 0"} <= set(found["threads"])
    assert "acpi=off" in found["cmdline"] and "No such file" in found["acpi"]
    assert found["root"].startswith("/dev/root / ext4 ro")
    assert found["link"] == "02:42:ac:11:00:02"
    assert found["stopped_in"] < 5 and found["status"] == 0
    assert found["metrics_lines"] >= 1


def test_go_runtime_plugs_disks_in_the_places_of_placeholders(scenario: Scenario) -> None:
    found = _found(scenario, "go")
    assert found["blocks"] == _disks(34816, *[0] * 8)
    assert found["plugged"] == _disks(34816, 4 * 2048, 0, 0, 6 * 2048, 0, 0, 0, 9 * 2048)
    for device, drive in (("vdb", "drive_0"), ("vde", "drive_3"), ("vdi", "drive_7")):
        assert found["mounted"][device].startswith(f"{drive}|/dev/{device} "), found["mounted"]
    assert found["unplugged"] == _disks(34816, 4 * 2048, 0, 0, 0, 0, 0, 0, 9 * 2048)


def test_runtime_rs(scenario: Scenario) -> None:
    found = _found(scenario, "runtime_rs")
    found["sent"].pop("01-boot-source")  # once more for each time that it came before the socket
    assert set(found["sent"].values()) == {1}
    assert "OK" in found["greeting"]
    assert found["blocks"] == _disks(34816, *[0] * 5)
    assert found["plugged"] == _disks(34816, 4 * 2048, 0, 0, 0, 9 * 2048)
    for device, drive in (("vdb", "drive1"), ("vdf", "drive5")):
        assert found["mounted"][device].startswith(f"{drive}|/dev/{device} "), found["mounted"]
    assert not found["early_end"] and found["end"]
