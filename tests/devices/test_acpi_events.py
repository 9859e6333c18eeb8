# SPDX-License-Identifier: Apache-2.0
"""The event device's port: events are told once, and merge; the tables name the same numbers."""

from __future__ import annotations

from boot import acpi
from devices import acpi_events
from devices.acpi_events import GENERATION_CHANGED, POWER_BUTTON, AcpiEvents
from vmm.bus import Bus

PORT = 0x604


def test_the_tables_and_the_device_agree() -> None:
    for name in ("GENERATION_CHANGED", "POWER_BUTTON"):
        assert getattr(acpi, name) == getattr(acpi_events, name)


def test_events_are_told_once() -> None:
    edges: list[int] = []
    events = AcpiEvents(lambda: edges.append(1))
    bus = Bus("pio", 1 << 16)
    bus.add(PORT, 1, events, "events")

    def read() -> int:
        data = bytearray(1)
        bus.access(PORT, data, False)
        return data[0]

    assert read() == 0
    events.tell(GENERATION_CHANGED)
    events.tell(POWER_BUTTON)
    assert len(edges) == 2
    assert read() == GENERATION_CHANGED | POWER_BUTTON
    assert read() == 0
    bus.access(PORT, bytearray(b"\xff"), True)
    assert read() == 0


def test_what_was_not_heard_is_told_by_a_copy() -> None:
    events = AcpiEvents()
    events.tell(POWER_BUTTON)
    edges: list[int] = []
    copy = AcpiEvents(lambda: edges.append(1))
    copy.restore(events.save())
    data = bytearray(1)
    copy.read(0, memoryview(data))
    assert (data[0], len(edges)) == (POWER_BUTTON, 1)


def test_a_signals_handler_may_tell_while_another_does() -> None:
    events = AcpiEvents()
    events.tell(GENERATION_CHANGED)
    with events._lock:  # as the handler that was interrupted has it
        events.tell(POWER_BUTTON)
    assert events.save() == {"pending": GENERATION_CHANGED | POWER_BUTTON}
