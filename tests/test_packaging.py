# SPDX-License-Identifier: Apache-2.0
"""From the sdist to a wheel to an import; and that nothing is imported from where pyvmm happens to be started."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("boot", "devices", "virtio", "vmm")
MODULES = sorted(str(path.relative_to(ROOT))[:-4] for room in ROOMS for path in (ROOT / room).rglob("*.pyx"))
REAL = "vmm/_bus"  # this one is compiled in the test; the others were, when this checkout was built
PYVMM = str(Path(sys.executable).with_name("pyvmm"))


def _hook(name: str, directory: Path, to: Path) -> Path:
    # as pip calls it, without isolation: what builds is here
    code = f"import setuptools.build_meta as backend; print(backend.build_{name}({str(to)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=directory,
        capture_output=True,
        text=True,
        env={**os.environ, "CFLAGS": "-O0 -g0"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return to / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, unpacked where nothing else is. It is made from a copy of what git would have."""
    place = tmp_path_factory.mktemp("sdist")
    tree = place / "tree"
    for room in ROOMS:
        shutil.copytree(
            ROOT / room, tree / room, ignore=shutil.ignore_patterns("*.so", "*.elf", "_*.[ch]", "__pycache__")
        )
    (tree / "tools").mkdir()
    for path in "setup.py pyproject.toml MANIFEST.in README.md LICENSE CHANGELOG.md tools/man_page.py".split():
        shutil.copy2(ROOT / path, tree / path)
    made = _hook("sdist", tree, place)
    assert not list(tree.rglob("_*.c"))  # Cython ran for nothing
    with tarfile.open(made) as archive:
        archive.extractall(place / "unpacked")  # our own; Debian 12's tarfile has no filters
    (unpacked,) = (place / "unpacked").iterdir()
    return unpacked


@pytest.mark.timeout(240)
def test_the_sdist_makes_a_wheel_that_can_be_imported(source: Path, tmp_path: Path) -> None:
    have = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    want = {f"{room}/{path.name}" for room in ROOMS for path in (ROOT / room).glob("*.p[yx][xdi]*")} - {"vmm/py.typed"}
    launcher = {"vmm/launcher.c", "vmm/start_image.c", "vmm/start_image.h"}
    assert {name for name in want if name.endswith((".pyx", ".pxd", ".pyi"))} | launcher <= have
    assert not [name for name in have if name.endswith((".so", ".elf")) or Path(name).match("_*.c")]
    library = source / f"build/lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    for module in MODULES:
        if module != REAL:
            (library / module).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / f"{module}.c", source / f"{module}.c")
            os.utime(source / f"{module}.c")
    for module in MODULES:
        if module != REAL:
            shutil.copy(ROOT / f"{module}{suffix}", library / f"{module}{suffix}")
            os.utime(library / f"{module}{suffix}")
    wheel = _hook("wheel", source, tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "installed")
    assert {f"{module}{suffix}" for module in MODULES} <= set(names)
    assert [name for name in names if name.endswith("scripts/pyvmm")]
    assert [name for name in names if name.endswith("data/share/man/man1/pyvmm.1")]
    agent = (tmp_path / "installed/vmm/sandbox/agent.elf").read_bytes()
    assert agent[:4] == b"\x7fELF" and len(agent) < 150_000 and b"ld-linux" not in agent  # static
    for name in ("enter", "exit"):
        program = (tmp_path / f"installed/vmm/images/{name}.elf").read_bytes()
        assert program[:4] == b"\x7fELF" and len(program) < 20_000
    code = f"""
import importlib, sys
sys.path.insert(0, {str(tmp_path / "installed")!r})
names = {[module.replace("/", ".") for module in MODULES]!r}
for name in names + ["vmm.commands.cli", "vmm.machine.machine", "vmm.api.server"]:
    assert importlib.import_module(name).__file__.startswith(sys.path[0]), name
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("lost", ["*.pyx", "_bus.pyx"])
def test_a_tree_that_lost_its_sources_makes_no_wheel(source: Path, tmp_path: Path, lost: str) -> None:
    shutil.copytree(source, tmp_path / "tree", ignore=shutil.ignore_patterns(lost, "build"))
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=tmp_path / "tree", capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith("setup.py: no source of ") and "this tree is not whole" in done.stderr


# What a start imports, and so what somebody who wants to be imported would be called.
SHADOWS = ("argparse", "json", "socket", "struct", "msgspec", "httptools", "subprocess", "select", "shutil", "re")


@pytest.mark.parametrize(
    "command", [[PYVMM], [sys.executable, "-m", "vmm"], [sys.executable, "-m", "vmm.commands.cli"]]
)
@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["serve", "--help"], ["lab", "--help"], ["check"]])
def test_nothing_is_imported_from_the_current_directory(command: list[str], words: list[str], tmp_path: Path) -> None:
    for name in SHADOWS:
        (tmp_path / f"{name}.py").write_text(f"print('imported', {name!r})\nraise SystemExit(99)\n")
    done = subprocess.run([*command, *words], cwd=tmp_path, capture_output=True, text=True)
    assert "imported" not in done.stdout + done.stderr
    assert done.returncode in (0, 1 if words == ["check"] else 0), done.stderr


def test_a_checkout_that_is_not_installed_runs(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-S", "-m", "vmm", "--version"], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith("pyvmm "), done.stderr
