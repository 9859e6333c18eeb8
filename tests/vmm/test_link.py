# SPDX-License-Identifier: Apache-2.0
"""``pyvmm link``: a program that keeps its name for those who resolve links first."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

LINK = (sys.executable, "-c", "from vmm.commands.cli import main; raise SystemExit(main())", "link")


def link(name: str, directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*LINK, name, str(directory)], capture_output=True, text=True)


@pytest.mark.parametrize(("name", "says"), [("firecracker", "Firecracker v1.12.1"), ("jailer", "Jailer v1.12.1")])
def test_started_by_its_real_path_it_is_what_its_name_says(tmp_path: Path, name: str, says: str) -> None:
    made = link(name, tmp_path).stdout.strip()
    assert os.path.realpath(made) == made and not os.path.islink(made)
    (tmp_path / "alias").symlink_to(made)
    for path in (made, os.path.realpath(tmp_path / "alias")):
        done = subprocess.run([path, "--version"], capture_output=True, text=True)
        assert done.stdout.startswith(says), done.stderr


def test_one_of_ours_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "firecracker"
    path.symlink_to("/old/place/pyvmm")  # as earlier versions made it
    assert link("firecracker", tmp_path).returncode == 0
    assert link("firecracker", tmp_path).returncode == 0
    path.write_text("#!/bin/sh\n")
    refused = link("firecracker", tmp_path)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "exists, and was not made by pyvmm link" in refused.stderr
    assert path.read_text() == "#!/bin/sh\n"
    assert [each.name for each in tmp_path.iterdir()] == ["firecracker"], "nothing half made is left"


def test_a_copy_makes_further_copies_and_is_a_jails_program(tmp_path: Path) -> None:
    made = link("jailer", tmp_path).stdout.strip()
    link("firecracker", tmp_path)
    options = ["--id", "a", "--uid", "0", "--gid", "0", "--chroot-base-dir", str(tmp_path / "none")]
    for program, says in (("firecracker", "--chroot-base-dir"), ("other", "--exec-file")):
        (tmp_path / "other").write_text("#!/bin/sh\n")
        done = subprocess.run(
            [made, *options, "--exec-file", str(tmp_path / program)], capture_output=True, text=True
        )  # fmt: skip
        assert done.returncode == 1 and done.stderr.startswith(f"pyvmm jailer: {says}"), done.stderr


def test_a_disk_that_is_full_has_no_half_of_one(tmp_path: Path) -> None:
    limited = f"ulimit -f 8; exec {shlex.join(LINK)} firecracker {tmp_path}"
    done = subprocess.run(["sh", "-c", limited], capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert list(tmp_path.iterdir()) == []
