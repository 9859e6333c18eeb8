# SPDX-License-Identifier: Apache-2.0
"""Defaults from files: their order, what the command line has instead, where a value comes from, and every mistake."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from vmm.commands import cli, run, serve
from vmm.config import fill_from_files
from vmm.config.files import ALLOWED, fill, paths
from vmm.config.vm import VmConfig
from vmm.errors import ConfigError

if TYPE_CHECKING:
    from vmm.config import Arguments


@pytest.fixture
def etc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "etc/config.d").mkdir(parents=True)
    monkeypatch.setenv("PYVMM_CONFIG", str(tmp_path / "etc"))
    return tmp_path / "etc"


def parsed(*words: str) -> Arguments:
    args: Arguments = cli.parse("run", run, ["kernel", *words])
    return args


def config(*words: str) -> VmConfig:
    return run.config_from(parsed(*words))


def test_a_later_file_goes_before_and_the_command_line_before_all(etc: Path) -> None:
    (etc / "config.toml").write_text('[run]\nmemory = "1G"\ncpus = 2\nnet = ["user", "auto"]\npoll = 5\n')
    (etc / "config.d/20.toml").write_text('[run]\ncpus = 4\nrng = true\nappend = "quiet"\nvirtio-console = false\n')
    (etc / "config.d/10.toml").write_text('[run]\ncpus = 3\nshare = ["t=/srv,ro"]\nkvm = "/dev/other"\n')
    for other in ("config.d/30.toml.bak", "config.d/.hidden.toml", "config.d/40.txt"):
        (etc / other).write_text("no TOML")
    plain = config()
    assert (plain.memory, plain.cpus, plain.poll_us, plain.kvm) == (1 << 30, 4, 5, "/dev/other")
    assert [net.mode for net in plain.nets] == ["user", "auto"] and plain.shares[0].read_only
    assert plain.entropy is not None and plain.append == "quiet" and not plain.virtio_console
    said = config("--cpus", "1", "--net", "tap=tap0", "--memory", "64M", "--append", "loud")
    assert (said.cpus, said.memory, said.append) == (1, 64 << 20, "loud")
    assert [net.tap for net in said.nets] == ["tap0"]
    assert config("--cmdline", "mine").append == ""


@pytest.mark.parametrize("directory", ["", "/nonexistent"])
def test_without_files_there_are_none(monkeypatch: pytest.MonkeyPatch, directory: str) -> None:
    monkeypatch.setenv("PYVMM_CONFIG", directory)
    assert fill_from_files(parsed(), "run", run.OPTIONS) == {}
    assert config() == VmConfig("kernel", console="stdio")


def test_every_option_that_a_file_may_have_is_one() -> None:
    for command, module in (("run", run), ("serve", serve)):
        assert {f"--{name}" for name in ALLOWED[command]} <= {option for option, *_ in module.OPTIONS}, command
    # Neither what is one VM's own nor what makes it less safe.
    assert not {"no-seccomp", "write-config", "api-sock", "id", "vsock", "initrd"} & {
        *ALLOWED["run"],
        *ALLOWED["serve"],
    }


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[run\n", r"10\.toml: is not TOML: .*line 1"),
        ("[run]\nmemry = 1\n", r"10\.toml:2: memry: .*did you mean memory\?"),
        ("[run]\nno-seccomp = true\n", r"10\.toml:2: no-seccomp: cannot be set in \[run\].*allowed: append, "),
        ("[rum]\n", r"10\.toml: rum: is not a table of options; did you mean run\?"),
        ("run = 3\n", r"10\.toml: run: is not a table of options"),
        ("[serve]\n[run]\n\ncpus = 200\n", r"10\.toml:4: --cpus 200: must be a number from 1 to 64"),
        ("[run]\ncpus = true\n", r"10\.toml:2: cpus True: must be a string or a number"),
        ("[run]\ncpus = [1]\n", r"10\.toml:2: cpus \[1\]: must be a string or a number"),
        ('[run]\ncpus = "x"\n', r"10\.toml:2: --cpus x: must be a number from 1 to 64"),
        ('[run]\nmemory = "1X"\n', r"10\.toml:2: memory 1X: a size is"),
        ("[run]\nrng = 1\n", r"10\.toml:2: rng 1: must be true or false"),
        ('[run]\nnet = "user"\n', r"10\.toml:2: net user: must be a list of strings"),
        ('[run]\nnet = ["usr"]\n', r"10\.toml:2: --net usr: unknown option 'usr'; did you mean user\?"),
        ('[run]\ndisk = ["a,queues=9"]\n', r"10\.toml:2: disk queues 9: must be a number from 1 to 8"),
        ('[run]\nballoon = "a"\n', r"10\.toml:2: balloon MIB a: must be a number from 0"),
        ("run = {cpus = 0}\n", r"10\.toml: --cpus 0: must be"),
        ("\xff", "is not TOML"),
    ],
)
def test_a_mistake_is_one_line_with_the_files_name(
    etc: Path, capsys: pytest.CaptureFixture[str], text: str, problem: str
) -> None:
    (etc / "config.d/10.toml").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=problem):
        config()
    assert cli.main(["config", "show"]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.startswith(f"pyvmm config: {etc}/config.d/10.toml")
    assert output.err.count("\n") == 1


def test_a_file_that_cannot_be_read_is_named(etc: Path) -> None:
    (etc / "config.toml").mkdir()
    with pytest.raises(ConfigError, match=r"config\.toml: cannot be read: Is a directory"):
        config()
    (etc / "config.toml").rmdir()
    (etc / "config.toml").symlink_to("nowhere")
    with pytest.raises(ConfigError, match=r"config\.toml: cannot be read: No such file"):
        config()
    (etc / "config.toml").unlink()
    (etc / "config.d").rmdir()
    (etc / "config.d").touch()
    with pytest.raises(ConfigError, match=r"config\.d: cannot be read: Not a directory"):
        paths(str(etc))


def test_show_says_where_each_value_comes_from(etc: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (etc / "config.toml").write_text('[serve]\nlevel = "Debug"\n\n[run]\nmemory = "1G"\nnet = ["user", "auto"]\n')
    assert cli.main(["config", "show", "--cpus", "2", "/k", "/root.img,ro", "--disk", "/d"]) == 0
    lines = [re.split(r"\s{2,}", line) for line in capsys.readouterr().out.splitlines()]
    shown = {(name, value): source for name, value, source in lines}
    base = f"{etc}/config.toml"
    assert shown["kernel", "'/k'"] == shown["cpus", "2"] == "command line"
    assert shown["memory", "'1G'"] == f"{base}:5" and shown["smt", "False"] == "default"
    assert shown["nets", "NetConfig(mode='user')"] == shown["nets", "NetConfig(mode='auto')"] == f"{base}:6"
    assert shown["drives", "DriveConfig('/root.img', read_only=True, root=True)"] == "command line"
    assert shown["drives", "DriveConfig('/d')"] == "command line"
    assert shown["console", "'stdio'"] == "default"
    assert shown["serve --level", "Debug"] == f"{base}:2"
    assert {name for name, _ in shown} == {*VmConfig.OPTIONS, "serve --level"}


def test_serve_takes_its_table(etc: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = etc / "config.toml"
    path.write_text('[serve]\nlevel = "Debug"\nshow-level = true\nhttp-api-max-payload-size = 4096\n')
    args = cli.parse("serve", serve, ["--id", "a"])
    assert list(serve.from_files(args)) == ["--level", "--show-level", "--http-api-max-payload-size"]
    assert (args.level, args.show_level, args.http_api_max_payload_size) == ("Debug", True, "4096")
    args = cli.parse("serve", serve, ["--http-api-max-payload-size", "51200"])  # the default, but said
    assert "--http-api-max-payload-size" not in serve.from_files(args) and args.http_api_max_payload_size == "51200"
    args = cli.parse("serve", serve, ["--level", "Off"])
    assert "--level" not in serve.from_files(args) and args.level == "Off"
    for text, problem in (
        ('level = "Loud"', "level Loud: "),
        ('mmds-size-limit = "x"', "--mmds-size-limit x: must be a number"),
        ("http-api-max-payload-size = -1", "--http-api-max-payload-size -1: must be a number from 0"),
        ('log-path = "x"', "log-path: cannot be set in"),
    ):
        path.write_text(f"[serve]\n{text}\n")
        assert cli.main(["serve", "--no-api", "--config-file", "x"]) == serve.STATUS_ARGUMENTS
        assert f"{path}:2: {problem}" in capsys.readouterr().err


def test_a_program_reads_them_at_its_start_and_a_library_does_not(etc: Path) -> None:
    (etc / "config.toml").write_text("[run]\nmemory = 1\n")
    assert VmConfig("kernel").memory == 512 << 20
    command = [sys.executable, "-m", "vmm.commands.cli", "run", "/nonexistent/kernel"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and f"{etc}/config.toml:2: memory 1: must be 1M to 1T" in done.stderr


def test_the_documentation_has_each_option_of_a_table() -> None:
    text = (Path(__file__).parents[2] / "docs/config.md").read_text()
    for command, names in ALLOWED.items():
        assert f"| `[{command}]` | {', '.join(f'`{name}`' for name in names)} |" in text


def test_fill_leaves_what_was_given(etc: Path) -> None:
    (etc / "config.toml").write_text("[run]\nrng = true\n")
    args: Any = parsed("--rng")
    assert fill(args, "run", run.OPTIONS, str(etc)) == {}
