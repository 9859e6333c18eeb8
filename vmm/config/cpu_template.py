# SPDX-License-Identifier: Apache-2.0
"""CPU templates: bits of CPUID and of model-specific registers that differ in the guest from KVM's.

Source: Firecracker docs/cpu_templates/cpu-templates.md.
"""

from __future__ import annotations

from vmm.config.option import Config, option
from vmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vmm.kvm.abi import kvm_cpuid_entry2


class Bits(Config):
    """Changed bits of a register: the new value is ``old & ~mask | value``."""

    mask: int = option(help="the bits that are changed", kw_only=False)
    value: int = option(help="what they become", kw_only=False)

    @classmethod
    def written(cls, field: str, text: str, width: int) -> Bits:
        """Parse ``0b`` and digits 0, 1 and x from the highest bit on. x and omitted bits stay; ``_`` is ignored.

        :raises ConfigError: another character, or more than `width` bits
        """
        digits = text.removeprefix("0b").replace("_", "")
        if text == digits or not 0 < len(digits) <= width or digits.strip("01x"):
            raise ConfigError(field, text, f"must be 0b and at most {width} digits 0, 1 or x")
        return cls(int("".join("0" if digit == "x" else "1" for digit in digits), 2), int(digits.replace("x", "0"), 2))

    def __call__(self, old: int) -> int:
        return old & ~self.mask | self.value


def parse_number(field: str, text: str) -> int:
    """A 32-bit number: ``0x``, ``0b`` or decimal.

    :raises ConfigError: the text is malformed
    """
    try:
        value = int(text, 0) if text.isascii() and "_" not in text else -1
    except ValueError:
        value = -1
    if not 0 <= value < 1 << 32:
        raise ConfigError(field, text, "must be a 32-bit number, e.g. 0x1f or 31")
    return value


class CpuTemplate(Config):
    """Changes to CPUID, MSRs and KVM capabilities."""

    capabilities: Sequence[int] = option(help="numbers of KVM_CAP_* that KVM must have", default=())
    not_required: Sequence[int] = option(help="numbers that it need not have after all", default=())
    cpuid: Mapping[tuple[int, int, int], Mapping[str, Bits]] = option(
        help="by leaf, subleaf and flags: bits by register's name", default={}
    )
    msrs: Mapping[int, Bits] = option(help="bits by the register's address", default={})

    def change_cpuid(self, entries: list[kvm_cpuid_entry2]) -> None:
        """Apply the changes to `entries`, the CPUID leaves of KVM.

        :raises ConfigError: KVM has no such leaf
        """
        by_leaf = {(entry.function, entry.index): entry for entry in entries}
        for (leaf, subleaf, _), registers in self.cpuid.items():
            entry = by_leaf.get((leaf, subleaf))
            if entry is None:
                raise ConfigError("cpuid_modifiers", f"{leaf:#x}/{subleaf:#x}", "this KVM does not have this leaf")
            for name, bits in registers.items():
                setattr(entry, name, bits(getattr(entry, name)))
