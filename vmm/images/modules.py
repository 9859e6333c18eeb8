# SPDX-License-Identifier: Apache-2.0
"""Kernel modules of an unpacked kernel package: which files to load, in which order.

A package that was unpacked and not installed has no modules.dep, but each module names what it needs in its
own ``.modinfo`` section (``depends=``, which the kernel's build wrote from the symbols it uses).
"""

from __future__ import annotations

import gzip
import lzma
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

from vmm.errors import ConfigError
from vmm.images.apt import modules_root
from vmm.images.host import PullError

_SUFFIXES = (".ko", ".ko.xz", ".ko.gz", ".ko.zst")


def load_order(tree: Path, version: str, names: Iterable[str], *, optional: Sequence[str] = ()) -> list[Path]:
    """Return the files of the named modules and of all they depend on, each after what it needs.

    Modules built into the kernel need no file and are left out, ``-`` and ``_`` in names are the same.

    :param tree: an unpacked kernel package
    :param optional: further names, which are left out if this kernel has no such module
    :raises ConfigError: a name that is neither a module nor built in
    :raises PullError: there are no modules of that version, or a file is not a module
    """
    root = modules_root(tree) / version
    files = {_name(path): path for path in root.rglob("*.ko*") if path.name.endswith(_SUFFIXES)}
    if not files:
        raise PullError(f"{root} holds no kernel modules")
    try:
        builtin = {_name(Path(line)) for line in (root / "modules.builtin").read_text().split()}
    except FileNotFoundError:
        builtin = set()
    order: dict[str, Path] = {}
    pending: set[str] = set()

    def add(name: str, wanted_by: str) -> None:
        if name in order or name in builtin:
            return
        if name in pending:
            raise PullError(f"{root}: module {name} depends on itself")
        pending.add(name)
        if name not in files:
            raise ConfigError("module", name, f"not in kernel {version}{wanted_by}")
        for needed in modinfo(read(files[name]), "depends"):
            for one in filter(None, needed.split(",")):
                add(one.replace("-", "_"), f", needed by {name}")
        order[name] = files[name]

    for name in names:
        add(name.replace("-", "_"), "")
    for name in optional:
        if name.replace("-", "_") in files:
            add(name.replace("-", "_"), "")
    return list(order.values())


def read(path: Path) -> bytes:
    """Return a module as an ELF file, decompressed (busybox's insmod takes nothing else).

    :raises PullError: damaged, or not an ELF file
    """
    data = path.read_bytes()
    try:
        if path.suffix == ".xz":
            data = lzma.decompress(data)
        elif path.suffix == ".gz":
            data = gzip.decompress(data)
        elif path.suffix == ".zst":
            import zstandard

            data = zstandard.ZstdDecompressor().decompressobj().decompress(data)
    except Exception as error:  # each of the three libraries has its own
        raise PullError(f"{path}: {error}") from error
    if data[:5] != b"\x7fELF\x02":
        raise PullError(f"{path} is not a 64-bit kernel module")
    return data


def modinfo(elf: bytes, key: str) -> list[str]:
    """Return the values that a module's ``.modinfo`` section has for a key, as ``modinfo -F`` prints them.

    :param elf: the module, as ``read`` returns it
    :raises PullError: its section table is damaged
    """
    try:
        (table,) = struct.unpack_from("<Q", elf, 0x28)  # e_shoff
        entry, count, names_index = struct.unpack_from("<HHH", elf, 0x3A)
        # sh_name, then sh_offset and sh_size, of each section
        sections = [struct.unpack_from("<I20xQQ", elf, table + i * entry) for i in range(count)]
        names = sections[names_index][1]
        for name, offset, size in sections:
            if elf[names + name : names + name + 9] == b".modinfo\0":
                pairs = (item.partition(b"=") for item in elf[offset : offset + size].split(b"\0"))
                return [value.decode(errors="replace") for name, _, value in pairs if name == key.encode()]
    except (struct.error, IndexError, OverflowError):
        pass
    raise PullError("a kernel module with no readable .modinfo section")


def _name(path: Path) -> str:
    return path.name.partition(".ko")[0].replace("-", "_")
