# SPDX-License-Identifier: Apache-2.0
"""With cache=always Linux uses files without opening them: what that leaves as it was, and what it needs."""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.virtio import fuse_client as fuse
from tests.virtio.fuse_client import ROOT, FuseVm
from tests.virtio.fuse_kernel import KernelMount
from tests.virtio.test_fs import held, mount, refused, root_only, tree
from tests.virtio.test_fs_dax import SLOT, at, put
from tests.virtio.test_fs_hostile import few_descriptors
from tests.virtio.test_fs_kernel import OPENING, kernel_mount
from vmm._budget import KEPT, set_descriptor_limit

__all__ = ["few_descriptors", "kernel_mount", "mount", "tree"]
pytestmark = root_only


@pytest.fixture
def vm(mount: Callable[..., FuseVm]) -> Iterator[FuseVm]:
    yield mount(cache="always", flags=fuse.ALL_FLAGS)


def test_nothing_is_opened_where_nobody_else_changes_files(tree: Path, mount: Callable[..., FuseVm]) -> None:
    (tree / "a").touch()
    create = struct.pack("<4I", os.O_RDWR, 0o644, 0, 0) + b"new\0"
    for settings, opens in (
        ({"cache": "always"}, False),
        ({"cache": "always", "read_only": True}, False),
        ({"cache": "auto"}, True),
        ({"cache": "none"}, True),
        ({"cache": "always", "squash": (1000, 1000)}, True),
        ({"cache": "always", "flags": fuse.ALL_FLAGS & ~fuse.NO_OPEN_SUPPORT}, True),
        ({"cache": "always", "flags": fuse.ALL_FLAGS & ~fuse.NO_OPENDIR_SUPPORT}, True),
    ):
        vm = mount(**{"flags": fuse.ALL_FLAGS, **settings})
        node = vm.lookup("a").nodeid
        assert bool(vm.flags & fuse.ATOMIC_O_TRUNC) == opens
        if opens:
            vm.release(node, vm.open(node))
            continue
        assert refused(vm.open, node) == refused(vm.opendir) == "ENOSYS"
        if not settings.get("read_only"):
            assert refused(vm.ask, fuse.CREATE, ROOT, create) == "ENOSYS"
        assert vm.device.stats["handles"] == 0 and vm.lookup("a")


def test_the_node_is_enough(tree: Path, vm: FuseVm) -> None:
    node = vm.make(fuse.MKNOD, "a", struct.pack("<4I", 0o100444, 0, 0, 0)).nodeid
    copy = vm.make(fuse.MKNOD, "b", struct.pack("<4I", 0o100000, 0, 0, 0)).nodeid
    assert vm.write(node, 0, b"0123456789", 5, flags=os.O_APPEND) == 10
    assert vm.read(node, 0, 100) == bytes(5) + b"0123456789"
    assert vm.setattr(node, fuse.FATTR_SIZE | fuse.FATTR_FH, size=8).size == 8
    vm.ask(fuse.FALLOCATE, node, struct.pack("<QQQII", 0, 0, 100, 0, 0))
    vm.ask(fuse.FSYNC, node, struct.pack("<QII", 0, 0, 0))
    assert struct.unpack("<Q", vm.ask(fuse.LSEEK, node, struct.pack("<QQII", 0, 0, os.SEEK_END, 0)))[0] == 100
    vm.ask(fuse.COPY_FILE_RANGE, node, struct.pack("<7Q", 0, 5, copy, 0, 0, 3, 0))
    assert (tree / "b").read_bytes() == b"012"
    names = [name for name, _, _ in vm.readdir(ROOT, 0)]
    assert sorted(names) == [".", "..", "a", "b"]
    assert {name for name, _, _ in vm.readdirplus(ROOT, 0)} == set(names)
    vm.ask(fuse.FSYNCDIR, ROOT, struct.pack("<QII", 0, 0, 0))
    vm.release(node, 0)
    assert held(tree) == 3  # the nodes


def test_only_files_are_read_and_only_directories_listed(tree: Path, vm: FuseVm) -> None:
    os.mkfifo(tree / "fifo")
    (tree / "link").symlink_to("a")
    (tree / "a").touch()
    for name in ("fifo", "link"):
        assert refused(vm.read, vm.lookup(name).nodeid, 0, 10) == "EBADF"
    assert refused(vm.read, ROOT, 0, 10) == refused(vm.readdir, vm.lookup("a").nodeid, 0) == "EBADF"
    assert refused(vm.read, 99, 0, 10) == "ESTALE"


@pytest.mark.parametrize("cache", ["always", "auto"])
def test_a_file_without_a_name_stays_until_the_guest_forgets_it(
    tree: Path, mount: Callable[..., FuseVm], few_descriptors: int, cache: str
) -> None:
    """Its descriptor is all that is left of it: it is not given back, however many others are looked up.

    Where files are opened, a guest uses it so if it is a FIFO, a directory that it is in, or opened by O_PATH.
    """

    count = 3 * few_descriptors
    for i in range(count):
        (tree / f"{i}").write_text(f"{i}")
    gone, replaced = range(0, 100, 2), range(1, 100, 2)
    for i in replaced:
        (tree / f"new{i}").write_text("new")
    vm = mount(cache=cache, flags=fuse.ALL_FLAGS)

    def contents(node: int) -> bytes:
        fh = vm.open(node) if cache == "auto" else 0
        data = vm.read(node, fh, 10)
        if fh:
            vm.release(node, fh)
        return data

    set_descriptor_limit(KEPT + few_descriptors)
    nodes = [vm.lookup(f"{i}").nodeid for i in range(count)]  # the first are closed by now
    for i in gone:
        vm.ask(fuse.UNLINK, ROOT, f"{i}".encode() + b"\0")
    for i in replaced:
        vm.rename(f"new{i}", f"{i}")
    for i in range(100, count):
        assert vm.lookup(f"{i}").nodeid == nodes[i]
        assert contents(nodes[i]) == f"{i}".encode()
    for i in (*gone, *replaced):
        assert vm.getattr(nodes[i]).nlink == 0
        assert contents(nodes[i]) == f"{i}".encode()
        vm.forget(nodes[i])
    assert vm.device.stats["bad_forgets"] == 0 and vm.device.stats["reopened"] > 0


CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 1 << 1, 1 << 2


@contextlib.contextmanager
def effective(capabilities: int) -> Iterator[None]:
    """This thread, and those that it makes, without the others, as a jail's: user 0 keeps one there."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, data = (ctypes.c_uint32 * 2)(0x2008_0522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, data) == 0
    before = list(data)
    data[0], data[3] = capabilities, 0
    assert libc.capset(header, data) == 0
    try:
        yield
    finally:
        assert libc.capset(header, (ctypes.c_uint32 * 6)(*before)) == 0


@pytest.mark.parametrize(
    ("capabilities", "read_only", "opens"),
    [
        (CAP_DAC_OVERRIDE, False, False),
        (CAP_DAC_OVERRIDE, True, False),
        (CAP_DAC_READ_SEARCH, False, True),
        (CAP_DAC_READ_SEARCH, True, False),
        (0, False, True),
        (0, True, True),
    ],
)
def test_it_takes_the_capability_to_open_everything(
    tree: Path, mount: Callable[..., FuseVm], capabilities: int, read_only: bool, opens: bool
) -> None:
    """In a jail there is at most CAP_DAC_OVERRIDE. What the host would refuse is refused when it is opened."""
    for name, mode in (("theirs", 0o600), ("nobodys", 0)):
        (tree / name).write_text(name)
        (tree / name).chmod(mode)
        os.chown(tree / name, 1234, 1234)
    with effective(capabilities):
        vm = mount(cache="always", read_only=read_only, flags=fuse.ALL_FLAGS)
    for name in ("theirs", "nobodys"):
        node = vm.lookup(name).nodeid
        if not opens:
            assert refused(vm.open, node) == "ENOSYS"
            assert vm.read(node, 0, 100) == name.encode()
            if not read_only:
                assert vm.write(node, 0, b"x") == 1
        elif capabilities:
            assert vm.read(node, vm.open(node), 100) == name.encode()
            assert refused(vm.open, node, os.O_RDWR) == "EACCES"
        else:
            assert refused(vm.open, node) == "EACCES"


def test_a_file_is_mapped_without_being_opened(tree: Path, mount: Callable[..., FuseVm]) -> None:
    """DAX names no handle; the mapping is the file's, whatever its mode and once its name is gone."""
    (tree / "a").write_bytes(b"0123456789")
    (tree / "a").chmod(0)
    vm = mount(cache="always", dax=2 * SLOT, flags=fuse.ALL_FLAGS)
    node = vm.lookup("a").nodeid
    assert refused(vm.open, node) == "ENOSYS"
    vm.ask(fuse.UNLINK, ROOT, b"a\0")
    vm.setupmapping(node, 0, SLOT, 0, 3)
    assert at(vm, 0, 10) == b"0123456789"
    put(vm, 0, b"guest")
    assert vm.read(node, 0, 10) == b"guest56789"
    vm.removemapping((0, SLOT))
    vm.forget(node)
    assert held(tree) == 1 and vm.device.stats["dax_mapped"] == 0


def test_a_read_only_share_maps_for_reading(tree: Path, mount: Callable[..., FuseVm]) -> None:
    (tree / "a").write_bytes(b"0123456789")
    vm = mount(cache="always", read_only=True, dax=2 * SLOT, flags=fuse.ALL_FLAGS)
    node = vm.lookup("a").nodeid
    assert refused(vm.open, node, os.O_RDWR) == "ENOSYS"
    assert refused(vm.setupmapping, node, 0, SLOT, 0, 3) == refused(vm.write, node, 0, b"x") == "EROFS"
    vm.setupmapping(node, 0, SLOT, 0, 2)
    put(vm, 0, b"guest")
    assert (tree / "a").read_bytes() == b"0123456789"


def read_often(path: str) -> int:
    """Read 20 small files 50 times."""
    total = 0
    for _ in range(50):
        for i in range(20):
            fd = os.open(f"{path}/{i}", os.O_RDONLY)
            total += len(os.read(fd, 4096))
            os.close(fd)
    return total


def test_linux_asks_nothing_for_a_file_that_it_has(tmp_path: Path, kernel_mount: Callable[..., KernelMount]) -> None:
    for i in range(20):
        (tmp_path / "shared" / f"{i}").write_bytes(b"x" * 4096)
    for hide, most in ((0, 20 * 3 + 5), (OPENING, 1 << 20)):
        share = kernel_mount(cache="always", hide=hide)
        assert share.call(read_often, str(share.path)) == 50 * 20 * 4096
        requests = share.vm.device.stats["requests"]
        assert requests <= most and (requests > 1000) == bool(hide)
