# SPDX-License-Identifier: Apache-2.0
"""The pages: links and names of the API reference lead somewhere, and the navigation has every page."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]


def _prose(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def _anchors(page: Path) -> set[str]:
    # As mkdocs and code hosts make them of headings.
    titles = re.findall(r"^#+ +(.*)", _prose(page), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link, anchor in re.findall(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]+))?\)", _prose(page)):
        target = (page.parent / link).resolve() if link else page
        assert target.exists(), f"{link} is not there"
        assert not anchor or anchor in _anchors(target), f"{link}#{anchor}: no such heading"


def test_the_navigation_has_every_page() -> None:
    named = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    pages = {str(page.relative_to(DOCS)) for page in PAGES if DOCS in page.parents}
    assert sorted(named) == sorted(pages | {"index.md", "CONTRIBUTING.md", "CHANGELOG.md"})


def test_the_reference_has_every_public_name() -> None:
    import vmm
    import vmm.sandbox

    named = set()
    for page in (DOCS / "reference").glob("*.md"):
        for name in re.findall(r"^::: (\S+)", page.read_text(), re.MULTILINE):
            named.add(name)
            home, _, last = name.rpartition(".")
            if name in ("vmm.bus.BusDevice",):  # there for type checkers alone
                continue
            module = importlib.import_module(home)
            assert hasattr(module, last) or importlib.import_module(name), name
    assert {f"vmm.{name}" for name in vmm.__all__} - named == {"vmm.Sandbox"}  # which is vmm.sandbox.Sandbox


def test_every_example_is_listed() -> None:
    text = (DOCS / "examples.md").read_text()
    for example in (ROOT / "examples").glob("*.py"):
        assert f"(../examples/{example.name})" in text, example.name
