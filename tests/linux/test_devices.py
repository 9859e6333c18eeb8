# SPDX-License-Identifier: Apache-2.0
"""The four devices under a stock kernel and the programs that people use on them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from tests.linux.device_scenarios import CONNECTIONS, DISK, DISKS, MIB, STRESSORS
from tests.linux.kernels import cpus
from tests.virtio.test_fs_mounts import CONFIGFS

# The first test here waits for every scenario, and for the lab's before them.
pytestmark = pytest.mark.timeout(1800)

# How often the driver lies, in probe.c.
LIES = 4


@pytest.fixture
def result(device_scenario: Callable[[str], dict[str, Any]], request: pytest.FixtureRequest) -> dict[str, Any]:
    """The result of the scenario that a test is named after."""
    facts = device_scenario(request.node.name.removeprefix("test_"))
    assert facts["status"] == 0, facts["error"]
    return facts


def _loss(said: str) -> str:
    found = re.search(r"([\d.]+)% packet loss", said)
    assert found, said
    return found[1]


def test_blk_verify(result: dict[str, Any]) -> None:
    for name, (_, queues) in DISKS.items():
        error, read, written = result[name].split(";")
        assert error == "0"
        assert int(read) >= int(written) == 2 * 12 * 1024, "every block is read again"
        assert result[f"{name}_queues"] == min(queues, cpus(2))


def test_blk_filesystem(result: dict[str, Any]) -> None:
    assert result["same"] == 0
    assert result["fsck_guest"] == 0
    assert result["fsck_host"] == 0
    assert result["trimmed"] <= result["full"] - 20 * MIB, "what fstrim discards is free on the host"
    assert result["discarded"] < MIB


def test_blk_resize(result: dict[str, Any]) -> None:
    assert result["before"] == DISK // 512
    assert result["after"] == (DISK + 16 * MIB) // 512
    assert result["last"] == "grown"


def test_blk_reload(result: dict[str, Any]) -> None:
    assert len(result["sums"]) == 4
    assert len(set(result["sums"])) == 1


def test_net_traffic(result: dict[str, Any]) -> None:
    for offloads in ("on", "off"):
        for name in ("tcp_out", "tcp_in", "udp_out", "udp_in"):
            assert result[f"{name}_{offloads}"]["bytes"] > 100_000, name
    assert _loss(result["ping"]) == "0"
    assert _loss(result["ping_large"]) == "0"


def test_net_reload(result: dict[str, Any]) -> None:
    assert [_loss(said) for said in result["pings"]] == ["0"] * 3


def test_vsock_connections(result: dict[str, Any]) -> None:
    assert result["errors"] == ""
    assert result["by_guest"] == result["expected"] == 2 * CONNECTIONS * 32768
    assert result["by_host"] == [str(result["expected"])]


def test_vsock_reload(result: dict[str, Any]) -> None:
    assert result["bytes"] == 2 * 8 * 100000


def test_frozen_at_work(result: dict[str, Any]) -> None:
    assert result["failed"] == []
    assert set(result["turns"]) == {"disk", "net", "sockets", "build", "timer"}
    assert result["dmesg"] == ""


def test_fs_work(result: dict[str, Any]) -> None:
    assert result["compiled"] == 42
    assert result["cloned"] == ["f0.c", "f1.c", "f2.c", "f3.c", "f4.c", "f5.c", "main.c"]
    assert result["head"][0] == result["head"][1]
    assert result["unpacked"] == 0


def test_fs_frozen(result: dict[str, Any]) -> None:
    assert (result["compiled"], result["copy_compiled"]) == (42, 42)
    assert (result["says"], result["copy_says"]) == ("", "")
    assert result["frozen"] > 20


def test_fs_read_only(result: dict[str, Any]) -> None:
    assert result["read"] == "as it was"
    assert result["done"] == []
    assert (result["here"], result["mode"]) == ({"kept": "as it was"}, 0o644)
    assert result["unmounted"] == 0


def test_fs_many_files(result: dict[str, Any]) -> None:
    assert result["here"] == result["there"] == result["count"]
    assert not result["left"]


def test_fs_mmap(result: dict[str, Any]) -> None:
    assert result["a"][0] == result["a"][1]
    assert result["b"][0] == result["b"][1]
    assert "dax" in result["mounts"]
    assert result["unlinked"] == "kept"
    assert result["cut"] + "\n" == result["cut_here"] == "two\nthree\n"
    assert result["handles"] == [0], "files are used without being opened"
    assert int(result["configfs"], 16) == CONFIGFS


def test_fs_stress(result: dict[str, Any]) -> None:
    failed = {name: result[name] for name in STRESSORS if result[name]["status"]}
    if not result["xattrs"]:
        assert "does not support xattr" in failed.pop("xattr")["said"], "the guest has what the host's file system has"
    assert failed == {}
    assert result["left"] == "0"


def test_fs_two_guests(result: dict[str, Any]) -> None:
    assert result["seen"] == ["one", "one\ntwo", "three", "three"]
    assert result["counts"] == [201, 201]
    assert result["here"] == 201


def test_liar(result: dict[str, Any]) -> None:
    assert result["lies"] == f"{LIES} {LIES}", "each lie is found out"
    for moment in ("before", "after"):
        error, *rates = result[moment].split(";")
        assert error == "0"
        assert all(int(rate) > 0 for rate in rates)
    assert result["share"] == "ok"
    assert _loss(result["ping"]) == "0"
    assert "4194304 bytes" in result["again"], "after a reset the device is as good as new"
