# SPDX-License-Identifier: Apache-2.0
"""What is imported where it is used is on the lists of ``vmm.jail.preload``: a jail has no files to import."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("boot", "devices", "virtio", "vmm")
# What `pyvmm serve` never runs, or runs before the jail is closed.
OTHERS = (
    "vmm/lab/", "vmm/images/", "vmm/commands/", "vmm/commands/cli.py", "vmm/jail/jailer.py", "vmm/vsock.py",
    "vmm/__main__.py", "vmm/launched.py", "vmm/machine/isolated.py", "vmm/machine/fork_server.py",
    "vmm/machine/terminal.py",
    "vmm/testing/", "virtio/testing.py", "vmm/sandbox/", "vmm/jail/rules.py",
)  # fmt: skip
# Imported where it is used, and not in a jail: by whom.
NEVER = {
    "numpy": "GuestMemory.view(), of programs that import us",
    "subprocess": "qcow2, passt and NAT, which start programs",
    "virtio.blk.qcow2": "the same",
    "virtio.net.nat": "the same",
    "virtio.net._policy": "passt",
    "virtio.net.resolver": "the same",
    "virtio.net.frames": "the same",
    "virtio.net.dns": "the same",
    "vmm.bus": "protocols, for type checkers",
    "socket": "Vsock.keep(), of sandboxes, whose programs have it already",
    "shutil": "save() of a snapshot, and images, where a file system exchanges no names",
    "difflib": "a mistake on the command line, before the jail",
    "vmm.config.typed": "type checkers",
    "vmm.config.files": "defaults of options, which the jailer reads before the jail",
    "asyncio": "Machine.run(), of programs that import us",
    "importlib": "vmm/__init__.py, for programs that import us",
    "vmm.machine.pool": "the same",
    "vmm.machine.isolated": "the same",
    "vmm._start_image": "starts from what `pyvmm prepare` has saved, before the jail",
}


def _inner_imports(path: Path) -> Iterator[str]:
    if path.suffix == ".pyx":
        yield from re.findall(r"^ +(?:import|from) (\S+)", path.read_text().split('"""', 2)[-1], re.MULTILINE)
        return
    for function in ast.walk(ast.parse(path.read_text())):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            for node in ast.walk(function):
                if isinstance(node, ast.Import):
                    yield from (alias.name for alias in node.names)
                elif isinstance(node, ast.ImportFrom):
                    for alias in node.names:
                        name = f"{node.module}.{alias.name}"
                        is_module = any((ROOT / f"{name.replace('.', '/')}{end}").exists() for end in (".py", ".pyx"))
                        yield name if is_module else node.module or ""


def _sources() -> list[Path]:
    return [
        path
        for room in ROOMS
        for path in sorted((ROOT / room).rglob("*.py*"))
        if path.suffix in (".py", ".pyx") and not str(path.relative_to(ROOT)).startswith(OTHERS)
    ]


@pytest.fixture(scope="module")
def loaded() -> set[str]:
    code = "import sys; from vmm.jail.preload import preload; preload(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    return set(done.stdout.split())


def test_every_import_inside_a_function_is_preloaded(loaded: set[str]) -> None:
    missing = {
        (str(path.relative_to(ROOT)), name) for path in _sources() for name in _inner_imports(path)
        if name not in loaded and name not in NEVER
    }  # fmt: skip
    assert not missing


def test_every_module_of_a_vm_is_preloaded_once_all_is(loaded: set[str]) -> None:
    wanted = {str(path.relative_to(ROOT).with_suffix("")).replace("/", ".") for path in _sources()}
    wanted = {name.removesuffix(".__init__") for name in wanted}
    assert wanted - loaded - set(NEVER) == set()


def test_a_preload_imports_no_program_starter() -> None:
    code = "import sys; from vmm.jail.preload import preload; preload(); print('subprocess' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout
    assert out == "False\n"
