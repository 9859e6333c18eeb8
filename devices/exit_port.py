# SPDX-License-Identifier: Apache-2.0
"""A port that ends the VM with an exit status of the guest's choosing, for tests and bare guests.

A write of ``value`` ends the VM with exit status ``value & 0xff``. QEMU's ``isa-debug-exit`` differs: there
the status is ``value << 1 | 1``, so that a guest cannot exit with 0. Here 0 is success, as for any program.
"""

from __future__ import annotations

from vmm.exits import Stop, StopReason


class ExitPort:
    """Bus device, 4 bytes wide: the first byte written is the exit status. Reads as 0."""

    __slots__ = ()

    def read(self, offset: int, data: memoryview) -> None:
        """Answer 0, so that a guest can tell the port from an empty one, which reads as all ones."""
        data[:] = bytes(len(data))

    def write(self, offset: int, data: memoryview) -> None:
        """End the VM; a write that does not begin at the port's first byte is ignored.

        :raises Stop: ``GUEST_EXIT`` with the low byte of what was written
        """
        if offset == 0:
            raise Stop(StopReason.GUEST_EXIT, data[0])
