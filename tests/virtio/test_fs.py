# SPDX-License-Identifier: Apache-2.0
"""The file system device does on the host what a guest's kernel asks of it, and tells it the truth."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cached import forget
from tests.virtio import fuse_client as fuse
from tests.virtio.fuse_client import ROOT, FuseError, FuseVm
from virtio._limiter import RateLimiter
from vmm.errors import ConfigError

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """What is shared; beside it there is a secret."""
    (tmp_path / "secret").write_text("not for the guest")
    shared = tmp_path / "shared"
    shared.mkdir()
    return shared


@pytest.fixture
def mount(tree: Path) -> Iterator[Callable[..., FuseVm]]:
    vms: list[FuseVm] = []

    def start(**settings: Any) -> FuseVm:
        vms.append(FuseVm(tree, **settings))
        return vms[-1]

    yield start
    for vm in vms:
        vm.close()


def refused(call: Callable[..., object], *arguments: object, **how: object) -> str:
    """The name of the errno that `call` is answered with."""
    with pytest.raises(FuseError) as info:
        call(*arguments, **how)
    return fuse.code(info.value.errno or 0)


def held(tree: Path) -> int:
    """Descriptors of this process on anything in `tree`."""
    count = 0
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            count += os.readlink(f"/proc/self/fd/{fd}").startswith(str(tree))
    return count


def test_config_space_has_tag_and_queues(mount: Callable[..., FuseVm]) -> None:
    vm = mount(threads=3)
    assert vm.driver.config(0, 40) == b"share".ljust(36, b"\0") + struct.pack("<I", 3)
    assert len(vm.transport.queues) == 4


def test_init_answers_version_and_sizes(mount: Callable[..., FuseVm]) -> None:
    major, minor, readahead, _, _, _, max_write, time_gran, max_pages, *_ = mount().init_reply
    assert (major, minor, readahead, max_write, time_gran, max_pages) == (7, 38, 131072, 1 << 20, 1, 256)


def test_init_offers_only_what_the_kernel_knows(mount: Callable[..., FuseVm]) -> None:
    vm = mount(init=False)
    vm.init(fuse.ASYNC_READ | fuse.BIG_WRITES)
    assert vm.flags == fuse.ASYNC_READ | fuse.BIG_WRITES


def test_writeback_is_of_cache_always_only(mount: Callable[..., FuseVm]) -> None:
    assert not mount().flags & fuse.WRITEBACK_CACHE
    assert mount(cache="always").flags & fuse.WRITEBACK_CACHE
    assert not mount(cache="always", read_only=True).flags & fuse.WRITEBACK_CACHE


def test_newer_major_is_asked_to_come_again(mount: Callable[..., FuseVm]) -> None:
    vm = mount(init=False)
    assert vm.init(major=8)[:2] == (7, 38)
    assert refused(vm.lookup, "a") == "EIO"  # that was no INIT yet
    vm.init()


def test_older_kernels_are_refused(mount: Callable[..., FuseVm]) -> None:
    vm = mount(init=False)
    assert refused(vm.init, minor=30) == "EPROTO"


def test_lookup_and_getattr_tell_what_stat_tells(tree: Path, mount: Callable[..., FuseVm]) -> None:
    (tree / "file").write_bytes(b"x" * 5000)
    (tree / "dir").mkdir(mode=0o750)
    (tree / "link").symlink_to("file")
    os.mkfifo(tree / "fifo")
    vm = mount()
    for name in ("file", "dir", "link", "fifo"):
        status = os.lstat(tree / name)
        found = vm.lookup(name)
        for attr in (found.attr, vm.getattr(found.nodeid)):
            assert (attr.ino, attr.mode, attr.size, attr.nlink, attr.uid, attr.gid, attr.blocks) == (
                status.st_ino, status.st_mode, status.st_size, status.st_nlink, status.st_uid, status.st_gid,
                status.st_blocks,
            )  # fmt: skip
            assert attr.mtime * 10**9 + attr.mtimensec == status.st_mtime_ns
    assert vm.getattr(ROOT).ino == os.stat(tree).st_ino
    assert refused(vm.lookup, "nothing") == "ENOENT"


def test_cache_policy_says_how_long_to_believe(tree: Path, mount: Callable[..., FuseVm]) -> None:
    (tree / "a").touch()
    assert [mount(cache=c).lookup("a").valid for c in ("none", "auto", "always")] == [0, 1, 86400]


def test_what_is_not_there_may_be_remembered_with_cache_always(mount: Callable[..., FuseVm]) -> None:
    found = mount(cache="always").lookup("nothing")
    assert (found.nodeid, found.valid) == (0, 86400)


def test_hard_links_are_one_node(tree: Path, mount: Callable[..., FuseVm]) -> None:
    (tree / "a").touch()
    os.link(tree / "a", tree / "b")
    vm = mount()
    assert vm.lookup("a").nodeid == vm.lookup("b").nodeid


def test_forget_closes_the_descriptor_when_the_last_lookup_is_forgotten(
    tree: Path, mount: Callable[..., FuseVm]
) -> None:
    (tree / "a").touch()
    vm = mount()
    node = vm.lookup("a").nodeid
    vm.lookup("a")
    vm.forget(node)
    assert vm.getattr(node)
    assert held(tree) == 2
    vm.forget(node)
    assert held(tree) == 1
    assert refused(vm.getattr, node) == "ESTALE"
    assert vm.lookup("a").nodeid == node  # the same file, for whom has a file handle (knfsd)
    vm.forget(node)
    (tree / "a").unlink()
    (tree / "a").touch()
    assert vm.lookup("a").nodeid != node  # another, though its inode number may be the same
    assert vm.device.stats["bad_forgets"] == 0


def test_batch_forget(tree: Path, mount: Callable[..., FuseVm]) -> None:
    vm = mount()
    nodes = []
    for name in "abc":
        (tree / name).touch()
        nodes.append(vm.lookup(name).nodeid)
    pairs = b"".join(struct.pack("<QQ", node, 1) for node in nodes)
    vm.silent(fuse.BATCH_FORGET, 0, struct.pack("<II", 3, 0) + pairs)
    assert vm.device.stats["nodes"] == 1


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 200_000])
@pytest.mark.parametrize("cache", ["auto", "always", "none"])
def test_read_write(tree: Path, mount: Callable[..., FuseVm], size: int, cache: str) -> None:
    vm = mount(cache=cache)
    data = os.urandom(size)
    found, fh = vm.create("file")
    assert vm.write(found.nodeid, fh, data) == size
    assert (tree / "file").read_bytes() == data
    assert vm.read(found.nodeid, fh, size + 100) == data
    assert vm.read(found.nodeid, fh, 100, size // 2) == data[size // 2 : size // 2 + 100]
    assert vm.read(found.nodeid, fh, 100, size) == b""
    vm.release(found.nodeid, fh)
    assert vm.device.stats["handles"] == 0


def test_read_into_any_framing(tree: Path, mount: Callable[..., FuseVm]) -> None:
    """§2.7.4: the driver may cut a request into buffers as it likes."""
    (tree / "file").write_bytes(bytes(range(200)))
    vm = mount()
    found = vm.lookup("file")
    fh = vm.open(found.nodeid)
    body = struct.pack("<QQIIQII", fh, 3, 100, 0, 0, 0, 0)
    for cuts in ((16, 100), (116,), (10, 106), (7, 7, 7, 95), (1,) * 116, (16, 1, 99), (15, 2, 99)):
        request = vm.header(fuse.READ, found.nodeid, len(body)) + body
        parts = [vm.buffer(request[i : i + 7]) for i in range(0, len(request), 7)]
        rooms = [vm.buffer(size, device_writes=True) for size in cuts]
        assert vm.submit([*parts, *rooms]) == 116
        reply = b"".join(vm.ram.read(room.addr, room.size) for room in rooms)
        assert reply == fuse.OUT_HEADER.pack(116, 0, vm.unique) + bytes(range(3, 103))


def test_write_in_any_framing(tree: Path, mount: Callable[..., FuseVm]) -> None:
    vm = mount()
    found, fh = vm.create("file")
    for cut in (1, 39, 40, 41, 79, 80, 81, 1000):
        data = os.urandom(200)
        body = struct.pack("<QQIIQII", fh, 0, len(data), 0, 0, 0, 0) + data
        request = vm.header(fuse.WRITE, found.nodeid, len(body)) + body
        parts = [vm.buffer(request[i : i + cut]) for i in range(0, len(request), cut)]
        assert vm.submit([*parts, vm.buffer(24, device_writes=True)]) == 24
        assert (tree / "file").read_bytes() == data


def test_writeback_reads_what_is_open_for_writing_and_places_appends_itself(
    tree: Path, mount: Callable[..., FuseVm]
) -> None:
    (tree / "log").write_bytes(b"one ")
    vm = mount(cache="always")
    found = vm.lookup("log")
    fh = vm.open(found.nodeid, os.O_WRONLY | os.O_APPEND)
    assert vm.read(found.nodeid, fh, 10) == b"one "
    vm.write(found.nodeid, fh, b"ON", 0)
    assert (tree / "log").read_bytes() == b"ONe "


def test_open_truncates(tree: Path, mount: Callable[..., FuseVm]) -> None:
    (tree / "a").write_bytes(b"text")
    vm = mount()
    vm.open(vm.lookup("a").nodeid, os.O_WRONLY | os.O_TRUNC)
    assert (tree / "a").read_bytes() == b""


def test_create_exclusively_or_open_what_is_there(tree: Path, mount: Callable[..., FuseVm]) -> None:
    (tree / "a").write_bytes(b"text")
    vm = mount()
    assert refused(vm.create, "a", os.O_RDWR | os.O_CREAT | os.O_EXCL) == "EEXIST"
    found, fh = vm.create("a")
    assert vm.read(found.nodeid, fh, 10) == b"text"
    found, fh = vm.create("a", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    assert (tree / "a").read_bytes() == b""
    _, _ = vm.create("b", mode=0o640)
    assert stat.S_IMODE(os.stat(tree / "b").st_mode) == 0o640


def test_modes_are_the_guests_not_cut_by_our_umask(tree: Path, mount: Callable[..., FuseVm]) -> None:
    vm = mount()
    assert os.umask(0o077) is not None
    try:
        vm.create("file", mode=0o666)
        vm.mkdir("dir", 0o777)
        assert os.umask(0o077) == 0o077  # and ours is as it was
    finally:
        os.umask(0o022)
    assert stat.S_IMODE(os.stat(tree / "file").st_mode) == 0o666
    assert stat.S_IMODE(os.stat(tree / "dir").st_mode) == 0o777


def test_make_and_remove(tree: Path, mount: Callable[..., FuseVm]) -> None:
    vm = mount()
    sub = vm.mkdir("sub")
    link = vm.make(fuse.SYMLINK, "link", parent=sub.nodeid, rest=b"/etc/passwd\0")
    assert os.readlink(tree / "sub" / "link") == "/etc/passwd"
    assert vm.ask(fuse.READLINK, link.nodeid) == b"/etc/passwd"
    fifo = vm.make(fuse.MKNOD, "fifo", struct.pack("<4I", stat.S_IFIFO | 0o600, 0, 0, 0))
    assert stat.S_ISFIFO(fifo.attr.mode)
    assert stat.S_ISFIFO(os.stat(tree / "fifo").st_mode)
    assert refused(vm.ask, fuse.RMDIR, ROOT, b"sub\0") == "ENOTEMPTY"
    vm.ask(fuse.UNLINK, sub.nodeid, b"link\0")
    vm.ask(fuse.RMDIR, ROOT, b"sub\0")
    vm.ask(fuse.UNLINK, ROOT, b"fifo\0")
    assert os.listdir(tree) == []


def test_link_names_the_node_again_even_a_symbolic_link(tree: Path, mount: Callable[..., FuseVm]) -> None:
    (tree / "a").touch()
    (tree / "s").symlink_to("/nowhere")
    vm = mount()
    for old, new in (("a", "b"), ("s", "t")):
        node = vm.lookup(old).nodeid
        linked = vm.make(fuse.LINK, new, struct.pack("<Q", node))
        assert linked.nodeid == node and linked.attr.nlink == 2
        assert os.lstat(tree / old).st_ino == os.lstat(tree / new).st_ino


def test_rename_and_its_flags(tree: Path, mount: Callable[..., FuseVm]) -> None:
    vm = mount()
    (tree / "a").write_text("a")
    (tree / "b").write_text("b")
    sub = vm.mkdir("sub").nodeid
    assert refused(vm.rename, "a", "b", flags=1) == "EEXIST"  # RENAME_NOREPLACE
    vm.rename("a", "b", flags=2)  # RENAME_EXCHANGE
    assert (tree / "a").read_text() == "b"
    vm.rename("a", "moved", newdir=sub)
    vm.rename("b", "moved", newdir=sub, flags=0)
    assert (tree / "sub" / "moved").read_text() == "a"
    assert os.listdir(tree) == ["sub"]


def test_setattr(tree: Path, mount: Callable[..., FuseVm]) -> None:
    vm = mount()
    found, fh = vm.create("a")
    node = found.nodeid
    assert vm.setattr(node, fuse.FATTR_MODE, mode=0o100600).mode == stat.S_IFREG | 0o600
    assert vm.setattr(node, fuse.FATTR_SIZE, size=12345).size == 12345
    assert vm.setattr(node, fuse.FATTR_SIZE | fuse.FATTR_FH, fh=fh, size=3).size == 3
    attr = vm.setattr(node, fuse.FATTR_ATIME | fuse.FATTR_MTIME, atime=1000, mtime=2000)
    assert (attr.atime, attr.mtime) == (1000, 2000)
    now = vm.setattr(node, fuse.FATTR_MTIME | fuse.FATTR_MTIME_NOW)
    assert now.mtime > 1_700_000_000 and now.atime == 1000
    assert refused(vm.setattr, node, fuse.FATTR_SIZE | fuse.FATTR_FH, fh=fh + 1, size=3) == "EBADF"
    assert refused(vm.setattr, ROOT, fuse.FATTR_SIZE, size=3) == "EISDIR"
    assert refused(vm.setattr, node, fuse.FATTR_SIZE, size=1 << 63) == "EINVAL"


def test_setattr_of_a_symbolic_link_is_of_the_link(tree: Path, mount: Callable[..., FuseVm]) -> None:
    (tree / "target").touch()
    (tree / "link").symlink_to("target")
    vm = mount()
    node = vm.lookup("link").nodeid
    before = os.stat(tree / "target")
    vm.setattr(node, fuse.FATTR_MTIME, mtime=5)
    assert os.lstat(tree / "link").st_mtime == 5
    assert refused(vm.setattr, node, fuse.FATTR_MODE, mode=0o777) == "ENOTSUP"
    assert refused(vm.setattr, node, fuse.FATTR_SIZE, size=0) == "EINVAL"
    assert os.stat(tree / "target") == before


@root_only
def test_files_are_made_as_the_user_that_the_guest_names(tree: Path, mount: Callable[..., FuseVm]) -> None:
    tree.chmod(0o700)  # root's: the guest's kernel has judged what its user may
    vm = mount()
    vm.uid, vm.gid = 1234, 5678
    vm.create("file")
    vm.mkdir("dir")
    vm.make(fuse.SYMLINK, "link", rest=b"x\0")
    vm.uid = 0
    vm.create("group")
    vm.gid = 0
    vm.create("root")
    owners = {name: (os.lstat(tree / name).st_uid, os.lstat(tree / name).st_gid) for name in os.listdir(tree)}
    user = (1234, 5678)
    assert owners == {"file": user, "dir": user, "link": user, "group": (0, 5678), "root": (0, 0)}


@root_only
def test_squash_makes_every_access_that_users(tree: Path, mount: Callable[..., FuseVm]) -> None:
    (tree / "roots").write_text("x")
    (tree / "roots").chmod(0o600)
    tree.chmod(0o777)
    vm = mount(squash=(1234, 5678))
    vm.create("file")
    assert (os.stat(tree / "file").st_uid, os.stat(tree / "file").st_gid) == (1234, 5678)
    node = vm.lookup("roots").nodeid
    assert refused(vm.open, node) == "EACCES"
    assert refused(vm.setattr, node, fuse.FATTR_UID, uid=1234) == "EPERM"
    assert refused(vm.setattr, vm.lookup("file").nodeid, fuse.FATTR_UID, uid=0) == "EPERM"
    device = struct.pack("<4I", stat.S_IFBLK | 0o600, 0x800, 0, 0)
    assert refused(vm.make, fuse.MKNOD, "sda", device) == "EPERM"
    assert os.geteuid() == 0  # only the share's own threads are somebody else


@root_only
def test_a_squashed_share_goes_on_after_a_hold(tree: Path, mount: Callable[..., FuseVm]) -> None:
    """As for a snapshot: its threads become that user only once, and cannot become it again."""
    tree.chmod(0o777)
    vm = mount(squash=(1234, 5678))
    for name in ("a", "b", "c"):
        vm.transport.stop()
        vm.transport.go_on()
        assert not vm.log
        found, fh = vm.create(name)
        vm.ask(fuse.FSYNC, found.nodeid, struct.pack("<QII", fh, 0, 0))
        assert (os.stat(tree / name).st_uid, os.stat(tree / name).st_gid) == (1234, 5678)


@root_only
def test_set_id_bits_go_when_the_guest_says_that_a_user_writes(tree: Path, mount: Callable[..., FuseVm]) -> None:
    path = tree / "suid"
    path.write_bytes(b"x")
    vm = mount()
    assert vm.flags & fuse.HANDLE_KILLPRIV_V2
    node = vm.lookup("suid").nodeid
    fh = vm.open(node, os.O_RDWR)

    def after(call: Callable[[], object]) -> int:
        path.chmod(0o6777)
        call()
        return stat.S_IMODE(os.stat(path).st_mode)

    assert after(lambda: vm.write(node, fh, b"y")) == 0o6777
    assert after(lambda: vm.write(node, fh, b"y", write_flags=4)) == 0o777
    assert after(lambda: vm.setattr(node, fuse.FATTR_SIZE, size=1)) == 0o6777
    assert after(lambda: vm.setattr(node, fuse.FATTR_SIZE | fuse.FATTR_KILL_SUIDGID, size=0)) == 0o777
    assert after(lambda: vm.open(node, os.O_RDWR | os.O_TRUNC, open_flags=1)) == 0o777
    vm.create("other")
    assert after(lambda: vm.write(node, fh, b"y")) == 0o6777  # the capability is back


@root_only
def test_device_numbers_are_the_same_on_both_sides(tree: Path, mount: Callable[..., FuseVm]) -> None:
    vm = mount()
    major, minor = 0xABC, 0x45678
    rdev = (minor & 0xFF) | major << 8 | (minor & ~0xFF) << 12
    made = vm.make(fuse.MKNOD, "dev", struct.pack("<4I", stat.S_IFCHR | 0o600, rdev, 0, 0))
    status = os.stat(tree / "dev")
    assert (os.major(status.st_rdev), os.minor(status.st_rdev)) == (major, minor)
    assert made.attr.rdev == rdev


def test_tmpfile_gets_a_name_by_link(tree: Path, mount: Callable[..., FuseVm]) -> None:
    vm = mount()
    try:
        found, fh = vm.create("", os.O_RDWR, opcode=fuse.TMPFILE)
    except FuseError as error:
        assert error.errno == errno.EOPNOTSUPP
        pytest.skip("the file system here has no O_TMPFILE")
    vm.write(found.nodeid, fh, b"hidden")
    assert os.listdir(tree) == []
    vm.make(fuse.LINK, "named", struct.pack("<Q", found.nodeid))
    assert (tree / "named").read_bytes() == b"hidden"


def test_an_unlinked_file_stays_usable_while_it_is_open(tree: Path, mount: Callable[..., FuseVm]) -> None:
    vm = mount()
    found, fh = vm.create("gone")
    vm.ask(fuse.UNLINK, ROOT, b"gone\0")
    assert vm.write(found.nodeid, fh, b"still") == 5
    assert vm.read(found.nodeid, fh, 10) == b"still"
    assert vm.getattr(found.nodeid).nlink == 0


def test_sparse_files_allocation_and_holes(tree: Path, mount: Callable[..., FuseVm]) -> None:
    vm = mount()
    found, fh = vm.create("sparse")
    node = found.nodeid
    vm.write(node, fh, b"data", 1 << 20)

    def seek(offset: int, whence: int) -> int:
        return int(struct.unpack("<Q", vm.ask(fuse.LSEEK, node, struct.pack("<QQII", fh, offset, whence, 0)))[0])

    assert seek(0, os.SEEK_DATA) == 1 << 20
    assert seek(0, os.SEEK_HOLE) == 0
    assert refused(seek, 2 << 20, os.SEEK_DATA) == "ENXIO"
    vm.ask(fuse.FALLOCATE, node, struct.pack("<QQQII", fh, 0, 1 << 20, 0, 0))
    assert vm.getattr(node).blocks >= 2048
    punch = 0x02 | 0x01  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
    vm.ask(fuse.FALLOCATE, node, struct.pack("<QQQII", fh, 0, 1 << 20, punch, 0))
    assert seek(0, os.SEEK_DATA) == 1 << 20
    assert vm.getattr(node).size == (1 << 20) + 4


def test_copy_file_range(tree: Path, mount: Callable[..., FuseVm]) -> None:
    (tree / "a").write_bytes(bytes(range(256)) * 100)
    vm = mount()
    a = vm.lookup("a").nodeid
    fa = vm.open(a)
    b, fb = vm.create("b")
    body = struct.pack("<7Q", fa, 256, b.nodeid, fb, 10, 1000, 0)
    assert struct.unpack_from("<I", vm.ask(fuse.COPY_FILE_RANGE, a, body))[0] == 1000
    assert (tree / "b").read_bytes() == bytes(10) + (tree / "a").read_bytes()[256:1256]
    assert vm.device.stats["handed_over"] == 1


def test_extended_attributes(tree: Path, mount: Callable[..., FuseVm]) -> None:
    (tree / "a").touch()
    try:
        os.setxattr(tree / "a", "user.other", b"")
    except OSError:
        pytest.skip("the file system here has no extended attributes of users")
    vm = mount()
    node = vm.lookup("a").nodeid
    value = os.urandom(1000)

    def get(name: bytes, size: int) -> bytes:
        return vm.ask(fuse.GETXATTR, node, struct.pack("<II", size, 0) + name + b"\0")

    vm.ask(fuse.SETXATTR, node, struct.pack("<II", len(value), 0) + b"user.test\0" + value)
    assert os.getxattr(tree / "a", "user.test") == value
    assert get(b"user.test", 2000) == value
    assert struct.unpack_from("<I", get(b"user.test", 0))[0] == 1000
    assert refused(get, b"user.test", 10) == "ERANGE"
    assert refused(get, b"user.none", 10) == "ENODATA"
    create = struct.pack("<II", 1, os.XATTR_CREATE) + b"user.test\0x"
    assert refused(vm.ask, fuse.SETXATTR, node, create) == "EEXIST"
    names = vm.ask(fuse.LISTXATTR, node, struct.pack("<II", 1000, 0))
    assert set(names.split(b"\0")) >= {b"user.test", b"user.other"}
    assert struct.unpack_from("<I", vm.ask(fuse.LISTXATTR, node, struct.pack("<II", 0, 0)))[0] == len(names)
    assert refused(vm.ask, fuse.LISTXATTR, node, struct.pack("<II", 3, 0)) == "ERANGE"
    vm.ask(fuse.REMOVEXATTR, node, b"user.test\0")
    assert "user.test" not in os.listxattr(tree / "a")


def test_acls_are_neither_set_nor_shown_while_the_guest_would_not_obey_them(
    tree: Path, mount: Callable[..., FuseVm]
) -> None:
    vm = mount()
    node = vm.create("a")[0].nodeid
    body = struct.pack("<II", 4, 0) + b"system.posix_acl_access\0" + struct.pack("<I", 2)
    assert refused(vm.ask, fuse.SETXATTR, node, body) == "ENOTSUP"


@pytest.mark.parametrize("size", [512, 4096, 65536])
def test_large_directories_are_listed_whole(tree: Path, mount: Callable[..., FuseVm], size: int) -> None:
    names = {f"file-{i:05}-{'x' * (i % 50)}" for i in range(10_000)}
    for name in names:
        (tree / name).touch()
    vm = mount()
    found = vm.list(size=size)
    assert len(found) == len(names) + 2
    assert set(found) == names | {".", ".."}


def test_readdir_starts_again_and_goes_on_where_it_is_told(tree: Path, mount: Callable[..., FuseVm]) -> None:
    for i in range(500):
        (tree / f"{i}").touch()
    vm = mount()
    fh = vm.opendir()
    first = vm.readdir(ROOT, fh, size=1000)
    second = vm.readdir(ROOT, fh, first[-1][1], size=1000)
    assert vm.readdir(ROOT, fh, size=1000) == first
    assert vm.readdir(ROOT, fh, first[-1][1], size=1000) == second
    assert vm.readdir(ROOT, fh, first[3][1], size=1000)[0] == first[4]


@pytest.mark.parametrize("flags", [fuse.LINUX_FLAGS, fuse.ALL_FLAGS], ids=["opened", "not opened"])
def test_a_directory_that_is_listed_again_is_what_it_is_now(
    tree: Path, mount: Callable[..., FuseVm], flags: int
) -> None:
    """Whichever thread lists: what one of them has read ahead is of an earlier listing."""
    (tree / "many").mkdir()
    for number in range(300):
        (tree / f"many/{number}").touch()
    vm = mount(threads=2, cache="always", flags=flags)
    node = vm.lookup("many").nodeid
    fh = vm.opendir(node) if flags == fuse.LINUX_FLAGS else 0

    def listed(offset: int, queue: int) -> list[tuple[str, int, int]]:
        return vm.readdir(node, fh, offset, size=1000, queue=queue)

    first = listed(0, 2)  # that thread has read the rest ahead
    after = first[-1][1]
    kept = [name for name, _, _ in (*first, listed(after, 1)[0])]
    for number in range(300):
        if str(number) not in kept:
            (tree / f"many/{number}").unlink()
    assert listed(0, 1) == first
    assert {name for name, _, _ in listed(after, 2)} - {".", ".."} == set(kept[-1:])


def test_readdirplus_looks_up_what_it_lists(tree: Path, mount: Callable[..., FuseVm]) -> None:
    (tree / "sub").mkdir()
    for i in range(300):
        (tree / f"{i}").write_bytes(bytes(i))
    vm = mount()
    known = vm.lookup("7").nodeid
    fh, offset = vm.opendir(), 0
    found: dict[Any, Any] = {}
    while entries := vm.readdirplus(ROOT, fh, offset):
        found |= {name: entry for name, _, entry in entries}
        offset = entries[-1][1]
    assert found["."].nodeid == found[".."].nodeid == 0
    assert found["7"].nodeid == known
    assert all(found[f"{i}"].attr.size == i for i in range(300))
    assert vm.device.stats["nodes"] == 302  # with the root
    vm.forget(known)
    assert vm.getattr(known)  # it was looked up twice
    assert sorted(vm.list(found["sub"].nodeid)) == [".", ".."]


def test_the_root_does_not_tell_what_is_above_it(tree: Path, mount: Callable[..., FuseVm]) -> None:
    vm = mount()
    fh = vm.opendir()
    data = vm.ask(fuse.READDIR, ROOT, struct.pack("<QQIIQII", fh, 0, 4096, 0, 0, 0, 0), room=4096)
    inodes = {struct.unpack_from("<Q", data)[0], struct.unpack_from("<Q", data, 32)[0]}
    assert inodes == {os.stat(tree).st_ino}


def test_statfs(tree: Path, mount: Callable[..., FuseVm]) -> None:
    blocks, _, _, files, _, bsize, namelen, frsize = struct.unpack_from("<5Q3I", mount().ask(fuse.STATFS, ROOT))
    host = os.statvfs(tree)
    assert (blocks, files, namelen, frsize) == (host.f_blocks, host.f_files, host.f_namemax, host.f_frsize)
    assert bsize == host.f_bsize


def test_fsync_and_syncfs_are_answered_by_a_helper(tree: Path, mount: Callable[..., FuseVm]) -> None:
    vm = mount()
    found, fh = vm.create("a")
    vm.ask(fuse.FSYNC, found.nodeid, struct.pack("<QII", fh, 0, 0))
    vm.ask(fuse.FSYNC, found.nodeid, struct.pack("<QII", fh, 1, 0))
    directory = vm.opendir()
    vm.ask(fuse.FSYNCDIR, ROOT, struct.pack("<QII", directory, 0, 0))
    vm.ask(fuse.SYNCFS, ROOT, bytes(8))
    assert vm.device.stats["handed_over"] == 4
    assert refused(vm.ask, fuse.FSYNC, found.nodeid, struct.pack("<QII", directory, 0, 0)) == "EBADF"


def test_access_judges_as_modes_say(tree: Path, mount: Callable[..., FuseVm]) -> None:
    (tree / "a").touch()
    (tree / "a").chmod(0o640)
    vm = mount()
    node = vm.lookup("a").nodeid
    vm.ask(fuse.ACCESS, node, struct.pack("<II", 6, 0))
    assert refused(vm.ask, fuse.ACCESS, node, struct.pack("<II", 1, 0)) == "EACCES"
    vm.uid = vm.gid = 4321
    assert refused(vm.ask, fuse.ACCESS, node, struct.pack("<II", 4, 0)) == "EACCES"


def test_what_is_not_offered_is_refused_as_linux_expects(mount: Callable[..., FuseVm]) -> None:
    vm = mount()
    found, fh = vm.create("a")
    expected = {fuse.BMAP: "ENOSYS", fuse.POLL: "ENOSYS", fuse.IOCTL: "ENOTTY", fuse.FLUSH: "ENOSYS", 4096: "ENOSYS"}
    for opcode, answer in expected.items():
        body = struct.pack("<Q", fh) + bytes(40)
        assert refused(vm.ask, opcode, found.nodeid, body) == answer


def test_destroy_and_reset_close_everything(tree: Path, mount: Callable[..., FuseVm]) -> None:
    vm = mount()
    for again in range(3):
        for i in range(20):
            vm.create(f"{again}-{i}")
        vm.opendir()
        assert held(tree) == 42
        if again == 0:
            vm.ask(fuse.DESTROY, 0)
            assert refused(vm.lookup, "0-0") == "EIO"
            vm.init()
        elif again == 1:
            vm.init()
        else:
            vm.driver.bring_up()
            vm.base = vm.driver.allocator.next
            vm.init()
        assert held(tree) == 1
        vm.forget(vm.lookup("0-0").nodeid)


def test_several_queues_serve_one_tree(tree: Path, mount: Callable[..., FuseVm]) -> None:
    vm = mount(threads=4)
    found, fh = vm.create("a")
    for queue in (1, 2, 3, 4, 0):
        vm.ask(fuse.GETATTR, found.nodeid, bytes(16), queue=queue)
    vm.ask(fuse.FSYNC, found.nodeid, struct.pack("<QII", fh, 0, 0), queue=3)


def test_limits_hold_reads_and_writes_back_and_can_be_lifted(tree: Path, mount: Callable[..., FuseVm]) -> None:
    vm = mount(limiter=RateLimiter(ops=(2, 0, 7_200_000)), threads=2)  # one an hour
    found, fh = vm.create("a")
    vm.write(found.nodeid, fh, b"1", 0)
    body = struct.pack("<QQIIQII", fh, 1, 1, 0, 0, 0, 0) + b"2"
    request = vm.buffer(vm.header(fuse.WRITE, found.nodeid, len(body)) + body)
    ring = vm.driver.queues[1]
    ring.add_indirect([request, vm.buffer(24, device_writes=True)])
    vm.driver.kick(1)
    while not vm.device.stats["throttled"]:
        time.sleep(0.001)
    assert (tree / "a").read_bytes() == b"1" and not ring.reap()
    vm.base = vm.driver.allocator.next
    assert vm.ask(fuse.GETATTR, found.nodeid, bytes(16), queue=2)  # the other queue goes on
    vm.device.set_rate_limit(ops=(0, 0, 0))
    while not ring.reap():
        time.sleep(0.001)
    assert (tree / "a").read_bytes() == b"12"


def test_a_users_mistakes_are_named(tmp_path: Path) -> None:
    from virtio.fs.device import ShareDevice

    (tmp_path / "file").touch()
    for name in ("none", "file"):
        with pytest.raises(ConfigError):
            ShareDevice("t", str(tmp_path / name))


def test_a_read_that_would_wait_for_the_disk_is_handed_over(tree: Path, mount: Callable[..., FuseVm]) -> None:
    data = os.urandom(1 << 20)
    for name in ("a", "b"):
        (tree / name).write_bytes(data)
    vm = mount()
    node = vm.lookup("a").nodeid
    fh = vm.open(node)
    waits = 0
    with open(tree / "a", "rb") as first, open(tree / "b", "rb") as second:
        # Who asks has the host begin to read, and a fast disk may have it before the answer: so more than once.
        for _ in range(40):
            if vm.device.stats["handed_over"] or not forget(second.fileno()):
                break
            try:
                os.preadv(second.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT)
                continue  # this time it was
            except BlockingIOError:
                waits += 1
            except OSError:
                break  # the file system here cannot tell
            forget(first.fileno())
            assert vm.read(node, fh, 65536) == data[:65536]
    assert vm.read(node, fh, 65536) == data[:65536]
    handed_over = vm.device.stats["handed_over"]
    assert handed_over or waits < 20
    assert vm.read(node, fh, 65536) == data[:65536]  # now it is in memory
    assert vm.device.stats["handed_over"] == handed_over
    assert vm.read(node, fh, 1 << 20, 4096) == data[4096:]  # to the file's end, partly cold
    for size, offset in ((10, 5), (100, (1 << 20) - 50), (10, 1 << 20)):
        assert vm.read(node, fh, size, offset) == data[offset : offset + size]


def test_a_synchronous_write_is_handed_over(tree: Path, mount: Callable[..., FuseVm]) -> None:
    vm = mount()
    found, fh = vm.create("a", os.O_WRONLY | os.O_CREAT | os.O_DSYNC)
    vm.write(found.nodeid, fh, b"x" * 10000, 3)
    assert (tree / "a").read_bytes() == bytes(3) + b"x" * 10000
    assert vm.device.stats["handed_over"] == 1


def test_files_past_the_guests_cache_can_be_mapped_by_kernels_that_know_how(mount: Callable[..., FuseVm]) -> None:
    allow_mmap = 1 << 36
    assert mount(cache="none", flags=fuse.LINUX_FLAGS | allow_mmap).flags & allow_mmap
    assert not mount(cache="none").flags & allow_mmap
    assert not mount(flags=fuse.LINUX_FLAGS | allow_mmap).flags & allow_mmap
