# SPDX-License-Identifier: Apache-2.0
"""pvpanic: the guest's kernel tells that it panicked.

Source: QEMU docs/specs/pvpanic.rst; Linux include/uapi/misc/pvpanic.h.
"""

from __future__ import annotations

from vmm.exits import Stop, StopReason

PANICKED = 1 << 0
CRASHLOADED = 1 << 1  # it panicked, and a crash kernel that it loaded earlier goes on from here
SUPPORTED = PANICKED | CRASHLOADED


class PvPanic:
    """Bus device, one byte wide. ``crashes`` counts the panics that a crash kernel took over."""

    __slots__ = ("crashes",)

    def __init__(self) -> None:
        self.crashes = 0

    def read(self, offset: int, data: memoryview) -> None:
        """Answer the events that this device knows."""
        data[:] = bytes(len(data))
        if offset == 0:
            data[0] = SUPPORTED

    def write(self, offset: int, data: memoryview) -> None:
        """Take an event; bits that this device did not offer are ignored.

        :raises Stop: ``PANIC`` for PANICKED
        """
        if offset != 0:
            return
        if data[0] & PANICKED:
            raise Stop(StopReason.PANIC, detail="the guest reported it (pvpanic)")
        if data[0] & CRASHLOADED:
            self.crashes += 1
