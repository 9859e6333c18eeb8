# SPDX-License-Identifier: Apache-2.0
"""The library guide's programs, run as a reader would: one after the other, in one directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.guide import programs


def test_every_program_of_the_library_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    found = programs("library.md")
    assert len(found) >= 7
    for program in found:
        exec(compile(program, "library.md", "exec"), names)
