# SPDX-License-Identifier: Apache-2.0
"""Some random driver programs for each device; ``python -m tests.fuzz.fuzz_devices`` runs as many as you like."""

from __future__ import annotations

import gc
import sys

import pytest

from tests.fuzz.driver_programs import KINDS, Victim, descriptors

PROGRAMS = 300
# What a stream of passt's had begun stays with that passt.
MOVABLE = sorted(set(KINDS) - {"net-stream", "net-mmds-stream", "net-policy-stream"})


@pytest.mark.parametrize("name", sorted(KINDS))
def test_no_program_harms_the_host(name: str) -> None:
    gc.collect()
    before = descriptors()
    with Victim(name) as victim:
        for seed in range(PROGRAMS):
            victim.run(seed)
        assert len(victim.log) <= 200  # whatever the guest does, its lines are limited
    del victim
    gc.collect()  # what the loops in C hold goes with them
    assert descriptors() == before


@pytest.mark.parametrize("name", MOVABLE)
def test_a_conversation_goes_on_with_another_device(name: str) -> None:
    gc.collect()
    before = descriptors()
    with Victim(name, cuts=0.3) as victim:
        workers = len(victim.transport._workers)
        for seed in range(PROGRAMS // 2):
            victim.run(seed)
        assert victim.cut_count > PROGRAMS // 10
        assert len(victim.transport._workers) == workers, "none of an earlier transport"
    del victim
    gc.collect()
    assert descriptors() == before


@pytest.mark.parametrize("name", sorted(KINDS))
def test_no_guest_that_changes_what_is_being_read_harms_the_host(name: str) -> None:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        with Victim(name, races=True) as victim:
            for seed in range(PROGRAMS // 10):
                victim.run(seed)
    finally:
        sys.setswitchinterval(before)
