# SPDX-License-Identifier: Apache-2.0
"""Mounts for a test's own thread: nobody else sees them, and they end with it."""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CLONE_NEWNS = 0x20000
MS_REC, MS_PRIVATE, MS_BIND = 0x4000, 1 << 18, 0x1000
_libc = ctypes.CDLL(None, use_errno=True)


def private_mounts(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test in a thread with a mount namespace of its own. What a share looks up there is in that namespace."""

    @functools.wraps(test)
    def run(*arguments: Any, **how: Any) -> None:
        raised: list[BaseException] = []

        def body() -> None:
            try:
                if _libc.unshare(CLONE_NEWNS) or _libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None):
                    pytest.fail("LAYER MISSING: mounts: root with CAP_SYS_ADMIN")
                test(*arguments, **how)
            except BaseException as error:
                raised.append(error)

        thread = threading.Thread(target=body)
        thread.start()
        thread.join()
        if raised:
            raise raised[0]

    return run


def mounted(kind: str, where: Path, *, flags: int = 0, source: str = "none", options: str = "") -> bool:
    """Mount; False: this kernel has no such file system."""
    what = source.encode(), os.fsencode(where), kind.encode() if kind else None, flags, options.encode() or None
    if _libc.mount(*what) == 0:
        return True
    number = ctypes.get_errno()
    if number == 19:  # ENODEV
        return False
    raise OSError(number, os.strerror(number), f"{kind} on {where}")


def bind(source: Path | str, where: Path) -> None:
    """What is at `source` at `where`, too."""
    mounted("", where, flags=MS_BIND, source=str(source))


def unmount(where: Path) -> None:
    """Take away what is mounted there."""
    if _libc.umount2(os.fsencode(where), 2):
        raise OSError(ctypes.get_errno(), "umount", str(where))


def ext4(where: Path, image: Path) -> None:
    """A file system on a disk, at `where`."""
    image.write_bytes(b"")
    os.truncate(image, 16 << 20)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    where.mkdir(exist_ok=True)
    made = subprocess.run(["mount", "-o", "loop", str(image), str(where)], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.fail(f"LAYER MISSING: loop devices: {made.stderr}")


def overlay(base: Path, **options: str) -> tuple[Path, Path]:
    """An overlayfs on a tmpfs at `base`, empty; the merged directory and the lower one, to fill before `overlaid`."""
    assert mounted("tmpfs", base)
    for name in ("lower", "upper", "work", "merged"):
        (base / name).mkdir()
    return base / "merged", base / "lower"


def overlaid(base: Path, **options: str) -> None:
    """Mount what `overlay` prepared."""
    given = {"lowerdir": base / "lower", "upperdir": base / "upper", "workdir": base / "work", **options}
    assert mounted("overlay", base / "merged", options=",".join(f"{key}={value}" for key, value in given.items()))
