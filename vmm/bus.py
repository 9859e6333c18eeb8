# SPDX-License-Identifier: Apache-2.0
"""What a bus device is; the address spaces themselves are ``vmm._bus.Bus``."""

from __future__ import annotations

from vmm._bus import Bus, NativeDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol
else:
    Protocol = object  # typing costs more to import than a launch has


class BusDevice(Protocol):
    """Answers accesses of 1, 2, 4 or 8 bytes; both methods are called with the GIL, from any vCPU's thread.

    ``data`` is little endian, borrowed for the call. A guest chooses ``offset`` and the width: a device ignores
    what it does not understand and never raises for it, except ``vmm.exits.Stop`` to end the VM.
    """

    def read(self, offset: int, data: memoryview) -> None:
        """Fill `data` with what the guest reads at `offset`."""
        ...

    def write(self, offset: int, data: memoryview) -> None:
        """The guest writes `data` at `offset`."""
        ...


__all__ = ["Bus", "BusDevice", "NativeDevice"]
