# SPDX-License-Identifier: Apache-2.0
"""Packages by name, with the real apt on an archive in a directory."""

from __future__ import annotations

import http.server
import os
import pwd
import threading
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from tests.images.conftest import Repository
from vmm.images import apt, host, suites
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


def test_the_apt_of_another_suite_keeps_what_it_has_read(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise it reads the lists anew for each question; a container's own apt keeps nothing."""
    parts = repository.root / "etc/apt.conf.d"
    parts.mkdir()
    (parts / "docker-clean").write_text(
        'Dir::Cache::pkgcache ""; Dir::Cache::srcpkgcache ""; Acquire::http::Proxy "x";'
    )
    monkeypatch.setattr(suites, "sources", lambda: [["http://m/d/", "bookworm", "main"]])
    monkeypatch.setattr(suites, "_update", lambda suite, env: None)
    with suites.apt_of("trixie", host.silent) as env:
        said = host.run(["apt-config", "dump"], env=env)
    assert 'Dir::Cache::pkgcache "pkgcache.bin";' in said
    assert 'Dir::Cache::srcpkgcache "srcpkgcache.bin";' in said
    assert 'Acquire::http::Proxy "x";' in said, "what the host says besides holds"


def test_several_get_the_lists_of_another_suite_once(
    cache: Path, repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two", "three"):
        repository.add(name, "1.0", {name: "1"})
    repository.update()
    suites_of: list[str] = []

    def apt_of(suite: str, progress: host.Progress) -> AbstractContextManager[dict[str, str]]:
        suites_of.append(suite)
        return nullcontext({})

    monkeypatch.setattr(suites, "apt_of", apt_of)
    assert apt.package("two", suite="other").name == "two"
    for _ in range(2):
        found = apt.packages(["one", "two", "three"], suite="other")
        assert [(package.name, (package.tree / package.name).read_text()) for package in found] == [
            ("one", "1"), ("two", "1"), ("three", "1"),
        ]  # fmt: skip
        assert suites_of == ["other", "other"], "the second time all of them are in the cache"
    assert (cache / "debs/three@other.chosen").exists()


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


# Each release of Debian has moved something; these are the trees of their packages.
LAYOUTS = {
    "12": ("linux-image-6.1.0-9-cloud-amd64", "boot/vmlinuz-6.1.0-9-cloud-amd64", "lib/modules"),
    "13": ("linux-image-6.12.1+deb13-cloud-amd64", "boot/vmlinuz-6.12.1+deb13-cloud-amd64", "usr/lib/modules"),
    "14": (
        "linux-image-7.2.1+deb14-cloud-amd64", "usr/lib/modules/7.2.1+deb14-cloud-amd64/vmlinuz", "usr/lib/modules",
    ),
}  # fmt: skip


@pytest.mark.parametrize("release", LAYOUTS)
def test_kernels_as_each_debian_packs_them(cache: Path, repository: Repository, release: str) -> None:
    name, image, root = LAYOUTS[release]
    version = name.removeprefix("linux-image-")
    files = {image: "kernel", f"{root}/{version}/kernel/virtio.ko": "module", f"{root}/{version}/modules.builtin": ""}
    exact = "(= 1-1)"
    if release == "14":
        for number, part in enumerate(("binary", "modules", "base")):
            repository.add(f"linux-{part}-{version}", "1-1", dict([list(files.items())[number]]))
        parts = ", ".join(f"linux-{part}-{version} {exact}" for part in ("base", "binary", "modules"))
        repository.add(name, "1-1", {}, depends=f"dracut | linux-initramfs-tool, linux-base (>= 4.17~), {parts}")
        repository.add("linux-base-cloud-amd64", "1-1", {})
        repository.add("linux-image-cloud-amd64", "1-1", {}, depends=f"linux-base-cloud-amd64 {exact}, {name} {exact}")
    else:
        repository.add(name, "1-1", files)
        repository.add("linux-image-cloud-amd64", "1-1", {}, depends=f"{name} {exact}")
    assert repository.update() == 0
    package = apt.package("linux-image-cloud-amd64")
    assert package.name == name
    path, found = apt.kernel_of(package.tree)
    assert (path.read_text(), found) == ("kernel", version)
    assert (apt.modules_root(package.tree) / version / "kernel/virtio.ko").read_text() == "module"
    assert (apt.modules_root(package.tree) / version / "modules.builtin").exists()


def test_leftovers_of_a_killed_fetch_go(cache: Path, repository: Repository) -> None:
    repository.add("thing", "1.0", {"usr/share/thing": "one"})
    repository.update()
    left = cache / "debs/.linux-image-6.1-abc"
    (left / "tree/boot").mkdir(parents=True)
    apt.package("thing")
    assert sorted(path.name for path in (cache / "debs").iterdir()) == ["lock", "thing.chosen", "thing_1.0"]


def test_a_package_is_on_the_disk_before_it_has_its_name(
    cache: Path, repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """One that a power failure left empty would be taken for whole, with --refresh, too."""
    repository.add("thing", "1.0", {"usr/share/thing": "one"})
    repository.update()
    synced = []

    def watched(argv: list[str], **more: Any) -> str:
        if argv[0] == "sync":
            synced.append((Path(argv[-1], "tree/usr/share/thing").exists(), (cache / "debs/thing_1.0").exists()))
        return host.run(argv, **more)

    monkeypatch.setattr(apt, "run", watched)
    apt.package("thing")
    assert synced == [(True, False)]


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


def test_what_fails_now_and_then_is_tried_three_times(
    cache: Path, repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository.add("thing", "1.0", {"x": "1"})
    repository.add("other", "1.0", {"x": "1"})
    repository.update()
    download, tries = apt._download, []

    def twice_offline(*arguments: object) -> None:
        tries.append(arguments)
        if len(tries) < 3:
            raise host.FetchError("cannot fetch thing: is this host offline?")
        download(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(apt, "_download", twice_offline)
    assert apt.package("thing").version == "1.0"
    assert len(tries) == 3
    tries.clear()
    monkeypatch.setattr(host, "TRIES", 2)
    with pytest.raises(PullError, match="offline"):
        apt.package("other")
    assert len(tries) == 2


def _uid_of(port: int) -> int:
    # of the process that has this end of a connection on the loopback device
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    return next(int(line.split()[7]) for line in lines if line.split()[1].endswith(f":{port:04X}"))


@pytest.mark.skipif(os.geteuid() != 0, reason="apt changes its user only as root")
def test_as_root_apt_fetches_as_its_own_user(cache: Path, repository: Repository) -> None:
    users: dict[str, int] = {}

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            users[self.path.rpartition("/")[2]] = _uid_of(self.client_address[1])
            super().do_GET()

        def log_message(self, *_: object) -> None:
            pass

    serve = partial(Handler, directory=str(repository.root / "archive"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            repository.add("thing", "1.0", {"x": "1"})
            text = repository.configuration.read_text()
            assert repository.update(address=f"http://127.0.0.1:{server.server_port}") == 0
            repository.configuration.write_text(text.replace('Sandbox::User "root"', 'Sandbox::User "_apt"'))
            assert (apt.package("thing").tree / "x").read_text() == "1"
        finally:
            server.shutdown()
    assert users["thing_1.0_amd64.deb"] == pwd.getpwnam("_apt").pw_uid


def test_a_file_that_changed_after_apt_looked_is_refused(
    cache: Path, repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository.add("thing", "1.0", {"x": "1"})
    repository.update()
    download = apt._download

    def then_changed(offer: apt._Offer, spool: Path, *rest: object) -> None:
        download(offer, spool, *rest)  # type: ignore[arg-type]
        (deb,) = spool.glob("*.deb")
        deb.write_bytes(deb.read_bytes() + b"!")

    monkeypatch.setattr(apt, "_download", then_changed)
    with pytest.raises(PullError, match="cannot fetch thing: Hash Sum mismatch"):
        apt.package("thing")


def test_who_has_the_file_open_cannot_change_what_was_looked_at(
    cache: Path, repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository.add("thing", "1.0", {"x": "1"})
    repository.update()
    download, check = apt._download, apt._check
    still: list[BinaryIO] = []

    def then_open(offer: apt._Offer, spool: Path, *rest: Any) -> None:
        download(offer, spool, *rest)
        (deb,) = spool.glob("*.deb")
        still.append(open(deb, "r+b"))

    def then_changed(deb: Path, offer: apt._Offer) -> None:
        check(deb, offer)
        still[0].truncate(0)

    monkeypatch.setattr(apt, "_download", then_open)
    monkeypatch.setattr(apt, "_check", then_changed)
    assert (apt.package("thing").tree / "x").read_text() == "1"
    still[0].close()


def test_unsigned_archive_is_refused(cache: Path, repository: Repository) -> None:
    repository.add("thing", "1.0", {"x": "1"})
    repository.add("apt", "1.0", {})
    assert repository.update(trusted=False) != 0
    with pytest.raises(PullError, match="run `apt-get update`"):
        apt.package("thing")


@pytest.mark.parametrize("name", ["", "-o=x", "--help", "../x", "a b"])
def test_what_is_no_name_never_reaches_apt(cache: Path, repository: Repository, name: str) -> None:
    with pytest.raises(PullError, match="not a package name"):
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
    with pytest.raises(PullError, match="run `apt-get update && apt-get install e2fsprogs mmdebstrap apt`"):
        host.need("mke2fs", "mmdebstrap", "apt-get", "apt-cache")


def test_progress_ends_at_the_whole(cache: Path, repository: Repository) -> None:
    repository.add("thing", "1.0", {"x": "1" * 100_000})
    repository.update()
    seen: list[tuple[str, float | None]] = []
    apt.package("thing", progress=lambda step, done: seen.append((step, done)))
    shares = [done for step, done in seen if step.startswith("thing 1.0 (0.1 MB)") and done is not None]
    assert shares[0] == 0.0
    assert shares[-1] == 1.0
