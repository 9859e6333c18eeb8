# SPDX-License-Identifier: Apache-2.0
"""The library guide's programs, run as a reader would: one after the other, in one directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.guide import run_programs


def test_every_program_of_the_library_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_programs("library.md") >= 7
