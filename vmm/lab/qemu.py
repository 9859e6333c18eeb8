# SPDX-License-Identifier: Apache-2.0
"""The QEMU that emulates the lab's machine: this host's, or a newer one of Debian's backports, unpacked in the cache.

QEMU before 9.1 loses the interrupt shadow at VMRUN: a guest in the lab that executes `sti; hlt` now and then takes its
interrupt between the two, and sleeps for ever (docs/SPECIFICATION.md has the counts).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from vmm.errors import ConfigError
from vmm.images import apt, suites
from vmm.images.host import Progress, PullError, silent

NAME = "qemu-system-x86_64"
WANTED = (9, 1)
# The program; what it reads at the start: option ROMs, the BIOS.
PACKAGES = ("qemu-system-x86", "qemu-system-data", "seabios")
_DATA = ("usr/share/qemu", "usr/share/seabios")
_LIBRARIES = ("usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu")


class Qemu(NamedTuple):
    """A program to run, with its first arguments, and what its environment has beside ours."""

    argv: tuple[str, ...]
    env: dict[str, str]
    version: tuple[int, int]


def choose(program: str | None = None, progress: Progress = silent) -> Qemu:
    """The QEMU for the lab.

    :param program: one that the user named; None for the best there is
    :raises ConfigError: the program is not a QEMU that runs here
    """
    own = _tried((program or shutil.which(NAME) or NAME,), {})
    if program is not None and own.version == (0, 0):
        raise ConfigError("--qemu", program, "is not a QEMU that can run here")
    if program is not None or own.version >= WANTED:
        return own
    try:
        newer = _of_backports(progress)
    except PullError as error:
        progress(f"QEMU {'.'.join(map(str, own.version))}, in which a guest stops dead now and then: {error}", None)
        return own
    return newer


def _tried(argv: tuple[str, ...], env: dict[str, str]) -> Qemu:
    # a program that does not run, or is not a QEMU, has version 0.0
    try:
        said = subprocess.run(
            [*argv, "--version"], env={**os.environ, **env}, stdin=subprocess.DEVNULL, capture_output=True, text=True
        ).stdout
    except OSError:
        said = ""
    found = re.match(r"QEMU emulator version (\d+)\.(\d+)", said)
    return Qemu(argv, env, (int(found[1]), int(found[2])) if found else (0, 0))


def _of_backports(progress: Progress) -> Qemu:
    """Debian's backport, with those of its libraries that this host has not installed.

    :raises PullError: no suitable QEMU exists, or it cannot be fetched
    """
    release = suites.own()
    if release is None:
        raise PullError("this host is not a Debian, so there is no backport for it")
    suite = f"{release}-backports"
    trees = [package.tree for package in apt.packages(PACKAGES, suite=suite, progress=progress)]
    program = trees[0] / "usr/bin" / NAME
    if _lacks(program):
        libraries = [name for name in apt.depends(PACKAGES[0], suite=suite) if name.startswith("lib")]
        wanted = [name for name in libraries if not _installed(name)]
        trees += [package.tree for package in apt.packages(wanted, suite=suite, progress=progress)]
    data = [option for tree in trees for path in _DATA if (tree / path).is_dir() for option in ("-L", str(tree / path))]
    places = [str(tree / path) for tree in trees[len(PACKAGES) :] for path in _LIBRARIES if (tree / path).is_dir()]
    qemu = _tried((str(program), *data), {"LD_LIBRARY_PATH": ":".join(places)} if places else {})
    if qemu.version < WANTED:
        raise PullError(f"{suite}'s QEMU does not run here")
    return qemu


def _lacks(program: Path) -> bool:
    # whether the linker misses a library
    done = subprocess.run(["ldd", program], capture_output=True, text=True)
    return done.returncode != 0 or "not found" in done.stdout


def _installed(package: str) -> bool:
    done = subprocess.run(["dpkg-query", "-W", "-f", "${db:Status-Status}", package], capture_output=True, text=True)
    return "installed" in done.stdout.split()
