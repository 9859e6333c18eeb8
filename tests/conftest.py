# SPDX-License-Identifier: Apache-2.0
"""For every layer: time decides no test, and a layer that could not run is said last, with its count."""

from __future__ import annotations

import pytest
from hypothesis import settings

settings.register_profile("pyvmm", deadline=None)
settings.load_profile("pyvmm")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Count the tests of layers that are missing here."""
    reports = terminalreporter.stats.get("skipped", []) + terminalreporter.stats.get("failed", [])
    missing = [report for report in reports if "LAYER MISSING" in str(report.longrepr)]
    if missing:
        terminalreporter.write_line(f"LAYER MISSING: {len(missing)} tests did not run; the reasons are above", red=True)
