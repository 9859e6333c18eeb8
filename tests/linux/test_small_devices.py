# SPDX-License-Identifier: Apache-2.0
"""virtio-rng, -balloon and -console under Debian's own drivers, and the guide's device beside them."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(1800)
MIB = 1 << 20


@pytest.fixture(scope="session")
def facts(scenario: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    result = scenario("small_devices")
    assert result["status"] == 0, result
    found: dict[str, Any] = json.loads(result["stdout"])
    return found


@pytest.fixture
def small(facts: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = facts["small"]
    return found


def test_the_drivers_take_them(small: dict[str, Any]) -> None:
    assert sorted(small["drivers"].split()) == ["virtio_balloon", "virtio_console", "virtio_rng"]
    assert all(counters["needs_reset"] == counters["bad_requests"] == 0 for counters in small["stats"].values())


def test_random_numbers(small: dict[str, Any]) -> None:
    assert small["rng"].split() == ["virtio_rng.0", "1000"]
    assert small["stats"]["rng"]["bytes"] >= 1000


def test_console_and_port_both_ways_and_its_size(small: dict[str, Any]) -> None:
    assert small["hvc0"] == "from the guest\r\n" and small["hvc0_read"] == "from the host"
    assert small["size"] == "37 91" and small["resized"]
    assert small["port"] == "org.pyvmm.test"
    assert small["agent"] == "agent\n" and small["agent_read"] == "orders"


@pytest.mark.parametrize("where", ["memfd", "mapped"])
def test_inflating_gives_the_host_its_memory_back(small: dict[str, Any], where: str) -> None:
    assert small["inflated"]
    # of the 64 MiB that the balloon took, most had been used before: 48 with r3, all with a stock kernel
    assert small["before"][where] - small["after"][where] > 40 * MIB
    assert small["free_before"] - small["free_after"] > 80 * 1024


def test_statistics_and_deflation(small: dict[str, Any]) -> None:
    assert small["statistics_came"]
    statistics = small["statistics"]
    assert statistics["target_pages"] == statistics["actual_pages"] == 96 * 256
    assert 100 * MIB < statistics["total_memory"] < 192 * MIB
    assert {"minor_faults", "available_memory", "disk_caches", "swap_in"} <= set(statistics)
    assert small["deflated"] and small["used_again"] == "yes"


def test_drivers_that_are_loaded_again(small: dict[str, Any]) -> None:
    assert small["reloaded"] == "100"
    assert small["inflated_after_reload"]


def test_free_page_reporting_gives_memory_back_without_being_asked(facts: dict[str, Any]) -> None:
    reporting = facts["reporting"]
    assert reporting["came"], reporting
    assert reporting["before"]["mapped"] - reporting["after"]["mapped"] > 40 * MIB
    assert reporting["stats"]["inflated"] == 0


def test_a_program_gets_what_the_balloon_holds_if_it_deflates_on_oom(facts: dict[str, Any]) -> None:
    deflates, holds = facts["hungry"]["deflates"], facts["hungry"]["holds"]
    assert deflates["inflated"] and holds["inflated"], facts["hungry"]
    assert deflates["ended"] == "status 0" and deflates["actual_mib"] < deflates["amount_mib"] - 10
    assert holds["ended"] != "status 0" and holds["actual_mib"] == holds["amount_mib"]  # SIGKILL, or refused


def test_the_guides_device_in_a_stock_kernel(scenario: Callable[[str], dict[str, Any]]) -> None:
    result = scenario("device_guide")
    assert result["status"] == 0, result
    assert "power-off {" in result["stdout"] and "'bad_requests': 0" in result["stdout"]
    rows = re.findall(r"^((?: [0-9a-f]{2}){16})\r?$", result["stdout"], re.MULTILINE)
    assert len(rows) == 3
    assert bytes.fromhex("".join(rows)) in random.Random(42).randbytes(1 << 20)
