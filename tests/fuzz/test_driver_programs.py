# SPDX-License-Identifier: Apache-2.0
"""Some random driver programs for each device; ``python -m tests.fuzz.fuzz_devices`` runs as many as you like."""

from __future__ import annotations

import gc

import pytest

from tests.fuzz.driver_programs import KINDS, Victim, descriptors

PROGRAMS = 300


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
