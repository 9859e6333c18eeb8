# SPDX-License-Identifier: Apache-2.0
"""The programs of docs/devices.md that need no KVM, run as a reader would; others are in tests/kvm and tests/linux."""

from __future__ import annotations

from tests.guide import programs


def test_the_device_is_as_short_as_promised_and_works() -> None:
    device, trial, upper, _, thermometer, test, _, _, jobs, jobs_test, *_ = programs("devices.md")
    assert len(device.strip().splitlines()) <= 30
    for pair in ((device, trial), (upper,), (thermometer, test), (jobs, jobs_test)):
        names: dict[str, object] = {}
        for program in pair:
            exec(compile(program, "devices.md", "exec"), names)
