# SPDX-License-Identifier: Apache-2.0
"""The programs of the guides in docs/, for the tests that run them."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def programs(name: str) -> list[str]:
    """The Python programs of a page, each on the page's own line numbers."""
    text = (DOCS / name).read_text()
    found = re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return ["\n" * text.count("\n", 0, block.start(1)) + block.group(1) for block in found]


def run_programs(name: str) -> int:
    """Run the programs of a page one after the other, with the names of those before; how many there are."""
    names: dict[str, object] = {}
    found = programs(name)
    for program in found:
        exec(compile(program, name, "exec"), names)
    return len(found)
