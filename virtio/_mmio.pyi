# SPDX-License-Identifier: Apache-2.0
from vmm._bus import NativeDevice
from vmm.irq import IrqLine

class Interrupt:
    """The one interrupt of a virtio-mmio device: InterruptStatus and its line; safe from any thread."""

    def __init__(self, owner: IrqLine) -> None: ...
    @property
    def page_address(self) -> int:
        """Host address of a page with the registers as the driver reads them; it lives as long as this object."""
    def show(self, offset: int, value: int) -> None:
        """Let the driver read `value` in the register at `offset`, which is not InterruptStatus."""
    def show_config(self, config: bytes) -> None:
        """Let the driver read `config` as the configuration space."""
    def __call__(self) -> None:
        """Tell the driver that a used ring has changed."""
    def config(self) -> None:
        """Tell the driver that the configuration space, or DEVICE_NEEDS_RESET, has changed."""
    @property
    def status(self) -> int:
        """InterruptStatus as the driver reads it."""
    @property
    def notified(self) -> int:
        """Writes to QueueNotify that came by an exit to user space, not by KVM's ioeventfd; a statistic."""
    def acknowledge(self, bits: int) -> None:
        """The driver has seen `bits`."""
    def set_notify(self, queue: int, fd: int) -> None:
        """Let a write of `queue` to QueueNotify signal the eventfd `fd`; -1: leave it to Python, as a mistake."""

class MmioRegisters(NativeDevice):
    """Base of the transport: InterruptStatus, InterruptACK and QueueNotify in C, the rest by ``read`` and ``write``."""

    interrupt: Interrupt
    def __init__(self, owner: IrqLine) -> None: ...
