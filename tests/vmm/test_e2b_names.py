# SPDX-License-Identifier: Apache-2.0
"""E2B's names, as its SDK of PyPI has them, beside ours: what is equal, and what is missing, by name."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

import pytest

from benches.peers.firecracker import Missing
from tests.api.third_party import fetched
from vmm.sandbox import e2b
from vmm.sandbox.e2b import aio, commands, files

SDK = "e2b==2.63.0"
CLASSES: dict[str, tuple[type, str]] = {
    "Sandbox": (e2b.Sandbox, "sandbox_sync/main.py"),
    "Commands": (commands.Commands, "sandbox_sync/commands/command.py"),
    "CommandHandle": (e2b.CommandHandle, "sandbox_sync/commands/command_handle.py"),
    "Pty": (commands.Pty, "sandbox_sync/commands/pty.py"),
    "Filesystem": (files.Filesystem, "sandbox_sync/filesystem/filesystem.py"),
    "WatchHandle": (e2b.WatchHandle, "sandbox_sync/filesystem/watch_handle.py"),
    "AsyncSandbox": (e2b.AsyncSandbox, "sandbox_async/main.py"),
    "AsyncCommands": (aio.AsyncCommands, "sandbox_async/commands/command.py"),
    "AsyncCommandHandle": (e2b.AsyncCommandHandle, "sandbox_async/commands/command_handle.py"),
    "AsyncPty": (aio.AsyncPty, "sandbox_async/commands/pty.py"),
    "AsyncFilesystem": (aio.AsyncFilesystem, "sandbox_async/filesystem/filesystem.py"),
    "AsyncWatchHandle": (e2b.AsyncWatchHandle, "sandbox_async/filesystem/watch_handle.py"),
}
# What E2B has and we have not: parts of its cloud service, and git, which it has deprecated.
_CLOUD = {
    "connection_config", "create_snapshot", "delete_snapshot", "download_url", "envd_api_url", "envd_direct_url",
    "get_mcp_token", "get_mcp_url", "get_metrics", "git", "list_snapshots", "sandbox_domain", "traffic_access_token",
    "update_network", "upload_url",
}  # fmt: skip
MISSING = {
    "Sandbox": _CLOUD, "AsyncSandbox": _CLOUD, "AsyncCommands": {"stream_input"}, "AsyncPty": {"stream_input"},
}  # fmt: skip
# Parameters likewise; mcp, iam, lifecycle and volume_mounts are refused by name.
_MODE = {"keep_memory", "mode", "strict"}
_LIST = {"query", "limit", "next_token", "order"}
_SERVICE = {"idempotency_key", "logger", "on_resume"}
LESS = {
    "run": {"retain_output"},
    "connect": {"retain_output", "on_stdout", "on_stderr", "on_data", *_SERVICE},
    "pause": _MODE,
    "beta_pause": _MODE,
    "list": _LIST,
}
REFUSED = {"mcp", "iam", "lifecycle", "volume_mounts"}


@pytest.fixture(scope="module")
def sdk() -> Path:
    """E2B's package, fetched once; it is read, not imported."""
    try:
        return fetched("--no-deps", SDK) / "e2b"
    except Missing as problem:
        pytest.fail(f"LAYER MISSING: e2b: {problem}", pytrace=False)


def _methods(place: Path, name: str) -> dict[str, ast.FunctionDef | ast.AsyncFunctionDef]:
    found: dict[str, ast.FunctionDef | ast.AsyncFunctionDef] = {}
    if "Sandbox" in name:  # and what it inherits
        found |= _own_methods(place / "sandbox/main.py", "SandboxBase")
        kind = "async" if name.startswith("Async") else "sync"
        found |= _own_methods(place / f"sandbox_{kind}/sandbox_api.py", "SandboxApi")
    return found | _own_methods(place / CLASSES[name][1], name)


def _own_methods(source: Path, name: str) -> dict[str, ast.FunctionDef | ast.AsyncFunctionDef]:
    found = next(
        node
        for node in ast.parse(source.read_text()).body
        if getattr(node, "name", "") in (name, name.removeprefix("Async"))
    )
    assert isinstance(found, ast.ClassDef)
    return {
        node.name: node  # of several, the last is the one that is called
        for node in found.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_")
    }


def _parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    return [each.arg for each in node.args.args if each.arg not in ("self", "cls")]


@pytest.mark.parametrize("name", CLASSES)
def test_names_and_parameters_are_e2bs(sdk: Path, name: str) -> None:
    ours, _ = CLASSES[name]
    theirs = _methods(sdk, name)
    assert len(theirs) > 1 or name == "AsyncWatchHandle"
    assert {each for each in theirs if not _has(ours, each)} == MISSING.get(name, set())
    for method, node in theirs.items():
        found: Any = inspect.getattr_static(ours, method, None)
        if found is None or not (node.args.args[1:] or node.args.kwonlyargs):
            continue
        found = getattr(found, "_method", found)
        parameters = inspect.signature(getattr(found, "__func__", found)).parameters
        takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
        less = LESS.get(method, set())
        positional = [each for each in _parameters(node) if each not in less]
        here = [each for each in parameters if each not in ("self", "cls")]
        while set(positional) & REFUSED:  # has no place of its own; nor has what comes after it
            positional.pop()
        assert here[: len(positional)] == positional, method
        for keyword in node.args.kwonlyargs:
            assert takes_any or keyword.arg in here or keyword.arg in less, (method, keyword.arg)
        assert isinstance(node, ast.AsyncFunctionDef) == _is_async(found), method


def _has(ours: type, name: str) -> bool:
    attributes = ("files", "commands", "pty", "sandbox_id")  # made by the constructor, properties in E2B's
    return hasattr(ours, name) or (name in attributes and "Sandbox" in ours.__name__)


def _is_async(found: Any) -> bool:
    found = getattr(found, "__func__", found)
    return inspect.iscoroutinefunction(found)


def test_a_result_and_a_file_have_e2bs_fields(sdk: Path) -> None:
    for ours, source in (
        (e2b.CommandResult, "sandbox/commands/command_handle.py"),
        (e2b.PtySize, "sandbox/commands/command_handle.py"),
        (e2b.ProcessInfo, "sandbox/commands/main.py"),
        (e2b.EntryInfo, "sandbox/filesystem/filesystem.py"),
        (e2b.WriteInfo, "sandbox/filesystem/filesystem.py"),
        (e2b.FilesystemEvent, "sandbox/filesystem/watch_handle.py"),
    ):
        tree = ast.parse((sdk / source).read_text())
        found = next(node for node in tree.body if getattr(node, "name", "") == ours.__name__)
        assert isinstance(found, ast.ClassDef)
        theirs = {each.target.id for each in found.body if isinstance(each, ast.AnnAssign)}  # type: ignore[union-attr]
        assert theirs - set(inspect.signature(ours).parameters) <= {"metadata"}, ours


def test_enumerations_and_errors_are_e2bs(sdk: Path) -> None:
    for ours, source in (
        (e2b.FileType, "sandbox/filesystem/filesystem.py"),
        (e2b.FilesystemEventType, "sandbox/filesystem/watch_handle.py"),
    ):
        tree = ast.parse((sdk / source).read_text())
        found = next(node for node in tree.body if getattr(node, "name", "") == ours.__name__)
        assert isinstance(found, ast.ClassDef)
        values = [ast.literal_eval(each.value) for each in found.body if isinstance(each, ast.Assign)]
        assert sorted(values) == sorted(each.value for each in ours)
    bases = {
        node.name: [each.id for each in node.bases if isinstance(each, ast.Name)]
        for node in ast.parse((sdk / "exceptions.py").read_text()).body
        if isinstance(node, ast.ClassDef)
    }
    for name in e2b.__all__:
        if name.endswith("Exception") and name in bases:
            for base in set(bases[name]) - {"Exception"}:
                assert issubclass(getattr(e2b, name), getattr(e2b, base)), name
