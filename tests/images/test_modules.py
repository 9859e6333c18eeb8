# SPDX-License-Identifier: Apache-2.0
"""Module order on a made-up kernel tree, and .modinfo of made-up and damaged modules."""

from __future__ import annotations

import gzip
import lzma
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from vmm.errors import ConfigError
from vmm.images import modules
from vmm.images.host import PullError

VERSION = "6.1.0-0-test"


def module(*info: str) -> bytes:
    """An ELF file with a .modinfo section and nothing else that a loader would look at."""
    content = b"".join(item.encode() + b"\0" for item in info)
    names = b"\0.modinfo\0.shstrtab\0"
    body = content + names
    table = 64 + len(body)
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        b"\x7fELF\x02\x01\x01".ljust(16, b"\0"),
        1,
        62,
        1,
        0,
        0,
        table,
        0,
        64,
        0,
        0,
        64,
        3,
        2,
    )
    sections = bytes(64)
    for name, offset, size in ((1, 64, len(content)), (10, 64 + len(content), len(names))):
        sections += struct.pack("<IIQQQQIIQQ", name, 1, 0, 0, offset, size, 0, 0, 1, 0)
    return header + body + sections


PACK: dict[str, Callable[[bytes], bytes]] = {
    ".ko": lambda data: data,
    ".ko.xz": lzma.compress,
    ".ko.gz": gzip.compress,
    ".ko.zst": lambda data: zstandard.ZstdCompressor().compress(data),
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    def add(path: str, depends: str) -> None:
        file = tmp_path / "lib/modules" / VERSION / "kernel" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(PACK["." + path.partition(".")[2]](module("license=GPL", f"depends={depends}", "name=x")))

    add("drivers/virtio/virtio_ring.ko", "")
    add("drivers/virtio/virtio.ko.xz", "virtio_ring")
    add("drivers/block/virtio_blk.ko.gz", "virtio,virtio_ring")
    add("drivers/misc/pvpanic-mmio.ko.zst", "pvpanic")
    add("drivers/misc/pvpanic.ko", "")
    add("drivers/loop-a.ko", "loop_b")
    add("drivers/loop-b.ko", "loop-a")
    add("drivers/orphan.ko", "gone")
    (tmp_path / "lib/modules" / VERSION / "modules.builtin").write_text("kernel/fs/ext4/ext4.ko\n")
    return tmp_path


def names(paths: list[Path]) -> list[str]:
    return [path.name.partition(".")[0] for path in paths]


def test_each_module_comes_after_what_it_needs(tree: Path) -> None:
    assert names(modules.load_order(tree, VERSION, ["virtio_blk"])) == ["virtio_ring", "virtio", "virtio_blk"]


def test_no_module_comes_twice(tree: Path) -> None:
    order = modules.load_order(tree, VERSION, ["virtio", "virtio_blk", "virtio"])
    assert names(order) == ["virtio_ring", "virtio", "virtio_blk"]


def test_dash_and_underscore_are_the_same(tree: Path) -> None:
    for name in ("pvpanic-mmio", "pvpanic_mmio"):
        assert names(modules.load_order(tree, VERSION, [name])) == ["pvpanic", "pvpanic-mmio"]


def test_built_in_needs_no_file(tree: Path) -> None:
    assert names(modules.load_order(tree, VERSION, ["ext4", "virtio"])) == ["virtio_ring", "virtio"]


def test_unknown_module_is_named(tree: Path) -> None:
    with pytest.raises(ConfigError, match=f"module nosuch: not in kernel {VERSION}"):
        modules.load_order(tree, VERSION, ["virtio", "nosuch"])


def test_missing_dependency_names_both(tree: Path) -> None:
    with pytest.raises(ConfigError, match=r"module gone: .*needed by orphan"):
        modules.load_order(tree, VERSION, ["orphan"])


def test_optional_module_may_be_missing(tree: Path) -> None:
    order = modules.load_order(tree, VERSION, ["virtio"], optional=["nosuch", "pvpanic"])
    assert names(order) == ["virtio_ring", "virtio", "pvpanic"]


def test_a_circle_is_an_error(tree: Path) -> None:
    with pytest.raises(PullError, match="depends on itself"):
        modules.load_order(tree, VERSION, ["loop-a"])


def test_no_modules_at_all(tmp_path: Path) -> None:
    with pytest.raises(PullError, match="holds no kernel modules"):
        modules.load_order(tmp_path, VERSION, ["virtio"])


@pytest.mark.parametrize("suffix", PACK)
def test_every_compression_is_undone(tmp_path: Path, suffix: str) -> None:
    elf = module("license=GPL")
    path = tmp_path / f"m{suffix}"
    path.write_bytes(PACK[suffix](elf))
    assert modules.read(path) == elf


@pytest.mark.parametrize("suffix", PACK)
def test_damaged_file_is_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"m{suffix}"
    path.write_bytes(b"no module at all")
    with pytest.raises(PullError, match=str(path)):
        modules.read(path)


def test_modinfo_gives_every_value_of_a_key() -> None:
    elf = module("alias=a", "aliases=no", "alias=b=c", "depends=")
    assert modules.modinfo(elf, "alias") == ["a", "b=c"]
    assert modules.modinfo(elf, "depends") == [""]
    assert modules.modinfo(elf, "nosuch") == []


def test_table_far_beyond_the_file_is_an_error() -> None:
    elf = bytearray(module("depends=a"))
    elf[0x2F] = 0x40  # of e_shoff
    with pytest.raises(PullError, match="no readable"):
        modules.modinfo(bytes(elf), "depends")


@given(st.data())
def test_damaged_module_raises_nothing_else(data: st.DataObject) -> None:
    elf = bytearray(module("license=GPL", "depends=a,b"))
    for _ in range(data.draw(st.integers(1, 4))):
        elf[data.draw(st.integers(0, len(elf) - 1))] = data.draw(st.integers(0, 255))
    del elf[data.draw(st.integers(0, len(elf))) :]
    try:
        modules.modinfo(bytes(elf), "depends")
    except PullError:
        pass
