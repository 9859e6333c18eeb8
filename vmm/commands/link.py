# SPDX-License-Identifier: Apache-2.0
"""``pyvmm link``: this program under the name by which a runtime starts it.

A regular file: a runtime that resolves symbolic links (Kata's) would start ``pyvmm``, which is another program.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys

from vmm.commands.cli import PROGRAMS
from vmm.errors import ConfigError, HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

# At the end of such a file, as vmm/launcher.c reads it.
MAGIC = b"pyvmm-link-1"
_ELF = b"\x7fELF"
_DEPENDENCIES = ("httptools", "msgspec", "numpy", "zstandard")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``pyvmm link``."""
    parser.add_argument("name", metavar="NAME", help=f"the name of the file: {', '.join(PROGRAMS)}")
    parser.add_argument("directory", metavar="DIR", help="an existing directory for the file")


def main(args: argparse.Namespace) -> int:
    """Make the program, or replace one of ours.

    :raises ConfigError: the name means nothing, or the place is taken
    :raises HostError: the directory cannot be written
    """
    if args.name not in PROGRAMS:
        raise ConfigError("NAME", args.name, f"must be {' or '.join(PROGRAMS)}")
    if not os.path.isdir(args.directory):
        raise ConfigError("DIR", args.directory, "is not a directory")
    source = program()
    path = os.path.join(args.directory, args.name)
    if os.path.lexists(path) and not is_link(path):
        raise ConfigError("DIR", path, "exists, and was not made by pyvmm link")
    new = f"{path}.{os.getpid()}"
    try:
        with open(source, "rb") as itself, open(new, "xb") as file:
            file.write(itself.read() + _tail())
        os.chmod(new, 0o755)
        os.replace(new, path)  # the old one may be running
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(new)
        raise HostError(error.errno or 0, "make the program", path) from None
    print(path)
    return 0


def is_link(path: str) -> bool:
    """Whether `path` is what ``pyvmm link`` makes, or was once: a symbolic link to ``pyvmm``."""
    if os.path.islink(path) and os.path.basename(os.readlink(path)) == "pyvmm":
        return True
    try:
        with open(path, "rb") as file:
            file.seek(-len(MAGIC), os.SEEK_END)
            return file.read() == MAGIC
    except OSError:
        return False


def import_path() -> list[str]:
    """The directories of pyvmm and of what it imports."""
    from importlib.util import find_spec

    places = [os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))]
    for name in _DEPENDENCIES:
        spec = find_spec(name)
        if spec is not None and spec.origin is not None:
            places.append(os.path.dirname(os.path.dirname(spec.origin)))
    return list(dict.fromkeys(places))


def _tail() -> bytes:
    # Where it will find its interpreter and what it imports, wherever it is.
    text = b"%b\0%b\0" % (os.fsencode(sys.executable), os.fsencode(":".join(import_path())))
    return text + b"%08x" % len(text) + MAGIC


def program() -> str:
    """The installed program: this one, or where we were started as a module, the one beside the interpreter.

    :raises ConfigError: pyvmm is not installed as a program
    """
    for path in (sys.argv[0], os.path.join(os.path.dirname(sys.executable), "pyvmm"), shutil.which("pyvmm")):
        if path and os.path.basename(path) == "pyvmm" and os.access(path, os.X_OK):
            with open(path, "rb") as file:
                if file.read(len(_ELF)) == _ELF:
                    return os.path.abspath(path)
    raise ConfigError("pyvmm", "", "is not installed as a program; pip install makes it")
