# SPDX-License-Identifier: Apache-2.0
"""An initramfs: busybox, the modules that a kernel needs, and a script that is /init."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from vmm.images import apt, modules
from vmm.images.cpio import Archive
from vmm.images.host import Progress, run, silent

# The first lines of an /init: what nearly every script needs before anything else.
LOAD_MODULES = """\
#!/bin/sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
while read -r name; do insmod "/lib/modules/$name" || echo "init: cannot load $name"; done </lib/modules/order
"""


def build_initramfs(
    kernel: Path,
    module_names: Iterable[str],
    init: str,
    *,
    optional: Sequence[str] = (),
    files: Mapping[str, bytes] | None = None,
    progress: Progress = silent,
) -> bytes:
    """Return a newc archive, uncompressed: small, and unpacking it costs a guest more than reading it.

    It holds busybox with all its applets (``busybox-static``, fetched if not in the cache), the modules in
    ``/lib/modules`` and their names in loading order in ``/lib/modules/order``, and empty mount points.

    :param kernel: an unpacked kernel package, as ``apt.package(...).tree``
    :param module_names: modules to include with what they depend on; may be empty
    :param init: text of /init, a shell script; ``LOAD_MODULES`` is a good beginning
    :param optional: more modules, which this kernel may lack
    :param files: further files by their path in the guest, executable if they begin with ``#!`` or as ELF
    :raises ConfigError: an unknown module
    :raises PullError: busybox cannot be fetched, or the kernel's tree is damaged
    """
    archive = Archive()
    for directory in ("proc", "sys", "dev", "run", "mnt", "tmp", "root", "etc"):
        archive.directory(directory)
    archive.node("dev/console", "c", 5, 1)  # devtmpfs is not mounted yet when the kernel opens it for /init
    add_busybox(archive, progress)
    order = []
    if names := list(module_names) + list(optional):
        version = apt.kernel_of(kernel)[1]
        required = names[: len(names) - len(optional)]
        for path in modules.load_order(kernel, version, required, optional=optional):
            name = path.name.partition(".ko")[0] + ".ko"
            archive.file(f"lib/modules/{name}", modules.read(path))
            order.append(name)
    archive.file("lib/modules/order", "".join(f"{name}\n" for name in order).encode())
    archive.file("init", init.encode(), 0o755)
    for guest_path, data in (files or {}).items():
        archive.file(guest_path, data, 0o755 if data.startswith((b"#!", b"\x7fELF")) else 0o644)
    return archive.to_bytes()


def busybox(progress: Progress = silent) -> tuple[bytes, list[str]]:
    """Return Debian's static busybox and where its applets belong, as ``bin/sh``.

    :raises PullError: it cannot be fetched
    """
    binary = apt.package("busybox-static", progress=progress).tree / "bin/busybox"
    return binary.read_bytes(), run([str(binary), "--list-full"]).split()


def add_busybox(archive: Archive, progress: Progress = silent) -> None:
    """Add busybox as ``/bin/busybox`` and a link for each of its applets."""
    binary, applets = busybox(progress)
    archive.file("bin/busybox", binary, 0o755)
    for applet in applets:
        if applet not in archive:
            archive.symlink(applet, "/bin/busybox")
