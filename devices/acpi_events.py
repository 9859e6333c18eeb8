# SPDX-License-Identifier: Apache-2.0
"""Events for the guest by ACPI: one interrupt, and a port that tells which events there are.

The tables (``boot/acpi.py``) have a Generic Event Device whose method reads the port and notifies a device for each
bit.
Source: ACPI 6.5 section 5.6.9, Interrupt-signaled ACPI events.
"""

from __future__ import annotations

import threading

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

# boot/acpi.py tells the guest the same (tests/devices/test_acpi_events.py compares them).
GENERATION_CHANGED = 1  # the VM generation counter has a new value
POWER_BUTTON = 2


class AcpiEvents:
    """Bus device of one port: reading it gives the events since the last time.

    :param interrupt: raises the event device's interrupt, an edge each time
    """

    __slots__ = ("_interrupt", "_lock", "_pending")

    def __init__(self, interrupt: Callable[[], None] = lambda: None) -> None:
        self._interrupt = interrupt
        self._lock = threading.RLock()  # a signal's handler presses the button, even during another's
        self._pending = 0

    def tell(self, event: int) -> None:
        """Let the guest hear of `event`; any thread."""
        with self._lock:
            self._pending |= event
        self._interrupt()

    def read(self, offset: int, data: memoryview) -> None:
        data[:] = bytes(len(data))
        with self._lock:
            data[0], self._pending = self._pending, 0

    def write(self, offset: int, data: memoryview) -> None:
        """Ignore it: a guest has nothing to say here."""

    def save(self) -> dict[str, Any]:
        return {"pending": self._pending}

    def restore(self, state: dict[str, Any]) -> None:
        self._pending = int(state["pending"]) & (GENERATION_CHANGED | POWER_BUTTON)
        if self._pending:
            self._interrupt()
