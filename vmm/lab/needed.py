# SPDX-License-Identifier: Apache-2.0
"""The files of this host that the lab's machine sees: the system's, this Python's, and those that the command names."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from vmm import images

SYSTEM = ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/usr", "/opt", "/etc")
# The machine has its own.
OWN = ("/", "/dev", "/proc", "/run", "/sys")
_VARIABLES = re.compile("PATH|VIRTUAL_ENV|PYTHON.*|PYVMM_.*")
_BETWEEN = re.compile(r"[\s=,:;'\"<>|&()]+")


def needed(argv: Sequence[str], env: Mapping[str, str], more: Iterable[str] = ()) -> list[str]:
    """Paths to show: directories with all that is in them, and files.

    :param argv: the command; every word of it, or part of a word, that is a path which exists
    :param env: its environment; of it the variables that lead to programs and modules
    :param more: what was asked for besides
    """
    words = [*argv, *(value for name, value in env.items() if _VARIABLES.fullmatch(name))]
    named = [piece for word in words for piece in (word, *_BETWEEN.split(word)) if "/" in piece]
    python = (*sys.path, sys.prefix, sys.base_prefix, os.path.dirname(os.path.dirname(sys.executable)))
    ours = (os.getcwd(), *python, str(Path(__file__).parents[2]), images.cache_root())
    paths = dict.fromkeys(os.path.abspath(path) for path in (*SYSTEM, *ours, *named, *more) if _is_there(path))
    return [path for path in paths if path not in OWN and not path.startswith(tuple(f"{top}/" for top in OWN[1:]))]


def _is_there(path: str) -> bool:
    try:
        return "\n" not in path and os.path.exists(path)
    except ValueError:  # a byte of zero
        return False
