# SPDX-License-Identifier: Apache-2.0
"""The suite itself: started in the background it tests what it tests in the foreground."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ASK = "import signal; print(*(signal.getsignal(number) == signal.SIG_IGN for number in (1, 2, 3, 15)))"


def test_programs_that_tests_start_hear_signals() -> None:
    said = subprocess.run([sys.executable, "-c", ASK], check=True, capture_output=True, text=True).stdout
    assert said.split() == ["False"] * 4


def test_started_by_nohup_in_the_background_too() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "programs_that"]
    deaf = ["sh", "-c", 'trap "" INT HUP; exec "$@"', "sh", *command]
    done = subprocess.run(deaf, cwd=Path(__file__).parents[1], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
