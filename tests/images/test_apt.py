# SPDX-License-Identifier: Apache-2.0
"""Packages by name, with the real apt on an archive in a directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.images.conftest import Repository
from vmm.images import apt, host
from vmm.images.host import PullError

KERNEL = "linux-image-6.1.0-9-cloud-amd64"


def test_package_is_fetched_and_unpacked(cache: Path, repository: Repository) -> None:
    repository.add("thing", "1:2.0-1", {"usr/share/thing": "hello"})
    assert repository.update() == 0
    package = apt.package("thing")
    assert (package.name, package.version) == ("thing", "1:2.0-1")
    assert (package.tree / "usr/share/thing").read_text() == "hello"
    assert package.tree.parent == cache / "debs"
    assert not list(cache.glob("debs/.*")), "nothing half-made is left"


def test_cached_package_needs_neither_network_nor_apt(
    cache: Path, repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    deb = repository.add("thing", "1.0", {"x": "1"})
    repository.update()
    first = apt.package("thing")
    repository.remove(deb)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(host, "SBIN", "")
    assert apt.package("thing") == first


def test_refresh_takes_the_newer_version(cache: Path, repository: Repository) -> None:
    repository.add("thing", "1.0", {"x": "1"})
    repository.update()
    apt.package("thing")
    repository.add("thing", "1.1", {"x": "2"})
    repository.update()
    assert apt.package("thing").version == "1.0"
    assert apt.package("thing", refresh=True).version == "1.1"
    assert apt.package("thing").version == "1.1"


def test_kernel_meta_package_stands_for_its_kernel(cache: Path, repository: Repository) -> None:
    repository.add("linux-image-cloud-amd64", "6.1.9-1", {}, depends=f"{KERNEL} (= 6.1.9-1)")
    repository.add(KERNEL, "6.1.9-1", {"boot/vmlinuz-6.1.0-9-cloud-amd64": "kernel"})
    repository.update()
    package = apt.package("linux-image-cloud-amd64")
    assert package.name == KERNEL
    path, version = apt.kernel_of(package.tree)
    assert version == "6.1.0-9-cloud-amd64"
    assert path.read_text() == "kernel"


def test_no_kernel_in_the_package(cache: Path, repository: Repository) -> None:
    repository.add("thing", "1.0", {"x": "1"})
    repository.update()
    with pytest.raises(PullError, match="holds 0 kernels"):
        apt.kernel_of(apt.package("thing").tree)


def test_unknown_package_says_what_to_do(cache: Path, repository: Repository) -> None:
    repository.add("thing", "1.0", {})
    repository.add("apt", "1.0", {})
    repository.update()
    with pytest.raises(PullError, match="apt knows no package nosuch: run `apt-get update`"):
        apt.package("nosuch")


def test_missing_lists_say_what_to_do(cache: Path, repository: Repository) -> None:
    with pytest.raises(PullError, match="apt has no package lists: run `apt-get update` as root"):
        apt.package("thing")


def test_package_that_cannot_be_fetched_is_one_line(cache: Path, repository: Repository) -> None:
    deb = repository.add("thing", "1.0", {"x": "1"})
    repository.update()
    repository.remove(deb)
    with pytest.raises(PullError, match="cannot fetch thing: ") as caught:
        apt.package("thing")
    assert "\n" not in str(caught.value)
    assert not [path for path in (cache / "debs").iterdir() if path.is_dir()]


def test_tampered_package_is_refused(cache: Path, repository: Repository) -> None:
    deb = repository.add("thing", "1.0", {"x": "1"})
    repository.update()
    data = bytearray(deb.read_bytes())
    data[-1] ^= 1
    deb.write_bytes(data)
    with pytest.raises(PullError, match="Hash Sum mismatch"):
        apt.package("thing")


def test_unsigned_archive_is_refused(cache: Path, repository: Repository) -> None:
    repository.add("thing", "1.0", {"x": "1"})
    repository.add("apt", "1.0", {})
    assert repository.update(trusted=False) != 0
    with pytest.raises(PullError, match="run `apt-get update`"):
        apt.package("thing")


@pytest.mark.parametrize("name", ["", "-o=x", "--help", "../x", "a b"])
def test_what_is_no_name_never_reaches_apt(cache: Path, repository: Repository, name: str) -> None:
    with pytest.raises(PullError, match="no package name"):
        apt.package(name)


def test_missing_apt_names_its_package(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(host, "SBIN", "")
    with pytest.raises(PullError, match="apt-cache is not installed: run `apt-get install apt`"):
        apt.package("thing")


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (
            ["E: Failed to fetch http://h/p_1.deb  Temporary failure resolving 'h'", "E: Some files failed"],
            "is this host offline? apt says: Temporary failure resolving 'h'",
        ),
        (["E: Failed to fetch http://h/p_1.deb  404  Not Found [IP: ::1 80]"], "apt's package lists are old"),
        (["W: x", "E: Unable to locate package y"], "Unable to locate package y"),
        ([], "apt does not say why"),
    ],
)
def test_reason_is_one_clause(said: list[str], expected: str) -> None:
    assert apt.reason(said).startswith(expected)


def test_need_names_every_missing_package_in_one_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(host, "SBIN", "")
    with pytest.raises(PullError, match="run `apt-get install e2fsprogs mmdebstrap apt`"):
        host.need("mke2fs", "mmdebstrap", "apt-get", "apt-cache")


def test_progress_ends_at_the_whole(cache: Path, repository: Repository) -> None:
    repository.add("thing", "1.0", {"x": "1" * 100_000})
    repository.update()
    seen: list[tuple[str, float | None]] = []
    apt.package("thing", progress=lambda step, done: seen.append((step, done)))
    shares = [done for step, done in seen if step.startswith("thing 1.0 (0.1 MB)") and done is not None]
    assert shares[0] == 0.0
    assert shares[-1] == 1.0
