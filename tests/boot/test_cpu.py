# SPDX-License-Identifier: Apache-2.0
"""CPUID as a guest reads it: what a vCPU says of the package, whatever KVM gave."""

from __future__ import annotations

import pytest

from boot.cpu import shape_cpuid
from vmm.kvm.abi import kvm_cpuid_entry2

SIGNIFICANT_INDEX = 1


def entry(function: int, index: int = 0, **registers: int) -> kvm_cpuid_entry2:
    return kvm_cpuid_entry2(function=function, index=index, flags=SIGNIFICANT_INDEX, **registers)


# As Linux gives them since 6.2: level 0 alone; before, as many as the host has.
NEW = [(0, 0, 0, 0)]
OLD = [(1, 2, 1 << 8, 5), (4, 8, 2 << 8 | 1, 5), (0, 0, 2, 5)]


@pytest.mark.parametrize("leaf", [0xB, 0x1F])
@pytest.mark.parametrize("given", [NEW, OLD], ids=["Linux 6.2", "before"])
@pytest.mark.parametrize(
    ("count", "threads", "bits"), [(1, 1, (0, 0)), (4, 1, (0, 2)), (4, 2, (1, 2)), (6, 2, (1, 3)), (64, 1, (0, 6))]
)
def test_every_level_of_the_topology_is_there(
    leaf: int, given: list[tuple[int, ...]], count: int, threads: int, bits: tuple[int, int]
) -> None:
    entries = [entry(leaf, i, eax=a, ebx=b, ecx=c, edx=d) for i, (a, b, c, d) in enumerate(given)] + [entry(0x80000000)]
    for index in (0, count - 1):  # the same table for one vCPU after the other
        shape_cpuid(entries, index=index, count=count, threads=threads, tsc_deadline=True)
        levels = [(each.eax, each.ebx, each.ecx) for each in entries if each.function == leaf]
        assert levels == [(bits[0], threads, 1 << 8), (bits[1], count, 2 << 8 | 1), (0, 0, 2)]
        assert {each.edx for each in entries if each.function == leaf} == {index}
        assert {each.flags for each in entries} == {SIGNIFICANT_INDEX}
        assert [each.index for each in entries if each.function == leaf] == [0, 1, 2]


def test_a_leaf_that_the_cpu_has_not_is_not_made_up() -> None:
    entries = [entry(0x1), entry(0x80000000)]
    shape_cpuid(entries, index=0, count=2, tsc_deadline=False)
    assert [each.function for each in entries] == [0x1, 0x80000000]
