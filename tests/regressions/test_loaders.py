# SPDX-License-Identifier: Apache-2.0
"""Every input that the loaders' fuzzer kept, played again; see tests/fuzz/fuzz_loaders.py."""

from __future__ import annotations

from pathlib import Path

import loader_input
import pytest

FILES = sorted((Path(__file__).parent / "loaders").iterdir())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_input_is_loaded_or_refused(path):
    loaded = loader_input.run(path.read_bytes())
    assert (loaded is not None) == path.name.startswith("ok-")
