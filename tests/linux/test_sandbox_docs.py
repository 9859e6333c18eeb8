# SPDX-License-Identifier: Apache-2.0
"""The programs of the sandbox guide, and the examples that need a Linux: run as a reader would, and what they print."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

from tests.guide import DOCS, run_programs
from tests.linux import kernels

EXAMPLES = Path(__file__).parents[2] / "examples"
pytestmark = pytest.mark.timeout(900)  # the first one may build r3


def test_every_program_of_the_guide_runs_and_prints_what_it_says(
    runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_programs("sandbox.md") >= 5
    said = capsys.readouterr().out
    for promised in re.findall(r"print\(.*\)  # (.*)", (DOCS / "sandbox.md").read_text()):
        assert promised in said
    assert re.findall(r"^Result\(.*", (DOCS / "sandbox.md").read_text(), re.MULTILINE)[0] in said


def _said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str) -> tuple[str, object]:
    monkeypatch.setattr(sys, "argv", [name, "busybox"])
    status: object = None
    try:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    except SystemExit as end:
        status = end.code
    return capsys.readouterr().out, status


def test_the_code_runner(runtime: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    said, _ = _said(capsys, monkeypatch, "code_runner.py")
    assert said.splitlines() == [
        "adds: 42",
        "reads what was prepared: 3",
        "breaks everything: gone",
        "is not hurt by that: 3",
        "has a mistake: exit status 1: cat: can't open '/data/letters': No such file or directory",
        said.splitlines()[5],
    ]
    assert said.splitlines()[5].startswith("never ends: /bin/sh /tmp/code: not done within")


def test_the_matrix(runtime: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    said, status = _said(capsys, monkeypatch, "ci_matrix.py")
    assert status == 1
    assert [line.partition("}: ")[2] for line in said.splitlines()] == [
        "exit status 0 ok 1 fast", "exit status 0 ok 1 safe", "exit status 1", "exit status 0 ok 2 safe",
    ]  # fmt: skip


def test_the_judge(runtime: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    said, _ = _said(capsys, monkeypatch, "judge.py")
    told = dict(line.split(": ", 1) for line in said.splitlines())
    assert told["right"] == "accepted" and told["wrong"] == "wrong answer: -1"
    assert told["slow"] == "too slow" and told["talkative"] == "too much output"
    assert told["busy"].startswith(("ended by a limit", "too slow")) and told["curious"] == "failed (exit status 1)"


def test_the_boot(native: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "initrd").write_bytes(kernels.session())
    main = runpy.run_path(str(EXAMPLES / "boot_linux.py"))["main"]
    status = main(kernels.kernel().path, 'quiet -- sh -c "echo it is $((6 * 7)); exit 3"', str(tmp_path / "initrd"))
    said = capsys.readouterr().out
    assert re.search(r"^ +\d+\.\d\d s  it is 42$", said, re.MULTILINE), said
    assert status == 3 and said.splitlines()[-1] == "the guest: guest exit 3"
