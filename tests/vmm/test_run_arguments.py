# SPDX-License-Identifier: Apache-2.0
"""``pyvmm run`` parses plain command lines without argparse: the two must not differ."""

from __future__ import annotations

import argparse
import contextlib
import io
import subprocess
import sys
import types
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.commands import cli
from vmm.commands.parser import declare
from vmm.commands.run import OPTIONS, POSITIONAL, add_arguments, config_from
from vmm.config import parse_plain
from vmm.config.vm import DEFAULT_CMDLINE

WORDS = st.one_of(
    st.sampled_from([option for option, *_ in OPTIONS]),
    st.sampled_from([f"{option}=-x" for option, *_ in OPTIONS]),
    st.sampled_from(
        [
            "-v",
            "-h",
            "--help",
            "--",
            "-",
            "--cpu",
            "--memory=1G",
            "--memory=",
            "-1",
            "1",
            "0x1",
            " 1",
            "٣",
            "-٣",
            "",
            "a b",
        ]
    ),
    st.text(max_size=6),
)


@given(st.lists(WORDS, max_size=8))
def test_quick_parse_agrees_with_argparse(words: list[str]) -> None:
    quick = parse_plain(words, OPTIONS, POSITIONAL)
    if quick is None:
        return
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_arguments(parser)
    declare(parser, OPTIONS, {})
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            full = parser.parse_intermixed_args(words)
    except SystemExit:
        raise AssertionError(f"argparse refuses what was parsed quickly: {words}") from None
    assert vars(quick) == vars(full)


def test_every_plain_command_line_is_quick() -> None:
    words = ["kernel", "rootfs"]
    for option, metavar, default, _ in OPTIONS:
        words += [option] if metavar is None else [option, "2" if isinstance(default, int) else "value"]
    assert parse_plain(words, OPTIONS, POSITIONAL) is not None


def test_a_directory_is_a_root_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vmm import images

    image = types.SimpleNamespace(kernel="K", initrd="I", rootfs="R", cmdline="root=/dev/vda rw quiet", config=None)
    monkeypatch.setattr(images, "resolve", lambda name: image)
    args = parse_plain(["debian", "dir:/srv/root,cache=always"], OPTIONS, POSITIONAL)
    assert args is not None
    config = config_from(args)
    assert [(s.tag, s.path, s.cache, s.root) for s in config.shares] == [("rootfs", "/srv/root", "always", True)]
    assert not config.drives
    assert config.full_cmdline == f"{DEFAULT_CMDLINE} root=rootfs rootfstype=virtiofs rw quiet"
    args = parse_plain(["debian", "--share", "t=/srv"], OPTIONS, POSITIONAL)
    assert args is not None
    config = config_from(args)
    assert config.full_cmdline == f"{DEFAULT_CMDLINE} root=/dev/vda rw quiet"
    assert [share.tag for share in config.shares] == ["t"]


def test_a_written_configuration_is_its_owners_alone(tmp_path: Path) -> None:
    (tmp_path / "kernel").touch()
    command = [
        sys.executable,
        "-m",
        "vmm.commands.cli",
        "run",
        str(tmp_path / "kernel"),
        "--write-config",
        str(tmp_path / "c"),
    ]
    subprocess.run(command, check=True, umask=0)
    assert (tmp_path / "c").stat().st_mode & 0o777 == 0o600


def test_a_socket_in_the_lab_is_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYVMM_LAB", raising=False)
    for option, value in (("--vsock", "cid=3,uds=/x"), ("--console", "unix:/x")):
        assert cli.main(["run", "kernel", "--lab", option, value]) == 2
        assert f"{option} {value.rpartition('=')[2]}: would be a socket inside the lab" in capsys.readouterr().err
