# SPDX-License-Identifier: Apache-2.0
"""A guest that lies to its share, and a host that changes the directory meanwhile: no crash, no leak, no way out."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import select
import stat
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.virtio import fuse_client as fuse
from tests.virtio.fuse_client import ROOT, FuseError, FuseVm
from tests.virtio.test_fs import held, mount, refused, tree
from virtio import spec
from virtio.testing import Buffer
from vmm.budget import KEPT, raise_descriptor_limit, set_descriptor_limit
from vmm.jail._seccomp import landlock

__all__ = ["mount", "tree"]

BAD_NAMES = {
    b"\0": "EINVAL",
    b".\0": "EINVAL",
    b"..\0": "EINVAL",
    b"a/b\0": "EINVAL",
    b"/etc\0": "EINVAL",
    b"../secret\0": "EINVAL",
    b"a" * 256 + b"\0": "ENAMETOOLONG",
    b"unterminated": "EINVAL",
    b"": "EINVAL",
}
# What has a name, and what comes before it.
NAMING = {
    "LOOKUP": b"",
    "SYMLINK": b"",
    "MKNOD": struct.pack("<4I", stat.S_IFREG | 0o644, 0, 0, 0),
    "MKDIR": bytes(8),
    "UNLINK": b"",
    "RMDIR": b"",
    "RENAME": struct.pack("<Q", ROOT),
    "RENAME2": struct.pack("<QII", ROOT, 0, 0),
    "LINK": struct.pack("<Q", ROOT),
    "CREATE": struct.pack("<4I", os.O_RDWR, 0o644, 0, 0),
}
OPCODES = {
    name: value for name, value in vars(fuse).items()
    if name.isupper() and isinstance(value, int) and 0 < value <= fuse.TMPFILE and name != "ROOT"
    and name not in ("ASYNC_READ", "ATOMIC_O_TRUNC", "BIG_WRITES") and not name.startswith("FATTR")
}  # fmt: skip
SILENT = {fuse.FORGET, fuse.BATCH_FORGET, fuse.INTERRUPT}


def content(path: Path) -> dict[str, tuple[int, int, bytes]]:
    """All below `path`: mode, links and bytes by name."""
    found = {}
    for at, dirs, files in os.walk(path):
        for name in (*dirs, *files):
            full = Path(at, name)
            status = full.lstat()
            data = full.read_bytes() if stat.S_ISREG(status.st_mode) else b""
            found[str(full.relative_to(path))] = (status.st_mode, status.st_nlink, data)
    return found


def raw(vm: FuseVm, request: bytes, room: int = 0) -> tuple[int, bytes]:
    """A request as it is and a reply's room; what the used entry says and the room afterwards."""
    vm.driver.allocator.next = vm.base
    parts: list[Buffer] = [vm.buffer(request)] if request else []
    out = vm.buffer(b"\xee" * room, device_writes=True)
    written = vm.submit([*parts, *([out] if room else [])] or [vm.buffer(b"")])
    return written, vm.ram.read(out.addr, room)


@pytest.mark.parametrize("opcode", NAMING)
@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_is_one_component(tree: Path, mount: Callable[..., FuseVm], opcode: str, name: bytes) -> None:
    (tree / "a").mkdir()
    (tree / "a" / "b").touch()
    before = content(tree.parent)
    vm = mount()
    body = NAMING[opcode] + name + (b"fine\0" if name.endswith(b"\0") else b"")
    if not name.endswith(b"\0"):
        body = NAMING[opcode] + name
    if opcode == "LOOKUP" and name in (b".\0", b"..\0"):
        assert vm.lookup(name[:-1]).nodeid == ROOT  # a file handle's: nothing is above
    else:
        assert refused(vm.ask, getattr(fuse, opcode), ROOT, body) == BAD_NAMES[name]
    assert content(tree.parent) == before


@pytest.mark.parametrize("name", BAD_NAMES)
def test_the_second_name_is_one_component_too(tree: Path, mount: Callable[..., FuseVm], name: bytes) -> None:
    (tree / "a").touch()
    vm = mount()
    for opcode in ("RENAME", "RENAME2"):
        assert refused(vm.ask, getattr(fuse, opcode), ROOT, NAMING[opcode] + b"a\0" + name) == BAD_NAMES[name]
    assert os.listdir(tree) == ["a"]


def test_a_name_of_255_bytes_is_legal(tree: Path, mount: Callable[..., FuseVm]) -> None:
    (tree / ("n" * 255)).touch()
    assert mount().lookup("n" * 255).nodeid


@pytest.mark.parametrize("size", range(1, 40))
def test_a_request_shorter_than_its_header(mount: Callable[..., FuseVm], size: int) -> None:
    vm = mount()
    written, reply = raw(vm, vm.header(fuse.LOOKUP, ROOT, 0)[:size], 16)
    assert written == 16
    assert fuse.OUT_HEADER.unpack(reply)[1] < 0
    assert vm.device.stats["bad_requests"] == 1


def test_a_request_without_any_byte_to_read(mount: Callable[..., FuseVm]) -> None:
    vm = mount()
    written, reply = raw(vm, b"", 64)
    assert (written, reply[16:]) == (16, b"\xee" * 48)


@pytest.mark.parametrize("length", [0, 39, 40, 41, 44, 46, 1 << 20, 0xFFFF_FFFF])
def test_a_length_that_disagrees_with_the_buffers(tree: Path, mount: Callable[..., FuseVm], length: int) -> None:
    vm = mount()
    (tree / "abcd").touch()
    assert refused(vm.ask, fuse.LOOKUP, ROOT, b"abcd\0", length=length) == "EIO"
    assert vm.device.stats["bad_requests"] == 1
    assert vm.lookup("abcd")


@pytest.mark.parametrize("opcode", sorted(set(OPCODES.values()) - SILENT))
@pytest.mark.parametrize("room", [0, 1, 15])
def test_no_room_for_a_reply_is_counted_and_nothing_is_done(
    tree: Path, mount: Callable[..., FuseVm], opcode: int, room: int
) -> None:
    (tree / "a").touch()
    before = content(tree)
    vm = mount()
    body = b"a\0new\0" + bytes(200)
    written, reply = raw(vm, vm.header(opcode, ROOT, len(body)) + body, room)
    assert (written, reply) == (0, b"\xee" * room)
    assert vm.device.stats["bad_requests"] == 1
    assert vm.device.stats["nodes"] == 1 and vm.device.stats["handles"] == 0
    assert content(tree) == before


@pytest.mark.parametrize("room", [0, 1, 100, 127])
def test_a_reply_that_would_not_fit_is_an_error_and_nothing_is_done(
    tree: Path, mount: Callable[..., FuseVm], room: int
) -> None:
    (tree / "a").touch()
    vm = mount()
    for opcode, fixed in NAMING.items():
        if opcode in ("UNLINK", "RMDIR", "RENAME", "RENAME2"):
            continue
        assert refused(vm.ask, getattr(fuse, opcode), ROOT, fixed + b"a\0x\0", room=room) == "EIO"
    assert refused(vm.ask, fuse.OPENDIR, ROOT, bytes(8), room=min(room, 15)) == "EIO"
    assert vm.device.stats["nodes"] == 1 and vm.device.stats["handles"] == 0
    assert os.listdir(tree) == ["a"]


def test_reads_beyond_the_room_and_beyond_the_end(tree: Path, mount: Callable[..., FuseVm]) -> None:
    (tree / "a").write_bytes(b"12345")
    vm = mount()
    node = vm.lookup("a").nodeid
    fh = vm.open(node)

    def read(size: int, offset: int, room: int) -> bytes:
        return vm.ask(fuse.READ, node, struct.pack("<QQIIQII", fh, offset, size, 0, 0, 0, 0), room=room)

    assert refused(read, 101, 0, 100) == "EIO"
    assert refused(read, 0xFFFF_FFFF, 0, 100) == "EIO"
    assert refused(read, 1, 0, 0) == "EIO"
    assert read(0, 0, 0) == b""
    assert read(100, 3, 100) == b"45"
    assert read(100, 5, 100) == read(100, 1 << 62, 100) == b""
    assert refused(read, 100, 1 << 63, 100) == "EINVAL"
    assert refused(read, 100, (1 << 64) - 1, 100) == "EINVAL"
    directory = vm.opendir()
    body = struct.pack("<QQIIQII", directory, 0, 101, 0, 0, 0, 0)
    assert refused(vm.ask, fuse.READDIR, ROOT, body, room=100) == "EIO"
    assert refused(vm.ask, fuse.READDIRPLUS, ROOT, body, room=100) == "EIO"


def test_a_read_of_more_than_a_guest_asks_for_is_refused(tree: Path, mount: Callable[..., FuseVm]) -> None:
    """A driver can describe 4 GiB with few pages. A machine is held once such a read is done, and the 64 after it."""
    (tree / "a").touch()
    os.truncate(tree / "a", 4 << 30)
    vm = mount()
    node = vm.lookup("a").nodeid
    fh = vm.open(node)
    assert vm.read(node, fh, 1 << 20) == bytes(1 << 20)

    def read(size: int) -> bytes:
        vm.driver.allocator.next = vm.base
        body = struct.pack("<QQIIQII", fh, 0, size, 0, 0, 0, 0)
        request = vm.buffer(vm.header(fuse.READ, node, len(body)) + body)
        head, data = vm.buffer(16, device_writes=True), vm.buffer(8 << 20, device_writes=True)
        return vm.reply(vm.submit([request, head, *[data] * 100]), head, None)

    for size in ((1 << 20) + 1, 800 << 20):
        assert refused(read, size) == "EIO"


def test_a_write_whose_size_is_not_its_datas(tree: Path, mount: Callable[..., FuseVm]) -> None:
    vm = mount()
    found, fh = vm.create("a")
    for size in (0, 4, 6, 0xFFFF_FFFF):
        body = struct.pack("<QQIIQII", fh, 0, size, 0, 0, 0, 0) + b"12345"
        assert refused(vm.ask, fuse.WRITE, found.nodeid, body) == "EIO"
    assert refused(vm.write, found.nodeid, fh, b"x", 1 << 63) == "EINVAL"
    assert refused(vm.write, found.nodeid, fh, bytes((1 << 20) + 1)) == "EIO"
    assert (tree / "a").read_bytes() == b""


@pytest.mark.parametrize("nodeid", [0, 2, 99, 1 << 32 | 1, 1 << 31, (1 << 32) - 1, (1 << 64) - 1])
def test_unknown_nodes(mount: Callable[..., FuseVm], nodeid: int) -> None:
    vm = mount()
    assert refused(vm.getattr, nodeid) == "ESTALE"
    assert refused(vm.lookup, "a", nodeid) == "ESTALE"
    assert refused(vm.open, nodeid) == "ESTALE"
    assert refused(vm.rename, "a", "b", newdir=nodeid) == "ESTALE"
    assert refused(vm.make, fuse.LINK, "a", struct.pack("<Q", nodeid)) == "ESTALE"


def test_unknown_handles(tree: Path, mount: Callable[..., FuseVm]) -> None:
    (tree / "b").touch()
    vm = mount()
    found, before = vm.create("a")
    other, directory = vm.lookup("b").nodeid, vm.opendir()
    node = found.nodeid
    vm.release(node, before)
    fh = vm.open(node, os.O_RDWR)
    assert fh & 0xFFFF_FFFF == before & 0xFFFF_FFFF, "the same slot"
    for bad in (0, fh + 1, fh ^ 1 << 33, before, directory, (1 << 64) - 1):
        assert refused(vm.read, node, bad, 10) == "EBADF"
        assert refused(vm.write, node, bad, b"x") == "EBADF"
        assert refused(vm.release, node, bad) == "EBADF"
    assert refused(vm.read, other, fh, 10) == "EBADF"  # another node's
    assert refused(vm.readdir, ROOT, fh) == "EBADF"
    vm.release(node, fh)
    assert refused(vm.read, node, fh, 10) == "EBADF"
    assert refused(vm.release, node, fh) == "EBADF"
    assert vm.create("c")[1] != fh  # its slot has a new number


def test_forgetting_what_was_never_told(tree: Path, mount: Callable[..., FuseVm]) -> None:
    (tree / "a").touch()
    vm = mount()
    node = vm.lookup("a").nodeid
    for nodeid, count in ((0, 1), (99, 1), (node, 2), (node, 1), (1 << 63, 1 << 63)):
        vm.forget(nodeid, count)
    assert vm.device.stats["bad_forgets"] == 5
    vm.forget(ROOT, 1 << 63)
    assert vm.getattr(ROOT)
    for count, pairs in ((3, 1), (0xFFFF_FFFF, 0), (1 << 28, 2)):
        vm.silent(fuse.BATCH_FORGET, 0, struct.pack("<II", count, 0) + bytes(16 * pairs))
    assert vm.device.stats["bad_requests"] == 3
    assert refused(vm.getattr, node) == "ESTALE"
    assert vm.lookup("a").nodeid


def test_nothing_is_answered_before_init(mount: Callable[..., FuseVm]) -> None:
    vm = mount(init=False)
    for opcode in set(OPCODES.values()) - SILENT - {fuse.INIT}:
        assert refused(vm.ask, opcode, ROOT, b"a\0" + bytes(200)) in ("EIO", "ENOSYS")
    vm.forget(5)


def test_unknown_opcodes(mount: Callable[..., FuseVm]) -> None:
    vm = mount()
    for opcode in (0, 7, 19, 41, 52, 53, 1000, 4096, 1 << 31, 0xFFFF_FFFF, fuse.GETLK, fuse.SETLK, fuse.SETLKW):
        assert refused(vm.ask, opcode, ROOT, bytes(100)) == "ENOSYS"


@pytest.mark.parametrize("opcode", sorted(set(OPCODES.values()) - SILENT))
def test_a_request_without_its_arguments(tree: Path, mount: Callable[..., FuseVm], opcode: int) -> None:
    vm = mount()
    before = content(tree)
    with contextlib.suppress(FuseError):
        vm.ask(opcode, ROOT)
    for size in range(1, 60):
        with contextlib.suppress(FuseError):
            vm.ask(opcode, ROOT, b"\xff" * size)
    assert content(tree) == before


def test_a_broken_ring_stops_this_device_until_it_is_reset(tree: Path, mount: Callable[..., FuseVm]) -> None:
    (tree / "a").touch()
    vm = mount()
    vm.driver.queues[1].offer(5000)
    vm.driver.set(spec.MMIO_QUEUE_NOTIFY, 1)
    while not vm.driver.get(spec.MMIO_STATUS) & spec.DEVICE_NEEDS_RESET:
        assert select.select([vm.line.fd], [], [], 30)[0]
        vm.line.take()
    vm.driver.bring_up()
    vm.base = vm.driver.allocator.next
    vm.init()
    assert vm.lookup("a")


# No way out of the directory


def test_symbolic_links_are_never_followed_here(tree: Path, mount: Callable[..., FuseVm]) -> None:
    secret = tree.parent / "secret"
    (tree / "up").symlink_to("..")
    (tree / "abs").symlink_to(secret)
    vm = mount()
    for name in ("up", "abs"):
        node = vm.lookup(name).nodeid
        assert stat.S_ISLNK(vm.getattr(node).mode)
        assert refused(vm.open, node, os.O_RDWR) == "ELOOP"
        assert refused(vm.ask, fuse.OPENDIR, node, bytes(8)) == "ENOTDIR"
        assert refused(vm.lookup, "secret", node) == "ENOTDIR"
        assert refused(vm.create, "new", parent=node) == "ENOTDIR"
        assert refused(vm.create, name) == "ELOOP"
        assert refused(vm.create, name, os.O_RDWR | os.O_CREAT | os.O_TRUNC) == "ELOOP"
        assert refused(vm.create, "", os.O_RDWR, parent=node, opcode=fuse.TMPFILE) == "EINVAL"
        assert refused(vm.ask, fuse.UNLINK, node, b"secret\0") == "ENOTDIR"
        assert refused(vm.setattr, node, fuse.FATTR_SIZE, size=0) == "EINVAL"
        assert refused(vm.ask, fuse.SYNCFS, node, bytes(8)) == "EINVAL"
        with contextlib.suppress(FuseError):  # of the link itself, where the file system has such
            vm.ask(fuse.SETXATTR, node, struct.pack("<II", 1, 0) + b"trusted.x\0y")
        assert vm.lookup(name).nodeid == node
    assert secret.read_text() == "not for the guest"
    assert os.listxattr(secret) == []


def test_devices_and_fifos_are_never_opened(tree: Path, mount: Callable[..., FuseVm]) -> None:
    os.mkfifo(tree / "fifo")
    vm = mount()
    node = vm.lookup("fifo").nodeid
    assert refused(vm.open, node, os.O_RDONLY) == "ENXIO"
    assert refused(vm.open, node, os.O_RDWR) == "ENXIO"
    assert refused(vm.create, "fifo") == "ENXIO"
    assert refused(vm.setattr, node, fuse.FATTR_SIZE, size=0) == "EINVAL"


def test_a_directory_swapped_for_a_symbolic_link_stays_what_it_was(tree: Path, mount: Callable[..., FuseVm]) -> None:
    outside = tree.parent / "outside"
    outside.mkdir()
    (outside / "file").write_text("outside")
    (tree / "dir").mkdir()
    (tree / "dir" / "file").write_text("inside")
    vm = mount()
    node = vm.lookup("dir").nodeid
    os.rename(tree / "dir", tree / "moved")
    (tree / "dir").symlink_to(outside)
    found = vm.lookup("file", node)
    assert vm.read(found.nodeid, vm.open(found.nodeid), 100) == b"inside"
    vm.create("new", parent=node)
    assert os.listdir(outside) == ["file"]
    assert stat.S_ISLNK(vm.lookup("dir").attr.mode)


@pytest.mark.large
def test_a_path_raced_by_a_symbolic_link_never_leads_out(tree: Path, mount: Callable[..., FuseVm]) -> None:
    """A host process swaps a directory and a link to the parent without pause, while the guest walks and creates."""
    outside = tree.parent / "outside"
    outside.mkdir()
    (outside / "file").write_text("outside")
    (tree / "d").mkdir()
    (tree / "d" / "file").write_text("inside")
    (tree / "s").symlink_to(outside)
    libc = ctypes.CDLL(None)
    stop = threading.Event()
    swaps = inside = 0

    def swap() -> None:
        nonlocal swaps
        while not stop.is_set():
            assert libc.renameat2(-100, bytes(tree / "d"), -100, bytes(tree / "s"), 2) == 0  # RENAME_EXCHANGE
            swaps += 1

    thread = threading.Thread(target=swap)
    vm = mount()
    thread.start()
    try:
        for i in range(1500):
            with contextlib.suppress(FuseError):
                node = vm.lookup("d").nodeid
                vm.create(f"new{i}", parent=node)
            with contextlib.suppress(FuseError):
                found = vm.walk("d/file")
                assert vm.read(found.nodeid, vm.open(found.nodeid), 100) == b"inside"
                inside += 1
            with contextlib.suppress(FuseError):
                vm.create("d", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    finally:
        stop.set()
        thread.join()
    assert swaps > 100 and inside
    assert os.listdir(outside) == ["file"] and (outside / "file").read_text() == "outside"


def test_a_directory_moved_out_gives_no_way_to_its_new_parent(tree: Path, mount: Callable[..., FuseVm]) -> None:
    (tree / "dir").mkdir()
    vm = mount()
    node = vm.lookup("dir").nodeid
    os.rename(tree / "dir", tree.parent / "dir")
    assert refused(vm.lookup, "..", node) == "ESTALE"
    assert refused(vm.lookup, "secret", node) == "ENOENT"


@pytest.mark.skipif(landlock() < 2, reason="LAYER MISSING: Landlock ABI 2, Linux 5.19")
def test_what_the_host_has_moved_out_is_opened_no_more(tree: Path, mount: Callable[..., FuseVm]) -> None:
    (tree / "dir").mkdir()
    (tree / "dir/file").write_bytes(b"text")
    vm = mount()
    directory, file = vm.lookup("dir").nodeid, vm.walk("dir/file").nodeid
    fh = vm.open(file)
    os.rename(tree / "dir", tree.parent / "dir")
    assert vm.read(file, fh, 4) == b"text", "it was open already"
    assert (
        refused(vm.open, file)
        == refused(vm.opendir, directory)
        == refused(vm.create, "new", parent=directory)
        == "EACCES"
    )
    os.rename(tree.parent / "dir", tree / "back")
    assert vm.read(file, vm.open(file), 4) == b"text"
    assert os.listdir(tree / "back") == ["file"]


def test_the_shared_directory_replaced_is_the_old_one_still(tree: Path, mount: Callable[..., FuseVm]) -> None:
    (tree / "old").touch()
    vm = mount()
    os.rename(tree, tree.with_name("gone"))
    tree.symlink_to("/")
    assert sorted(vm.list()) == [".", "..", "old"]


# Read-only


def test_nothing_changes_a_read_only_share(tree: Path, mount: Callable[..., FuseVm]) -> None:
    (tree / "a").write_bytes(b"text")
    (tree / "dir").mkdir()
    os.setxattr(tree / "a", "user.x", b"y")
    before = content(tree)
    vm = mount(read_only=True)
    node = vm.lookup("a").nodeid
    for flags in (os.O_RDWR, os.O_WRONLY, os.O_RDONLY | os.O_TRUNC, os.O_RDONLY | os.O_CREAT, 3):
        assert refused(vm.open, node, flags) == "EROFS"
    fh = vm.open(node)
    assert refused(vm.write, node, fh, b"x") == "EROFS"
    assert refused(vm.setattr, node, fuse.FATTR_MODE, mode=0) == "EROFS"
    assert refused(vm.setattr, node, 0) == "EROFS"
    for opcode in set(NAMING) - {"LOOKUP"}:
        assert refused(vm.ask, getattr(fuse, opcode), ROOT, NAMING[opcode] + b"a\0b\0") == "EROFS"
    assert refused(vm.create, "", os.O_RDWR, opcode=fuse.TMPFILE) == "EROFS"
    assert refused(vm.ask, fuse.SETXATTR, node, struct.pack("<II", 1, 0) + b"user.y\0z") == "EROFS"
    assert refused(vm.ask, fuse.REMOVEXATTR, node, b"user.x\0") == "EROFS"
    assert refused(vm.ask, fuse.FALLOCATE, node, struct.pack("<QQQII", fh, 0, 9, 0, 0)) == "EROFS"
    copy = struct.pack("<7Q", fh, 0, node, fh, 0, 1, 0)
    assert refused(vm.ask, fuse.COPY_FILE_RANGE, node, copy) == "EROFS"
    assert vm.read(node, fh, 10) == b"text"
    assert content(tree) == before
    assert os.getxattr(tree / "a", "user.x") == b"y"


# Exhaustion


@pytest.fixture
def few_descriptors() -> Iterator[int]:
    """The share has 600 descriptors for guests beyond those in use now; a quarter of all is not for look-ups."""
    raise_descriptor_limit()
    limit = max(int(fd) for fd in os.listdir("/proc/self/fd")) + 600
    yield limit
    raise_descriptor_limit()


def highest() -> int:
    """The largest number of a descriptor in use."""
    return max(int(fd) for fd in os.listdir("/proc/self/fd"))  # that of the listing itself, too


def test_a_guest_that_opens_everything_runs_out_and_not_the_host(
    tree: Path, mount: Callable[..., FuseVm], few_descriptors: int
) -> None:
    for i in range(700):
        (tree / f"{i}").touch()
    first, second = mount(), mount()
    set_descriptor_limit(KEPT + few_descriptors)
    nodes = [first.lookup(f"{i}").nodeid for i in range(700)]
    assert second.lookup("1").nodeid, "two shares have one budget"
    handles = []
    with pytest.raises(FuseError, match="Too many open files in system"):
        for i in range(700):
            handles.append(first.open(nodes[i]))
    assert len(handles) > few_descriptors // 5
    with pytest.raises(FuseError, match="Too many open files in system"):
        while True:
            second.opendir()
    assert refused(first.create, "new") == refused(second.create, "new") == refused(first.mkdir, "new") == "ENFILE"
    assert refused(first.make, fuse.SYMLINK, "new", rest=b"target\0") == "ENFILE"
    assert refused(first.make, fuse.MKNOD, "new", struct.pack("<4I", 0o100644, 0, 0, 0)) == "ENFILE"
    assert "new" not in os.listdir(tree)
    assert highest() <= few_descriptors, "the rest of the process has its own"
    os.close(os.dup(0))
    first.release(nodes[0], handles[0])
    first.opendir()


@pytest.mark.usefixtures("few_descriptors")
def test_look_ups_where_the_host_has_descriptors_in_plenty(tree: Path, mount: Callable[..., FuseVm]) -> None:
    """systemd raises fs.nr_open to 2^30, which is then a container's limit, too."""
    (tree / "a").touch()
    vm = mount()
    set_descriptor_limit(1 << 30)
    assert vm.lookup("a").nodeid


@pytest.mark.large
def test_what_is_looked_up_does_not_keep_what_is_known_from_being_opened(
    tree: Path, mount: Callable[..., FuseVm], few_descriptors: int
) -> None:
    """Ten times as many files as descriptors: each is its own, opened, renamed, below directories that were moved."""
    for i in range(60):
        (tree / f"d{i}").mkdir()
        for j in range(100):
            (tree / f"d{i}" / f"f{j}").write_text(f"{i}/{j}")
    vm = mount()
    set_descriptor_limit(KEPT + few_descriptors)
    dirs = [vm.lookup(f"d{i}").nodeid for i in range(60)]
    nodes = {(i, j): vm.lookup(f"f{j}", dirs[i]).nodeid for i in range(60) for j in range(100)}
    assert len(set(nodes.values())) == 6000
    assert highest() <= few_descriptors
    vm.mkdir("moved")
    top = vm.lookup("moved").nodeid
    for i in range(0, 60, 3):
        vm.rename(f"d{i}", f"e{i}", newdir=top)  # the guest's own rename: what is below goes with it
    for i in range(1, 60, 3):
        vm.rename(f"f{i}", "renamed", parent=dirs[i], newdir=dirs[i])
    pairs = list(nodes)
    random.Random(3).shuffle(pairs)
    for i, j in pairs:
        fh = vm.open(nodes[i, j])
        assert vm.read(nodes[i, j], fh, 20) == f"{i}/{j}".encode()
        vm.release(nodes[i, j], fh)
        assert vm.getattr(nodes[i, j]).size == len(f"{i}/{j}")
    assert vm.device.stats["reopened"] > 5000
    assert vm.device.stats["nodes"] == 6000 + 60 + 2
    for (i, j), node in nodes.items():
        name = "renamed" if i % 3 == 1 and j == i else f"f{j}"
        assert vm.lookup(name, dirs[i]).nodeid == node, "what is known keeps its number"
        vm.forget(node, 2)
    assert vm.device.stats["nodes"] == 62 and vm.device.stats["bad_forgets"] == 0


@pytest.mark.large
def test_what_was_replaced_on_the_host_is_not_taken_for_what_was_there(
    tree: Path, mount: Callable[..., FuseVm], few_descriptors: int
) -> None:
    """Its descriptor was closed; the name leads to another file, a link or a mount's bait now. Linux asks anew."""
    for i in range(700):
        (tree / f"{i}").write_text("old")
    vm = mount()
    set_descriptor_limit(KEPT + few_descriptors)
    nodes = {i: vm.lookup(f"{i}").nodeid for i in range(700)}
    closed = [i for i in range(700) if f"{tree}/{i}" not in held_paths()]
    assert len(closed) > 100
    first, second, third, fourth = closed[:4]
    for i in (first, second, third):
        (tree / f"{i}").unlink()
    (tree / f"{first}").write_text("new")
    (tree / f"{second}").symlink_to("../secret")
    (tree / f"{fourth}").rename(tree / "away")
    for i in (first, second, third, fourth):
        assert refused(vm.getattr, nodes[i]) == refused(vm.open, nodes[i]) == "ESTALE"
    found = vm.lookup(f"{first}")
    assert found.nodeid != nodes[first]
    assert vm.read(found.nodeid, vm.open(found.nodeid), 9) == b"new"
    assert vm.lookup("away").nodeid == nodes[fourth], "found again, it is the same"
    assert vm.getattr(nodes[fourth]).size == 3
    assert stat.S_ISLNK(vm.lookup(f"{second}").attr.mode)


def test_an_open_file_keeps_its_descriptor(tree: Path, mount: Callable[..., FuseVm], few_descriptors: int) -> None:
    for i in range(700):
        (tree / f"{i}").write_text("old")
    vm = mount()
    set_descriptor_limit(KEPT + few_descriptors)
    node = vm.lookup("0").nodeid
    fh = vm.open(node)
    vm.ask(fuse.UNLINK, ROOT, b"0\0")
    for _ in range(2):
        for i in range(1, 700):
            vm.lookup(f"{i}")
    assert vm.getattr(node).size == 3 and vm.read(node, fh, 9) == b"old"


def held_paths() -> set[str]:
    """What this process has open, by name."""
    return {
        os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{fd}")
    }


def test_a_directory_that_is_open_costs_no_heap(tree: Path, mount: Callable[..., FuseVm]) -> None:
    for i in range(100):
        (tree / f"{i}").touch()
    vm = mount()
    handles = [vm.opendir() for _ in range(2000)]
    before = resident()
    for fh in handles:
        assert vm.readdir(ROOT, fh)
    if os.environ.get("PYVMM_SANITIZER") != "address":  # which keeps what is freed, so its growth says nothing
        assert resident() - before < 4 << 20  # 62 MiB, had each a buffer
    # Each has its own position all the same, whichever was read last.
    seen: dict[int, list[str]] = {fh: [] for fh in handles[:3]}
    offsets = dict.fromkeys(seen, 0)
    while any(offsets[fh] >= 0 for fh in seen):
        for fh in seen:
            found = vm.readdir(ROOT, fh, offsets[fh], size=512) if offsets[fh] >= 0 else []
            seen[fh] += [name for name, _, _ in found]
            offsets[fh] = found[-1][1] if found else -1
    assert all(sorted(names) == sorted([".", "..", *os.listdir(tree)]) for names in seen.values())


def resident() -> int:
    """Bytes of this process's memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.large
def test_many_nodes_come_and_go(tree: Path, mount: Callable[..., FuseVm]) -> None:
    names = [f"{i}" for i in range(3000)]
    for name in names:
        (tree / name).touch()
    vm = mount()
    for _ in range(2):
        nodes = {name: vm.lookup(name).nodeid for name in names}
        assert len(set(nodes.values())) == len(names)
        assert all(vm.getattr(node).size == 0 for node in nodes.values())
        assert held(tree) == len(names) + 1
        for name in random.Random(0).sample(names, len(names)):
            assert vm.lookup(name).nodeid == nodes[name]
            vm.forget(nodes[name], 2)
        assert held(tree) == 1
    assert vm.device.stats["bad_forgets"] == 0


# Anything at all


class Chaos:
    """A share that lives through many examples; what it holds is let go after each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.vm = FuseVm(path, threads=4)

    def body(self, data: st.DataObject, nodes: list[int], handles: list[int]) -> bytes:
        name = st.sampled_from([b"a", b"b", b"dir", b"link", b"fifo", b"..", b"x/y", b"", b"n" * 256])
        number = st.one_of(st.sampled_from([*nodes, *handles]), st.integers(0, 20), st.integers(0, 2**64 - 1)).map(
            lambda n: struct.pack("<Q", n)
        )
        part = st.one_of(number, name.map(lambda n: n + b"\0"), st.binary(max_size=16))
        return b"".join(data.draw(st.lists(part, max_size=8)))


@pytest.fixture
def chaos(tree: Path) -> Iterator[Chaos]:
    (tree / "a").write_bytes(b"x" * 1000)
    (tree / "dir").mkdir()
    (tree / "dir" / "b").touch()
    (tree / "link").symlink_to("../../secret")
    os.mkfifo(tree / "fifo")
    made = Chaos(tree)
    yield made
    made.vm.close()


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_random_requests_never_crash_and_leak_nothing(chaos: Chaos, data: st.DataObject) -> None:
    vm = chaos.vm
    vm.init()
    nodes = [ROOT]
    for name in ("a", "dir", "link", "fifo"):
        with contextlib.suppress(FuseError):
            nodes.append(vm.lookup(name).nodeid)
    handles = [vm.opendir()]
    with contextlib.suppress(FuseError):
        handles.append(vm.open(nodes[1], os.O_RDWR))
    # Not FALLOCATE of any size, and no syncing of a disk that others use.
    some = sorted(set(OPCODES.values()) - {fuse.FALLOCATE, fuse.SYNCFS})
    opcodes = st.one_of(st.sampled_from(some), st.integers(0, 2**32 - 1))
    for _ in range(data.draw(st.integers(1, 30))):
        # Drawn before anything is offered: hypothesis may stop an example at any draw.
        queue = data.draw(st.integers(0, 4))
        requests = []
        for _ in range(data.draw(st.integers(1, 4))):
            body = chaos.body(data, nodes, handles)
            request = vm.header(data.draw(opcodes), data.draw(st.sampled_from(nodes)), len(body)) + body
            cut = data.draw(st.integers(1, len(request)))
            requests.append((request[:cut], request[cut:], data.draw(st.lists(st.integers(1, 5000), max_size=3))))
        vm.driver.allocator.next = vm.base
        ring = vm.driver.queues[queue]
        room = {}
        for first, second, rooms in requests:
            parts = [vm.buffer(first), *([vm.buffer(second)] if second else [])]
            parts += [vm.buffer(size, device_writes=True) for size in rooms]
            room[ring.add_indirect(parts)] = sum(rooms)
        # Several are in flight; what comes back is each chain once, never with more than it has room for.
        ring.want_interrupt()
        vm.driver.kick(queue)
        done: dict[int, int] = {}
        while len(done) < len(room):
            done |= dict(ring.reap())
            ring.want_interrupt()
            select.select([vm.line.fd], [], [], 0.001)
            assert not vm.log
        assert all(done[head] <= room[head] for head in room)
    vm.init()
    assert held(chaos.path) == 1
    assert vm.device.stats["nodes"] == 1 and vm.device.stats["handles"] == 0
    assert vm.device.stats["needs_reset"] == 0
    assert (chaos.path.parent / "secret").read_text() == "not for the guest"
    with contextlib.suppress(OSError):
        (chaos.path / "a").touch()


def test_sessions_that_end_while_requests_run(tree: Path, mount: Callable[..., FuseVm]) -> None:
    """INIT and DESTROY on one queue, work on the others: what is in use stays open until it is done with."""
    for i in range(50):
        (tree / f"{i}").write_bytes(b"x" * 100)
    vm = mount(threads=4)
    random_ = random.Random(1)
    for _ in range(300):
        vm.driver.allocator.next = vm.base
        waiting = {queue: 0 for queue in range(1, 5)}
        for queue in waiting:
            ring = vm.driver.queues[queue]
            for _ in range(8):
                choice = random_.random()
                opcode, node, body = fuse.LOOKUP, ROOT, b"%d\0" % random_.randrange(50)
                if choice < 0.1:
                    opcode, body = fuse.INIT, struct.pack("<5I44x", 7, 38, 0, fuse.LINUX_FLAGS & 0xFFFF_FFFF, 0)
                elif choice < 0.15:
                    opcode, body = fuse.DESTROY, b""
                elif choice < 0.4:
                    opcode, node, body = fuse.OPEN, random_.randrange(2, 60), bytes(8)
                elif choice < 0.6:
                    generation = random_.randrange(1, 4) << 32
                    body = struct.pack("<QQIIQII", generation | random_.randrange(1, 60), 0, 100, 0, 0, 0, 0)
                    opcode, node = fuse.READ, random_.randrange(2, 60)
                elif choice < 0.7:
                    opcode, body = fuse.SYNCFS, bytes(8)
                elif choice < 0.9:
                    opcode, node, body = fuse.FORGET, random_.randrange(2, 60), struct.pack("<Q", 1)
                request = vm.buffer(vm.header(opcode, node, len(body)) + body, queue=queue)
                ring.add_indirect([request, vm.buffer(300, device_writes=True, queue=queue)])
                waiting[queue] += 1
            vm.driver.set(spec.MMIO_QUEUE_NOTIFY, queue)
        while any(waiting.values()):
            for queue in waiting:
                waiting[queue] -= len(vm.driver.queues[queue].reap())
                vm.driver.queues[queue].want_interrupt()
    vm.init()
    assert held(tree) == 1
