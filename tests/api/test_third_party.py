# SPDX-License-Identifier: Apache-2.0
"""Firecracker clients that others wrote, unmodified, boot a VM by the socket; and by Firecracker 1.12.1's as well."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benches.peers.firecracker import Missing
from tests.api import third_party
from tests.api.oracle import firecracker
from tests.kvm.ring3 import kernel
from vmm.errors import ConfigError
from vmm.images.host import PullError
from vmm.kvm.vm import Kvm

SECTORS, WORD = 2048, 0x1122334455667788
DISK = f"capacity={SECTORS} changed=0 word={WORD}"


# Before any test is in a namespace without a network: pip or apt may have to fetch something.
@pytest.fixture(scope="session", params=["pyvmm", "Firecracker 1.12.1"])
def peer(request: pytest.FixtureRequest) -> str | None:
    try:
        Kvm().close()
        for client in third_party.WHEELS:
            third_party.installed(client)
        third_party.nftables()
    except (ConfigError, Missing, PullError) as problem:
        pytest.fail(f"LAYER MISSING: clients: {problem}", pytrace=False)
    return None if request.param == "pyvmm" else firecracker()


@pytest.fixture
def program(peer: str | None, tmp_path: Path, namespace: None) -> str:
    """What the clients find as firecracker."""
    if peer is not None:
        return peer
    code = "from vmm.commands.cli import main; raise SystemExit(main())"
    command = [sys.executable, "-c", code, "link", "firecracker", str(tmp_path)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def booted_by(client: str, program: str, tmp_path: Path) -> dict[str, Any]:
    disk = tmp_path / "rootfs"
    with disk.open("wb") as file:
        file.write(WORD.to_bytes(8, "little"))
        file.truncate(SECTORS * 512)
    try:
        return third_party.run(client, program, Path(kernel("kata")), disk)
    except (Missing, PullError) as problem:
        pytest.fail(f"LAYER MISSING: clients: {problem}", pytrace=False)


def test_firecracker_python(program: str, tmp_path: Path) -> None:
    found = booted_by("firecracker-python", program, tmp_path)
    assert found["created"].endswith(" created")
    assert found["agent"] == [DISK]
    assert found["status"].endswith(" is running")
    assert found["listed"] == [[True, "Running"]]
    assert found["paused"][1] == "Paused" and found["resumed"][1] == "Running"
    assert found["agent_again"] == DISK
    assert found["config"]["machine-config"]["mem_size_mib"] == 128
    assert found["config"]["mmds-config"]["network_interfaces"] == ["eth0"]
    assert found["deleted"].endswith(" is deleted")
    assert found["left"] == ["snapshots"]


def test_smolvm(program: str, tmp_path: Path) -> None:
    found = booted_by("smolvm", program, tmp_path)
    assert found["agent"] == [DISK]
    assert (found["before"], found["paused"], found["after"]) == ("Not started", "Paused", "Running")
    assert found["agent_again"] == DISK
    assert found["refused"].endswith("The requested operation is not supported after starting the microVM.")


@pytest.mark.parametrize("client", ["hysn", "bunkervm", "bandsox"])
def test_a_snapshot_and_what_goes_on_from_it(program: str, tmp_path: Path, client: str) -> None:
    if client == "hysn" and "PYVMM_SLOW" not in os.environ:
        pytest.skip("it sleeps 12 s: run with PYVMM_SLOW=1")
    found = booted_by(client, program, tmp_path)
    assert found["agent"] == [DISK]
    assert found["agent_restored"] == DISK
    assert found.get("agent_after", DISK) == DISK
    if client == "hysn":
        assert found["created"].endswith(" created") and found["restored"].endswith(" created")
        assert (found["after"], found["state"]) == ("Running", "Running")
        assert found["deleted"].endswith(" is deleted") and found["deleted_too"].endswith(" is deleted")
