# SPDX-License-Identifier: Apache-2.0
"""The network device under Debian's own driver: taps with one queue and two, passt, a driver that goes and comes."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.linux.kernels import cpus

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="session")
def facts(scenario: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    result = scenario("net_devices")
    assert result["status"] == 0, result
    found: dict[str, Any] = json.loads(result["stdout"])
    return found


def test_the_driver_finds_what_was_configured(facts: dict[str, Any]) -> None:
    assert facts["queues"] == [f"{way}-{queue}" for way in ("rx", "tx") for queue in range(cpus(2))]
    assert facts["macs"][0] == "06:00:ac:10:00:02"
    assert len(set(facts["macs"])) == 3
    assert facts["mtus"] == ["1500", "4000", "1500"]


@pytest.mark.parametrize("part", ["", "reloaded "])
def test_host_and_guest_reach_each_other(facts: dict[str, Any], part: str) -> None:
    """Also after rmmod and modprobe."""
    assert facts[part + "ping"][0] == 0, facts[part + "ping"]
    assert facts["host"][part + "ping"] == [True, True]


def test_bytes_arrive_both_ways(facts: dict[str, Any]) -> None:
    assert facts["get"] == facts["reloaded get"] == facts["put_md5"] == facts["md5"]


def test_passt_gives_an_address_and_a_way_to_the_host(facts: dict[str, Any]) -> None:
    assert facts["dhcp"][0] == 0, facts["dhcp"]
    assert facts["lease"] == ["10.7.7.5", "10.7.7.1"]
    assert facts["by passt"][1].split()[0] == facts["md5"]


def test_a_mistake_is_one_line(facts: dict[str, Any]) -> None:
    for option, (status, said) in facts["mistakes"].items():
        assert status == 2, option
        assert said.startswith("pyvmm run: "), said
        assert said.count("\n") == 1, said


def test_nothing_is_left(facts: dict[str, Any]) -> None:
    assert facts["status"] == 0
    assert facts["left"] == []
