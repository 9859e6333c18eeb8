# SPDX-License-Identifier: Apache-2.0
"""The board's table: no two parts meet, and the machine's buses are what it says."""

from __future__ import annotations

import itertools

from boot.board import PARTS, VIRTIO_GSIS


def test_no_port_is_two_parts() -> None:
    ports = [range(first, first + count) for part in PARTS for first, count in part.ports]
    for one, other in itertools.combinations(ports, 2):
        assert set(one).isdisjoint(other)


def test_only_the_event_devices_line_is_shared() -> None:
    lines = [part.gsi for part in PARTS if part.gsi is not None]
    assert len(set(lines)) == len(lines)
    assert set(lines) & set(VIRTIO_GSIS) == {13}
    assert len(set(VIRTIO_GSIS)) == len(VIRTIO_GSIS)
    assert {0, 2, 8} & {*lines, *VIRTIO_GSIS} == set(), "the timer's, the cascade's, the RTC's"


def test_names_are_told_apart() -> None:
    for names in ([part.name for part in PARTS], [part.acpi[0] for part in PARTS if part.acpi]):
        assert len(set(names)) == len(names)
