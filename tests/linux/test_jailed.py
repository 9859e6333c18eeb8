# SPDX-License-Identifier: Apache-2.0
"""Debian's kernel with disk, network, sockets and a share, in a jail and behind seccomp filters."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.jail.jailed import UID
from tests.linux.kernels import cpus

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="session")
def facts(scenario: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    result = scenario("jailed")
    assert result["status"] == 0, result
    found: dict[str, Any] = json.loads(result["stdout"])
    return found


def test_the_disk_keeps_what_is_written(facts: dict[str, Any]) -> None:
    assert [line.split()[0] for line in facts["disk"].splitlines()] == [facts["md5"]] * 2
    assert facts["patch"] == 204
    assert facts["sectors"] == str(48 << 11)


def test_the_share_is_the_hosts_directory(facts: dict[str, Any]) -> None:
    lines = facts["share"].splitlines()
    assert lines[0].split()[0] == facts["md5"]
    assert lines[1:] == ["200", "200", "1", "1"]
    assert facts["output"] == [facts["md5"], UID]


@pytest.mark.parametrize("part", ["net", "reloaded"])
def test_the_network_of_its_namespace_answers(facts: dict[str, Any], part: str) -> None:
    assert "50 packets transmitted, 50 packets received" in facts[part]


def test_the_small_devices_work(facts: dict[str, Any]) -> None:
    assert facts["rng"] == "64"
    assert facts["balloon"]["actual_mib"] == 16


def test_every_thread_has_a_filter(facts: dict[str, Any]) -> None:
    assert set(facts["threads"].values()) == {"2"}
    vcpus = {f"fc_vcpu {number}" for number in range(cpus(2))}
    assert vcpus | {"fc_api", "virtio-blk0", "virtio-net0", "virtio-vsock", "virtio-fs0"} <= set(facts["threads"])


def test_a_signal_ends_it_in_under_a_second(facts: dict[str, Any]) -> None:
    assert facts["end_seconds"] < 1
