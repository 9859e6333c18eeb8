# SPDX-License-Identifier: Apache-2.0
"""``pyvmm stop``: ends a VM, at first by asking its guest."""

from __future__ import annotations

import os
import select
import signal

from vmm.commands import running
from vmm.config import parse_count
from vmm.errors import ConfigError, VmmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

_PATIENCE = 10  # seconds for the program itself, after SIGTERM
_SLOW = "did not end within 10 s after SIGTERM"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``pyvmm stop``."""
    parser.add_argument("name", metavar="NAME", help="name of a VM, as pyvmm ps lists it, or its PID")
    parser.add_argument(
        "--timeout", metavar="S", default="10",
        help="seconds to wait after pressing the power button (default: 10); 0: do not press it",
    )  # fmt: skip


def main(args: argparse.Namespace) -> int:
    """Press the power button, and after the time limit send SIGTERM; 0: it has ended."""
    timeout = parse_count("--timeout", args.timeout, 0, 86400)
    each = running.named(args.name)
    if each.kind in ("python", "copy"):
        raise ConfigError("NAME", args.name, f"belongs to another program, PID {each.pid}, which has to end it")
    try:
        process = os.pidfd_open(each.pid)
        if running.began(each.pid) != each.ticks:
            raise ProcessLookupError
    except ProcessLookupError:
        return 0  # it has ended meanwhile
    # A sandbox has no power button: its process 1 is ours, and ends with the program.
    if timeout and each.kind != "sandbox" and _ended(process, signal.SIGPWR, timeout):
        return 0
    if not _ended(process, signal.SIGTERM, _PATIENCE):
        raise VmmError(f"PID {each.pid} {_SLOW}")
    return 0


def _ended(process: int, number: signal.Signals, seconds: int) -> bool:
    # A pidfd: the number of a process that has ended may be another's by now.
    try:
        signal.pidfd_send_signal(process, number)
    except ProcessLookupError:
        return True
    return bool(select.select([process], [], [], seconds)[0])
