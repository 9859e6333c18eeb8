# SPDX-License-Identifier: Apache-2.0
"""A cache of its own for every test, and a Debian archive on disk that apt itself reads."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from vmm.images import apt, host, store


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pyvmm's cache directory, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(host, "PAUSE", 0.0)
    return tmp_path / "cache/pyvmm"


class Repository:
    """A flat Debian archive with made-up packages, and an apt configuration that knows nothing else."""

    def __init__(self, root: Path, setenv: Callable[[str, str], None]) -> None:
        self.root = root
        for name in ("archive", "lists/partial", "cache/archives/partial", "etc"):
            (root / name).mkdir(parents=True)
        (root / "status").touch()
        self.configuration = root / "apt.conf"
        self.configuration.write_text(
            f"""
            APT::Architecture "amd64"; APT::Architectures {{ "amd64"; }};
            Dir::State "{root}"; Dir::State::lists "{root}/lists"; Dir::State::status "{root}/status";
            Dir::Cache "{root}/cache"; Dir::Etc "{root}/etc"; Dir::Etc::sourcelist "{root}/sources.list";
            Acquire::Languages "none"; APT::Sandbox::User "root";
            """
        )
        setenv("APT_CONFIG", str(self.configuration))

    def add(self, name: str, version: str, files: dict[str, str], depends: str = "") -> Path:
        """Build a package into the archive; returns its .deb."""
        tree = self.root / f"{name}-{version}".replace(":", "_")
        (tree / "DEBIAN").mkdir(parents=True)
        control = f"Package: {name}\nVersion: {version}\nArchitecture: amd64\nMaintainer: t <t@t>\nDescription: t\n"
        (tree / "DEBIAN/control").write_text(control + (f"Depends: {depends}\n" if depends else ""))
        for path, text in files.items():
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            (tree / path).write_text(text)
        deb = self.root / "archive" / f"{name}_{version.partition(':')[2] or version}_amd64.deb"
        subprocess.run(
            ["dpkg-deb", "--build", "--root-owner-group", "-Znone", tree, deb],
            check=True,
            capture_output=True,
        )
        return deb

    def update(self, *, trusted: bool = True, address: str = "") -> int:
        """Index the archive and run `apt-get update`; returns its exit status.

        :param address: a server that has the archive, as ``http://127.0.0.1:8000``; empty: it is read as files
        """
        packages = ""
        for deb in sorted((self.root / "archive").glob("*.deb")):
            control = subprocess.run(["dpkg-deb", "--field", deb], check=True, capture_output=True, text=True).stdout
            data = deb.read_bytes()
            digest = hashlib.sha256(data).hexdigest()
            packages += f"{control}Filename: ./{deb.name}\nSize: {len(data)}\nSHA256: {digest}\n\n"
        (self.root / "archive/Packages").write_text(packages)
        trust = "[trusted=yes] " if trusted else ""
        (self.root / "sources.list").write_text(f"deb {trust}{address or f'file:{self.root}/archive'} ./\n")
        return subprocess.run(["apt-get", "update"], env=os.environ, capture_output=True).returncode

    def remove(self, deb: Path) -> None:
        """Take a package's file away and leave it in the lists: as a host that went offline."""
        deb.unlink()


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Repository:
    """A local Debian archive, empty, that apt is set to use alone."""
    return Repository(tmp_path / "repository", monkeypatch.setenv)


@pytest.fixture
def kernel(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kernel that is here already; returns the cache."""
    (tmp_path / "kernel/boot").mkdir(parents=True)
    (tmp_path / "kernel/boot/vmlinuz-6.1-test").write_text("kernel")
    package = apt.Package("linux-image-test", "6.1-1", tmp_path / "kernel")
    monkeypatch.setattr(apt, "package", lambda name, **kwargs: package)
    monkeypatch.setattr(store, "build_initramfs", lambda *args, **kwargs: b"initrd")
    return cache
