# SPDX-License-Identifier: Apache-2.0
"""Container images in the cache: fetched, merged into one read-only disk, described for a machine.

``images/oci-KEY/{kernel,initrd,rootfs.squashfs,image.json}`` is an image, there complete or not at all. ``disks/`` has
each disk once, however many images have it (hard links); ``blobs/`` has what registries sent, by digest.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec

from vmm.durable import sync
from vmm.images import Image, apt, guest, layers, manifest, sources, squashfs, store, users
from vmm.images.container import ImageConfig
from vmm.images.host import Progress, PullError, cache_root, need, tool
from vmm.images.reference import Name

LIMIT = 8 << 30  # bytes of an image, unpacked, if its user says no other
MODULES = ("virtio_mmio", "virtio_pci", "virtio_blk", "squashfs", "overlay")
# The overlay is the initramfs's: docs/images.md.
CMDLINE = "root=/dev/vda ro rootfstype=squashfs overlay=tmpfs quiet"
_VERSION = b"Directory Transport Version: "  # in each dir: of skopeo. Source: containers/image, directory_dest.go


def pull(name: Name, *, refresh: bool, limit: int | None, progress: Progress) -> Image:
    """Return the image, making it if it is not in the cache; see ``vmm.images.pull``."""
    image = store.obtain(
        str(name), name.directory, lambda: need("sqfstar"),
        lambda work: _make(name, limit or LIMIT, refresh, work, progress), refresh=refresh, progress=progress,
    )  # fmt: skip
    _sweep()
    return image


def _make(name: Name, limit: int, refresh: bool, work: Path, progress: Progress) -> None:
    out = work / "image"
    out.mkdir()
    kernel = apt.package(store.KERNEL, refresh=refresh, progress=progress)
    make = _of_directory if name.kind == "dir" else _of_layers
    config = make(name, limit, work, progress)
    disk = (work / "disk").rename(out / "rootfs.squashfs")
    facts = {
        "name": str(name), "rootfs": "rootfs.squashfs", "cmdline": CMDLINE, "config": msgspec.to_builtins(config),
        "size": disk.stat().st_size,
    }  # fmt: skip
    on_demand = (*guest.ON_DEMAND_MODULES, "ext4")
    store.finish(out, kernel, facts, MODULES, on_demand, guest.container_files(config), progress)


def _of_directory(name: Name, limit: int, work: Path, progress: Progress) -> ImageConfig:
    if not os.path.isdir(name.place):
        raise PullError(f"{name.place} is not a directory")
    if os.path.exists(f"{name.place}/oci-layout"):
        raise PullError(f"{name.place} is an image in OCI's layout: name it oci:{name.place}")
    if os.path.isfile(f"{name.place}/version"):
        with open(f"{name.place}/version", "rb") as file:
            if file.read(len(_VERSION)) == _VERSION:
                how = "`skopeo copy dir:... oci:DIR` makes one that pyvmm reads"
                raise PullError(f"{name.place} is an image in skopeo's format: {how}")
    progress("making the file system", None)
    options = [*squashfs.COMPRESSION, "-one-file-system", "-no-progress", "-exit-on-error"]
    mounts = list(_mounts_below(name.place))
    for path, status in mounts:
        quoted = path.replace("\\", "\\\\").replace('"', '\\"')
        options += ["-p", f'"{quoted}" d {status.st_mode & 0o7777:o} {status.st_uid} {status.st_gid}']
    if mounts:  # squashfs-tools 4.7 would take the directory, and refuse the one that is made for it
        options += ["-e", *(path for path, _ in mounts)]
    argv = [tool("mksquashfs"), name.place, str(work / "disk"), *options]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise PullError(f"mksquashfs: {said[0]}")
    return ImageConfig(home="/root")


def _mounts_below(place: str) -> Iterator[tuple[str, os.stat_result]]:
    # Directories of the tree on which another file system is mounted, as proc in a prepared chroot. mksquashfs takes
    # nothing of those, but a guest mounts something there, too. Source: proc(5), mountinfo.
    root = os.path.realpath(place)
    own = os.stat(root).st_dev
    with open("/proc/thread-self/mountinfo", "rb") as file:
        points = {re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), line.split()[4]) for line in file}
    for point in sorted(map(os.fsdecode, points)):
        if point.startswith(root.rstrip("/") + "/") and os.path.isdir(point):
            status = os.stat(point)
            if status.st_dev != own == os.stat(os.path.dirname(point)).st_dev:
                yield os.path.relpath(point, root), status


def _of_layers(name: Name, limit: int, work: Path, progress: Progress) -> ImageConfig:
    if name.repository:
        content = sources.registry(name, cache_root() / "blobs", progress)
    elif name.kind == "oci":
        content = sources.layout(name)
    else:
        content = sources.archive(name)
    config, diff_ids = manifest.read_config(str(name), content.config)
    if len(diff_ids) != len(content.layers):
        raise PullError(f"{name} has {len(content.layers)} layers, and its config says {len(diff_ids)}")
    key = hashlib.sha256("\n".join(["1", *squashfs.COMPRESSION, *diff_ids]).encode()).hexdigest()
    shared = cache_root() / "disks" / f"{key}.squashfs"
    shared.parent.mkdir(exist_ok=True)
    tree = layers.Tree(limit)
    left = limit
    with contextlib.ExitStack() as tars:
        for number, (opened, diff_id) in enumerate(zip(content.layers, diff_ids, strict=True), 1):
            what = f"{name}: layer {number}"
            progress(f"{name}: reading layer {number} of {len(diff_ids)}", None)
            try:
                with opened() as file:
                    tar, size = sources.unpack(what, file, diff_id, left, work)
            except sources.Damaged:
                for blob in content.blobs:  # the next pull fetches it again
                    blob.unlink(missing_ok=True)
                raise
            tars.enter_context(tar)
            left -= size
            tree.add(what, tar, size)
        user = users.look_up(config.user, tree.read("etc/passwd"), tree.read("etc/group"))
        try:
            os.link(shared, work / "disk")
        except OSError:  # it is not there, or cannot be shared
            squashfs.write(tree, work / "disk", progress)
            sync(str(work / "disk"))
            with contextlib.suppress(OSError):
                os.link(work / "disk", shared)
    return msgspec.structs.replace(config, uid=user.uid, gid=user.gid, groups=user.groups, home=user.home)


def _sweep() -> None:
    # disks that no image has any more
    for disk in (cache_root() / "disks").glob("*.squashfs"):
        with contextlib.suppress(OSError):  # another pull was first, or the cache is read-only
            if disk.stat().st_nlink == 1:
                disk.unlink()
