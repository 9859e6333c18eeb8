# SPDX-License-Identifier: Apache-2.0
"""What is mounted below a shared directory: never a way into the kernel, and other file systems by a word only."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.virtio import fuse_client as fuse
from tests.virtio.fuse_client import LINUX_FLAGS, ROOT, FuseVm
from tests.virtio.mounts import bind, ext4, mounted, private_mounts, unmount
from tests.virtio.test_fs import held, mount, refused, tree
from virtio.fs._share import stores_files
from vmm.errors import ConfigError

__all__ = ["mount", "tree"]

# Of each a file that is written. The test of numbers has those that this kernel lacks, too.
KERNEL_KINDS = {
    "proc": "self", "sysfs": "kernel", "cgroup2": "cgroup.procs", "debugfs": "", "tracefs": "", "securityfs": "",
    "configfs": "", "bpf": "", "binfmt_misc": "register", "mqueue": "", "devpts": "ptmx", "pstore": "", "fusectl": "",
    "hugetlbfs": "",
}  # fmt: skip
KNOWN = {line.split()[-1] for line in Path("/proc/filesystems").read_text().splitlines()}
KINDS_HERE = [kind for kind in KERNEL_KINDS if kind in KNOWN]
# Source: linux/magic.h has all others; these are of fs/configfs/mount.c, ipc/mqueue.c, fs/fuse/control.c.
CONFIGFS = 0x62656570
OWN_NUMBERS = {"configfs": CONFIGFS, "mqueue": 0x19800202, "fusectl": 0x65735543}
# Of linux/magic.h, those that store files.
STORES = (
    "AFS CEPH CIFS CRAMFS ECRYPTFS EROFS EXFAT EXT2 EXT3 EXT4 BTRFS F2FS FUSE ISOFS JFFS2 MSDOS NFS NILFS OCFS2 "
    "OVERLAYFS RAMFS REISERFS SMB2 SQUASHFS TMPFS UDF V9FS XFS"
).split()
LATER_STORES = {"BCACHEFS"}  # in the headers since Linux 6.7
SUBMOUNT = 1 << 0  # of fuse_attr.flags
Mount = Callable[..., FuseVm]


def kernel_file_system(kind: str, where: Path) -> None:
    """Mount it."""
    try:
        assert mounted(kind, where)
    except OSError as error:
        pytest.fail(f"LAYER MISSING: mounts: {error}")


def test_file_systems_are_judged_by_their_numbers() -> None:
    """The list against Linux's own header: what stores files, and none of the others, whatever this kernel has."""
    header = Path("/usr/include/linux/magic.h").read_text()
    found = re.findall(r"#define (\w+_MAGIC\w*)\s+(0x[\da-fA-F]+)", header)
    numbers = {name: int(number, 16) for name, number in found}
    allowed = {name for name, number in numbers.items() if stores_files(number)}
    names = {re.sub(r"(_SUPER|_FS)?_MAGIC(_V1)?$", "", name) for name in allowed}
    assert names - LATER_STORES == set(STORES)
    doors = {"PROC_SUPER_MAGIC", "SYSFS_MAGIC", "DEBUGFS_MAGIC", "TRACEFS_MAGIC", "BPF_FS_MAGIC", "NSFS_MAGIC"}
    assert doors <= set(numbers) - allowed, "the header is read right"
    assert not [name for name, number in OWN_NUMBERS.items() if stores_files(number)]


@pytest.mark.parametrize("submounts", [False, True])
@pytest.mark.parametrize("kind", KINDS_HERE)
@private_mounts
def test_kernel_file_systems_are_not_entered(tree: Path, mount: Mount, kind: str, submounts: bool) -> None:
    (tree / "door").mkdir()
    kernel_file_system(kind, tree / "door")
    vm = mount(submounts=submounts)
    assert refused(vm.lookup, "door") == "EXDEV"
    fh = vm.opendir()
    assert {name: found.nodeid for name, _, found in vm.readdirplus(ROOT, fh)}["door"] == 0
    assert refused(vm.create, "door") == "EXDEV" if KERNEL_KINDS[kind] else True
    unmount(tree / "door")
    assert vm.lookup("door").nodeid


@pytest.mark.parametrize("kind", KINDS_HERE)
@private_mounts
def test_kernel_file_systems_are_not_shared_themselves(tree: Path, kind: str) -> None:
    kernel_file_system(kind, tree)
    with pytest.raises(ConfigError, match="is on a kernel pseudo file system"):
        FuseVm(tree)
    assert held(tree) == 0


def test_a_file_system_that_has_lost_its_server_is_refused(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stale(fd: int) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr("virtio.fs.device.file_system", stale)
    with pytest.raises(ConfigError, match="cannot be used: Stale file handle"):
        FuseVm(tree)
    assert held(tree) == 0


@pytest.mark.parametrize("submounts", [False, True])
@private_mounts
def test_a_namespace_that_is_mounted_on_a_file_is_not_entered(tree: Path, mount: Mount, submounts: bool) -> None:
    (tree / "ns").touch()
    bind("/proc/self/ns/net", tree / "ns")
    vm = mount(submounts=submounts)
    assert refused(vm.lookup, "ns") == "EXDEV"
    assert refused(vm.create, "ns") == "EXDEV"


@pytest.mark.parametrize("submounts", [False, True])
@private_mounts
def test_a_file_of_procfs_that_is_mounted_on_a_file_is_not_entered(tree: Path, mount: Mount, submounts: bool) -> None:
    (tree / "mem").touch()
    bind("/proc/self/mem", tree / "mem")
    assert refused(mount(submounts=submounts).lookup, "mem") == "EXDEV"


@private_mounts
def test_a_mount_made_after_the_look_up_is_not_entered(tree: Path, mount: Mount) -> None:
    """The node is what was looked up, not what is on top of it now; a name below is judged when it is looked up."""
    (tree / "dir" / "sub").mkdir(parents=True)
    (tree / "dir" / "old").write_text("old")
    vm = mount(submounts=True)
    node = vm.lookup("dir").nodeid
    fh = vm.opendir(node)
    assert mounted("proc", tree / "dir")
    assert refused(vm.lookup, "dir") == "EXDEV"
    assert refused(vm.lookup, "self", node) == "ENOENT"
    found = vm.lookup("old", node)
    assert vm.read(found.nodeid, vm.open(found.nodeid), 10) == b"old"
    assert sorted(name for name, _, _ in vm.readdirplus(node, fh)) == [".", "..", "old", "sub"]
    assert "self" not in vm.list(node)
    vm.mkdir("new", parent=node)
    unmount(tree / "dir")
    assert mounted("proc", tree / "dir" / "new")
    assert refused(vm.lookup, "new", node) == "EXDEV"


@private_mounts
def test_other_mounts_need_the_word(tree: Path, mount: Mount) -> None:
    (tree / "other").mkdir()
    (tree / "same").mkdir()
    (tree / "kept").mkdir()
    (tree / "kept" / "in").touch()
    assert mounted("tmpfs", tree / "other")
    bind(tree / "kept", tree / "same")
    vm = mount()
    assert refused(vm.lookup, "other") == refused(vm.lookup, "same") == "EXDEV"
    assert refused(vm.ask, fuse.RMDIR, ROOT, b"other\0") == "EBUSY"
    assert sorted(vm.list()) == [".", "..", "kept", "other", "same"]


@private_mounts
def test_two_file_systems_are_two_in_the_guest(tree: Path, mount: Mount) -> None:
    """Numbers that are equal belong to mounts that are announced, each of which gets a device number of its own."""
    for name in ("a", "b"):
        (tree / name).mkdir()
        assert mounted("tmpfs", tree / name)
        (tree / name / "file").write_text(name)
    assert (tree / "a" / "file").stat().st_ino == (tree / "b" / "file").stat().st_ino
    vm = mount(submounts=True)
    assert vm.flags & 1 << 27, "FUSE_SUBMOUNTS"
    for _ in range(2):  # looked up anew, and known
        tops = {name: vm.lookup(name) for name in ("a", "b")}
        assert all(top.attr.flags & SUBMOUNT for top in tops.values())
    files = {name: vm.lookup("file", top.nodeid) for name, top in tops.items()}
    assert files["a"].nodeid != files["b"].nodeid
    assert not any(found.attr.flags & SUBMOUNT for found in files.values())
    assert {name: vm.read(found.nodeid, vm.open(found.nodeid), 9) for name, found in files.items()} == {
        "a": b"a", "b": b"b",
    }  # fmt: skip
    names = {name: found for name, _, found in vm.readdirplus(ROOT, vm.opendir())}
    assert names["a"].attr.flags & names["b"].attr.flags & SUBMOUNT
    assert refused(vm.rename, "file", "file", parent=tops["a"].nodeid, newdir=tops["b"].nodeid) == "EXDEV"


@private_mounts
def test_a_file_that_is_a_mount_has_a_number_of_its_own(tree: Path, mount: Mount) -> None:
    (tree / "dir").mkdir()
    assert mounted("tmpfs", tree / "dir")
    (tree / "dir" / "inner").write_text("inner")
    (tree / "on").touch()
    bind(tree / "dir" / "inner", tree / "on")
    vm = mount(submounts=True)
    found = vm.lookup("on")
    assert found.attr.ino != (tree / "on").stat().st_ino
    assert not found.attr.flags & SUBMOUNT
    assert vm.getattr(found.nodeid).ino == vm.lookup("on").attr.ino == found.attr.ino
    assert vm.read(found.nodeid, vm.open(found.nodeid), 9) == b"inner"


@private_mounts
def test_a_kernel_that_knows_no_submounts_is_shown_none(tree: Path, mount: Mount) -> None:
    (tree / "a").mkdir()
    assert mounted("tmpfs", tree / "a")
    assert refused(mount(submounts=True, flags=LINUX_FLAGS & ~(1 << 27)).lookup, "a") == "EXDEV"


def delayed(path: Path) -> bool:
    """Whether the file's data has no place on the disk yet (FIEMAP)."""
    with open(path, "rb") as file:
        request = bytearray(struct.pack("<QQIIII", 0, 1 << 40, 0, 0, 1, 0) + bytes(56))
        fcntl.ioctl(file, 0xC020660B, request)
    return bool(struct.unpack_from("<I", request, 32 + 40)[0] & 4)


@pytest.mark.parametrize("by_root", [False, True])
@private_mounts
def test_syncfs_reaches_each(tree: Path, mount: Mount, tmp_path: Path, by_root: bool) -> None:
    for name in ("a", "b"):
        ext4(tree / name, tmp_path / f"{name}.img")
    vm = mount(submounts=True)
    tops = [vm.lookup(name).nodeid for name in ("a", "b")]
    for name in ("a", "b"):
        (tree / name / "file").write_bytes(b"x" * 10000)
        assert delayed(tree / name / "file")
    for top in [ROOT] if by_root else tops:
        vm.ask(fuse.SYNCFS, top, bytes(8))
    assert not delayed(tree / "a" / "file") and not delayed(tree / "b" / "file")
    if not by_root:
        (tree / "b" / "later").write_bytes(b"y" * 10000)
        vm.ask(fuse.SYNCFS, tops[0], bytes(8))
        assert delayed(tree / "b" / "later")


def test_the_test_sees_mounts_of_its_own(tmp_path: Path) -> None:
    """The threads of a share look up in the namespace that its descriptors are of: the tests above prove something."""

    @private_mounts
    def inside() -> None:
        assert mounted("tmpfs", tmp_path)
        (tmp_path / "x").touch()

    inside()
    assert not os.listdir(tmp_path)
