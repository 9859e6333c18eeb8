# SPDX-License-Identifier: Apache-2.0
"""What a launch takes over from the launcher."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vmm import launched


def test_a_socket_that_somebody_has_removed_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fd = os.open("/dev/null", os.O_RDONLY)
    monkeypatch.setattr(launched, "_waits", (fd, str(tmp_path / "gone")))
    launched.drop_socket()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_a_directory_that_was_removed_is_no_mistake(tmp_path: Path) -> None:
    command = f"cd {tmp_path} && rmdir {tmp_path} && exec {sys.executable} -m vmm --version"
    environment = {**os.environ, "PYTHONPATH": str(Path(launched.__file__).parents[1])}
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
