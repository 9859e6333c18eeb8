# SPDX-License-Identifier: Apache-2.0
"""A configuration that Firecracker 1.12.1 boots, pyvmm boots, too: the same file, the same Debian, the same machine."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from tests.api.differential import FIELDS
from tests.linux.same_config import WRITTEN

pytestmark = pytest.mark.timeout(1800)

Pair = tuple[dict[str, Any], dict[str, Any]]


@pytest.fixture
def both(scenario: Callable[[str], dict[str, Any]]) -> Pair:
    result = scenario("same_config")
    assert result["status"] == 0, result["stderr"][-2000:]
    found = json.loads(result["stdout"])
    return found["firecracker"], found["pyvmm"]


def _facts(console: str) -> dict[str, str]:
    inside = re.search(r"<facts>(.*)</facts>", console, re.DOTALL)
    assert inside is not None, console[-3000:]
    lines = inside[1].replace("\r", "").strip()
    return dict(re.findall(r"^(\w+)=(.*(?:\n(?!\w+=).*)*)$", lines, re.MULTILINE))


def test_guests_find_the_same_machine(both: Pair) -> None:
    theirs, ours = (_facts(each["console"]) for each in both)
    words = [
        [word for word in facts.pop("cmdline").split() if not word.startswith("virtio_mmio.device=")]
        for facts in (theirs, ours)
    ]
    assert words[0] == words[1]
    memory = [int(facts.pop("memory")) for facts in (theirs, ours)]
    assert abs(memory[0] - memory[1]) < memory[0] / 50
    assert theirs == ours
    assert ours["wrote"] == WRITTEN and ours["random"] == "16"
    assert ours["mmds"].split() == ["ami-id", "hostname"]
    assert ours["vda"].startswith("8192 "), "the root device is the first"


def test_both_tell_the_same_configuration(both: Pair) -> None:
    for field in FIELDS:
        for each in both:
            del each["config"][field.name]
    assert both[0]["config"] == both[1]["config"]


def test_the_same_is_left_afterwards(both: Pair) -> None:
    for each in both:
        assert each["status"] == 0, each["console"][-2000:]
        assert each["written"] == WRITTEN
        assert each["metrics"] >= 1
        assert "INFO" in each["log"]
