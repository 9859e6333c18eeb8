# SPDX-License-Identifier: Apache-2.0
"""What the lab's machine is shown of this host's files, looked at by a program in QEMU's place."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vmm.images import cache_root
from vmm.lab import view
from vmm.lab.needed import needed

Look = Callable[..., str]
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root, as the lab does")


@pytest.fixture
def look(tmp_path: Path) -> Iterator[Look]:
    """Runs a shell where a directory, its $1, shows the paths; what it said."""
    (tmp_path / "view").mkdir()

    def call(paths: list[Path | str], script: str, before: str = "") -> str:
        (tmp_path / "list").write_bytes(b"".join(os.fsencode(path) + b"\n" for path in paths))
        command = [sys.executable, "-I", view.__file__, str(tmp_path / "view"), str(tmp_path / "list")]
        command += ["sh", "-c", script, "sh", str(tmp_path / "view")]
        if before:
            command = ["unshare", "-m", "sh", "-c", f'{before}; exec "$@"', "sh", *command]
        done = subprocess.run(command, capture_output=True, text=True)
        return done.stdout + done.stderr

    yield call
    assert os.listdir(tmp_path / "view") == [], "the mounts are its own"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    for name in ("shown/deep", "hidden"):
        (root / name).mkdir(parents=True)
        (root / name / "file").write_text(name)
    (root / "link").symlink_to("chain")
    (root / "chain").symlink_to(root / "shown")
    (root / "loop").symlink_to("loop")
    return root


def test_what_is_named_is_there_and_nothing_else(look: Look, tree: Path) -> None:
    said = look([tree / "link/deep/file"], f'cd "$1{tree}"; find . | sort; cat link/deep/file')
    assert said == ".\n./chain\n./link\n./shown\n./shown/deep\n./shown/deep/file\nshown/deep"


def test_a_name_may_be_any_bytes_of_one_line(look: Look, tree: Path) -> None:
    odd = Path(os.fsdecode(os.fsencode(tree) + b"/a\xff\x0cb\r"))
    odd.write_text("odd")
    assert look([odd], f'cat "$1{tree}"/a*') == "odd"


def test_it_is_not_written(look: Look, tree: Path) -> None:
    said = look([tree / "shown"], f'echo x >"$1{tree}/shown/deep/file"; touch "$1{tree}/shown/new"')
    assert said.count("Read-only file system") == 2
    assert (tree / "shown/deep/file").read_text() == "shown/deep"


def test_secrets_of_the_system_are_not_shown(look: Look) -> None:
    said = look(["/etc"], 'cd "$1/etc"; wc -c <shadow; cmp passwd /etc/passwd && find . ! -type l ! -perm -4 -size +0')
    assert said == "0\n"


def test_mounts_below_are_not_followed_but_what_is_named_there_is_shown(look: Look, tree: Path) -> None:
    deep = tree / "shown/deep"
    before = f"mount -t tmpfs tmpfs {deep}; echo 1 >{deep}/one; echo 2 >{deep}/two"
    assert look([tree / "shown"], f'cat "$1{deep}/file"', before) == "shown/deep"
    (deep / "file").unlink()
    said = look([tree / "shown", deep / "one"], f'cd "$1{deep}"; ls; cat one', before)
    assert said == "one\n1\n"
    assert os.listdir(deep) == []


def test_what_cannot_be_shown_is_said_in_one_line(look: Look, tree: Path) -> None:
    said = look([tree / "loop/x"], "echo not reached")
    assert "cannot show the machine a part of this host's files" in said and "loop" in said
    assert said.count("\n") == 1 and "not reached" not in said


def test_a_chroot_that_is_no_mount_point_is_said(tmp_path: Path) -> None:
    (tmp_path / "list").write_text("")
    code = "import os, sys; from vmm.lab import view; os.chroot(sys.argv[1]); view.main(['/', '/list', 'true'])"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "/ is not a mount point; before a chroot DIR, run `mount --bind DIR DIR`" in done.stderr


def test_what_a_command_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b, and c", "d", "e"):
        (tmp_path / name).write_text("")
    argv = [
        "run",
        f"--disk={tmp_path}/a,ro",
        f"{tmp_path}/b, and c",
        "sh",
        "-c",
        f"cat </etc/passwd >{tmp_path}/d; ls ../x",
    ]
    paths = needed(
        [*argv, "/proc/self", "/", "/dev/null", "/nosuch/file"], {"PATH": "/usr/bin:/nosuch", "HOME": "/root"}
    )
    for path in ("/usr", "/etc", str(tmp_path), sys.prefix, *(f"{tmp_path}/{name}" for name in ("a", "b, and c", "d"))):
        assert path in paths
    for path in ("/", "/root", "/proc", "/proc/self", "/dev/null", "/nosuch", f"{tmp_path}/e"):
        assert path not in paths
    assert (cache_root() in paths) == os.path.isdir(cache_root())
    assert "/proc" not in needed(["true"], {}, ["/proc"])
    monkeypatch.chdir("/")
    assert "/" not in needed(["ls", "/"], {}, ["/"])
