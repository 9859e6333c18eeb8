# SPDX-License-Identifier: Apache-2.0
"""Every input that the loaders' fuzzer kept, played again; see tests/fuzz/fuzz_loaders.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.boot import loader_input

FILES = sorted((Path(__file__).parent / "loaders").iterdir())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_input_is_loaded_or_refused(path: Path) -> None:
    """A finding is named as the fuzzer named it; what was chosen from its corpus says how it must end."""
    loaded = loader_input.run(path.read_bytes())
    end = path.name.split("-")[0]
    assert end in ("crash", "timeout", "oom", "ok" if loaded else "refused")
