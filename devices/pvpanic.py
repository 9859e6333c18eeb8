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
    """Bus device, one byte wide."""

    __slots__ = ()

    def read(self, offset: int, data: memoryview) -> None:
        data[:] = bytes(len(data))
        if offset == 0:
            data[0] = SUPPORTED

    def write(self, offset: int, data: memoryview) -> None:
        """Take an event. A panic that a crash kernel takes over is not the end, and other bits are ignored.

        :raises Stop: ``PANIC`` for PANICKED
        """
        if offset == 0 and data[0] & PANICKED:
            raise Stop(StopReason.PANIC, detail="the guest reported it (pvpanic)")
