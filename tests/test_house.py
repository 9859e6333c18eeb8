# SPDX-License-Identifier: Apache-2.0
"""The house's rules that a linter does not know: which room may import which, and what a launch may import."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("boot", "devices", "virtio", "vmm")
# Which room may import which, besides its own. A module directly in vmm/ is a primitive: any room may import it, and it
# imports primitives alone. What stands above is in a folder.
MAY_IMPORT = {
    "vmm": set(),
    "vmm.kvm": {"vmm"},
    "vmm.jail": {"vmm"},
    "boot": {"vmm", "vmm.kvm.abi"},
    "devices": {"vmm"},
    "virtio": {"vmm"},
    "vmm.config": {"vmm", "vmm.kvm.abi"},
    "vmm.mmds": {"vmm", "vmm.config"},
    "vmm.machine": {"vmm", "vmm.kvm", "vmm.jail", "vmm.config", "vmm.mmds", "boot", "devices", "virtio"},
    "vmm.observe": {"vmm", "vmm.machine", "virtio"},
    "vmm.testing": {"vmm", "vmm.machine"},
    "vmm.images": {"vmm", "vmm.config"},
    "vmm.lab": {"vmm", "vmm.config", "vmm.images", "vmm.machine"},
    "vmm.sandbox": {"vmm", "vmm.kvm", "vmm.config", "vmm.images", "vmm.machine"},
    "vmm.api": {"vmm", "vmm.kvm", "vmm.config", "vmm.mmds", "vmm.machine", "vmm.observe", "virtio"},
}
MAY_IMPORT["vmm.commands"] = set(MAY_IMPORT)
# What a user imports and what a process starts with.
FACES = ("vmm", "vmm.__main__")


def _room(name: str) -> str:
    return next((room for room in MAY_IMPORT if "." in room and f"{name}.".startswith(f"{room}.")), name.split(".")[0])


def _modules() -> list[tuple[str, Path]]:
    found = []
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*")):
            if path.suffix in (".py", ".pyx", ".pyi", ".pxd"):
                name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
                found.append((name, path))
    return found


def _imports(path: Path) -> set[str]:
    text = path.read_text()
    if path.suffix in (".pyx", ".pxd"):
        found = re.findall(r"^\s*from\s+([\w.]+)\s+c?import\b", text, re.MULTILINE)
        return set(found) | set(re.findall(r"^\s*c?import\s+([\w.]+)", text, re.MULTILINE))
    names: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; the rooms' names are absolute"
            base = node.module or ""
            names |= {f"{base}.{alias.name}" if base in ROOMS else base for alias in node.names}
    return names


def _ours(name: str) -> bool:
    return name.split(".")[0] in ROOMS


@pytest.mark.parametrize(("module", "path"), _modules(), ids=lambda value: str(value).replace(str(ROOT), ""))
def test_import_arrows(module: str, path: Path) -> None:
    if module in FACES:
        return
    room = _room(module)
    allowed = MAY_IMPORT[room] | {room}
    for name in filter(_ours, _imports(path)):
        assert name in allowed or _room(name) in allowed, f"{module} must not import {name}"


def test_threads_are_made_by_spawn() -> None:
    # Behind the filters no other way makes one, and signals are the main thread's. A pool makes machines, and has none.
    allowed = {"vmm.machine.pool", "vmm.threads", "vmm.jail.seccomp", "vmm.api.server"}
    makers = {module for module, path in _modules() if re.search(r"\bThread\(target", path.read_text())}
    assert makers <= allowed, makers - allowed


def test_launch_imports_nothing_heavy() -> None:
    heavy = set("numpy asyncio argparse dataclasses inspect json logging subprocess cffi pathlib".split())
    # What takes long to import, and of which C has all that a launch uses.
    spared = set("collections collections.abc ctypes enum functools operator signal typing".split())
    code = f"""
import gc, sys
sys.path += [{str(ROOT)!r}]
gc.disable()
from vmm import launched
launched.spare_threading()
import vmm.commands.cli, vmm.commands.run, vmm.kvm.vm
launched.spare_collections("vmm.machine.machine")
assert "vmm.machine.machine" in sys.modules
print(*sys.modules)
import functools, collections, collections.abc, threading
functools.wraps, collections.Counter, collections.abc.Sequence, threading.Thread(target=print).start()
"""
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True, capture_output=True, text=True)
    loaded = set(done.stdout.splitlines()[0].split())
    assert not (heavy | spared) & loaded


def test_a_served_start_imports_nothing_heavy() -> None:
    # As vmm/launcher.c starts it.
    import msgspec

    code = f"""
import gc, sys
sys.path += {[str(ROOT), str(Path(msgspec.__file__).parents[1])]!r}
gc.disable()
from vmm import launched
launched.spare_threading()
import vmm.commands.cli, vmm.commands.serve, vmm.unix_socket
launched.spare_httptools()
import vmm.api.server
launched.spare_msgspec()
import vmm.api.actions, vmm.api.answer
print(*sys.modules)
"""
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True, capture_output=True, text=True)
    loaded = set(done.stdout.split())
    never = set("site argparse dataclasses inspect json logging subprocess pathlib socket selectors tokenize".split())
    late = set("typing_extensions uuid decimal datetime platform textwrap ctypes vmm.machine.machine".split())
    late |= set("collections contextlib functools operator re warnings msgspec.inspect msgspec.toml".split())
    late |= {"enum"} if sys.version_info < (3, 14) else set()  # since then msgspec needs annotationlib, and it enum
    assert loaded & (never | late) == set()


def test_nothing_else_is_at_the_top() -> None:
    # What a trial leaves in a checkout has been committed by `git add -A`, more than once.
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout: what belongs to it is not known")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    known = (
        ".ci .gitattributes .gitignore .pre-commit-config.yaml benches boot CHANGELOG.md CONTRIBUTING.md devices docs "
        "examples LICENSE Makefile MANIFEST.in mkdocs.yml pyproject.toml README.md setup.py tests tools virtio vmm"
    )
    assert {line.partition("/")[0] for line in listed.splitlines()} == set(known.split())


def test_one_version() -> None:
    import tomllib

    from vmm import __version__

    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == __version__


# What a reader stumbles over, and what to write instead.
STUMBLES = {
    r"\b(is|are|was) none\b": "say what does not exist: `0 if no connection is idle`, `the file is missing`",
    r"(?<![Tt]here )\b(is|are) no (?!longer|more)": "say `is not a X`, `does not exist`, `has no X` or `there is no X`",
    r":param \w+: (of|with) ": "begin with the noun: `:param size: the file's size, in bytes`",
    r":raises \w+: it ": "name what `it` stands for: `:raises OSError: the file cannot be written`",
}


def test_texts_are_plain() -> None:
    found = []
    for _, path in _modules():
        name = str(path.relative_to(ROOT))
        for number, line in enumerate(path.read_text().splitlines(), 1):
            text = line.partition("#")[0]  # a comment is for who knows the code
            for pattern, instead in STUMBLES.items():
                match = re.search(pattern, text)
                if match:
                    found.append(f"{name}:{number}: `{match[0].strip()}`: {instead}")
    assert not found, "\n".join(found)


def _materialises(path: Path) -> list[int]:
    """Lines at which a device in Python takes a chain's buffers as a list, other than one at a time to write to."""
    tree = ast.parse(path.read_text())
    loops = [node.iter for node in ast.walk(tree) if isinstance(node, ast.For)]
    return [
        node.lineno for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in ("readable", "writable")
        and not (node.attr == "writable" and node in loops)
    ]  # fmt: skip


@pytest.mark.parametrize("path", sorted((ROOT / "virtio").rglob("*.py")), ids=lambda path: path.name)
def test_devices_copy_a_chain_once_and_bounded(path: Path) -> None:
    # A driver names 4 GiB by a few descriptors: a list of a chain's buffers invites to join it before it is judged.
    assert not _materialises(path), "Chain.gather(limit) copies what a driver wrote, Chain.scatter what it gets"


@pytest.mark.parametrize("path", sorted((ROOT / "virtio").rglob("*.pyx")), ids=lambda path: path.name)
def test_no_copy_as_long_as_a_chain_says(path: Path) -> None:
    made = re.findall(
        r"(?:FromStringAndSize|malloc|Malloc|calloc|Calloc)\(.*(?:readable|writable)_bytes", path.read_text()
    )
    assert not made, "min() with a limit of ours comes first"
