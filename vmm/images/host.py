# SPDX-License-Identifier: Apache-2.0
"""What building images needs from the host: a cache directory, programs, errors that say what to do."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from vmm import images
from vmm.errors import VmmError

# Called with a step ("busybox-static (0.9 MB)") and how much of it is done, 0.0 to 1.0, None where unknown.
Progress = Callable[[str, float | None], None]

# The Debian package of each program that images are made with.
PACKAGE_OF = {
    "apt-get": "apt",
    "apt-cache": "apt",
    "dpkg-deb": "dpkg",
    "mke2fs": "e2fsprogs",
    "depmod": "kmod",
    "newuidmap": "uidmap",
    "mksquashfs": "squashfs-tools",
    "sqfstar": "squashfs-tools",
}
TRIES = 3
PAUSE = 2.0  # seconds between two tries
SBIN = ":/usr/local/sbin:/usr/sbin:/sbin"  # not in an ordinary user's PATH


class PullError(VmmError):
    """An image cannot be fetched or built on this host; the message is one line that says what to do."""


class FetchError(PullError):
    """The network or a server failed; the next try may not."""


_T = TypeVar("_T")


def tried(fetch: Callable[[], _T], failure: type[Exception] = FetchError) -> _T:
    """Call ``fetch`` up to three times: a look-up of a name fails now and then.

    :raises failure: the third time, too
    """
    for _ in range(TRIES - 1):
        try:
            return fetch()
        except failure:
            time.sleep(PAUSE)
    return fetch()


def silent(step: str, done: float | None) -> None:
    """Ignore progress."""


def cache_root() -> Path:
    """Return pyvmm's cache directory, ``$XDG_CACHE_HOME/pyvmm``; nothing is created."""
    return Path(images.cache_root())


def tool(name: str) -> str:
    """Return the path of a program, looking in sbin too, which an ordinary user's PATH leaves out.

    :raises PullError: the program is not installed; the message names its Debian package
    """
    path = _found(name)
    if path is None:
        raise PullError(f"{name} is not installed: run `apt-get install {PACKAGE_OF.get(name, name)}`")
    return path


def _found(name: str) -> str | None:
    return shutil.which(name, path=os.environ.get("PATH", os.defpath) + SBIN)


def need(*names: str) -> None:
    """Check that every program is installed, so that a long build does not stop halfway.

    :raises PullError: a program is missing; the message is one line with the command that installs all that are
    """
    packages = [PACKAGE_OF.get(name, name) for name in names if _found(name) is None]
    if packages:
        raise PullError(
            f"missing programs: run `apt-get update && apt-get install {' '.join(dict.fromkeys(packages))}`"
        )


def run(argv: list[str], *, cwd: str | Path | None = None, env: Mapping[str, str] | None = None) -> str:
    """Run a program whose messages are in English and return what it wrote to standard output.

    :param env: added to our own environment
    :raises PullError: the program failed; the message is the last line of its standard error
    """
    done = subprocess.run(
        [tool(argv[0]), *argv[1:]],
        cwd=cwd,
        env={**os.environ, **(env or {}), "LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise PullError(f"{argv[0]}: {said[-1].removeprefix('E: ')}")
    return done.stdout


@contextmanager
def locked(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold a lock; ``waiting`` is called first if another process has it."""
    with open(path, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
