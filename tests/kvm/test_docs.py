# SPDX-License-Identifier: Apache-2.0
"""README's first program and those of the guides, run as a reader would: one after the other, in one directory."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.guide import programs, run_programs


def test_every_program_of_the_library_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_programs("library.md") >= 7


def test_a_device_that_no_kernel_knows_in_a_machine_and_in_its_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    upper, _, thermometer, _, warm, asks, jobs, _, squares, *more = programs("devices.md")[2:]
    names: dict[str, object] = {}
    for program in (upper, thermometer, warm, asks, jobs, squares, *more):
        exec(compile(program, "devices.md", "exec"), names)
    assert len(more) == 1
    promised = re.findall(r"print\(.*\)  # (.*)", more[-1])
    assert capsys.readouterr().out.splitlines() == promised and promised


def test_the_first_program_of_the_guide_to_snapshots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(programs("snapshots.md")[0], "snapshots.md", "exec"), names)
    with names["vm"] as vm, names["copy"] as copy:
        assert [each.state for each in (vm, copy, *names["children"])] == ["Running"] * 5
        for child in names["children"]:
            child.close()


def test_the_first_program_of_readme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    program = programs("../README.md")[0]
    exec(compile(program, "README.md", "exec"), {})
    promised = re.findall(r"print\(.*\)  # ([^:\n]*)", program)
    assert capsys.readouterr().out.splitlines() == promised and len(promised) == 2
