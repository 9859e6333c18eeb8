# SPDX-License-Identifier: Apache-2.0
"""Debian's buildah, with a store of its own. It needs no other image, no runtime and no daemon."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


class Buildah:
    """Called with the words of a command, it returns what that printed.

    :param home: a directory for what it stores
    """

    def __init__(self, home: Path) -> None:
        self._home = home
        self._argv = ["buildah", "--root", f"{home}/root", "--runroot", f"{home}/run", "--storage-driver", "vfs"]

    def __call__(self, *words: str | Path) -> str:
        others = ("XDG_", "REGISTRY_", "BUILDAH_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(others)}
        env = {**kept, "HOME": str(self._home), "TMPDIR": str(self._home), "BUILDAH_ISOLATION": "chroot"}
        done = subprocess.run([*self._argv, *words], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def copy(self, image: str) -> tuple[str, Path]:
        """Make a container of an image: its name, and the directory with its files."""
        name = self("from", "--pull-never", image)
        return name, Path(self("mount", name))
