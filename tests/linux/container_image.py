# SPDX-License-Identifier: Apache-2.0
"""A container image of busybox, made by hand in two layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.images.layouts import Made, directory, entry, layer, symlink
from vmm import images
from vmm.images import host, initramfs


def pull(cache: Path, program: dict[str, Any]) -> str:
    """Pull one with that config into a cache of its own, and return its name."""
    packages = host.cache_root() / "debs"
    (cache / "pyvmm").mkdir()
    (cache / "pyvmm/debs").symlink_to(packages)
    home = write(cache / "layout", program)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        images.pull(f"oci:{home}")
    return f"oci:{home}"


def write(place: Path, program: dict[str, Any]) -> Path:
    """The same as a directory in OCI's layout; returns `place`."""
    binary, applets = initramfs.busybox()
    lower = layer(
        directory("etc"), entry("etc/passwd", b"root:x:0:0::/root:/bin/sh\nweb:x:33:34::/var:/bin/sh\n"),
        entry("etc/group", b"www:x:34:\nlog:x:4:web\n"), directory("bin"), entry("bin/busybox", binary, mode=0o755),
        entry("gone", b"x"), directory("srv", uid=33, gid=34), entry("bin/data", b"data", mode=0o644),
        *(symlink(applet, "/bin/busybox") for applet in applets if applet != "bin/busybox"),
    )  # fmt: skip
    return Made([lower, layer(entry(".wh.gone"))], program).write(place)
