# SPDX-License-Identifier: Apache-2.0
"""Guest images: a kernel, an initramfs and a root file system under one name, made by `pyvmm pull`.

``resolve`` is on the way of every `pyvmm run`, so this module imports only os; the rest comes when used.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from vmm.images.container import ImageConfig
    from vmm.images.host import Progress

NAMES = ("busybox", "debian")
FORMAT = 2  # of image.json; an image of another format is pulled again. 2: drivers of every device of ours


class Image:
    """A pulled image: paths of its files, and the kernel command line that brings it up on a virtio disk.

    ``disks`` are the image's own, in the order in which a machine has them: /dev/vda is the first, ``rootfs``. With a
    ``config`` it is a container image: its disk is a squashfs, read-only and shared between machines, and its
    initramfs puts a writable overlay over it.
    """

    __slots__ = ("cmdline", "config", "disks", "initrd", "kernel", "name", "rootfs")

    def __init__(
        self, name: str, kernel: str, initrd: str, rootfs: str, cmdline: str, config: ImageConfig | None = None
    ) -> None:
        self.name = name
        self.kernel = kernel
        self.initrd = initrd
        self.rootfs = rootfs
        self.disks = [rootfs]
        self.cmdline = cmdline
        self.config = config

    def __repr__(self) -> str:
        return f"Image({self.name!r}, {os.path.dirname(self.kernel)!r})"


def cache_root() -> str:
    """Return pyvmm's cache directory, ``$XDG_CACHE_HOME/pyvmm``; nothing is created.

    :raises ConfigError: neither the environment nor the password file says where this user's files are

    Source: XDG Base Directory Specification: a relative XDG_CACHE_HOME is invalid and ignored.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):
        # An empty HOME would be the root directory.
        base = os.path.expanduser("~/.cache") if os.environ.get("HOME", "~") else ""
    if not os.path.isabs(base):
        from vmm.errors import ConfigError

        problem = "is not set, and this user has no home directory; set it, or XDG_CACHE_HOME, to an absolute path"
        raise ConfigError("HOME", os.environ.get("HOME", ""), problem)
    return os.path.join(base, "pyvmm")


def resolve(name: str) -> Image | None:
    """Return the image of that name, or None if it was not pulled (or by a pyvmm with another format).

    :raises ConfigError: it is there but damaged; or an ``oci:`` name that is none
    """
    directory = name
    if ":" in name:
        from vmm.images import reference

        container = reference.parse(name)
        if container is None:
            return None
        directory = container.directory
    elif not name or "/" in name or name.startswith("."):
        return None
    directory = os.path.join(cache_root(), "images", directory)
    described = os.path.join(directory, "image.json")
    if not os.path.exists(described):
        return None
    import json

    from vmm.errors import ConfigError

    again = f"the cached image is damaged: run `pyvmm pull {name} --refresh`"
    try:
        with open(described, encoding="utf-8") as file:
            facts = json.load(file)
        if facts["format"] != FORMAT:
            return None
        kernel, initrd, rootfs = (os.path.join(directory, facts[key]) for key in ("kernel", "initrd", "rootfs"))
        image = Image(name, kernel, initrd, rootfs, facts["cmdline"])
        if "config" in facts:
            import msgspec

            from vmm.images.container import ImageConfig

            image.config = msgspec.convert(facts["config"], ImageConfig)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError("image", name, again) from error
    for path in (image.kernel, image.initrd, image.rootfs):
        if not os.path.isfile(path):
            raise ConfigError("image", name, f"{os.path.basename(path)} is missing, {again}")
    return image


def pull(
    name: str,
    *,
    refresh: bool = False,
    size: int | None = None,
    packages: Sequence[str] = (),
    progress: Progress | None = None,
) -> Image:
    """Return the image of that name, making it first if it is not in the cache.

    Beside ``NAMES`` there is ``oci:REF`` and what else docs/images.md has of container images.

    Two pulls of one image wait for each other; a pull that fails or is killed leaves what was there.

    :param refresh: make it again, from what apt offers now
    :param size: bytes of the root file system (sparse); of a container image what it may have unpacked, at most;
        None for the default
    :param packages: further Debian packages in the root file system
    :param progress: called with each step and how much of it is done
    :raises ConfigError: no such name; or it is in the cache with another size or other packages
    :raises PullError: a program is missing, or a package or a container image cannot be fetched, or is damaged
    """
    from vmm.images import store
    from vmm.images.host import silent

    return store.pull(name, refresh=refresh, size=size, packages=packages, progress=progress or silent)


def available() -> list[dict[str, Any]]:
    """Return what can be pulled: name and summary, and for what is in the cache also image.json's facts.

    Keys: ``name``, ``summary``, ``cached`` (bool); if cached ``bytes`` (on disk), ``kernel_version``,
    ``built`` (UTC, ISO 8601), ``packages``, ``size`` (bytes of the root file system); or ``damaged`` (why).
    """
    from vmm.images import store

    return store.available()
