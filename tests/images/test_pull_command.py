# SPDX-License-Identifier: Apache-2.0
"""`pyvmm pull` as a user meets it."""

from __future__ import annotations

import contextlib
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from vmm import images
from vmm.commands.cli import main
from vmm.commands.pull import _Progress
from vmm.images import Image


@pytest.fixture
def fake_pull(cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    calls: list[dict[str, object]] = []

    def pull(name: str, **options: object) -> Image:
        calls.append({"name": name, **options})
        return Image(name, f"/c/{name}/kernel", f"/c/{name}/initrd", f"/c/{name}/rootfs.ext4", "")

    monkeypatch.setattr(images, "pull", pull)
    return calls


def test_options_reach_the_pull(fake_pull: list[dict[str, object]], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pull", "debian", "--size", "2G", "--packages", "vim,git", "--force"]) == 0
    (call,) = fake_pull
    assert (call["name"], call["size"], call["packages"], call["refresh"]) == (
        "debian",
        2 << 30,
        ["vim", "git"],
        True,
    )
    assert capsys.readouterr().out == "debian is ready: /c/debian\nrun it with: pyvmm run debian\n"


def test_no_name_and_bad_size_are_one_line(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv, expected in (
        (["pull"], "pyvmm pull: image: name an image, e.g. `pyvmm pull debian`; `pyvmm pull --list` shows them\n"),
        (
            ["pull", "nosuch"],
            "pyvmm pull: image nosuch: not known; allowed: busybox, debian, and oci:REF for any container image\n",
        ),
    ):
        assert main(argv) == 2
        assert capsys.readouterr().err == expected
    assert main(["pull", "debian", "--size", "big"]) == 2
    assert capsys.readouterr().err.startswith("pyvmm pull: --size big: ")


def test_host_failure_is_status_1(cache: Path, repository: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pull", "busybox"]) == 1
    assert capsys.readouterr().err == "pyvmm pull: apt has no package lists: run `apt-get update` as root\n"


def test_list_shows_what_there_is(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pull", "--list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in images.NAMES)
    assert out.count("not pulled") == len(images.NAMES)


def test_list_shows_what_is_cached(
    cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = {
        "name": "debian",
        "summary": "s",
        "cached": True,
        "bytes": 5 << 20,
        "kernel_version": "6.1",
        "built": "B",
        "packages": ["vim"],
        "size": 1,
    }
    monkeypatch.setattr(images, "available", lambda: [entry])
    assert main(["pull", "--list"]) == 0
    assert "cached: kernel 6.1, 5 MiB on disk, B, with vim" in capsys.readouterr().out


def test_without_a_terminal_progress_is_a_line_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    with _Progress() as progress:
        for done in (0.0, 0.5, 1.0):
            progress("fetching", done)
        progress("making", None)
    assert capsys.readouterr().err == "fetching\nmaking\n"


def test_on_a_terminal_progress_is_a_bar_that_goes() -> None:
    code = (
        "from vmm.commands.pull import _Progress\n"
        "with _Progress() as progress:\n"
        "    progress('fetching', 0.5); progress('fetching', 0.5); progress('a step ' + 'x' * 500, None)\n"
    )
    master, slave = pty.openpty()
    try:
        subprocess.run([sys.executable, "-c", code], stderr=slave, check=True, cwd=Path(__file__).parents[2])
    finally:
        os.close(slave)
    written = b""
    with contextlib.suppress(OSError), open(master, "rb", buffering=0) as terminal:
        while piece := terminal.read(65536):  # EIO at the end, as nobody has the other side
            written += piece
    shown = written.decode()
    assert shown.count("fetching [##########          ]  50 %") == 1
    assert max(len(line) for line in shown.split("\r")) < 90, "a line never wraps"
    assert shown.endswith("\r\x1b[K")
