# SPDX-License-Identifier: Apache-2.0
"""``pyvmm ps``: this user's sandboxes that run."""

from __future__ import annotations

import time

from vmm.sandbox import registry

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``pyvmm ps``."""
    parser.add_argument("--json", action="store_true", help="one JSON object a line")


def main(args: argparse.Namespace) -> int:
    """List them."""
    rows = [("NAME", "IMAGE", "PID", "UPTIME")]
    for each in registry.all_running():
        if args.json:
            import json

            print(json.dumps({key: each.get(key) for key in ("name", "image", "pid", "began")}))
        rows.append((each["name"], str(each["image"]), str(each["pid"]), _span(time.time() - each["began"])))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows if not args.json else ():
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _span(seconds: float) -> str:
    minutes, rest = divmod(int(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s" if minutes else f"{rest}s"
