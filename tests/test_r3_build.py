# SPDX-License-Identifier: Apache-2.0
"""r3's build around its compiler: killed it leaves nothing running, two at once are one, other checkouts' stay."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.linux import r3
from tests.waiting import until
from vmm.images.apt import Package
from vmm.images.host import PullError, silent

SOURCE = Package("linux-source-6.1", "6.1-1", Path("/nowhere"))
KILLED = "import sys; from pathlib import Path; from tests.linux import r3; r3._run(['make'], Path(sys.argv[1]))"


def test_a_killed_build_leaves_no_process(tmp_path: Path) -> None:
    (tmp_path / "Makefile").write_text("all:\n\t+@$(MAKE) inner\ninner:\n\t@echo $$$$ >pid; exec sleep 60\n")
    with subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], cwd=Path(__file__).parents[1]) as build:
        pid = until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip())
        build.kill()
    until(lambda: not Path("/proc", pid).exists())


def test_the_cause_of_a_failure_is_said(tmp_path: Path) -> None:
    (tmp_path / "Makefile").write_text("all:\n\t@echo 'a.c:1: error: no such thing'; exit 1\n")
    with pytest.raises(PullError, match=r"r3 was not built: make: a\.c:1: error: no such thing"):
        r3._run(["make"], tmp_path)


def test_two_at_once_build_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    builds, waits = [], threading.Event()

    def build(source: Package, work: Path, progress: object) -> Path:
        builds.append(work)
        assert waits.wait(30)  # until the other one waits for us
        (work / "vmlinux").touch()
        return work / "vmlinux"

    monkeypatch.setattr(r3, "_build", build)
    home = tmp_path / "pyvmm/r3"
    (home / ".build-killed/linux").mkdir(parents=True)
    for age in range(4):
        (home / f"vmlinux-{age}").touch()
        os.utime(home / f"vmlinux-{age}", (age, age))
    paths = []
    first = threading.Thread(target=lambda: paths.append(r3._cached(SOURCE, silent)))
    first.start()
    until(lambda: builds)
    paths.append(r3._cached(SOURCE, lambda step, done: waits.set()))
    first.join()
    assert len(builds) == 1 and paths[0] == paths[1]
    assert sorted(path.name for path in home.iterdir()) == sorted(["lock", "vmlinux-2", "vmlinux-3", paths[0].name])
