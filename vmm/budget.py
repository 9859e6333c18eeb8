# SPDX-License-Identifier: Apache-2.0
"""One budget for all devices of this process: what guests may make it hold together."""

from __future__ import annotations

from vmm._budget import KEPT, Budget, raise_descriptor_limit, set_descriptor_limit

__all__ = ["KEPT", "Budget", "dax_slots", "holes", "memory", "raise_descriptor_limit", "set_descriptor_limit"]

# Bytes of heap whose amount guests decide: tables of what they know, data on its way to who does not read it.
memory = Budget(256 << 20)
# In the RAM of copies, where guests have given pages back. Each is two mappings, of which a process has 65,530.
holes = Budget(12288)
# Of vm.max_map_count, for threads' stacks, libraries and the allocator.
_KEPT_MAPS = 8192
_dax_slots: Budget | None = None


def dax_slots() -> Budget:
    """Slots that all DAX windows may have: each is a descriptor, and two mappings where a file ends in it."""
    global _dax_slots
    if _dax_slots is None:
        try:
            with open("/proc/sys/vm/max_map_count") as file:
                maps = int(file.read())
        except (OSError, ValueError):
            maps = 65530  # Linux's default
        descriptors = (raise_descriptor_limit() - KEPT) // 2
        _dax_slots = Budget(max(0, min((maps - _KEPT_MAPS) // 2, descriptors)))
    return _dax_slots
