# SPDX-License-Identifier: Apache-2.0
"""A program that sees one directory with chosen parts of this host's files in it, and nothing but them below it.

    python -I view.py DIRECTORY LIST COMMAND...

In a mount namespace of its own it puts every path of LIST, a line each, below DIRECTORY, and becomes COMMAND.
Mounts below a path are not followed. Imports nothing of ours, for it is run before anything is known.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import sys
from collections.abc import Callable

CLONE_NEWNS = 0x20000
MS_RDONLY, MS_NOSUID, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 32, 4096, 1 << 14, 1 << 18
MAX_LINKS = 40  # as Linux
# What a system has at least, for programs that write there; whatever of it is not shown is an empty directory.
PLACES = {
    "dev": 0o755, "proc": 0o755, "sys": 0o755, "run": 0o755, "tmp": 0o1777, "var/tmp": 0o1777, "root": 0o700,
    "home": 0o755, "mnt": 0o755, "srv": 0o755, "var/lib": 0o755, "var/cache": 0o755, "var/log": 0o755,
}  # fmt: skip


class View:
    """The directory, filled one path at a time."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._libc = ctypes.CDLL(None, use_errno=True)
        if self._libc.unshare(CLONE_NEWNS):
            raise OSError(ctypes.get_errno(), "unshare the mounts")
        try:
            self._mount("none", "/", None, MS_REC | MS_PRIVATE)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            raise OSError(
                errno.EINVAL, "/ is not a mount point; before a chroot DIR, run `mount --bind DIR DIR`"
            ) from None
        self._mount("view", root, "tmpfs", MS_NOSUID)
        for name, mode in PLACES.items():
            os.makedirs(f"{root}/{name}", exist_ok=True)
            os.chmod(f"{root}/{name}", mode)
        os.symlink("/run", f"{root}/var/run")
        os.mkdir(f"{root}/.nothing")
        open(f"{root}/.none", "x").close()

    def show(self, path: str) -> None:
        """Put a file or a directory at its own path; symbolic links on the way become such."""
        real, parts, links = "", path.split("/"), 0
        while parts:
            part = parts.pop(0)
            here = f"{real}/{part}"
            if part in ("", "."):
                continue
            if part == "..":
                real = os.path.dirname(real)
            elif not os.path.islink(here):
                real = here
            else:
                links += 1
                if links > MAX_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
                target = os.readlink(here)
                if not os.path.lexists(self._root + here):
                    self._directories(real)
                    os.symlink(target, self._root + here)
                parts = target.split("/") + parts
                real = "" if target.startswith("/") else real
        there = self._root + real
        if os.path.exists(there) and os.path.samestat(os.stat(there), os.stat(real)):
            return
        if os.path.isdir(real):
            self._directories(real)
        else:
            self._directories(os.path.dirname(real))
            self._make(os.mknod, there)
        self._mount(real, there, None, MS_BIND)
        self._mount("none", there, None, MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID)

    def hide_secrets(self, directory: str) -> None:
        """Cover what not everybody on this host may read."""
        for where, directories, files in os.walk(self._root + directory):
            for name in [*directories]:
                mode = os.lstat(f"{where}/{name}").st_mode
                if stat.S_ISDIR(mode) and mode & 0o5 != 0o5:
                    self._mount(f"{self._root}/.nothing", f"{where}/{name}", None, MS_BIND)
                    directories.remove(name)
            for name in files:
                mode = os.lstat(f"{where}/{name}").st_mode
                if not stat.S_ISLNK(mode) and not mode & 0o4:
                    self._mount(f"{self._root}/.none", f"{where}/{name}", None, MS_BIND)

    def _directories(self, path: str) -> None:
        at = self._root
        for part in filter(None, path.split("/")):
            at = f"{at}/{part}"
            if not os.path.isdir(at):
                self._make(os.mkdir, at)

    def _make(self, make: Callable[[str], None], at: str) -> None:
        # What is shown is read-only. A path that is not there, though it is on the host, is behind a mount point.
        try:
            make(at)
        except OSError as error:
            if error.errno != errno.EROFS:
                raise
            self._mount("view", os.path.dirname(at), "tmpfs", MS_NOSUID)
            make(at)

    def _mount(self, source: str, target: str, kind: str | None, flags: int) -> None:
        places = os.fsencode(source), os.fsencode(target)
        if self._libc.mount(*places, kind and kind.encode(), ctypes.c_ulong(flags), None):
            raise OSError(ctypes.get_errno(), f"mount {target}")


def main(argv: list[str]) -> None:
    """Make the view, and become the command."""
    root, listing, *command = argv
    try:
        with open(listing, "rb") as file:
            paths = [os.fsdecode(path) for path in file.read().split(b"\n") if path]
        view = View(root)
        for path in sorted(paths, key=lambda path: path.count("/")):
            view.show(path)
        view.hide_secrets("/etc")
        os.execvp(command[0], command)
    except OSError as error:
        what = error.filename or (error.args[1] if len(error.args) > 1 else "")
        sys.exit(f"cannot show the machine a part of this host's files: {what}: {os.strerror(error.errno or 0)}")


if __name__ == "__main__":
    main(sys.argv[1:])
