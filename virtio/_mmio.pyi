# SPDX-License-Identifier: Apache-2.0
from virtio._interrupt import Interrupt
from vmm._bus import NativeDevice
from vmm.irq import IrqLine

class MmioRegisters(NativeDevice):
    """The registers in C: InterruptStatus, InterruptACK and QueueNotify; the rest by ``read`` and ``write``.

    :param owner: the device's interrupt line; not owned
    """

    interrupt: Interrupt
    def __init__(self, owner: IrqLine) -> None: ...
    @property
    def page_address(self) -> int:
        """Host address of a page with the registers as the driver reads them; it lives as long as this object."""
    @property
    def notified(self) -> int:
        """Writes to QueueNotify that came by an exit to user space, not by KVM's ioeventfd; a statistic."""
    def show(self, offset: int, value: int) -> None:
        """Let the driver read `value` in the register at `offset`, which is not InterruptStatus."""
    def show_config(self, config: bytes) -> None:
        """Let the driver read `config` as the configuration space."""
    def set_notify(self, queue: int, fd: int) -> None:
        """Let a write of `queue` to QueueNotify signal the eventfd `fd`; -1: leave it to Python, as a mistake."""
