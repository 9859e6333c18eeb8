# SPDX-License-Identifier: Apache-2.0
"""The metadata service under Debian's kernel and busybox's wget and nc."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.linux.mmds import LARGE

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="session")
def facts(scenario: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    result = scenario("mmds")
    assert result["status"] == 0, result
    found: dict[str, Any] = json.loads(result["stdout"])
    return found


def test_v1(facts: dict[str, Any]) -> None:
    v1 = facts["v1"]
    digest = hashlib.md5(LARGE.encode()).hexdigest()
    assert v1["root"].splitlines() == ["count", "large", "latest/"]
    assert v1["keys"].splitlines() == ["ami-id", "network/"]
    assert v1["value"] == "ami-1"
    assert json.loads(v1["json"]) == {"meta-data": {"ami-id": "ami-1", "network": {"mac": "06:00"}}}
    assert "404" in v1["nowhere"]
    assert "501" in v1["number"]
    assert v1["large"].split()[0] == digest
    assert v1["again"].split() == ["20", "ami-1"]
    assert v1["at_once"].split()[:2] == ["4", digest]
    assert "06:01:23:45:67:01" in v1["arp"]
    assert v1["another_port"].endswith("1")
    assert facts["patched"] == "ami-2"


def test_v2(facts: dict[str, Any]) -> None:
    v2 = facts["v2"]
    assert "401" in v2["without"]
    assert v2["token"] == "48"
    assert v2["value"] == "ami-2"
    assert v2["aws"].splitlines() == ["ami-id", "network/"]
    assert "401" in v2["wrong"]


def test_the_driver_may_be_loaded_again(facts: dict[str, Any]) -> None:
    assert facts["reloaded"] == "ami-2"


def test_other_traffic_is_the_taps(facts: dict[str, Any]) -> None:
    assert "50 packets transmitted, 50 packets received" in facts["ping"]
    stats = facts["stats"]
    assert stats["mmds_connections_created"] >= 40
    assert stats["mmds_rx_accepted_err"] == stats["mmds_errors"] == stats["tx_bad"] == 0
