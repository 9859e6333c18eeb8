# SPDX-License-Identifier: Apache-2.0
"""Draws docs/ratios.svg: pyvmm relative to its peer, for each row of the tables in docs/SPECIFICATION.md.

A column `ratio` is the ratio of two costs, so its inverse is drawn. A column `rate` is drawn as it is.
"""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
SHORT = {
    "Devices on /dev/kvm itself": "/dev/kvm",
    "The same devices under Linux": "lab",
    "Devices under r3": "r3",
    "The API's socket": "API",
}


def rows(text: str) -> list[tuple[str, float]]:
    """The table rows with a peer, in the document's order: the name, and pyvmm's result relative to the peer's."""
    found = []
    head: list[str] = []
    section = ""
    for line in text.splitlines():
        if line.startswith("#"):
            section = line.lstrip("#0123456789. ")
        if not line.startswith("|"):
            head = []
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not head:
            head = cells
            continue
        for name, sign in (("ratio", -1), ("rate", 1)):
            value = re.match(r"[0-9.]+", cells[head.index(name)]) if name in head else None
            if value and not {"C", "bare C loop"} & set(head):
                place = section.split(",")[0]
                found.append((f"{SHORT.get(place, place)}: {cells[0]}", float(value[0]) ** sign))
    return found


def main() -> None:
    """Draw it."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "pyvmm"  # the same figures give the same file
    matplotlib.rcParams["svg.fonttype"] = "none"
    from matplotlib import pyplot

    names, values = zip(*reversed(rows((DOCS / "SPECIFICATION.md").read_text())), strict=True)
    figure, ax = pyplot.subplots(figsize=(9, 0.2 * len(names) + 0.8))
    colours = ["#2a7f62" if value >= 1 else "#b5523b" for value in values]
    ax.barh(range(len(names)), [value - 1 for value in values], left=1, color=colours, height=0.7)
    ax.set_yticks(range(len(names)), names, fontsize=7)
    ax.set_xscale("log")
    ax.set_xticks([0.03, 0.1, 0.3, 1, 3, 10], ["1/30", "1/10", "1/3", "as good", "3 times", "10 times"], fontsize=7)
    ax.axvline(1, color="black", linewidth=0.8)
    ax.set_ylim(-0.7, len(names) - 0.3)
    figure.tight_layout()
    figure.savefig(DOCS / "ratios.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
