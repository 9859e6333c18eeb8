# SPDX-License-Identifier: Apache-2.0
"""What a request says at the moment counts: its flags, its user; and what the host does not do whole is not success."""

from __future__ import annotations

import fcntl
import os
import stat
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.virtio import fuse_client as fuse
from tests.virtio.fuse_client import ROOT, FuseVm
from tests.virtio.test_fs import mount, refused, root_only, tree
from tests.virtio.test_fs_kernel import small_disk

__all__ = ["mount", "tree"]

WRITE_CACHE = DIRECT_IO = 1
NOBODY = (1 << 32) - 1


def test_a_write_appends_if_the_file_does_now(tree: Path, mount: Callable[..., FuseVm]) -> None:
    vm = mount()
    found, fh = vm.create("a", os.O_RDWR | os.O_CREAT | os.O_APPEND)
    vm.write(found.nodeid, fh, b"0123456789", 0, flags=os.O_APPEND)
    with open(tree / "a", "ab") as file:
        file.write(b"host")  # which the guest does not know yet
    vm.write(found.nodeid, fh, b"end", 10, flags=os.O_APPEND)
    assert (tree / "a").read_bytes() == b"0123456789hostend"
    vm.write(found.nodeid, fh, b"ab", 0)  # fcntl(F_SETFL) meanwhile
    vm.write(found.nodeid, fh, b"cd", 4, flags=os.O_APPEND, write_flags=WRITE_CACHE)
    assert (tree / "a").read_bytes() == b"ab23cd6789hostend"
    again = vm.open(found.nodeid, os.O_WRONLY)
    vm.write(found.nodeid, again, b"!", 0, flags=os.O_WRONLY | os.O_APPEND)
    assert (tree / "a").read_bytes() == b"ab23cd6789hostend!"


def test_a_guest_that_keeps_pages_says_where_the_file_ends(tree: Path, mount: Callable[..., FuseVm]) -> None:
    vm = mount(cache="always")
    found, fh = vm.create("a", os.O_RDWR | os.O_CREAT | os.O_APPEND)
    vm.write(found.nodeid, fh, b"later", 10, flags=os.O_APPEND)
    assert (tree / "a").read_bytes() == bytes(10) + b"later"


FS_IOC_GETFLAGS, FS_IOC_SETFLAGS, FS_APPEND_FL = 0x8008_6601, 0x4008_6602, 0x20


@root_only
@pytest.mark.parametrize("cache", ["auto", "always", "none"])
def test_a_file_that_can_only_be_appended_to(tree: Path, mount: Callable[..., FuseVm], cache: str) -> None:
    """``chattr +a``: the host opens it with O_APPEND alone."""
    (tree / "log").write_text("old ")
    with open(tree / "log") as file:
        try:
            flags = struct.unpack("l", fcntl.ioctl(file, FS_IOC_GETFLAGS, bytes(8)))[0]
            fcntl.ioctl(file, FS_IOC_SETFLAGS, struct.pack("l", flags | FS_APPEND_FL))
        except OSError:
            pytest.fail("LAYER MISSING: a file system with attributes of files, such as ext4")
        try:
            vm = mount(cache=cache)
            node = vm.lookup("log").nodeid
            assert refused(vm.open, node, os.O_WRONLY) == "EPERM"
            assert refused(vm.open, node, os.O_RDWR | os.O_APPEND) == "EPERM"  # it could be mapped
            fh = vm.open(node, os.O_WRONLY | os.O_APPEND)
            assert vm.open_flags(node, os.O_WRONLY | os.O_APPEND) & DIRECT_IO
            vm.write(node, fh, b"new", 4, flags=os.O_WRONLY | os.O_APPEND)
            assert (tree / "log").read_text() == "old new"
        finally:
            fcntl.ioctl(file, FS_IOC_SETFLAGS, struct.pack("l", flags))


def test_a_write_waits_for_the_disk_if_it_says_so(tree: Path, mount: Callable[..., FuseVm]) -> None:
    vm = mount()
    found, fh = vm.create("a")
    for at, flags in enumerate((0, os.O_DSYNC, os.O_SYNC)):
        vm.write(found.nodeid, fh, b"x", at, flags=flags)
        assert vm.device.stats["handed_over"] == at
    assert (tree / "a").read_bytes() == b"xxx"


@root_only
@pytest.mark.parametrize("cache", ["auto", "always", "none"])
def test_pages_are_written_whole_or_not_at_all(mount: Callable[..., FuseVm], cache: str) -> None:
    root = small_disk(64 << 10)
    with FuseVm(f"/proc/self/fd/{root}", cache=cache) as vm:
        found, fh = vm.create("a")
        data = b"x" * (128 << 10)
        assert vm.write(found.nodeid, fh, data[: 16 << 10], 0, write_flags=WRITE_CACHE) == 16 << 10
        assert refused(vm.write, found.nodeid, fh, data, 0, write_flags=WRITE_CACHE) == "ENOSPC"
        assert vm.write(found.nodeid, fh, data, 0) == 64 << 10  # write(2) tells its caller
        assert refused(vm.write, found.nodeid, fh, data, 64 << 10) == "ENOSPC"
    os.close(root)


@root_only
@pytest.mark.parametrize("opcode", ["MKDIR", "MKNOD", "SYMLINK", "CREATE", "TMPFILE", "RENAME2"])
@pytest.mark.parametrize("who", [(NOBODY, 0), (0, NOBODY), (NOBODY, 7), (7, NOBODY), (NOBODY, NOBODY)])
def test_no_user_has_the_number_that_means_no_change(
    tree: Path, mount: Callable[..., FuseVm], opcode: str, who: tuple[int, int]
) -> None:
    (tree / "old").touch()
    bodies = {
        "MKDIR": bytes(8) + b"new\0",
        "MKNOD": struct.pack("<4I", stat.S_IFREG | 0o644, 0, 0, 0) + b"new\0",
        "SYMLINK": b"new\0target\0",
        "CREATE": struct.pack("<4I", os.O_RDWR, 0o644, 0, 0) + b"new\0",
        "TMPFILE": struct.pack("<4I", os.O_RDWR, 0o644, 0, 0) + b"\0",
        "RENAME2": struct.pack("<QII", ROOT, 4, 0) + b"old\0new\0",
    }
    vm = mount()
    vm.uid, vm.gid = who
    assert refused(vm.ask, getattr(fuse, opcode), ROOT, bodies[opcode]) == "EINVAL"
    assert os.listdir(tree) == ["old"]
    vm.uid = vm.gid = 0
    device = vm.make(fuse.MKNOD, "dev", struct.pack("<4I", stat.S_IFCHR | 0o600, 0x107, 0, 0))
    assert device.attr.uid == 0  # the thread's capabilities are all there
    node = vm.lookup("old").nodeid
    assert vm.setattr(node, fuse.FATTR_UID | fuse.FATTR_GID, uid=12, gid=13).uid == 12
    for change in (fuse.FATTR_UID, fuse.FATTR_GID):
        assert refused(vm.setattr, node, change, uid=NOBODY, gid=NOBODY) == "EINVAL"


@root_only
def test_setgid_stays_with_who_is_in_the_group_by_the_guests_word(tree: Path, mount: Callable[..., FuseVm]) -> None:
    os.chown(tree, 0, 2000)
    tree.chmod(0o2777)
    vm = mount(init=False)
    for minor, kept in ((37, 0o2775), (36, 0o775)):  # Linux before 6.0 leaves the judgement to the share
        vm.init(minor=minor)
        vm.uid = vm.gid = 1000  # group 2000 is one of its others
        found, _ = vm.create(f"a{minor}", mode=0o2775)
        assert (stat.S_IMODE(found.attr.mode), found.attr.gid) == (kept, 2000)
        made = vm.make(fuse.MKNOD, f"b{minor}", struct.pack("<4I", stat.S_IFREG | 0o2775, 0, 0, 0))
        assert (stat.S_IMODE(made.attr.mode), made.attr.gid) == (kept, 2000)
        vm.uid = vm.gid = 0


@root_only
@pytest.mark.parametrize("name", ["FALLOCATE", "COPY_FILE_RANGE"])
def test_set_id_bits_go_when_others_allocate_or_copy(tree: Path, mount: Callable[..., FuseVm], name: str) -> None:
    path = tree / "suid"
    path.write_bytes(b"x" * 5000)
    (tree / "source").write_bytes(b"y" * 100)
    vm = mount()
    node, source = vm.lookup("suid").nodeid, vm.lookup("source").nodeid
    fh, other = vm.open(node, os.O_RDWR), vm.open(source)
    what, body = {
        "FALLOCATE": (node, struct.pack("<QQQII", fh, 0, 10_000, 0, 0)),
        "COPY_FILE_RANGE": (source, struct.pack("<7Q", other, 0, node, fh, 0, 100, 0)),
    }[name]
    for uid, left in ((0, 0o6777), (1000, 0o777), (0, 0o6777)):
        path.chmod(0o6777)
        vm.uid = uid
        vm.ask(getattr(fuse, name), what, body)
        assert stat.S_IMODE(os.stat(path).st_mode) == left


def test_renames_that_linux_has_and_others(tree: Path, mount: Callable[..., FuseVm]) -> None:
    (tree / "a").write_text("a")
    (tree / "b").write_text("b")
    vm = mount()
    vm.rename("a", "b", flags=4)
    assert (tree / "b").read_text() == "a"
    status = os.lstat(tree / "a")
    assert stat.S_ISCHR(status.st_mode) and status.st_rdev == 0
    assert refused(vm.rename, "a", "b", flags=5) == "EEXIST"
    for flags in (6, 8, 1 << 31):
        assert refused(vm.rename, "a", "b", flags=flags) == "EINVAL"
