# SPDX-License-Identifier: Apache-2.0
"""``pyvmm link``: a link to this program under the name by which a runtime starts it."""

from __future__ import annotations

import os
import shutil
import sys

from vmm.cli import PROGRAMS
from vmm.errors import ConfigError, HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``pyvmm link``."""
    parser.add_argument("name", metavar="NAME", help=f"the name to be started by: {', '.join(PROGRAMS)}")
    parser.add_argument("directory", metavar="DIR", help="where the link is made; it has to be there")


def main(args: argparse.Namespace) -> int:
    """Make the link, or replace one of ours.

    :raises ConfigError: the name is none that means anything, or the place is taken
    :raises HostError: the directory cannot be written
    """
    if args.name not in PROGRAMS:
        raise ConfigError("NAME", args.name, f"must be {' or '.join(PROGRAMS)}")
    if not os.path.isdir(args.directory):
        raise ConfigError("DIR", args.directory, "is no directory")
    target = _program()
    link = os.path.join(args.directory, args.name)
    try:
        if os.path.islink(link) and os.path.basename(os.readlink(link)) == os.path.basename(target):
            os.unlink(link)
        os.symlink(target, link)
    except FileExistsError:
        raise ConfigError("DIR", link, "is there already, and is not ours") from None
    except OSError as error:
        raise HostError(error.errno or 0, "make the link", link) from None
    print(link)
    return 0


def _program() -> str:
    # The installed script: this one, or where we were started as a module, the one beside the interpreter.
    for path in (sys.argv[0], os.path.join(os.path.dirname(sys.executable), "pyvmm"), shutil.which("pyvmm")):
        if path and os.path.basename(path) == "pyvmm" and os.access(path, os.X_OK):
            return os.path.abspath(path)
    raise ConfigError("pyvmm", "", "is not installed as a program; pip install makes it")
