from typing import Self

# SPDX-License-Identifier: Apache-2.0
from vmm.irq import IrqLine

class Interrupt:
    """How a device tells its driver; safe from any thread.

    :param owner: the interrupt line of every queue and of the configuration; not owned
    """

    def __new__(cls, owner: IrqLine) -> Self: ...
    def __call__(self, queue: int = 0) -> None:
        """Tell the driver that the used ring of `queue` has changed."""
    def config(self) -> None:
        """Tell the driver that the configuration space, or DEVICE_NEEDS_RESET, has changed."""
    @property
    def status(self) -> int:
        """InterruptStatus as the driver reads it."""
    def acknowledge(self, bits: int) -> None:
        """The driver has seen `bits`."""
    def restore(self, status: int) -> None:
        """Set InterruptStatus to that of another machine, without an interrupt."""
