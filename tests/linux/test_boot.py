# SPDX-License-Identifier: Apache-2.0
"""A Linux from its first instruction to its end, every way in and every way out."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from vmm.kvm.vm import runs_linux

# The session's first test here waits for every scenario.
pytestmark = pytest.mark.timeout(1800)

Scenario = Callable[[str], dict[str, Any]]


def _values(result: dict[str, Any]) -> dict[str, str]:
    """What the guest printed as ``name=value``; an echo of the command itself starts otherwise."""
    return dict(re.findall(r"^(\w+)=([^\r\n]*)\r?$", result["stdout"], re.MULTILINE))


def _show(result: dict[str, Any]) -> str:
    return f"status {result['status']}\n{result['stdout'][-3000:]}\n--\n{result['stderr'][-1000:]}"


@pytest.fixture(params=["disk_here", pytest.param("disk", marks=pytest.mark.lab)])
def disk(scenario: Scenario, request: pytest.FixtureRequest) -> dict[str, Any]:
    return scenario(request.param)


def test_root_on_a_virtio_disk(disk: dict[str, Any]) -> None:
    result = disk
    assert result["status"] == 0, _show(result)
    values = _values(result)
    assert values["cpus"] == str(result["asked"])
    assert 400_000 < int(values["memory"]) < 512 * 1024
    assert values["root"].startswith("/dev/vda / ext4 rw")
    assert int(values["virtio"]) == 1
    assert int(values["interrupts"]) >= 1
    # A software KVM promises a TSC that never stops, which Linux likes better.
    assert values["clock"] in (("kvm-clock",) if runs_linux() or "disk" == result["name"] else ("kvm-clock", "tsc"))


def test_what_was_synced_is_in_the_image(disk: dict[str, Any]) -> None:
    result = disk
    assert _values(result)["sum"].split()[0] == result["in_image"], _show(result)
    assert result["fsck"] in (0, 1, 4), "the journal may want a replay after poweroff -f, the file system no repair"


@pytest.mark.lab
def test_smp_without_acpi(scenario: Scenario) -> None:
    result = scenario("smp_without_acpi")
    assert _values(result)["cpus"] == "4", _show(result)
    assert "No such file" in _values(result)["acpi"]
    assert result["status"] == 80, "a reboot has a status of its own"


def test_panic(scenario: Scenario) -> None:
    result = scenario("panic_by_pvh")
    assert result["status"] == 81, _show(result)
    assert "pvh entry" in result["stderr"]
    assert "guest ended: panic" in result["stderr"]


def test_exit_code_from_user_space(scenario: Scenario) -> None:
    result = scenario("exit_port")
    assert result["status"] == 7, _show(result)
    assert ", linux64 entry" in result["stderr"]


@pytest.mark.lab
def test_two_queues_on_two_cpus_under_a_stock_kernel(scenario: Scenario) -> None:
    result = scenario("queues")
    assert result["status"] == 0, _show(result)
    values = _values(result)
    assert (values["blk"], values["net"]) == ("2", "4")
    assert values["sums"].split() == [result["sum"]] * 2
    assert (values["ping1"], values["ping2"]) == ("1", "1")


@pytest.mark.lab
def test_exit_code_by_the_bzimages_own_unpacker(scenario: Scenario) -> None:
    result = scenario("exit_port_by_bzimage")
    assert result["status"] == 7, _show(result)
    assert "bzimage, linux64 entry" in result["stderr"]


@pytest.mark.lab
def test_a_sandbox_and_its_copy_on_two_cpus_under_a_stock_kernel(scenario: Scenario) -> None:
    result = scenario("stock_sandbox")
    assert result["status"] == 0, _show(result)
    facts = json.loads(result["stdout"])
    assert (facts["cpus"], facts["both"], facts["after"]) == ("2", [0, 0], "1000000")
    assert facts["copy"] == ["2", "1000000", facts["name"]]
    assert len(set(facts["random"])) == 2


def test_triple_fault(scenario: Scenario) -> None:
    result = scenario("triple_fault")
    assert result["status"] == 82, _show(result)


@pytest.mark.lab
def test_what_is_pasted_loses_no_byte(scenario: Scenario) -> None:
    result = scenario("paste")
    assert result["status"] == 0, _show(result)
    assert result["expected"] in result["stdout"], _show(result)


def test_idle_guest_and_sigterm(scenario: Scenario) -> None:
    result = scenario("idle")
    assert result["status"] == 130, _show(result)
    assert result["busy"] < 0.5, "a sleeping guest must leave the host's CPU alone"


def test_a_directory_as_root(scenario: Scenario) -> None:
    result = scenario("root_directory")
    assert result["status"] == 7, _show(result)
    assert "rootfs / virtiofs rw" in result["stdout"]
    assert result["written"].splitlines() == [str(i) for i in range(1, 1001)]
