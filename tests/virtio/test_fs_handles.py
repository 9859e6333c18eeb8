# SPDX-License-Identifier: Apache-2.0
"""File handles of the guest's (knfsd, open_by_handle_at): a node id finds its file after the guest forgot it."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path

from tests.virtio.fuse_client import LINUX_FLAGS, ROOT, FuseVm
from tests.virtio.mounts import mounted, private_mounts
from tests.virtio.test_fs import held, mount, refused, tree
from virtio.fs.device import ShareDevice
from vmm.budget import memory

__all__ = ["mount", "tree"]

EXPORT_SUPPORT = 1 << 4
Mount = Callable[..., FuseVm]


def test_it_is_offered(mount: Mount) -> None:
    assert mount().flags & EXPORT_SUPPORT
    assert not mount(flags=LINUX_FLAGS & ~EXPORT_SUPPORT).flags & EXPORT_SUPPORT


def test_a_forgotten_node_is_found_by_its_number(tree: Path, mount: Mount) -> None:
    (tree / "a" / "b").mkdir(parents=True)
    (tree / "a" / "b" / "file").write_text("text")
    vm = mount()
    nodes = [vm.lookup("a").nodeid]
    nodes.append(vm.lookup("b", nodes[0]).nodeid)
    nodes.append(vm.lookup("file", nodes[1]).nodeid)
    for node in reversed(nodes):
        vm.forget(node)
    assert held(tree) == 1 and vm.device.stats["nodes"] == 1
    assert refused(vm.getattr, nodes[2]) == "ESTALE"
    found = vm.lookup(".", nodes[2])
    assert (found.nodeid, found.attr.ino) == (nodes[2], (tree / "a" / "b" / "file").stat().st_ino)
    assert vm.read(nodes[2], vm.open(nodes[2]), 9) == b"text"
    assert vm.lookup(".", nodes[1]).nodeid == nodes[1]
    assert vm.lookup("..", nodes[1]).nodeid == nodes[0]
    assert vm.lookup("..", nodes[0]).nodeid == vm.lookup("..").nodeid == vm.lookup(".").nodeid == ROOT
    for node in nodes:
        vm.forget(node)
    assert vm.device.stats["nodes"] == 2 and vm.device.stats["bad_forgets"] == 0  # the file is open


def test_nothing_else_is_found(tree: Path, mount: Mount) -> None:
    (tree / "a").mkdir()
    (tree / "gone").write_text("old")
    (tree / "in").mkdir()
    vm = mount()
    gone, node, inner = (vm.lookup(name).nodeid for name in ("gone", "a", "in"))
    for each in (gone, node, inner):
        vm.forget(each)
    (tree / "gone").unlink()
    (tree / "gone").write_text("new")
    (tree / "a").rename(tree.parent / "a")
    for number in (gone, node, gone + 1000, gone + (1 << 32), 0, 1 << 63):
        assert refused(vm.lookup, ".", number) == refused(vm.lookup, "..", number) == "ESTALE"
    # Moved out of the share while the guest has it: what is above is not found.
    assert vm.lookup(".", inner)
    fh = vm.opendir(inner)
    (tree / "in").rename(tree.parent / "in")
    assert refused(vm.lookup, "..", inner) == "ESTALE"
    assert vm.readdir(inner, fh)
    vm.forget(inner)
    assert vm.device.stats["nodes"] == 2


def test_a_new_session_knows_nothing_of_the_last_one(tree: Path, mount: Mount) -> None:
    (tree / "a").touch()
    vm = mount()
    node = vm.lookup("a").nodeid
    vm.init()
    assert refused(vm.lookup, ".", node) == "ESTALE"


@private_mounts
def test_a_mount_on_the_way_is_not_entered_again(tree: Path, mount: Mount) -> None:
    (tree / "a").mkdir()
    (tree / "a" / "status").touch()
    vm = mount()
    node = vm.lookup("a").nodeid
    file = vm.lookup("status", node).nodeid
    vm.forget(file)
    vm.forget(node)
    assert mounted("proc", tree / "a")
    assert refused(vm.lookup, ".", node) == refused(vm.lookup, ".", file) == "ESTALE"
    assert os.listdir(tree) == ["a"]


def test_a_share_that_is_collected_gives_its_memory_back(tmp_path: Path) -> None:
    gc.collect()
    before = memory.used
    for _ in range(3):
        device = ShareDevice("tag", str(tmp_path))
        device.itself = device  # type: ignore[attr-defined]  # as devices and their threads name one another
        device.close()
    del device
    gc.collect()
    assert memory.used == before


def test_a_name_that_there_is_no_room_for_takes_the_room_of_none(tree: Path, mount: Mount) -> None:
    (tree / "a").touch()
    vm = mount()
    vm.lookup("a")
    left = memory.limit - memory.used
    assert memory.ask(left)
    try:
        vm.rename("a", "b" * 100)
        assert memory.used == memory.limit - len("a\0"), "the name before is gone"
    finally:
        memory.put_back(left)
