# SPDX-License-Identifier: Apache-2.0
"""The image cache: an image is there complete or not at all, whatever happens to the pull."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.killed import killed_at
from vmm import durable, images
from vmm.errors import ConfigError
from vmm.images import apt, rootfs, store
from vmm.images.host import Progress, PullError, silent


class Made:
    """Stands for what takes long: counts the root file systems made, and fails when told to."""

    def __init__(self) -> None:
        self.count = 0
        self.error: Exception | None = None
        self.seconds = 0.0

    def root(
        self,
        image: Path,
        size: int,
        kernel: apt.Package,
        packages: Sequence[str],
        work: Path,
        progress: Progress,
    ) -> None:
        self.count += 1
        time.sleep(self.seconds)
        image.write_text(f"{self.count} {size} {','.join(packages)}")
        if self.error:
            raise self.error


@pytest.fixture
def made(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Made:
    made = Made()
    (tmp_path / "kernel/boot").mkdir(parents=True)
    (tmp_path / "kernel/boot/vmlinuz-6.1-test").write_text("kernel")
    package = apt.Package("linux-image-test", "6.1-1", tmp_path / "kernel")
    recipe = store.Recipe("a test", 64 << 20, made.root)
    monkeypatch.setattr(store, "RECIPES", {"debian": recipe})
    monkeypatch.setattr(rootfs, "check_tools", lambda name: None)
    monkeypatch.setattr(apt, "package", lambda name, **kwargs: package)
    monkeypatch.setattr(store, "build_initramfs", lambda *args, **kwargs: b"initrd")
    return made


def test_pulled_image_resolves(made: Made, cache: Path) -> None:
    assert images.resolve("debian") is None
    image = images.pull("debian")
    assert Path(image.kernel).read_text() == "kernel"
    assert Path(image.initrd).read_bytes() == b"initrd"
    assert Path(image.rootfs).read_text() == f"1 {64 << 20} "
    assert "root=/dev/vda" in image.cmdline
    found = images.resolve("debian")
    assert found is not None
    assert (found.kernel, found.rootfs, found.cmdline) == (image.kernel, image.rootfs, image.cmdline)
    assert Path(image.kernel).parent == cache / "images/debian"


def test_second_pull_makes_nothing(made: Made) -> None:
    images.pull("debian")
    images.pull("debian")
    assert made.count == 1


def test_refresh_replaces_and_open_files_stay(made: Made, cache: Path) -> None:
    image = images.pull("debian")
    with open(image.rootfs) as old:
        images.pull("debian", refresh=True)
        assert old.read().startswith("1 ")
    assert Path(image.rootfs).read_text().startswith("2 ")
    assert {path.name for path in (cache / "images").iterdir()} == {"debian", "debian.lock"}


def test_failed_pull_leaves_nothing(made: Made, cache: Path) -> None:
    made.error = PullError("no")
    with pytest.raises(PullError, match="no"):
        images.pull("debian")
    assert images.resolve("debian") is None
    assert [path.name for path in (cache / "images").iterdir()] == ["debian.lock"]


def test_failed_refresh_keeps_what_was_there(made: Made) -> None:
    image = images.pull("debian")
    made.error = KeyboardInterrupt()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        images.pull("debian", refresh=True)
    assert Path(image.rootfs).read_text().startswith("1 ")
    assert images.resolve("debian") is not None


def test_leftovers_of_a_killed_pull_go(made: Made, cache: Path) -> None:
    left = cache / "images/.debian-abc"
    left.mkdir(parents=True)
    (left / "debian.tar").write_text("half")
    images.pull("debian")
    assert not left.exists()


def test_an_image_is_there_whenever_its_refresh_is_killed(made: Made, cache: Path) -> None:
    images.pull("debian")
    made.count = 5
    step = 1
    while killed_at(step, lambda: images.pull("debian", refresh=True)):
        found = images.resolve("debian")
        assert found is not None, f"killed at system call {step}"
        assert Path(found.rootfs).read_text()[0] in "16"
        step += 1
    assert step > 50
    images.pull("debian")
    assert {path.name for path in (cache / "images").iterdir()} <= {"debian", "debian.lock"}


def test_an_image_is_on_the_disk_before_it_has_its_name(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a power failure a file that was not synced may be empty, and a name that is younger be there."""
    synced: set[str] = set()
    fsync = os.fsync

    def watched(fd: int) -> None:
        synced.add(os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", watched)
    before: list[set[str]] = []

    def putting(new: str, place: str) -> None:
        before.append({*synced})
        durable.put_whole(new, place)

    monkeypatch.setattr(store, "put_whole", putting)
    images.pull("debian")
    assert before == [{"kernel", "initrd", "rootfs.ext4", "image.json", "image"}]


@pytest.mark.skipif(os.geteuid() != 0, reason="root mounts an overlay")
def test_an_image_of_an_overlays_lower_layer_is_replaced(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """As in a container whose image has it: there no directory of the lower layer can be renamed, or change places."""
    images.pull("debian")
    upper, work, merged = (tmp_path / name for name in ("upper", "work", "merged"))
    for each in (upper, work, merged):
        each.mkdir()
    options = f"lowerdir={tmp_path / 'cache'},upperdir={upper},workdir={work}"
    done = subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, merged], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"LAYER MISSING: overlayfs: {done.stderr.strip()}")
    try:
        monkeypatch.setenv("XDG_CACHE_HOME", str(merged))
        images.pull("debian", refresh=True)
        found = images.resolve("debian")
        assert found is not None and Path(found.rootfs).read_text().startswith("2 ")
    finally:
        subprocess.run(["umount", merged], check=True)


def test_two_pulls_at_once_make_it_once(made: Made) -> None:
    made.seconds = 0.3
    waited: list[str] = []
    threads = [
        threading.Thread(target=lambda: images.pull("debian", progress=lambda step, done: waited.append(step)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made.count == 1
    assert "another pull of debian is running, waiting for it" in waited


def test_other_size_or_packages_than_cached_are_refused(made: Made) -> None:
    images.pull("debian", size=128 << 20, packages=["vim", "git"])
    images.pull("debian", packages=["git"])
    images.pull("debian", size=128 << 20)
    with pytest.raises(ConfigError, match=r"--size .* in the cache with 134217728: add --refresh"):
        images.pull("debian", size=64 << 20)
    with pytest.raises(ConfigError, match=r"--packages curl: .* with git, vim: add --refresh"):
        images.pull("debian", packages=["curl"])
    assert made.count == 1


@pytest.mark.parametrize("size", [0, -1, 4096, (64 << 20) + 1])
def test_impossible_size_is_refused(made: Made, size: int) -> None:
    with pytest.raises(ConfigError, match="multiple of 4096 and at least 16M"):
        images.pull("debian", size=size)


def test_unknown_image_names_those_there_are(cache: Path) -> None:
    with pytest.raises(ConfigError, match="image fedora: not known; allowed: busybox, debian, and oci:REF"):
        images.pull("fedora")
    assert not cache.exists()


def test_names_and_recipes_agree() -> None:
    assert tuple(store.RECIPES) == images.NAMES


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", f'{{"format": {images.FORMAT}}}', f'{{"format": {images.FORMAT}, "kernel": 3}}']
)
def test_damaged_description_says_what_to_do_and_pull_heals_it(made: Made, cache: Path, text: str) -> None:
    images.pull("debian")
    (cache / "images/debian/image.json").write_text(text)
    with pytest.raises(ConfigError, match="damaged: run `pyvmm pull debian --refresh`"):
        images.resolve("debian")
    assert images.available()[0]["damaged"]
    images.pull("debian")
    assert images.resolve("debian") is not None


def test_missing_file_is_named(made: Made, cache: Path) -> None:
    images.pull("debian")
    (cache / "images/debian/rootfs.ext4").unlink()
    with pytest.raises(ConfigError, match=r"image debian: rootfs.ext4 is missing"):
        images.resolve("debian")


def test_image_of_another_format_is_pulled_again(made: Made, cache: Path) -> None:
    images.pull("debian")
    path = cache / "images/debian/image.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": images.FORMAT + 1}))
    assert images.resolve("debian") is None
    images.pull("debian")
    assert made.count == 2


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/etc", ".debian-abc", "nosuch", "x\0y"])
def test_what_is_no_image_resolves_to_none(cache: Path, name: str) -> None:
    assert images.resolve(name) is None


def test_relative_cache_home_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/someone")
    assert images.cache_root() == "/home/someone/.cache/pyvmm"


def test_available_tells_what_is_cached(made: Made) -> None:
    assert images.available() == [{"name": "debian", "summary": "a test", "cached": False}]
    images.pull("debian", packages=["vim"])
    (entry,) = images.available()
    assert entry["cached"] is True
    assert entry["kernel_version"] == "6.1-test"
    assert entry["packages"] == ["vim"]
    assert entry["bytes"] > 0


def test_umask_of_the_caller_is_back(made: Made) -> None:
    before = os.umask(0o077)
    try:
        images.pull("debian")
        assert os.umask(0o077) == 0o077
    finally:
        os.umask(before)


def test_busybox_takes_no_packages(cache: Path) -> None:
    package = apt.Package("k", "1", cache)
    with pytest.raises(PullError, match="takes no packages"):
        rootfs.busybox(cache, 1, package, ["vim"], cache, silent)


def test_resolve_imports_only_what_a_launch_has() -> None:
    code = (
        "import sys, vmm.images; before = set(sys.modules); vmm.images.resolve('nosuch');"
        "print(*(set(sys.modules) & {'json', 'subprocess', 'pathlib', 'typing', 'vmm.images.store', 're'}))"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
