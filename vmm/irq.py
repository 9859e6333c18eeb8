# SPDX-License-Identifier: Apache-2.0
"""Interrupts, as a device sees them: one eventfd that KVM turns into an edge on an interrupt line."""

from __future__ import annotations

import os


class IrqLine:
    """One edge-triggered interrupt line; owns its eventfd.

    :param gsi: the global system interrupt, which ``Vm.irqfd`` binds ``fd`` to

    Without a VM behind it (unit tests) it counts: ``take()`` returns the edges since the last call.
    Source: Linux Documentation/virt/kvm/api.rst, KVM_IRQFD.
    """

    __slots__ = ("fd", "gsi")

    def __init__(self, gsi: int) -> None:
        self.gsi = gsi
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def trigger(self) -> None:
        """Raise one edge; safe from any thread. Edges that KVM has not taken yet merge into one."""
        os.eventfd_write(self.fd, 1)

    def take(self) -> int:
        """Edges raised and not yet taken by KVM; only for a line that no VM is bound to."""
        try:
            return os.eventfd_read(self.fd)
        except BlockingIOError:
            return 0

    def close(self) -> None:
        """Give the eventfd back; idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
