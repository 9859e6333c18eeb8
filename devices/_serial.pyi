from typing import Any, Self

from vmm.bus import NativeDevice
from vmm.irq import IrqLine

class Serial(NativeDevice):
    """A 16550A serial port of 8 ports: FIFO, interrupts, modem lines, loopback.

    :param irq: its interrupt line; kept, and borrowed from its owner, who closes it after this
    """

    def __new__(cls, irq: IrqLine) -> Self: ...
    @property
    def stats(self) -> dict[str, int]:
        """Accesses of the guest's, by name."""

    def save(self) -> dict[str, Any]:
        """What the guest can see of the port; what the host has not taken yet, or sent, stays here."""
    def restore(self, state: dict[str, Any]) -> None:
        """Take what ``save`` told of another port, and raise the interrupt if there is a cause."""
    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Send `data` to the guest; returns when all of it is on the wire, at most 4 KiB ahead of the guest.

        Blocks without the GIL while the guest does not read, or holds RTS down; ``close`` ends the wait, and
        what was not taken by then is lost.
        """

    def wait_output(self) -> bytes:
        """Take all that the guest has sent, waiting without the GIL until there is something; for one thread.

        :returns: at most 64 KiB; ``b""`` when the port is closed and everything was taken
        """

    def drop_output(self, words: bytes = b"") -> None:
        """From here on what the guest sends is lost at once, and no thread has to take it; what waits, too.

        :param words: looked for in it; no byte of them is 0, and their first one comes once
        :raises ValueError: they are otherwise
        """

    def keep_output(self) -> None:
        """From here on ``wait_output`` has what the guest sends."""
    @property
    def said(self) -> bool:
        """Whether the words that ``drop_output`` was to look for went by."""

    def close(self) -> None:
        """Wake ``feed`` and ``wait_output``; the port itself keeps answering the guest. Idempotent."""
