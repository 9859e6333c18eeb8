# SPDX-License-Identifier: Apache-2.0
"""A launch's own finder of modules: what the library's finds, and never code of another source."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

import pytest

from vmm import launched

ROOT = Path(__file__).parents[2]
FINDER = launched._Finder(str(ROOT), os.path.dirname(os.__file__))


def _load(spec: ModuleSpec | None) -> ModuleType:
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "name", ["vmm.kvm.abi", "vmm.api.types", "devices._serial", "boot.elf", "struct", "threading", "boot", "vmm.api"]
)
def test_finds_what_the_library_finds(name: str) -> None:
    parent = name.rpartition(".")[0]
    place = [str(ROOT / parent.replace(".", "/"))] if parent else None
    mine, usual = FINDER.find_spec(name, place), PathFinder.find_spec(name, place)
    assert mine is not None and usual is not None
    for attribute in ("name", "origin", "cached", "has_location", "parent", "submodule_search_locations"):
        assert getattr(mine, attribute) == getattr(usual, attribute), attribute
    if name != "devices._serial":
        assert set(vars(_load(mine))) == set(vars(_load(usual)))


@pytest.mark.parametrize(
    "name", ["vmm.images", "vmm.lab", "json", "re", "vmm.nothing", "vmm._nothing", "boot.elf.deeper"]
)
def test_leaves_the_rest_to_the_library(name: str) -> None:
    assert FINDER.find_spec(name) is None


def test_code_is_of_the_source_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    (tmp_path / "boot").mkdir()
    source = tmp_path / "boot" / "told.py"
    finder = launched._Finder(str(tmp_path), "")

    def told() -> object:
        return _load(finder.find_spec("boot.told")).word

    source.write_text("word = 'first'\n")
    assert told() == "first"  # compiled now
    compiled = Path(importlib.util.cache_from_source(str(source)))
    assert told() == "first"
    assert compiled.exists()
    source.write_text("word = 'another'\n")
    assert told() == "another"
    source.write_text("word = 'as long'\n")
    os.utime(source, (1, 1))
    assert told() == "as long"
    whole = compiled.read_bytes()
    for damaged in (b"", whole[:9], whole[:-20], b"\0" * 4 + whole[4:], whole[:4] + b"\1" + whole[5:]):
        compiled.write_bytes(damaged)
        try:
            assert told() == "as long"
        except (EOFError, ValueError):
            assert damaged == whole[:-20]  # as the library itself
        compiled.write_bytes(whole)


def test_a_socket_that_somebody_has_removed_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fd = os.open("/dev/null", os.O_RDONLY)
    monkeypatch.setattr(launched, "_waits", (fd, str(tmp_path / "gone")))
    launched.drop_socket()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_a_directory_that_was_removed_is_no_mistake(tmp_path: Path) -> None:
    command = f"cd {tmp_path} && rmdir {tmp_path} && exec {sys.executable} -m vmm --version"
    environment = {**os.environ, "PYTHONPATH": str(Path(launched.__file__).parents[1])}
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
