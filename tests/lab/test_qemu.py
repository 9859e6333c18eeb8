# SPDX-License-Identifier: Apache-2.0
"""Which QEMU the lab takes, with programs that say they are one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from vmm.errors import ConfigError
from vmm.images import apt, suites
from vmm.images.host import PullError
from vmm.lab import qemu


def _program(path: Path, version: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\necho "QEMU emulator version {version} (Debian)"\n')
    path.chmod(0o755)
    return path


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This host's, of version 7.2."""
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    return _program(tmp_path / "bin" / qemu.NAME, "7.2.19")


@pytest.fixture
def backports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A Debian whose backports have 10.0.2, with a library that this host lacks."""
    for name in (*qemu.PACKAGES, "libnew1"):
        (tmp_path / name).mkdir()
    (tmp_path / "qemu-system-data/usr/share/qemu").mkdir(parents=True)
    (tmp_path / "libnew1/usr/lib/x86_64-linux-gnu").mkdir(parents=True)
    _program(tmp_path / "qemu-system-x86/usr/bin" / qemu.NAME, "10.0.2")
    asked = []

    def packages(names: Sequence[str], *, suite: str, progress: object) -> list[apt.Package]:
        asked.append(suite)
        return [apt.Package(name, "1", tmp_path / name) for name in names]

    monkeypatch.setattr(suites, "own", lambda: "bookworm")
    monkeypatch.setattr(apt, "packages", packages)
    monkeypatch.setattr(apt, "depends", lambda name, suite: ["libc6", "seabios", "libnew1"])
    monkeypatch.setattr(qemu, "_installed", lambda name: name == "libc6")
    yield tmp_path
    assert set(asked) <= {"bookworm-backports"}


def test_a_new_one_of_this_host_is_taken(own: Path) -> None:
    _program(own, "9.1.0")
    assert qemu.choose() == qemu.Qemu((str(own),), {}, (9, 1))


def test_else_that_of_backports_with_its_libraries(own: Path, backports: Path) -> None:
    found = qemu.choose()
    assert found.version == (10, 0)
    assert found.argv == (
        f"{backports}/qemu-system-x86/usr/bin/{qemu.NAME}", "-L", f"{backports}/qemu-system-data/usr/share/qemu",
    )  # fmt: skip
    assert found.env == {"LD_LIBRARY_PATH": f"{backports}/libnew1/usr/lib/x86_64-linux-gnu"}


def test_with_no_backports_the_old_one_is_taken_and_that_is_said(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline() -> str:
        raise PullError("is this host offline?")

    said: list[str] = []
    monkeypatch.setattr(suites, "own", offline)
    assert qemu.choose(progress=lambda step, done: said.append(step)).argv == (str(own),)
    assert said == ["QEMU 7.2, in which a guest stops dead now and then: is this host offline?"]
    monkeypatch.setattr(suites, "own", lambda: None)
    assert qemu.choose().version == (7, 2)


def test_the_users_own_choice_is_taken_as_it_is(own: Path, backports: Path) -> None:
    assert qemu.choose(str(own)).version == (7, 2)
    for program in ("/bin/true", "/nosuch"):
        with pytest.raises(ConfigError, match=f"--qemu {program}: is not a QEMU that can run here"):
            qemu.choose(program)
