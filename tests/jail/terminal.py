# SPDX-License-Identifier: Apache-2.0
"""A terminal, a shell with job control on it, and the person in front of it."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

from tests.jail.jailed import ROOT
from tests.waiting import PATIENCE, until

SHELL = Path(__file__).with_name("shell.py")


class Terminal:
    """A terminal with a shell on it, which runs one job: ``master`` is the person's side."""

    def __init__(self, how: str, command: list[str]) -> None:
        self.master, slave = os.openpty()
        self.before = termios.tcgetattr(slave)
        self.slave = slave
        self.shell = subprocess.Popen(
            [sys.executable, str(SHELL), how, *command], stdin=slave, stdout=slave, stderr=slave,
            start_new_session=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        self.heard = b""

    def hear(self, what: bytes) -> None:
        """Read until that was said."""
        deadline = time.monotonic() + PATIENCE
        while what not in self.heard:
            assert time.monotonic() < deadline, self.heard
            if select.select([self.master], [], [], 0.2)[0]:
                self.heard += os.read(self.master, 4096)

    def end(self) -> int:
        """The job's status."""
        return self.shell.wait(PATIENCE)

    def job(self) -> int:
        """The process of the job."""
        return int(until(self._children)[0])

    def _children(self) -> list[str]:
        return Path(f"/proc/{self.shell.pid}/task/{self.shell.pid}/children").read_text().split()

    def hang_up(self) -> None:
        """Close the person's side, and ours of the other."""
        for fd in (self.master, self.slave):
            os.close(fd)
        self.master = self.slave = -1

    def close(self) -> None:
        """Kill what is left."""
        if self.shell.poll() is None:
            for child in self._children():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(child), signal.SIGKILL)
            self.shell.kill()
            self.shell.wait()
        if self.master >= 0:
            self.hang_up()
