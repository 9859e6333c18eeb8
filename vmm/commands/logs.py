# SPDX-License-Identifier: Apache-2.0
"""``pyvmm logs``: what a VM has written to its log, and to its console if that goes to a file."""

from __future__ import annotations

import os
import select
import sys

from vmm.commands import running
from vmm.errors import ConfigError, host_errors

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

_CHUNK = 1 << 16
_INTERVAL = 0.1  # seconds between two looks at the files


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``pyvmm logs``."""
    parser.add_argument("name", metavar="NAME", help="name of a VM, as pyvmm ps lists it, or its PID")
    parser.add_argument("-f", "--follow", action="store_true", help="print new lines until the VM ends")


def main(args: argparse.Namespace) -> int:
    """Print the files."""
    each = running.named(args.name)
    paths, others = running.outputs(each)
    if not paths:
        problem = f"writes to no file, but to {', '.join(others) or 'nothing'}: redirect its output, or give --log-path"
        raise ConfigError("NAME", args.name, problem)
    process = os.pidfd_open(each.pid) if args.follow else -1
    with host_errors("read"):
        files = [(os.readlink(path) if os.path.islink(path) else path, open(path, "rb")) for path in paths]
    shown = ""
    ended = not args.follow
    while True:
        for path, file in files:
            while data := file.read(_CHUNK):
                if len(files) > 1 and path != shown:
                    sys.stdout.buffer.write(f"==> {path} <==\n".encode(errors="surrogateescape"))
                    shown = path
                sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        if ended:
            return 0
        # One more look after its end.
        ended = bool(select.select([process], [], [], _INTERVAL)[0])
