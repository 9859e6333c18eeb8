# SPDX-License-Identifier: Apache-2.0
"""The extensions are built as a distribution builds its own: full RELRO, stack and buffer checks, branch targets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# An extension that is older was built by another setup.py; a fresh checkout has none of these.
BUILT = [
    path
    for room in ("vmm", "virtio", "devices")
    for path in sorted((ROOT / room).rglob("*.so"))
    if path.stat().st_mtime > (ROOT / "setup.py").stat().st_mtime
]


def _read(option: str, path: Path) -> str:
    return subprocess.run(["readelf", "-W", option, path], check=True, capture_output=True, text=True).stdout


@pytest.mark.skipif("PYVMM_SANITIZER" in os.environ, reason="sanitizers have their own flags")
@pytest.mark.parametrize("path", BUILT, ids=lambda path: path.name.partition(".")[0])
def test_an_extension_is_hardened(path: Path) -> None:
    assert "BIND_NOW" in _read("--dynamic", path)
    headers = _read("--program-headers", path)
    assert "GNU_RELRO" in headers
    assert "RWE" not in headers
    assert "__stack_chk_fail" in _read("--dyn-syms", path)


FLAGS = ("-fstack-protector-strong", "-D_FORTIFY_SOURCE=2", "-fcf-protection", "-Wl,-z,relro,-z,now")


def test_setup_asks_for_it() -> None:
    text = (ROOT / "setup.py").read_text()
    for flag in FLAGS:
        assert flag in text


def test_the_launcher_is_built_so_too(tmp_path: Path) -> None:
    said, compiler = tmp_path / "said", tmp_path / "cc"
    compiler.write_text(f'#!/bin/sh\necho "$@" >>{said}\nexec gcc "$@"\n')
    compiler.chmod(0o755)
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_scripts", "--build-dir", tmp_path], check=True, cwd=ROOT,
        env={**os.environ, "CC": str(compiler), "PYVMM_NO_EXTENSIONS": "1"},
    )  # fmt: skip
    words = said.read_text().split()
    assert set(FLAGS) <= set(words) and "vmm/launcher.c" in words
