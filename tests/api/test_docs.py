# SPDX-License-Identifier: Apache-2.0
"""docs/api.md names what there is."""

from __future__ import annotations

from pathlib import Path

from vmm.api.actions import ACTIONS

ROOT = Path(__file__).parents[2]


def test_every_path_is_in_the_table() -> None:
    text = (ROOT / "docs/api.md").read_text()
    for route in ACTIONS.values():
        path = "/snapshot/" if route.path.startswith("/snapshot/") else route.path
        assert path in text, path
