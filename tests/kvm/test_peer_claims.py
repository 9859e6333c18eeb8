# SPDX-License-Identifier: Apache-2.0
"""What README says of Firecracker and QEMU, asked of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benches.peers import claims, common
from benches.peers.firecracker import Missing, firecracker

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def _peers() -> None:
    try:
        common.need_kvm()
        firecracker()
    except Missing as missing:
        pytest.fail(f"LAYER MISSING: peers: {missing}")
    if shutil.which(common.QEMU) is None:
        pytest.fail("LAYER MISSING: peers: qemu-system-x86")


@pytest.mark.parametrize("claim", claims.CLAIMS, ids=lambda claim: f"{claim.peer}: {claim.text}")
def test_a_claim_holds(claim: claims.Claim, tmp_path: Path) -> None:
    assert claim.check(tmp_path) == claim.expected


def test_the_list_is_the_documents() -> None:
    text = (ROOT / "docs/peers.md").read_text()
    for claim in claims.CLAIMS:
        assert f"| {claim.peer} | {claim.text} |" in text
