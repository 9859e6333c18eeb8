# SPDX-License-Identifier: Apache-2.0
"""``pyvmm cp``: files to and from a sandbox that runs."""

from __future__ import annotations

import os
import posixpath

from vmm.errors import ConfigError
from vmm.sandbox import attach

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``pyvmm cp``."""
    for name, what in (("source", "SOURCE"), ("target", "TARGET")):
        parser.add_argument(name, metavar=what, help="PATH of this host, or NAME:PATH of a sandbox")


def main(args: argparse.Namespace) -> int:
    """Copy a file, or a directory with all that is in it, into TARGET if that is a directory."""
    source, target = _of(args.source), _of(args.target)
    if (source[0] is None) == (target[0] is None):
        raise ConfigError("SOURCE", args.source, "one of SOURCE and TARGET must be NAME:PATH, the other a PATH")
    if target[0] is not None:
        files, path = attach(target[0]).files, target[1]
        if files.exists(path) and files.stat(path, follow=True).type == "dir":
            path = posixpath.join(path, os.path.basename(os.path.abspath(source[1])))
        files.copy_in(source[1], path)
    else:
        assert source[0] is not None
        path = target[1]
        if os.path.isdir(path):
            path = os.path.join(path, posixpath.basename(posixpath.normpath(source[1])))
        attach(source[0]).files.copy_out(source[1], path)
    return 0


def _of(word: str) -> tuple[str | None, str]:
    name, colon, path = word.partition(":")
    return (name, path or ".") if colon and "/" not in name else (None, word)
