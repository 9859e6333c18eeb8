# SPDX-License-Identifier: Apache-2.0
"""The archive writer against the format's description, read back by a reader of its own and by cpio(1)."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.images.cpio import Archive


class Entry(NamedTuple):
    mode: int
    owner: tuple[int, int]
    links: int
    mtime: int
    device: tuple[int, int]
    data: bytes


def read(archive: bytes) -> dict[str, Entry]:
    """Read a newc archive as the kernel does (buffer-format.rst); the order of the keys is the archive's."""
    entries: dict[str, Entry] = {}
    at = 0
    while True:
        assert at % 4 == 0
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        _, mode, uid, gid, links, mtime, size, _, _, major, minor, name_size, check = fields
        name_at = at + 110
        assert archive[name_at + name_size - 1] == 0
        assert check == 0
        name = archive[name_at : name_at + name_size - 1].decode()
        data_at = (name_at + name_size + 3) & ~3
        data = archive[data_at : data_at + size]
        assert len(data) == size
        at = (data_at + size + 3) & ~3
        if name == "TRAILER!!!":
            assert not any(archive[at:])
            assert len(archive) % 512 == 0
            return entries
        assert name not in entries
        entries[name] = Entry(mode, (uid, gid), links, mtime, (major, minor), data)


def sample() -> Archive:
    archive = Archive()
    archive.file("/init", b"#!/bin/sh\n", 0o755)
    archive.file("etc/motd", b"hello")
    archive.symlink("bin/sh", "/bin/busybox")
    archive.console()
    archive.directory("tmp")
    return archive


def test_every_kind_of_entry() -> None:
    entries = read(sample().to_bytes())
    assert entries["init"] == Entry(stat.S_IFREG | 0o755, (0, 0), 1, 0, (0, 0), b"#!/bin/sh\n")
    assert entries["bin/sh"] == Entry(stat.S_IFLNK | 0o777, (0, 0), 1, 0, (0, 0), b"/bin/busybox")
    assert entries["dev/console"] == Entry(stat.S_IFCHR | 0o600, (0, 0), 1, 0, (5, 1), b"")
    assert entries["tmp"].mode == stat.S_IFDIR | 0o755


def test_parents_are_made_and_come_first() -> None:
    archive = Archive()
    archive.file("a/b/c", b"x")
    archive.file("a.b", b"y")
    names = list(read(archive.to_bytes()))
    assert set(names) == {"a", "a/b", "a/b/c", "a.b"}
    assert names.index("a") < names.index("a/b") < names.index("a/b/c")


def test_same_content_same_bytes() -> None:
    one, two = Archive(), Archive()
    one.file("x", b"1")
    one.file("y", b"2")
    two.file("y", b"2")
    two.file("/x", b"1")
    assert one.to_bytes() == two.to_bytes()


def test_a_file_added_again_replaces_the_first() -> None:
    archive = sample()
    archive.file("init", b"other")
    archive.file("bin/sh", b"a file now")
    entries = read(archive.to_bytes())
    assert entries["init"].data == b"other"
    assert stat.S_ISREG(entries["bin/sh"].mode)


@pytest.mark.parametrize("path", ["", "/", ".", "..", "x" * 4096])
def test_impossible_paths_are_refused(path: str) -> None:
    with pytest.raises(ValueError, match="not a path"):
        Archive().file(path, b"")


def test_a_file_is_no_directory() -> None:
    archive = sample()
    with pytest.raises(ValueError, match="/init is not a directory"):
        archive.file("init/x", b"")
    with pytest.raises(ValueError, match="a directory and a file"):
        archive.file("etc", b"")


def test_paths_cannot_leave_the_root() -> None:
    archive = Archive()
    archive.file("../../etc/passwd", b"x")
    assert set(read(archive.to_bytes())) == {"etc", "etc/passwd"}


names = st.text("abc.é", min_size=1, max_size=4).filter(lambda name: name not in (".", ".."))


@given(st.dictionaries(st.lists(names, min_size=1, max_size=3).map("/".join), st.binary(max_size=9)))
def test_any_files_come_back(files: dict[str, bytes]) -> None:
    archive = Archive()
    kept = {}
    for path, data in files.items():
        try:
            archive.file(path, data)
        except ValueError:
            continue
        kept[path] = data
    entries = read(archive.to_bytes())
    assert {path: e.data for path, e in entries.items() if stat.S_ISREG(e.mode)} == kept


@pytest.mark.skipif(shutil.which("cpio") is None, reason="cpio is not installed")
def test_cpio_reads_it(tmp_path: Path) -> None:
    archive = Archive()
    archive.file("init", b"#!/bin/sh\n", 0o755)
    archive.file("etc/motd", bytes(5001))
    archive.symlink("bin/sh", "/bin/busybox")
    archive.directory("tmp")
    done = subprocess.run(
        ["cpio", "--extract", "--quiet"],
        cwd=tmp_path,
        input=archive.to_bytes(),
        capture_output=True,
        check=True,
    )
    assert done.stderr == b""
    assert (tmp_path / "init").read_bytes() == b"#!/bin/sh\n"
    assert (tmp_path / "init").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "etc/motd").read_bytes() == bytes(5001)
    assert os.readlink(tmp_path / "bin/sh") == "/bin/busybox"
    assert (tmp_path / "tmp").stat().st_mode & 0o7777 == 0o755
    listing = subprocess.run(
        ["cpio", "--list", "--quiet", "--verbose"], input=sample().to_bytes(), capture_output=True, check=True
    ).stdout.decode()
    assert any(line.startswith("crw-------") and "5,   1" in line for line in listing.splitlines())
