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
# those of another kernel are of no use: it has these drivers built in
[ ! -d "/lib/modules/$(uname -r)" ] ||
    while read -r name; do insmod "/lib/modules/$name" || echo "init: cannot load $name"; done </lib/modules/order
"""


def build_initramfs(
    kernel: Path,
    module_names: Iterable[str],
    init: str,
    *,
    optional: Sequence[str] = (),
    on_demand: Sequence[str] = (),
    files: Mapping[str, str | bytes] | None = None,
    progress: Progress = silent,
) -> bytes:
    """Return a newc archive, uncompressed: small, and unpacking it costs a guest more than reading it.

    It holds busybox with all its applets (``busybox-static``, fetched if not in the cache), mount points, the
    modules in ``/lib/modules``, and in ``/lib/modules/order`` the paths there of those to load at once, each
    after what it needs. modprobe works too, so the kernel itself finds what it wants, as a file system.

    :param kernel: an unpacked kernel package, as ``apt.package(...).tree``
    :param module_names: modules to include with what they depend on; may be empty
    :param init: text of /init, a shell script; ``LOAD_MODULES`` is a good beginning
    :param optional: more modules, which this kernel may lack
    :param on_demand: modules, which this kernel may lack, for modprobe and not for the loading order
    :param files: further files by their path in the guest, executable if ``#!`` or ELF
    :raises ConfigError: an unknown module
    :raises PullError: busybox cannot be fetched, or the kernel's tree is damaged
    """
    archive = Archive()
    for directory in ("proc", "sys", "dev", "run", "mnt", "tmp", "root", "etc"):
        archive.directory(directory)
    archive.console()
    add_busybox(archive, progress)
    names = list(module_names)
    contents = {"lib/modules/order": b""}
    if names or optional or on_demand:
        contents = module_files(kernel, names, optional=optional, on_demand=on_demand)
    archive.file("init", init.encode(), 0o755)
    for path, data in contents.items():
        archive.file(path, data)
    for path, text in (files or {}).items():
        archive.file(path, *contents_of(text))
    return archive.to_bytes()


def contents_of(file: str | bytes) -> tuple[bytes, int]:
    """Return the bytes of a file and its mode: a script and an ELF file are executable."""
    data = file.encode() if isinstance(file, str) else file
    return data, 0o755 if data.startswith((b"#!", b"\x7fELF")) else 0o644


def busybox(progress: Progress = silent) -> tuple[bytes, list[str]]:
    """Return Debian's static busybox and where its applets belong, as ``bin/sh``.

    :raises PullError: the package cannot be fetched
    """
    binary = apt.place(apt.package("busybox-static", progress=progress).tree, "bin/busybox")
    return binary.read_bytes(), run([str(binary), "--list-full"]).split()


def add_busybox(archive: Archive, progress: Progress = silent) -> None:
    """Add busybox as ``/bin/busybox`` and a link for each of its applets."""
    binary, applets = busybox(progress)
    archive.file("bin/busybox", binary, 0o755)
    for applet in applets:
        if applet not in archive:
            archive.symlink(applet, "/bin/busybox")


def module_files(
    kernel: Path, names: Iterable[str], *, optional: Sequence[str] = (), on_demand: Sequence[str] = ()
) -> dict[str, bytes]:
    """Return the modules and their tables by path in the guest: ``lib/modules/{order,VERSION/...}``.

    Parameters and errors are those of ``build_initramfs``.
    """
    names = list(names)
    version = apt.kernel_of(kernel)[1]
    at_once = modules.load_order(kernel, version, names, optional=optional)
    files = {}
    order, depends, aliases = "", "", ""
    for path in modules.load_order(kernel, version, names, optional=[*optional, *on_demand]):
        name = path.name.partition(".ko")[0]
        elf = files[f"lib/modules/{version}/{name}.ko"] = modules.read(path)
        if path in at_once:
            order += f"{version}/{name}.ko\n"
        # modules.dep names first what is to be loaded last
        chain = reversed(modules.load_order(kernel, version, [name]))
        module, *needed = (part.name.partition(".ko")[0] + ".ko" for part in chain)
        depends += f"{module}: {' '.join(needed)}\n"
        aliases += "".join(f"alias {alias} {name.replace('-', '_')}\n" for alias in modules.modinfo(elf, "alias"))
    files["lib/modules/order"] = order.encode()
    files[f"lib/modules/{version}/modules.dep"] = depends.encode()
    files[f"lib/modules/{version}/modules.alias"] = aliases.encode()
    return files
