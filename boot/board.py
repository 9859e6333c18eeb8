# SPDX-License-Identifier: Apache-2.0
"""The board: the devices of every machine except processors and virtio. Buses and ACPI tables follow this table."""

from __future__ import annotations


class Part:
    """One device of the board.

    :ivar name: in a snapshot, and where the device is made
    :ivar title: on the bus
    :ivar ports: the first port and the number of each of its ranges
    :ivar gsi: its interrupt line, or None
    :ivar acpi: its name in the ACPI tables, its hardware id and unique id; None: it is in no device's description
    :ivar state: whether a snapshot has it
    """

    __slots__ = ("acpi", "gsi", "name", "ports", "state", "title")

    def __init__(
        self,
        name: str,
        *ports: tuple[int, int],
        title: str = "",
        gsi: int | None = None,
        acpi: tuple[str, str, int] | None = None,
        state: bool = False,
    ) -> None:
        self.name = name
        self.title = title or name
        self.ports = ports
        self.gsi = gsi
        self.acpi = acpi
        self.state = state


# In the order of the tables. The ids are the standards', the ports those of a PC, from 0x500 on our own.
PARTS = (
    Part("serial", (0x3F8, 8), gsi=4, acpi=("COM1", "PNP0501", 1), state=True),
    Part("i8042", (0x60, 1), (0x64, 1), gsi=1, acpi=("KBD0", "PNP0303", 0), state=True),
    Part("rtc", (0x70, 2), acpi=("RTC0", "PNP0B00", 0), state=True),
    Part("pvpanic", (0x505, 1), acpi=("PEVT", "QEMU0001", 0)),
    # The line is the FPU's, which has none: a virtio device may share it.
    Part("events", (0x604, 1), title="ACPI events", gsi=13, acpi=("GED0", "ACPI0013", 0), state=True),
    Part("power", (0x600, 3), title="ACPI power"),  # the FADT names its registers
    Part("timer", (0x40, 4), (0x61, 1)),
)
BY_NAME = {part.name: part for part in PARTS}

GSIS = 24  # the IOAPIC's pins, each of which the MP table names
# Interrupt lines for virtio-mmio, by a device's slot: all less those of the timer, the cascade and the parts; the event
# device's, which is seldom raised, last.
OWN_GSIS = (3, 8)  # for bus devices of the embedding program: no part of the board has them
VIRTIO_GSIS = (5, 6, 7, 9, 10, 11, 12, *range(14, GSIS), 13)
