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
    """A pulled image: the paths of its files, and the kernel command line that boots it from a virtio disk.

    ``disks`` are the image's own disks in order: /dev/vda is the first, ``rootfs``. An image with a ``config`` is a
    container image. Its disk is a squashfs, read-only and shared between machines, and its initramfs puts a writable
    overlay over it.
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
    """Return pyvmm's cache directory, ``$XDG_CACHE_HOME/pyvmm``, without creating it.

    :raises ConfigError: neither the environment nor the password file has a home directory of this user

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
    """Return the image of that name. None: it was not pulled, or by a pyvmm with another format.

    :raises ConfigError: the image is damaged, or its name is invalid
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
    """Return the image of that name. Make it first if it is not in the cache.

    Names are those of ``NAMES``, and of container images, such as ``oci:REF``: see docs/images.md.

    Two pulls of one image wait for each other. A pull that fails or is killed leaves the previous image.

    :param refresh: make it again from what apt or the registry offers now
    :param size: bytes of the root file system (sparse); for a container image, the limit of its unpacked bytes;
        None: the default
    :param packages: more Debian packages in the root file system
    :param progress: called with each step and its progress
    :raises ConfigError: an unknown name, or an image that is in the cache with another size or other packages
    :raises PullError: a program is missing, or a package or a container image is damaged or cannot be fetched
    """
    from vmm.images import store
    from vmm.images.host import silent

    return store.pull(name, refresh=refresh, size=size, packages=packages, progress=progress or silent)


def available() -> list[dict[str, Any]]:
    """Return the images that can be pulled, and those in the cache with the facts of their image.json.

    Keys: ``name``, ``summary``, ``cached`` (bool); if cached ``bytes`` (on disk), ``kernel_version``,
    ``built`` (UTC, ISO 8601), ``packages``, ``size`` (bytes of the root file system); or ``damaged`` (why).
    """
    from vmm.images import store

    return store.available()
