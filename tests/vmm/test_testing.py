# SPDX-License-Identifier: Apache-2.0
"""``vmm.testing``: binutils and our own reader of kernels know what it makes; mistakes are one line."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from boot import load
from vmm import ConfigError
from vmm.testing import ENTRY, assemble, tiny_elf, tiny_guest


def test_a_tiny_elf_is_one_to_binutils_and_boots_by_pvh(tmp_path: Path) -> None:
    path = tiny_guest(tmp_path, b"\xb0\x07\xe6\xf4")
    assert Path(path).read_bytes() == tiny_elf(b"\xb0\x07\xe6\xf4")
    told = subprocess.run(["readelf", "-hlnW", path], capture_output=True, text=True, check=True)
    assert told.stderr == "" and "Xen" in told.stdout
    assert f"Entry point address:               {ENTRY:#x}" in told.stdout
    assert load.probe(path).needs_ring0 is False


def test_assembler_source(tmp_path: Path) -> None:
    assert assemble("mov al, 7; out 0xf4, al") == bytes.fromhex("b007e6f4")
    assert assemble("push rax", bits=64) == b"\x50"
    assert Path(tiny_guest(tmp_path, "hlt", "other.elf")) == tmp_path / "other.elf"


def test_a_mistake_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^as: .*no such instruction: `movv ") as caught:
        assemble("movv al, 7")
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"^ld: .*undefined reference to `nowhere'"):
        assemble("call nowhere")


def test_without_binutils(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ConfigError, match=r"^as: is not installed"):
        assemble("nop; nop")
