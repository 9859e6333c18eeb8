# SPDX-License-Identifier: Apache-2.0
"""What is written by ``python -m tools.declared`` is what the declarations say now."""

from __future__ import annotations

import pytest

from tools import declared


@pytest.mark.parametrize("path", declared.FILES)
def test_the_file_is_as_the_declarations_say(path: str) -> None:
    assert (declared.ROOT / path).read_text() == declared.FILES[path](), "run python -m tools.declared"
