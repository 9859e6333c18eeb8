# SPDX-License-Identifier: Apache-2.0
"""CPU templates: their words, and what they do to CPUID."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.api.types import CpuConfig, CpuidLeafModifier, CpuidRegisterModifier, RegisterModifier
from vmm.config.cpu_template import Bits, CpuTemplate, parse_number
from vmm.errors import ConfigError
from vmm.kvm.abi import kvm_cpuid_entry2


@given(st.lists(st.sampled_from("01x"), min_size=1, max_size=32), st.integers(0, (1 << 32) - 1))
def test_each_bit_is_set_cleared_or_stays(digits: list[str], old: int) -> None:
    new = Bits.written("bitmap", "0b" + "".join(digits), 32)(old)
    for bit, digit in enumerate(reversed(digits)):
        assert new >> bit & 1 == (old >> bit & 1 if digit == "x" else int(digit))
    assert new >> len(digits) == old >> len(digits)


@pytest.mark.parametrize("text", ["", "0b", "1", "0b2", "0x1", "0b" + "1" * 33, "0b1 "])
def test_what_is_no_bitmap(text: str) -> None:
    with pytest.raises(ConfigError, match="must be 0b and at most 32"):
        Bits.written("bitmap", text, 32)


@pytest.mark.parametrize(("text", "value"), [("0x1f", 31), ("31", 31), ("0b11", 3), ("0xffffffff", (1 << 32) - 1)])
def test_numbers(text: str, value: int) -> None:
    assert parse_number("leaf", text) == value


@pytest.mark.parametrize("text", ["", "-1", "0x100000000", "leaf", "1_0", "\N{ARABIC-INDIC DIGIT ONE}"])
def test_what_is_no_number(text: str) -> None:
    with pytest.raises(ConfigError, match="must be a 32-bit number"):
        parse_number("leaf", text)


def test_a_template_changes_the_leaf_it_names_and_no_other() -> None:
    entries = [kvm_cpuid_entry2(function=7, index=index, ebx=0xF0) for index in (0, 1)]
    bits = [CpuidRegisterModifier(register="ebx", bitmap="0bxx1100")]
    template = CpuConfig(
        kvm_capabilities=["171", "!56"],
        cpuid_modifiers=[CpuidLeafModifier(leaf="0x7", subleaf="0x0", flags=1, modifiers=bits)],
        msr_modifiers=[RegisterModifier(addr="0x10a", bitmap="0b1")],
    ).template()
    template.change_cpuid(entries)
    assert [entry.ebx for entry in entries] == [0xFC, 0xF0]
    assert (template.capabilities, template.not_required) == ((171,), (56,))
    assert template.msrs[0x10A](6) == 7


def test_a_leaf_that_kvm_has_not_is_refused() -> None:
    template = CpuTemplate(cpuid={(0x99, 0, 0): {"eax": Bits(1, 1)}})
    with pytest.raises(ConfigError, match="0x99/0x0: this KVM does not have this leaf"):
        template.change_cpuid([])


def test_what_is_no_capability() -> None:
    with pytest.raises(ConfigError, match="must be a capability number"):
        CpuConfig(kvm_capabilities=["!x"])
