# SPDX-License-Identifier: Apache-2.0
"""The image cache, ``$XDG_CACHE_HOME/pyvmm/images``: one directory per image, there complete or not at all.

``NAME/{kernel,initrd,rootfs.ext4,image.json}``; ``NAME.lock`` is held while NAME is being made.
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from vmm.config import only
from vmm.durable import put_whole, sync
from vmm.errors import ConfigError, line, path_of
from vmm.images import FORMAT, NAMES, Image, apt, guest, reference, resolve, rootfs
from vmm.images.host import Progress, PullError, cache_root, locked
from vmm.images.initramfs import build_initramfs

KERNEL = "linux-image-cloud-amd64"
MIN_SIZE = 16 << 20  # bytes; below this mke2fs makes no useful journal

# Writes an ext4 image of so many bytes: (image, size, kernel, packages, work, progress)
MakeRoot = Callable[[Path, int, apt.Package, Sequence[str], Path, Progress], None]


class Recipe(NamedTuple):
    """How an image is made."""

    summary: str
    size: int  # default for the root file system, bytes; sparse, so only what is used takes space
    make_root: MakeRoot


RECIPES = {
    "busybox": Recipe("stock Debian kernel, busybox root file system: made in seconds", 64 << 20, rootfs.busybox),
    "debian": Recipe("stock Debian kernel, small Debian root file system", 1 << 30, rootfs.debian),
}


def pull(name: str, *, refresh: bool, size: int | None, packages: Sequence[str], progress: Progress) -> Image:
    """Return the image, making it if it is not in the cache; see ``vmm.images.pull``."""
    if container := reference.parse(name):
        from vmm.images import oci

        if packages:
            raise ConfigError("--packages", ",".join(packages), f"is for {' and '.join(NAMES)}, not for {name}")
        return oci.pull(container, refresh=refresh, limit=size, progress=progress)
    recipe = RECIPES.get(name)
    if recipe is None:
        raise ConfigError("image", name, f"not known{only(name, NAMES)}, and oci:REF for any container image")
    if size is not None and (size < MIN_SIZE or size % 4096):
        raise ConfigError("--size", size, f"must be a multiple of 4096 and at least {MIN_SIZE >> 20}M")

    def make(work: Path) -> None:
        umask = os.umask(0o022)  # modes of the trees are the guest's
        try:
            _make(recipe, size or recipe.size, packages, refresh, work, progress)
        finally:
            os.umask(umask)

    return obtain(
        name, name, lambda: rootfs.check_tools(name), make, lambda: _check_cached(name, size, packages),
        refresh=refresh, progress=progress,
    )  # fmt: skip


def obtain(
    name: str, directory: str, check: Callable[[], None], make: Callable[[Path], None],
    check_cached: Callable[[], None] = lambda: None, *, refresh: bool, progress: Progress,
) -> Image:  # fmt: skip
    """The image in the cache, or a new one; two pulls of one image wait for each other.

    :param directory: directory of the image, below ``images/``
    :param check: raises PullError where a program is missing
    :param make: is given a directory to work in, and makes ``image`` there
    :param check_cached: raises ConfigError where the image in the cache is not what was asked for
    :raises PullError: the image cannot be made
    """

    def cached() -> Image | None:
        try:
            image = None if refresh else resolve(name)
        except ConfigError:
            return None  # damaged: made again
        if image is not None:
            check_cached()
        return image

    place = cache_root() / "images" / directory
    if image := cached():
        return image
    check()
    place.parent.mkdir(parents=True, exist_ok=True)
    waiting = f"another pull of {name} is running, waiting for it"
    with locked(place.parent / f"{directory}.lock", lambda: progress(waiting, None)):
        # another pull may have made it in the meantime
        if image := cached():
            return image
        try:
            with making(place) as work:
                make(work)
        except OSError as error:
            raise PullError(f"{name}: {error.strerror}: {line(path_of(error) or str(place))}") from error
    made = resolve(name)
    assert made is not None
    return made


def available() -> list[dict[str, Any]]:
    """Return what can be pulled and what is in the cache; see ``vmm.images.available``."""
    found: list[dict[str, Any]] = []
    for name, recipe in RECIPES.items():
        entry: dict[str, Any] = {"name": name, "summary": recipe.summary, "cached": False}
        try:
            if resolve(name):
                entry |= _cached(name, _facts(name))
        except ConfigError as error:
            entry["damaged"] = str(error)
        found.append(entry)
    for path in sorted((cache_root() / "images").glob("oci-*/image.json")):
        with suppress(OSError, ValueError, KeyError, TypeError):  # of another pyvmm, or half deleted
            facts = _facts(path.parent.name)
            cached = _cached(path.parent.name, facts)
            found.append({"name": facts["name"], "summary": "container image", **cached})
    return found


def _cached(directory: str, facts: dict[str, Any]) -> dict[str, Any]:
    used = sum(path.stat().st_blocks * 512 for path in (cache_root() / "images" / directory).iterdir())
    about = {key: facts[key] for key in ("kernel_version", "built", "size")}
    return {"cached": True, "bytes": used, "packages": facts.get("packages", []), **about}


def _check_cached(name: str, size: int | None, packages: Sequence[str]) -> None:
    facts = _facts(name)
    if size not in (None, facts["size"]):
        raise ConfigError("--size", size, f"{name} is in the cache with {facts['size']}: add --refresh")
    if not set(packages) <= set(facts["packages"]):
        have = ", ".join(facts["packages"]) or "none"
        raise ConfigError("--packages", ",".join(packages), f"{name} is in the cache with {have}: add --refresh")


def _facts(name: str) -> dict[str, Any]:
    with open(cache_root() / "images" / name / "image.json", encoding="utf-8") as file:
        facts: dict[str, Any] = json.load(file)
    return facts


def _make(recipe: Recipe, size: int, packages: Sequence[str], refresh: bool, work: Path, progress: Progress) -> None:
    kernel = apt.package(KERNEL, refresh=refresh, progress=progress)
    if refresh:
        apt.package("busybox-static", refresh=True, progress=progress)
    out = work / "image"
    out.mkdir()
    recipe.make_root(out / "rootfs.ext4", size, kernel, packages, work, progress)
    facts = {
        "rootfs": "rootfs.ext4", "cmdline": "root=/dev/vda rw quiet", "packages": sorted(packages), "size": size,
        "kernel_package": f"{kernel.name} {kernel.version}",
    }  # fmt: skip
    finish(out, kernel, facts, guest.MODULES, guest.ON_DEMAND_MODULES, guest.busybox_files("initramfs"), progress)


def finish(
    out: Path, kernel: apt.Package, facts: dict[str, Any], modules: Sequence[str], on_demand: Sequence[str],
    files: Mapping[str, str | bytes], progress: Progress,
) -> None:  # fmt: skip
    """Put a kernel, an initramfs and ``image.json`` beside a root file system.

    :param facts: facts about the root file system, for ``image.json``
    :param modules: modules that the initramfs loads; with `on_demand`, modules that it has for modprobe
    :param files: further files of the initramfs
    """
    bzimage, version = apt.kernel_of(kernel.tree)
    shutil.copyfile(bzimage, out / "kernel")
    progress("making the initramfs", None)
    initramfs = build_initramfs(
        kernel.tree, modules, guest.INIT, optional=guest.OPTIONAL_MODULES, on_demand=on_demand, files=files,
        progress=progress,
    )  # fmt: skip
    (out / "initrd").write_bytes(initramfs)
    facts = {
        "format": FORMAT, "kernel": "kernel", "initrd": "initrd", "kernel_version": version, **facts,
        "built": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    (out / "image.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


@contextmanager
def making(place: Path) -> Iterator[Path]:
    """Yield a directory to work in, whose ``image`` then takes its place at `place`; for who holds its lock.

    Whoever looks there finds the image before or the new one, after a kill or a power failure, too. Whoever has files
    of the image before open keeps them. What a pull that was killed has left is removed.
    """
    for left in place.parent.glob(f".{place.name}-*"):
        shutil.rmtree(left, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=place.parent))
    try:
        yield work
        made = work / "image"
        for path in (*made.iterdir(), made):
            sync(str(path))
        put_whole(str(made), str(place))
    finally:
        shutil.rmtree(work, ignore_errors=True)
