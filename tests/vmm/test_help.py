# SPDX-License-Identifier: Apache-2.0
"""What the command says of itself: help held to the parsers, guesses, colours, and completion by the real shells."""

from __future__ import annotations

import io
import os
import pty
import select
import shlex
import shutil
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from types import ModuleType

import msgspec
import pytest

from vmm import exits
from vmm.commands import cli, guide, jailer, run, running, serve
from vmm.commands.completion import SHELLS, completion
from vmm.commands.parser import coloured, make_parser, paint, with_headings
from vmm.config.devices import DEVICES
from vmm.config.option import Config
from vmm.errors import ConfigError


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(words) in (1, 2, 153)
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1, output
    return output.err


@pytest.mark.parametrize("config", [each for each in DEVICES if each.USAGE], ids=lambda each: each.TITLE)
def test_every_word_of_a_device_is_told_and_is_one(config: type[Config]) -> None:
    (usage,) = [metavar for option, metavar, *_ in run.OPTIONS if option == f"--{config.TITLE}"]
    assert usage == config.USAGE
    with pytest.raises(ConfigError) as caught:
        config.parse("x=y,no such word")
    allowed = str(caught.value).partition("allowed: ")[2].split(", ")
    shown = guide.epilog("run").partition(f"words of --{config.TITLE}:\n")[2].partition("\n\n")[0]
    told = [line.split()[0] for line in shown.splitlines()]
    assert [word for word in told if word not in ("PATH", "TAG=DIR", "MIB")] == allowed


@pytest.mark.parametrize("module", [run, serve, jailer], ids=lambda module: module.__name__)
def test_every_option_is_in_one_group(module: ModuleType) -> None:
    grouped = [option for options in guide.GROUPS[module.__name__.rpartition(".")[2]].values() for option in options]
    assert sorted(grouped) == sorted(option for option, *_ in module.OPTIONS)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_has_examples_that_parse_and_statuses(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert "exit status:" in text and "\x1b" not in text
    module = import_module(f"vmm.commands.{name}")
    for line in text.partition("examples:\n")[2].partition("\n\n")[0].splitlines():
        program, command, *words = shlex.split(line.partition(" > ~")[0].partition(' > "$')[0])
        assert (program, command) == ("pyvmm", name), line
        parsed = cli.parse(name, module, words)
        assert not isinstance(parsed, int) and getattr(parsed, "mistake", None) is None, line


def test_every_end_of_a_guest_is_told() -> None:
    text = guide.epilog("run")
    for reason in exits._REASONS.values():
        assert f"\n  {reason.status} " in text, reason


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["rnu"], "run"),
        (["run", "kernel", "--memry", "1G"], "--memory"),
        (["run", "/dev/null", "--disk", "x,queus=2"], "queues="),
        (["run", "/dev/null", "--net", "usr"], "user"),
        (["run", "/dev/null", "--share", "a=b,submount"], "submounts"),
        (["serve", "--lvel", "Info"], "--level"),
        (["jailer", "--uidd", "3"], "--uid"),
        (["ctl", "--api-sock", "x", "statsu"], "status"),
        (["ctl", "--api-sock", "x", "drive", "d", "--pth"], "--path"),
        (["completion", "bsh"], "bash"),
        (["pull", "debain"], "debian"),
        (["run", "debain"], "debian"),
    ],
)
def test_what_was_meant(capsys: pytest.CaptureFixture[str], words: list[str], meant: str) -> None:
    assert f"did you mean {meant}?" in said(capsys, *words)


def test_a_vm_that_was_meant(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    other = running.Running("my-box", "run", 1, "running", "", 0.0, 0, 0.0, 0, ())
    monkeypatch.setattr(running, "find", lambda: [other])
    for command in ("attach", "logs", "stop"):
        assert "did you mean my-box?" in said(capsys, command, "my-bix")


def test_no_guess_at_what_is_close_to_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean" not in said(capsys, "zzzzzz")
    assert "did you mean" not in said(capsys, "run", "kernel", "--zzzzzz")


def test_a_third_file_is_told_how_to_be_a_disk(capsys: pytest.CaptureFixture[str]) -> None:
    assert "unrecognized arguments: b.img; a second disk is: --disk b.img" in said(capsys, "run", "k", "a.img", "b.img")
    assert "--disk" not in said(capsys, "ps", "b.img")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "environment", "fit"),
    [
        (Terminal, {"TERM": "xterm"}, True),
        (Terminal, {"TERM": "xterm", "NO_COLOR": ""}, True),  # no-color.org: set, and not empty
        (Terminal, {"TERM": "xterm", "NO_COLOR": "1"}, False),
        (Terminal, {"TERM": "dumb"}, False),
        (Terminal, {}, False),
        (io.StringIO, {"TERM": "xterm"}, False),
    ],
)
def test_colours(
    monkeypatch: pytest.MonkeyPatch, stream: type[io.StringIO], environment: dict[str, str], fit: bool
) -> None:
    for name in ("TERM", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    output = stream()
    assert coloured(output) is fit and (paint("x", 1, output) != "x") is fit
    make_parser("run", run).print_help(output)
    assert ("\x1b[1musage:\x1b[0m" in output.getvalue()) is fit
    assert ("\x1b[1mdevices:\x1b[0m" in output.getvalue()) is fit
    assert ("\x1b[1mexamples:\x1b[0m" in with_headings(guide.overview(), output)) is fit


def _shell(name: str) -> str:
    if not (path := shutil.which(name)):
        pytest.skip(f"no {name} here")
    return path


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("completion")
    for shell in SHELLS:
        (directory / shell).write_text(completion(shell))
    ps = directory / "bin/pyvmm"
    ps.parent.mkdir()
    ps.write_text('#!/bin/sh\n[ "$*" = "ps --quiet" ] && printf "a-vm\\nanother-vm\\n"\n')
    ps.chmod(0o755)
    return directory


@pytest.fixture
def _running(scripts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{scripts}/bin:{os.environ['PATH']}")


CASES = [
    ("run --memo", "--memory"),
    ("compl", "completion"),
    ("ctl --api-sock x snap", "snapshot"),
    ("run --protocol pv", "pvh"),
    ("attach anoth", "another-vm"),
]


@pytest.mark.parametrize(("line", "whole"), CASES)
@pytest.mark.usefixtures("_running")
def test_bash_completes(scripts: Path, line: str, whole: str) -> None:
    words = ["pyvmm", *line.split()]
    code = (
        'source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($#-1)); _shtab_pyvmm pyvmm "${!#}" x;'
        ' printf "%s\\n" "${COMPREPLY[@]}"'
    )
    command = [_shell("bash"), "--norc", "-c", code, "bash", str(scripts / "bash"), *words]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() == [whole]


@pytest.mark.parametrize(("line", "whole"), CASES)
@pytest.mark.usefixtures("_running")
def test_fish_completes(scripts: Path, tmp_path: Path, line: str, whole: str) -> None:
    code = f"source {shlex.quote(str(scripts / 'fish'))}; complete -C {shlex.quote('pyvmm ' + line)}"
    environment = {**os.environ, "HOME": str(tmp_path)}
    command = [_shell("fish"), "--no-config", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert [each.partition("\t")[0] for each in done.stdout.splitlines()] == [whole]


@pytest.mark.usefixtures("_running")
def test_zsh_completes(scripts: Path, tmp_path: Path) -> None:
    # zsh completes at a prompt alone, so it gets a terminal.
    (tmp_path / "_pyvmm").write_text((scripts / "zsh").read_text())
    pid, fd = pty.fork()
    if pid == 0:
        os.execve(
            _shell("zsh"), ["zsh", "-f", "-i"], {"HOME": str(tmp_path), "TERM": "dumb", "PATH": os.environ["PATH"]}
        )
    seen = b""

    def until(text: bytes) -> None:
        nonlocal seen
        end = time.monotonic() + 60
        while text not in seen:
            assert select.select([fd], [], [], max(end - time.monotonic(), 0))[0], seen
            seen += os.read(fd, 4096)
        seen = seen.partition(text)[2]

    try:
        setup = f"fpath=({shlex.quote(str(tmp_path))} $fpath); autoload -Uz compinit; compinit -u -D; print rea''dy\n"
        os.write(fd, setup.encode())
        until(b"ready")
        for line, whole in CASES:
            os.write(fd, f"pyvmm {line}\t".encode())
            until(f"pyvmm {line}".encode())
            until(whole.removeprefix(line.split()[-1]).encode())
            os.write(fd, b"\x15")  # Ctrl-U: the line is taken back
    finally:
        os.close(fd)
        os.waitpid(pid, 0)


def test_completion_without_shtab_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert "pip install shtab" in said(capsys, "completion", "bash")


def test_the_manual_page_has_every_option_and_no_mistake(tmp_path: Path) -> None:
    page = tmp_path / "pyvmm.1"
    root = Path(__file__).parents[2]
    # As where a wheel is built: of what pyvmm needs only what pyproject.toml says a build requires is installed.
    (tmp_path / "msgspec").symlink_to(Path(msgspec.__file__).parent)
    command = [sys.executable, "-S", str(root / "tools/man_page.py"), str(page)]
    subprocess.run(command, check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": f"{root}:{tmp_path}"})
    text = page.read_text().replace("\\-", "-")
    for name in cli.COMMANDS:
        assert f'.SS "pyvmm {name}"' in text
        for action in make_parser(name, import_module(f"vmm.commands.{name}"))._actions:
            assert all(option in text for option in action.option_strings), (name, action)
    if groff := shutil.which("groff"):
        drawn = subprocess.run([groff, "-man", "-ww", "-z", "-b", str(page)], capture_output=True, text=True)
        assert not drawn.returncode and not drawn.stderr
