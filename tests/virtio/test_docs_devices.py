# SPDX-License-Identifier: Apache-2.0
"""The programs of docs/devices.md that need no KVM, run as a reader would; the last one is in tests/linux."""

from __future__ import annotations

from tests.guide import programs


def test_the_device_is_as_short_as_promised_and_works() -> None:
    device, trial, _ = programs("devices.md")
    assert len(device.strip().splitlines()) <= 30
    names: dict[str, object] = {}
    for program in (device, trial):
        exec(compile(program, "devices.md", "exec"), names)
