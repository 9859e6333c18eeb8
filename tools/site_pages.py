# SPDX-License-Identifier: Apache-2.0
"""The site's pages that are not in docs/: README, CONTRIBUTING, CHANGELOG, and each source file that a page links to.

A hook of mkdocs (mkdocs.yml), so that a link that leads somewhere in the checkout leads there on the site, too.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}
LANGUAGES = {".py": "python", ".pyx": "cython", ".pxd": "cython", ".c": "c", ".h": "c", ".sh": "bash"}
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")


def _on_site(target: str) -> str:
    """Where a file of the checkout is on the site; `target` is its path from the root."""
    if target in PAGES:
        return PAGES[target]
    return target.removeprefix("docs/") if target.startswith("docs/") else f"source/{target}.md"


def _origin(page: str) -> str:
    """Path, from the root of the checkout, of the file from which the site's page `page` is made."""
    return next((origin for origin, name in PAGES.items() if name == page), f"docs/{page}")


def _sources(text: str, origin: str) -> Iterator[str]:
    for link in LINK.findall(text):
        target = posixpath.normpath(posixpath.join(posixpath.dirname(origin), link))
        if _on_site(target).startswith("source/") and (ROOT / target).is_file():
            yield target


def on_files(files: Any, config: Any) -> Any:
    """Add the pages."""
    from mkdocs.structure.files import File

    for origin, name in PAGES.items():
        files.append(File.generated(config, name, content=(ROOT / origin).read_text()))
    pages = [file.src_uri for file in files.documentation_pages()]
    for target in sorted(
        {found for page in pages for found in _sources((ROOT / _origin(page)).read_text(), _origin(page))}
    ):
        content = (ROOT / target).read_text()
        language = LANGUAGES.get(Path(target).suffix, "text")
        text = f"# {target}\n\n````{language}\n{content}\n````\n"
        files.append(File.generated(config, f"source/{target}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links of the checkout into links of the site."""
    name = page.file.src_uri
    if name.startswith("source/"):
        return markdown
    origin = _origin(name)

    def replace(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(origin), match[1]))
        return posixpath.relpath(_on_site(target), posixpath.dirname(name) or ".")

    return LINK.sub(replace, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Make the docstrings' ``:class:`NAME``` links to the API reference, where it has that name.

    Cython begins a docstring with the signature, which stands above it.
    """
    html = re.sub(r"<p>\w+\.\w+\(self[^<]*\)</p>", "", html)
    return re.sub(r":\w+:<code>([^<]+)</code>", r'<autoref optional identifier="\1"><code>\1</code></autoref>', html)
