# SPDX-License-Identifier: Apache-2.0
"""Draws docs/terminal.svg: runs commands and draws them with their output.

.venv/bin/python tools/draw_terminal.py     # needs `pyvmm pull busybox`, and a KVM that runs it (or
                                            # PYVMM_SANDBOX_KERNEL, a kernel that this one runs)
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).parents[1]
COMMANDS = (
    "pyvmm sandbox busybox sh -c 'uname -srm; grep MemTotal /proc/meminfo'",
    "python examples/code_runner.py busybox",
    "python examples/memory_search.py",
    "python examples/fuzzer.py",
)
WIDTH, LINE = 96, 19


def lines() -> list[tuple[str, str]]:
    """The lines, each with its CSS class."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    found = []
    for command in COMMANDS:
        found.append(("prompt", f"$ {command}"))
        done = subprocess.run(
            command, shell=True, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        found += [("said", line[:WIDTH]) for line in done.stdout.splitlines()]
    return found


def main() -> None:
    """Run the commands and draw the picture."""
    drawn = lines()
    height = LINE * len(drawn) + 30
    with open(ROOT / "docs/terminal.svg", "w") as file:
        file.write(
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 {height}" width="800" height="{height}" '
            'role="img" aria-label="A terminal: the commands of tools/draw_terminal.py and what they print">\n'
            '  <style>text { font: 13px ui-monospace, "DejaVu Sans Mono", monospace; white-space: pre } '
            ".prompt { fill: #7ee787 } .said { fill: #e6edf3 }</style>\n"
            f'  <rect width="800" height="{height}" rx="8" fill="#0d1117"/>\n'
        )
        for number, (kind, text) in enumerate(drawn):
            file.write(
                f'  <text class="{kind}" x="16" y="{LINE * number + 28}" xml:space="preserve">{escape(text)}</text>\n'
            )
        file.write("</svg>\n")


if __name__ == "__main__":
    main()
