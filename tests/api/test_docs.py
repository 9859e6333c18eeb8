# SPDX-License-Identifier: Apache-2.0
"""docs/api.md names what there is, and README's links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

from vmm.api.routes import ROUTES

ROOT = Path(__file__).parents[2]


def test_every_path_is_in_the_table() -> None:
    text = (ROOT / "docs/api.md").read_text()
    for route in ROUTES:
        path = "/snapshot/" if route.path.startswith("/snapshot/") else route.path
        assert path in text, path


def test_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
