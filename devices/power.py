# SPDX-License-Identifier: Apache-2.0
"""Power off and reset, as ACPI asks for them: three one-byte ports that the FADT points to.

Source: ACPI 6.5 section 4.8.3.7, Sleep Control and Status Registers; section 4.8.3.6, Reset Register.
"""

from __future__ import annotations

from vmm.exits import Stop, StopReason

# The registers, as offsets from the first. boot/acpi.py tells the guest the same (tests/devices/test_power.py compares
# them).
SLEEP_CONTROL = 0
SLEEP_STATUS = 1
RESET = 2
RESET_VALUE = 1
SLEEP_TYPE_S5 = 5  # the first element of \_S5

SLP_TYP_SHIFT = 2
SLP_TYP_MASK = 7
SLP_EN = 1 << 5


class AcpiPower:
    """Bus device of three ports: sleep control, sleep status, reset.

    The status register's only bit, WAK_STS, never sets: S5 is the only sleep, and nothing wakes from it.
    """

    __slots__ = ()

    def read(self, offset: int, data: memoryview) -> None:
        """Answer 0: SLP_EN is write-only, and neither WAK_STS nor the reset register holds anything."""
        data[:] = bytes(len(data))

    def write(self, offset: int, data: memoryview) -> None:
        """Obey; a sleep type or a reset value that no table names is ignored.

        :raises Stop: ``POWEROFF`` or ``RESET``
        """
        value = data[0]
        if offset == SLEEP_CONTROL:
            if value & SLP_EN and value >> SLP_TYP_SHIFT & SLP_TYP_MASK == SLEEP_TYPE_S5:
                raise Stop(StopReason.POWEROFF)
        elif offset == RESET and value == RESET_VALUE:
            raise Stop(StopReason.RESET)
