# SPDX-License-Identifier: Apache-2.0
"""The host is asked for permission once: what a guest has open stays usable, whatever the file's mode says then."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.virtio.fuse_client import FuseVm
from tests.virtio.fuse_kernel import KernelMount
from tests.virtio.test_fs import mount, refused, root_only, tree
from tests.virtio.test_fs_dax import SLOT, WINDOW, at, put
from tests.virtio.test_fs_kernel import kernel_mount

__all__ = ["kernel_mount", "mount", "tree"]
pytestmark = root_only
SQUASH = (1000, 1000)
DIRECT_IO = 1


@pytest.fixture
def squashed(tree: Path, mount: Callable[..., FuseVm]) -> Iterator[Callable[..., FuseVm]]:
    """A share whose every access is that of a user without rights."""
    os.chown(tree, *SQUASH)

    def start(**settings: object) -> FuseVm:
        return mount(squash=SQUASH, **settings)

    yield start


def test_a_file_that_is_open_for_writing_is_mapped_for_writing(tree: Path, squashed: Callable[..., FuseVm]) -> None:
    vm = squashed(dax=WINDOW)
    found, fh = vm.create("a", os.O_RDWR | os.O_CREAT, mode=0o444)
    os.truncate(tree / "a", 4096)
    vm.setupmapping(found.nodeid, 0, SLOT, 0, 3)
    put(vm, 0, b"guest")
    assert (tree / "a").read_bytes()[:5] == b"guest"
    vm.release(found.nodeid, fh)
    assert refused(vm.setupmapping, found.nodeid, 0, SLOT, SLOT, 3) == "EACCES"
    vm.setupmapping(found.nodeid, 0, SLOT, SLOT, 2)
    (tree / "a").chmod(0)
    assert refused(vm.setupmapping, found.nodeid, 0, SLOT, 0, 2) == "EACCES"


def test_which_of_many_handles_a_mapping_takes(tree: Path, squashed: Callable[..., FuseVm]) -> None:
    (tree / "a").write_bytes(b"host" * 1024)
    os.chown(tree / "a", *SQUASH)
    vm = squashed(dax=WINDOW)
    node = vm.lookup("a").nodeid
    reading = [vm.open(node) for _ in range(3)]
    writing = [vm.open(node, os.O_WRONLY) for _ in range(3)]
    more = [vm.open(node) for _ in range(2)]
    (tree / "a").chmod(0)
    for fh in (writing[1], reading[0], writing[2], more[1]):
        vm.release(node, fh)
        vm.setupmapping(node, 0, SLOT, 0, 3)
    vm.release(node, writing[0])
    assert refused(vm.setupmapping, node, 0, SLOT, 0, 3) == "EACCES"
    for fh in (reading[1], more[0]):
        vm.release(node, fh)
        vm.setupmapping(node, 0, SLOT, 0, 2)
        assert at(vm, 0, 4) == b"host"
    vm.release(node, reading[2])
    assert refused(vm.setupmapping, node, 0, SLOT, 0, 2) == "EACCES"


def test_a_file_that_cannot_be_read_is_no_dax_file(tree: Path, squashed: Callable[..., FuseVm]) -> None:
    vm = squashed(dax=WINDOW)
    for name, mode, uid, dax in (("a", 0o222, 1000, 0), ("b", 0o422, 1000, 2), ("c", 0o440, 0, 0), ("d", 0o404, 0, 2)):
        (tree / name).touch()
        (tree / name).chmod(mode)
        os.chown(tree / name, uid, 0)
        found = vm.lookup(name)
        assert found.attr.flags == vm.getattr(found.nodeid).flags == dax
    (tree / "c").chmod(0)
    (mine,) = (FuseVm(tree, dax=WINDOW),)
    assert mine.lookup("c").attr.flags == 2  # root reads everything
    mine.close()


@pytest.mark.parametrize("settings", [{"cache": "always"}, {"dax": WINDOW}, {}])
def test_a_file_that_may_be_written_but_not_read(
    tree: Path, squashed: Callable[..., FuseVm], settings: dict[str, object]
) -> None:
    (tree / "a").write_bytes(b"0123456789")
    (tree / "a").chmod(0o222)
    os.chown(tree / "a", *SQUASH)
    vm = squashed(**settings)
    node = vm.lookup("a").nodeid
    assert vm.open_flags(node, os.O_WRONLY) & DIRECT_IO == (DIRECT_IO if settings else 0)
    vm.write(node, vm.open(node, os.O_WRONLY), b"ab", 3)
    assert refused(vm.open, node, os.O_RDONLY) == refused(vm.open, node, os.O_RDWR) == "EACCES"
    assert (tree / "a").read_bytes() == b"012ab56789"
    (tree / "a").chmod(0o444)
    assert refused(vm.open, node, os.O_WRONLY) == "EACCES"


def write_and_sync(path: str, names: list[str]) -> list[str]:
    """As a user of the guest, write a little in each file and have it kept."""
    os.chdir(path)  # which no other user reaches by its name
    os.setegid(1000)
    os.seteuid(1000)
    try:
        for name in names:
            fd = os.open(name, os.O_WRONLY)
            os.pwrite(fd, b"ab", 3)
            os.fsync(fd)
            os.close(fd)
        fd = os.open("new", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o444)
        os.write(fd, b"x" * 10_000)
        os.fsync(fd)
        os.ftruncate(fd, 5000)
        os.close(fd)
    finally:
        os.seteuid(0)
        os.setegid(0)
    return os.listdir(path)


@pytest.mark.parametrize("cache", ["auto", "always", "none"])
def test_linux_writes_what_its_user_may_write(
    tmp_path: Path, kernel_mount: Callable[..., KernelMount], cache: str
) -> None:
    shared = tmp_path / "shared"
    for name, mode, uid in (("mine", 0o222, 1000), ("others", 0o666, 1001), ("unread", 0o622, 1001)):
        (shared / name).write_bytes(b"0123456789")
        (shared / name).chmod(mode)
        os.chown(shared / name, uid, uid)
    share = kernel_mount(cache=cache, squash=SQUASH)
    found = share.call(write_and_sync, str(share.path), ["mine", "others", "unread"])
    assert set(found) == {"mine", "others", "unread", "new"}
    for name in ("mine", "others", "unread"):
        assert (shared / name).read_bytes() == b"012ab56789"
    assert (shared / "new").read_bytes() == b"x" * 5000
