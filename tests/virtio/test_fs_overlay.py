# SPDX-License-Identifier: Apache-2.0
"""A share on an overlayfs, where an inode changes what it says it is when it is written for the first time."""

from __future__ import annotations

import itertools
import os
import struct
import time
from pathlib import Path

import pytest

from tests.virtio import fuse_client as fuse
from tests.virtio.fuse_client import ALL_FLAGS, LINUX_FLAGS, ROOT, FuseVm
from tests.virtio.mounts import ext4, overlaid, overlay, private_mounts
from tests.virtio.test_fs import tree
from tests.virtio.test_fs_saved import move

__all__ = ["tree"]


@pytest.mark.parametrize("lower", ["same file system", "another"])
@pytest.mark.parametrize("order", list(itertools.permutations("ab")), ids="".join)
@pytest.mark.parametrize("way", ["open", "truncate", "create"])
@private_mounts
def test_two_names_of_one_file_below_are_two_once_one_is_written(
    tree: Path, lower: str, order: tuple[str, str], way: str
) -> None:
    """As on the overlayfs itself: the copy has what was written, the other name what was there."""
    merged, below = overlay(tree)
    if lower == "another":
        ext4(below, tree / "image")
    (below / "a").write_text("old")
    os.link(below / "a", below / "b")
    overlaid(tree)
    assert os.path.samefile(merged / "a", merged / "b"), "stat says so"
    with FuseVm(merged) as vm:
        written, other = order
        nodes = {name: vm.lookup(name).nodeid for name in order}
        assert nodes["a"] != nodes["b"]
        assert [vm.lookup(name).nodeid for name in order] == [nodes[name] for name in order], "known, they are the same"
        if way == "truncate":
            vm.setattr(nodes[written], fuse.FATTR_SIZE, size=1)
        elif way == "open":
            fh = vm.open(nodes[written], os.O_RDWR)
            vm.write(nodes[written], fh, b"new")
        else:
            found, fh = vm.create(written, os.O_RDWR)
            assert found.nodeid == nodes[written]
            vm.write(nodes[written], fh, b"new")
        assert (merged / written).read_text() == ("o" if way == "truncate" else "new")
        assert (merged / other).read_text() == "old"
        assert vm.read(nodes[other], vm.open(nodes[other]), 9) == b"old"
        assert vm.lookup(written).nodeid == nodes[written], "copied up, it is the same"
        assert vm.lookup(other).nodeid == nodes[other]
        fh = vm.open(nodes[other], os.O_RDWR)
        vm.write(nodes[other], fh, b"two")
        assert (merged / other).read_text() == "two"
        assert (merged / written).read_text() == ("o" if way == "truncate" else "new")
        for name in order:
            assert vm.getattr(nodes[name]).ino == vm.lookup(name).attr.ino


@private_mounts
def test_two_names_of_one_file_above_are_one(tree: Path) -> None:
    merged, below = overlay(tree)
    (below / "low").write_text("low")
    overlaid(tree)
    (merged / "a").write_text("text")
    os.link(merged / "a", merged / "b")
    with FuseVm(merged) as vm:
        assert vm.lookup("a").nodeid == vm.lookup("b").nodeid
        low = vm.lookup("low").nodeid
        linked = vm.make(fuse.LINK, "linked", low.to_bytes(8, "little"))  # copies it up
        assert linked.nodeid == low == vm.lookup("linked").nodeid == vm.lookup("low").nodeid
        listed = {name: found.nodeid for name, _, found in vm.readdirplus(ROOT, vm.opendir())}
        assert listed["a"] == listed["b"] and listed["low"] == listed["linked"]
        for name in listed:
            vm.lookup(name)
        assert len(os.listdir("/proc/self/fd")) < 200


@private_mounts
def test_copied_up_a_node_stays_what_it_is(tree: Path) -> None:
    merged, below = overlay(tree)
    ext4(below, tree / "image")
    (below / "file").write_text("old")
    (below / "dir").mkdir()
    overlaid(tree)
    with FuseVm(merged) as vm:
        node, top = vm.lookup("file").nodeid, vm.lookup("dir").nodeid
        vm.write(node, vm.open(node, os.O_RDWR), b"new")
        vm.setattr(top, fuse.FATTR_MODE, mode=0o700)
        assert vm.lookup("file").nodeid == node and vm.lookup("dir").nodeid == top
        assert vm.read(node, vm.open(node), 9) == b"new"


@pytest.mark.parametrize("way", ["write", "map", "allocate", "copy", "attribute"])
@private_mounts
def test_copied_up_without_being_opened_a_node_stays_what_it_is(tree: Path, way: str) -> None:
    merged, below = overlay(tree)
    (below / "file").write_text("old")
    os.link(below / "file", below / "other")
    overlaid(tree)
    with FuseVm(merged, cache="always", dax=2 << 20, flags=ALL_FLAGS) as vm:
        node, other = vm.lookup("file").nodeid, vm.lookup("other").nodeid
        if way == "write":
            vm.write(node, 0, b"new")
        elif way == "map":
            vm.setupmapping(node, 0, 2 << 20, 0, 3)
        elif way == "allocate":
            vm.ask(fuse.FALLOCATE, node, struct.pack("<QQQII", 0, 0, 3, 0, 0))
        elif way == "attribute":
            vm.ask(fuse.SETXATTR, node, struct.pack("<II", 1, 0) + b"trusted.a\0x")
        else:
            vm.ask(fuse.COPY_FILE_RANGE, other, struct.pack("<7Q", 0, 0, node, 0, 0, 3, 0))
        assert vm.lookup("file").nodeid == node
        assert vm.lookup("other").nodeid == other


@pytest.mark.parametrize("way", ["create", "make", "remove", "rename", "link", "write"])
@private_mounts
def test_a_directory_that_is_copied_up_is_found_again(tree: Path, way: str) -> None:
    """By a copy of the machine, as where descriptors are few: its time of creation is the copy's."""
    merged, below = overlay(tree)
    for name in ("dir", "from"):
        (below / name).mkdir()
        (below / name / "file").write_text("text")
    (below / "dir" / "gone").touch()
    overlaid(tree)
    with FuseVm(merged) as vm:
        top, source = vm.lookup("dir").nodeid, vm.lookup("from").nodeid
        node = vm.lookup("file", top).nodeid
        moved = vm.lookup("file", source).nodeid
        fh, other = vm.open(node), vm.open(moved)
        time.sleep(0.05)  # the kernel's clock of files is a coarse one
        if way == "create":
            vm.create("new", parent=top)
        elif way == "make":
            vm.mkdir("new", parent=top)
        elif way == "remove":
            vm.ask(fuse.UNLINK, top, b"gone\0")
        elif way == "write":
            vm.release(node, vm.open(node, os.O_RDWR))
        elif way == "rename":
            vm.rename("file", "new", parent=source, newdir=top)
        else:
            vm.make(fuse.LINK, "new", moved.to_bytes(8, "little"), parent=top)
        move(vm)
        assert vm.read(node, fh, 9) == b"text"
        assert vm.read(moved, other, 9) == b"text"
        assert vm.lookup("dir").nodeid == top


@private_mounts
def test_a_link_has_the_number_of_its_file(tree: Path) -> None:
    merged, below = overlay(tree)
    ext4(below, tree / "image")
    (below / "file").touch()
    overlaid(tree)
    with FuseVm(merged) as vm:
        node = vm.lookup("file").nodeid
        linked = vm.make(fuse.LINK, "link", node.to_bytes(8, "little"))
        assert linked.attr.ino == vm.getattr(node).ino == vm.lookup("link").attr.ino


@private_mounts
def test_files_of_two_layers_have_two_numbers(tree: Path) -> None:
    """Equal numbers of two devices on one mount: the guest sees one device, so the numbers differ; old kernels, too."""
    merged, below = overlay(tree)
    ext4(below, tree / "image")
    for i in range(40):
        (below / f"low{i}").touch()
    overlaid(tree)
    for i in range(40):
        (merged / f"up{i}").touch()
    names = os.listdir(merged)
    here = {name: (merged / name).stat() for name in names}
    assert len({status.st_ino for status in here.values()}) < len(names), "some are equal on the host"
    with FuseVm(merged, flags=LINUX_FLAGS & ~(1 << 27)) as vm:
        assert len({vm.lookup(name).attr.ino for name in names}) == len(names)
