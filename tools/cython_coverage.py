# SPDX-License-Identifier: Apache-2.0
"""Tells which lines of Python and Cython ran: ``make coverage`` calls it after the tests, with their folder.

Python's lines are coverage.py's. gcov counts the lines of C that Cython made; Cython names the source line of each
statement in a comment above its C. Both go into one table by file, and one by package.

Source: gcov(1), --json-format; Cython/Coverage.py reads the same comments.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import coverage
from coverage.plugin_support import Plugins

# Where Cython makes C of its own: the module, classes, attributes that Python may read.
DECLARATION = re.compile(r"\s*(#|$|cdef (class|readonly|public) )")
STATEMENT = re.compile(r'\s*/\* "(\w[\w/]*\.p[yx][xd])":(\d+)$')
Lines = dict[str, dict[int, bool]]  # path of a .pyx or .pxd: each line that can run, and whether it did


def add_statements(source: Iterable[str], counts: Mapping[int, int], lines: Lines) -> None:
    """Add the statements of a C file to ``lines``. ``counts``: how often each line of C ran, of those that can.

    The first line of C that can run decides: below a loop's last statement is C of the loop itself.
    """
    place: tuple[str, int] | None = None
    for number, text in enumerate(source, 1):
        if found := STATEMENT.match(text):
            place = found[1], int(found[2])
        elif place and number in counts:
            path, line = place
            lines[path][line] = lines[path].get(line, False) or counts[number] > 0
            place = None


def counted(objects: Path) -> Lines:
    """What ran of all modules whose objects are below ``objects``. A module that no test imported has zeros."""
    lines: Lines = defaultdict(dict)
    notes = sorted(str(path) for path in objects.rglob("*.gcno"))
    told = subprocess.run(["gcov", "--json-format", "--stdout", *notes], capture_output=True, text=True, check=True)
    for file in (file for module in told.stdout.splitlines() for file in json.loads(module)["files"]):
        if file["file"].endswith(".c"):
            counts: Counter[int] = Counter()
            for line in file["lines"]:
                counts[line["line_number"]] += line["count"]
            add_statements(Path(file["file"]).read_text().splitlines(), counts, lines)
    for path, known in lines.items():
        for number, text in enumerate(Path(path).read_text().splitlines(), 1):
            if DECLARATION.match(text):
                known.pop(number, None)
    return lines


class Cython(coverage.CoveragePlugin):
    """Tells coverage.py the lines of a .pyx or .pxd that can run."""

    def __init__(self, lines: Lines) -> None:
        self.lines = {str(Path(path).absolute()): known for path, known in lines.items()}

    def file_reporter(self, filename: str) -> coverage.FileReporter:
        reporter = coverage.FileReporter(filename)
        reporter.lines = lambda: set(self.lines[filename])  # type: ignore[method-assign]
        return reporter


def main(folder: Path) -> None:
    cython = Cython(counted(folder / "temp"))

    def register(plugins: Plugins) -> None:
        plugins.add_file_tracer(cython)

    both = coverage.Coverage(data_file=str(folder / "both"), plugins=[register])
    both.combine([str(folder / "python")], keep=True)
    data = both.get_data()
    data.add_lines({path: [line for line, ran in known.items() if ran] for path, known in cython.lines.items()})
    data.add_file_tracers(dict.fromkeys(cython.lines, cython._coverage_plugin_name))
    here = Path.cwd()
    both.report(include=[f"{here}/*"])
    packages: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for path in (path for path in data.measured_files() if Path(path).is_relative_to(here)):
        _, can_run, _, missing, _ = both.analysis2(path)
        for package in (str(Path(path).parent.relative_to(here)), "all"):
            packages[package, "Cython" if path in cython.lines else "Python"].update(
                can_run=len(can_run), missing=len(missing)
            )
    print(f"\n{'Package':20}{'Language':10}{'Stmts':>8}{'Miss':>8}{'Cover':>8}")
    for (package, language), sums in sorted(packages.items()):
        ran = 1 - sums["missing"] / max(sums["can_run"], 1)
        print(f"{package:20}{language:10}{sums['can_run']:8}{sums['missing']:8}{ran:8.0%}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
