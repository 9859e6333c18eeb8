# SPDX-License-Identifier: Apache-2.0
"""The pages: links and names of the API reference lead somewhere, and the navigation has every page."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest

from benches.peers.__main__ import NAMES

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


def _reference() -> dict[str, object]:
    """What the pages of the API reference show, by name; of a module, what is made in it."""
    shown: dict[str, object] = {}
    for page in (DOCS / "reference").glob("*.md"):
        for name in re.findall(r"^::: (\S+)", page.read_text(), re.MULTILINE):
            home, _, last = name.rpartition(".")
            if name == "vmm.bus.BusDevice":  # there for type checkers alone
                continue
            value = getattr(importlib.import_module(home), last, None) or importlib.import_module(name)
            shown[name] = value
            if isinstance(value, ModuleType):
                shown |= {
                    f"{name}.{key}": member
                    for key, member in vars(value).items()
                    if not key.startswith("_") and callable(member) and member.__module__ == name
                }
    return shown


def test_the_reference_has_every_public_name() -> None:
    import vmm.sandbox

    shown = _reference()
    public = {f"vmm.{name}" for name in vmm.__all__}
    assert public - shown.keys() == {"vmm.Sandbox"}  # shown as vmm.sandbox.Sandbox
    objects = set(map(id, shown.values()))
    assert {name for name in vmm.sandbox.__all__ if id(getattr(vmm.sandbox, name)) not in objects} == {
        "Session",  # the page of Sandbox shows its methods
        "AsyncFiles",  # has those of Files
        "AsyncProcess",  # has those of Process
    }
    assert {"virtio.testing", "vmm.testing"} <= shown.keys()


def test_what_the_reference_shows_has_docstrings() -> None:
    # The site leaves out what has none.
    shown = _reference()
    for name, value in list(shown.items()):
        if isinstance(value, type):
            shown |= {
                f"{name}.{key}": getattr(member, "__func__", member)
                for key, member in vars(value).items()
                if not key.startswith("_") and (callable(member) or isinstance(member, property | classmethod))
            }
    assert [name for name, value in shown.items() if not value.__doc__] == []


def _spelt_out(path: str) -> list[str]:
    """A path with {a,b} in it, as the paths that it stands for."""
    braces = re.search(r"\{([^}]*)\}", path)
    if not braces:
        return [path]
    return [
        each
        for word in braces[1].split(",")
        for each in _spelt_out(path[: braces.start()] + word + path[braces.end() :])
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_are_there(page: Path) -> None:
    text = page.read_text()
    if page.name == "peers.md":  # whose sources are files of other projects
        text = text.partition("## Claims from their own documents")[0]
    for named in re.findall(r"`((?:vmm|virtio|devices|boot|tests|benches|examples|tools)/[^`\s]*)`", text):
        path, _, test = named.partition("::")
        for each in _spelt_out(path):
            assert list(ROOT.glob(each)), f"{each} is not there"
        assert not test or f"def {test}(" in (ROOT / path).read_text(), f"{named} is not there"
    for module in re.findall(r"python -m ((?:vmm|tests|benches|tools)[\w.]*)", text):
        home = ROOT / module.replace(".", "/")
        assert home.with_suffix(".py").exists() or (home / "__main__.py").exists(), f"{module} is not there"
    for words in re.findall(r"benches\.peers((?: +[a-z]\w*)+)", text):
        assert set(words.split()) <= set(NAMES), words


def test_every_example_is_listed() -> None:
    text = (DOCS / "examples.md").read_text()
    for example in (ROOT / "examples").glob("*.py"):
        assert f"(../examples/{example.name})" in text, example.name
