# SPDX-License-Identifier: Apache-2.0
"""The programs of docs/devices.md that need no KVM, run as a reader would; the last one is in tests/linux."""

from __future__ import annotations

import re
from pathlib import Path

GUIDE = Path(__file__).parents[2] / "docs" / "devices.md"


def programs() -> list[str]:
    """The guide's programs, each on its own line number of the guide."""
    text = GUIDE.read_text()
    found = re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return ["\n" * text.count("\n", 0, block.start(1)) + block.group(1) for block in found]


def test_the_device_is_as_short_as_promised_and_works() -> None:
    device, trial, machine = programs()
    assert len(device.strip().splitlines()) <= 30
    names: dict[str, object] = {}
    for program in (device, trial):
        exec(compile(program, str(GUIDE), "exec"), names)
    compile(machine, str(GUIDE), "exec")
