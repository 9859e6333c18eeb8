# SPDX-License-Identifier: Apache-2.0
"""``pyvmm ps``: the VMs that run on this host."""

from __future__ import annotations

import time

from vmm.commands import running
from vmm.errors import line

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``pyvmm ps``."""
    formats = parser.add_mutually_exclusive_group()
    formats.add_argument("--json", action="store_true", help="one JSON object a line")
    formats.add_argument("-q", "--quiet", action="store_true", help="only the names, one a line")


def main(args: argparse.Namespace) -> int:
    """List them."""
    rows = [("NAME", "COMMAND", "PID", "STATE", "UPTIME", "MEMORY", "CPU", "IMAGE")]
    for each in running.find():
        if args.quiet:
            print(each.name)
            continue
        uptime = max(time.time() - each.began, 0.01)
        percent = 100 * each.cpu / uptime
        if args.json:
            import json

            facts = {name: getattr(each, name) for name in ("name", "kind", "pid", "state", "image", "began", "memory")}
            print(json.dumps(facts | {"cpu_percent": round(percent, 1)}))
        memory = f"{each.memory >> 20} MiB"
        cpu, image = f"{percent:.0f}%", line(each.image)
        rows.append((each.name, each.kind, str(each.pid), each.state, _span(uptime), memory, cpu, image))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows if not (args.json or args.quiet) else ():
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _span(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s" if minutes else f"{rest}s"
