# SPDX-License-Identifier: Apache-2.0
"""A mounted share is saved with its machine: another device goes on with the guest's nodes and open files."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.virtio.fuse_client import (
    ALL_FLAGS,
    FSYNC,
    LINK,
    OPENDIR,
    READ,
    RELEASEDIR,
    ROOT,
    SYMLINK,
    TMPFILE,
    UNLINK,
    FuseError,
    FuseVm,
)
from virtio.fs.device import ShareDevice
from virtio.mmio import VirtioMmio
from vmm import undertaker
from vmm.errors import SnapshotError

Move = Callable[..., None]


@pytest.fixture
def vm(tmp_path: Path) -> Iterator[FuseVm]:
    (tmp_path / "share/dir/below").mkdir(parents=True)
    (tmp_path / "share/file").write_bytes(b"contents")
    (tmp_path / "share/dir/below/deep").write_bytes(b"deep")
    with FuseVm(tmp_path / "share") as vm:
        yield vm
        assert not vm.log


def saved(vm: FuseVm) -> dict[str, Any]:
    """The state as a file of a snapshot has it; the device goes on."""
    vm.transport.stop()
    state: dict[str, Any] = msgspec.msgpack.decode(msgspec.msgpack.encode(vm.transport.save()))
    vm.transport.go_on()
    return state


def move(vm: FuseVm, path: Path | None = None, state: dict[str, Any] | None = None, **settings: Any) -> None:
    """Let another device go on with what the guest knows."""
    if state is None:
        state = saved(vm)
    vm.transport.close()
    vm.device.close()
    vm.device = ShareDevice("share", str(path or vm.device.path), **settings)
    vm.transport = vm.driver.transport = VirtioMmio(vm.device, vm.ram, vm.line, warn=vm.log.append)
    vm.transport.restore(state)
    vm.transport.go_on()


def fails(number: int, call: Callable[[], object]) -> None:
    with pytest.raises(FuseError) as caught:
        call()
    assert caught.value.errno == number


def test_nodes_and_open_files_go_on(vm: FuseVm, tmp_path: Path) -> None:
    deep, file = vm.walk("dir/below/deep"), vm.lookup("file")
    reading, both = vm.open(deep.nodeid), vm.open(file.nodeid, os.O_RDWR)
    appending = vm.open(file.nodeid, os.O_WRONLY | os.O_APPEND)
    before = descriptors()
    for _ in range(3):
        move(vm)
        assert vm.device.stats["handles"] == 3 and vm.device.stats["nodes"] == 5
        assert vm.read(deep.nodeid, reading, 100) == b"deep"
        assert vm.write(file.nodeid, both, b"C") == 1
        assert vm.write(file.nodeid, appending, b"+", flags=os.O_APPEND) == 1
        assert vm.getattr(file.nodeid).ino == file.attr.ino
        assert vm.walk("dir/below/deep").nodeid == deep.nodeid, "a look-up finds the node"
    assert (tmp_path / "share/file").read_bytes() == b"Contents+++"
    assert descriptors() == before
    vm.release(deep.nodeid, reading)
    fails(errno.EBADF, lambda: vm.read(deep.nodeid, reading, 1))
    vm.forget(deep.nodeid, 4)
    fails(errno.ESTALE, lambda: vm.getattr(deep.nodeid))


def descriptors() -> int:
    gc.collect()  # what loops in C hold goes with them
    undertaker.wait()
    return len(os.listdir("/proc/self/fd"))


def test_ids_are_not_used_again(vm: FuseVm) -> None:
    node = vm.lookup("file").nodeid
    fh = vm.open(node)
    gone = vm.open(node)
    vm.release(node, gone)
    old = [vm.make(SYMLINK, f"link{number}", rest=b"target\0").nodeid for number in range(5)]
    for each in old[:4]:
        vm.forget(each)
    for number in range(4):
        vm.ask(UNLINK, ROOT, b"link%d\0" % number)
    move(vm)
    new = [vm.make(SYMLINK, f"new{number}", rest=b"target\0").nodeid for number in range(6)]
    assert len({node, *old, *new}) == 12
    assert len({fh, gone, vm.open(node), vm.open(node)}) == 4


def test_a_directory_is_read_on(vm: FuseVm, tmp_path: Path) -> None:
    for number in range(300):
        (tmp_path / f"share/dir/{number}").touch()
    node = vm.lookup("dir").nodeid
    fh, offset, names = vm.opendir(node), 0, []
    while found := vm.readdir(node, fh, offset, size=1000):
        names += [name for name, _, _ in found]
        offset = found[-1][1]
        move(vm)
    assert sorted(names) == sorted([".", "..", "below", *map(str, range(300))])
    vm.release(node, fh, opcode=RELEASEDIR)


def test_what_the_host_has_changed_meanwhile(vm: FuseVm, tmp_path: Path) -> None:
    share = tmp_path / "share"
    for name in ("removed", "replaced", "renamed", "kept"):
        (share / name).write_bytes(name.encode())
    nodes = {name: vm.lookup(name).nodeid for name in ("removed", "replaced", "renamed", "kept")}
    handles = {name: vm.open(node) for name, node in nodes.items()}
    state = saved(vm)
    (share / "removed").unlink()
    (share / "renamed").rename(share / "other")
    (share / "replaced").rename(share / "before")
    (share / "replaced").write_bytes(b"another file")
    move(vm, state=state)
    assert vm.read(nodes["kept"], handles["kept"], 100) == b"kept"
    for name in ("removed", "replaced", "renamed"):
        fails(errno.EBADF, partial(vm.read, nodes[name], handles[name], 100))
        fails(errno.ESTALE, partial(vm.getattr, nodes[name]))
        vm.release(nodes[name], handles[name])
    found = vm.lookup("replaced")
    assert found.nodeid != nodes["replaced"]
    assert vm.read(found.nodeid, vm.open(found.nodeid), 100) == b"another file"
    assert vm.lookup("other").nodeid != nodes["renamed"] or vm.getattr(nodes["renamed"])
    fails(errno.ENOENT, lambda: vm.lookup("removed"))


def test_another_directory_in_its_place(vm: FuseVm, tmp_path: Path) -> None:
    node = vm.walk("dir/below/deep").nodeid
    fh = vm.open(node)
    shutil.copytree(tmp_path / "share", tmp_path / "copy")
    (tmp_path / "copy/dir/below/deep").write_bytes(b"the copy's")
    move(vm, tmp_path / "copy")
    fails(errno.ESTALE, lambda: vm.getattr(node))
    fails(errno.EBADF, lambda: vm.read(node, fh, 10))
    again = vm.walk("dir/below/deep").nodeid
    assert vm.read(again, vm.open(again), 100) == b"the copy's"


def test_a_removed_file_that_is_open_is_refused(vm: FuseVm, tmp_path: Path) -> None:
    created, fh = vm.create("temporary")
    vm.write(created.nodeid, fh, b"data")
    vm.ask(UNLINK, ROOT, b"temporary\0")
    with pytest.raises(
        SnapshotError, match=rf"has a file of .*/share open that it has removed \(inode {created.attr.ino}"
    ):
        saved(vm)
    vm.transport.go_on()
    assert vm.read(created.nodeid, fh, 10) == b"data"
    vm.release(created.nodeid, fh)
    vm.forget(created.nodeid)
    saved(vm)
    file = vm.lookup("file").nodeid
    fh = vm.open(file)
    (tmp_path / "share/file").unlink()  # by the host
    with pytest.raises(SnapshotError, match="that it has removed"):
        saved(vm)
    vm.transport.go_on()
    vm.release(file, fh)
    saved(vm)


def test_a_guest_that_opens_no_files(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"contents")
    with FuseVm(tmp_path, cache="always", flags=ALL_FLAGS) as vm:
        node = vm.lookup("file").nodeid
        assert vm.read(node, 0, 100) == b"contents"
        move(vm, cache="always")
        assert vm.read(node, 0, 100) == b"contents"
        vm.ask(UNLINK, ROOT, b"file\0")
        with pytest.raises(SnapshotError, match="that it has removed"):
            saved(vm)


def link(vm: FuseVm, nodeid: int, name: str) -> None:
    assert vm.make(LINK, name, nodeid.to_bytes(8, "little")).nodeid == nodeid


def test_a_file_without_a_name_that_was_linked_goes_on(vm: FuseVm) -> None:
    made, fh = vm.create("", opcode=TMPFILE, flags=os.O_RDWR)
    vm.write(made.nodeid, fh, b"data")
    link(vm, made.nodeid, "final")
    move(vm)
    assert vm.read(made.nodeid, fh, 10) == b"data"
    assert vm.lookup("final").nodeid == made.nodeid


@pytest.mark.parametrize("cache", ["auto", "always"])
@pytest.mark.parametrize("way", ["remove", "remove and look up", "rename to itself", "replace"])
def test_a_file_goes_on_by_a_name_that_is_left(tmp_path: Path, way: str, cache: str) -> None:
    """Whether the guest opens it, or uses it unopened (cache=always)."""
    (tmp_path / "file").write_bytes(b"contents")
    (tmp_path / "new").write_bytes(b"new")
    with FuseVm(tmp_path, cache=cache, flags=ALL_FLAGS) as vm:
        node = vm.lookup("file").nodeid
        fh = vm.open(node) if cache == "auto" else 0
        link(vm, node, "link")
        if way == "remove":
            vm.ask(UNLINK, ROOT, b"file\0")
        elif way == "remove and look up":
            vm.ask(UNLINK, ROOT, b"link\0")
            assert vm.lookup("file").nodeid == node
        elif way == "rename to itself":
            vm.rename("link", "file")
        elif way == "replace":
            vm.rename("new", "file")
        move(vm, cache=cache)
        assert vm.read(node, fh, 100) == b"contents"


@pytest.mark.parametrize("way", ["remove", "replace"])
def test_an_open_file_whose_known_name_is_removed_is_refused(vm: FuseVm, tmp_path: Path, way: str) -> None:
    """Not saved by a name that it does not have, or another file has: in a copy it would be lost."""
    os.link(tmp_path / "share/file", tmp_path / "share/other")
    (tmp_path / "share/new").touch()
    node = vm.lookup("file").nodeid
    fh = vm.open(node)
    if way == "remove":
        vm.ask(UNLINK, ROOT, b"file\0")
    else:
        vm.rename("new", "file")
    with pytest.raises(SnapshotError, match="that it has removed"):
        saved(vm)
    vm.transport.go_on()
    assert vm.lookup("other").nodeid == node
    move(vm)
    assert vm.read(node, fh, 10) == b"contents"


def test_read_only_stays_so(vm: FuseVm, tmp_path: Path) -> None:
    node = vm.lookup("file").nodeid
    fh = vm.open(node, os.O_RDWR)
    move(vm, read_only=True)
    fails(errno.EROFS, lambda: vm.write(node, fh, b"x"))
    assert (tmp_path / "share/file").read_bytes() == b"contents"


def test_requests_that_helpers_have_are_answered_first(vm: FuseVm) -> None:
    node = vm.lookup("file").nodeid
    fh = vm.open(node, os.O_RDWR)
    ring = vm.driver.queues[1]
    for _ in range(60):
        vm.driver.allocator.next = vm.base
        ring.want_interrupt()
        vm.write(node, fh, b"x" * 4096)
        heads = []
        for _ in range(8):
            body = struct.pack("<QII", fh, 0, 0)
            answer = vm.buffer(bytes(16), device_writes=True)
            heads.append(ring.add([vm.buffer(vm.header(FSYNC, node, len(body)) + body), answer]))
        vm.driver.kick(1)
        vm.transport.stop()
        done = ring.reap()
        vm.transport.go_on()
        while len(done) < 8:
            done += ring.reap()
        assert sorted(head for head, _ in done) == sorted(heads)


def test_no_damaged_state_does_more_than_be_refused(vm: FuseVm, tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(b"secret")
    deep = vm.walk("dir/below/deep").nodeid
    handles = {vm.open(deep): deep, vm.opendir(): ROOT}
    good = saved(vm)
    rng = random.Random(5)
    refused = 0
    for _ in range(200):
        device = dict(good["device"])
        what = rng.choice(("nodes", "nodes", "handles", "session", "slots"))
        if what in ("nodes", "handles"):
            data = bytearray(device[what])
            if rng.random() < 0.2:
                del data[rng.randrange(len(data)) :]
            for _ in range(rng.choice((0, 1, 1, 3, 20))):
                data[rng.randrange(len(data) or 1) : 0] = b""
                if data:
                    data[rng.randrange(len(data))] = rng.choice((0, 1, 0x2E, 0x2F, 0xFF, rng.randrange(256)))
            device[what] = bytes(data)
        else:
            numbers = [rng.choice((0, 1, 2, 5000, 1 << 23, 1 << 31, 1 << 32, -1)) for _ in range(4)]
            device[what] = rng.choice((None, -1, 1 << 40, [1, 2, 3], [0, 0], 0, 255, "x", numbers, numbers))
        with FuseVm(tmp_path / "share", init=False) as other:
            try:
                move(other, state={**saved(other), "device": device})
            except SnapshotError:
                refused += 1
                continue
            for fh, node in handles.items():
                for opcode in (READ, OPENDIR):
                    with contextlib.suppress(FuseError):
                        other.ask(opcode, node, struct.pack("<QQIIQII", fh, 0, 100, 0, 0, 0, 0))
    assert refused > 50
    move(vm, state=good)
    assert vm.read(deep, next(iter(handles)), 10) == b"deep"


def test_directories_that_are_in_one_another_are_nowhere(vm: FuseVm) -> None:
    """As the host may have moved them meanwhile. Once they are forgotten nothing is left of them."""
    below, above = vm.walk("dir/below").nodeid, vm.lookup("dir").nodeid
    state = saved(vm)
    nodes = bytearray(state["device"]["nodes"])
    parent = 72 + 32  # of the second node
    assert struct.unpack_from("<Q", nodes, parent) == (ROOT,)
    struct.pack_into("<Q", nodes, parent, below)
    move(vm, state={**state, "device": {**state["device"], "nodes": bytes(nodes)}})
    for node, count in ((above, 2), (below, 1)):
        fails(errno.ESTALE, partial(vm.getattr, node))
        vm.forget(node, count)
    assert vm.device.stats["nodes"] == 1 and vm.device.stats["bad_forgets"] == 0


@pytest.mark.parametrize("name", [b"..", b".", b"a/b", b"../outside", b"a\0b"])
def test_a_damaged_name_leads_nowhere(vm: FuseVm, tmp_path: Path, name: bytes) -> None:
    vm.walk("dir/below/deep")
    state = saved(vm)
    nodes = state["device"]["nodes"]
    at = nodes.index(b"below")
    length = struct.unpack_from("<I", nodes, at - 8)[0]
    assert length == 5
    changed = nodes[: at - 8] + struct.pack("<II", len(name), 0) + name + nodes[at + 5 :]
    with pytest.raises(SnapshotError, match="a node's name"):
        move(vm, state={**state, "device": {**state["device"], "nodes": changed}})
