# SPDX-License-Identifier: Apache-2.0
"""For every layer: time decides no test, and a layer that could not run is said last, with its count."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import settings

from vmm import threads, undertaker
from vmm.jail import _seccomp

settings.register_profile("pyvmm", deadline=None)
settings.load_profile("pyvmm")
os.environ["PYVMM_CONFIG"] = ""  # what this host's /etc/pyvmm says changes no test

CLONE_NEWNET = 0x40000000


def pytest_configure() -> None:
    """Started by ``make test &`` or nohup, stay deaf to SIGINT and SIGHUP, but start programs that hear them.

    A signal that is ignored is ignored by the programs that we start, too; one with a handler has its default there.
    """
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGQUIT):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda number, frame: None)
    # A thread that breaks its filter ends the process: its line must not go where pytest collects stderr.
    terminal, log_to = os.dup(2), _seccomp.log_to
    _seccomp.log_to = lambda fd: log_to(terminal if fd < 0 else fd)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Count the tests of layers that are missing here."""
    reports = terminalreporter.stats.get("skipped", []) + terminalreporter.stats.get("failed", [])
    missing = [report for report in reports if "LAYER MISSING" in str(report.longrepr)]
    if missing:
        terminalreporter.write_line(f"LAYER MISSING: {len(missing)} tests did not run; the reasons are above", red=True)


@pytest.fixture(autouse=True)
def _nothing_of_others() -> Iterator[None]:
    """Filters begin with a machine and stay for the process: the next test's devices, without one, have none.

    What a test has closed is closed before the next one counts descriptors.
    """
    yield
    threads.guard = None
    undertaker.wait()


@pytest.fixture(autouse=True, scope="session")
def _threads_may_tell_of_races() -> Iterator[None]:
    """ThreadSanitizer reports from the thread that met the race, and opens files: no filter, no Landlock for it."""
    with pytest.MonkeyPatch.context() as patch:
        if os.environ.get("PYVMM_SANITIZER") == "thread":
            patch.setattr(threads, "enter", lambda kind, below=None: None)
        yield


@pytest.fixture
def namespace() -> Iterator[None]:
    """This thread in a network namespace of its own, where a tap harms nobody."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/thread-self/ns/net") as before:
        if not os.path.exists("/dev/net/tun") or libc.unshare(CLONE_NEWNET):
            pytest.fail("LAYER MISSING: tap: /dev/net/tun and CAP_SYS_ADMIN")
        yield
        assert libc.setns(before.fileno(), CLONE_NEWNET) == 0
