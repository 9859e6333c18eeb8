# SPDX-License-Identifier: Apache-2.0
"""A share's DAX window: what is mapped is the file, what is refused changes nothing, and truncation kills nobody."""

from __future__ import annotations

import ctypes
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.virtio import fuse_client as fuse
from tests.virtio.fuse_client import FuseVm
from tests.virtio.test_fs import held, mount, refused, tree
from tests.virtio.test_fs_hostile import few_descriptors
from tests.waiting import until
from virtio import spec
from virtio.testing import Buffer
from vmm.budget import KEPT, dax_slots, set_descriptor_limit
from vmm.errors import ConfigError

__all__ = ["few_descriptors", "mount", "tree"]

MIB = 1 << 20
SLOT = 2 * MIB
WINDOW = 8 * MIB


def at(vm: FuseVm, offset: int, size: int) -> bytes:
    """What a guest would read in the window."""
    assert vm.device.window is not None
    return ctypes.string_at(vm.device.window.address + offset, size)


def put(vm: FuseVm, offset: int, data: bytes) -> None:
    """What a guest would write there."""
    assert vm.device.window is not None
    ctypes.memmove(vm.device.window.address + offset, data, len(data))


def test_the_transport_tells_where_the_window_is(mount: Callable[..., FuseVm]) -> None:
    vm = mount(dax=WINDOW)
    vm.device.shm_regions[0] = (0x1_4000_0000, WINDOW)
    vm.driver.set(spec.MMIO_SHM_SEL, 0)
    registers = (spec.MMIO_SHM_BASE_LOW, spec.MMIO_SHM_BASE_HIGH, spec.MMIO_SHM_LEN_LOW, spec.MMIO_SHM_LEN_HIGH)
    assert [vm.driver.get(register) for register in registers] == [0x4000_0000, 1, WINDOW, 0]


def test_dax_is_offered_with_a_window_only(tree: Path, mount: Callable[..., FuseVm]) -> None:
    (tree / "a").touch()
    flags = fuse.MAP_ALIGNMENT | fuse.HAS_INODE_DAX
    plain, dax = mount(), mount(dax=WINDOW)
    assert not plain.flags & flags and plain.lookup("a").attr.flags == 0
    assert dax.flags & flags == flags and dax.init_reply[9] == 21
    assert dax.lookup("a").attr.flags == 2  # FUSE_ATTR_DAX
    assert dax.getattr(fuse.ROOT).flags == 0
    assert mount(dax=WINDOW, flags=fuse.LINUX_FLAGS & ~fuse.HAS_INODE_DAX).lookup("a").attr.flags == 0
    assert refused(plain.setupmapping, plain.lookup("a").nodeid, 0, SLOT, 0) == "ENOSYS"
    assert refused(plain.removemapping, (0, SLOT)) == "ENOSYS"


def test_a_mapping_is_the_file_both_ways(tree: Path, mount: Callable[..., FuseVm]) -> None:
    (tree / "a").write_bytes(os.urandom(5 * MIB))
    data = (tree / "a").read_bytes()
    vm = mount(dax=WINDOW)
    node = vm.lookup("a").nodeid
    vm.setupmapping(node, 0, 2 * SLOT, SLOT, 3)
    vm.setupmapping(node, 2 * SLOT, MIB, 0, 3)
    assert at(vm, SLOT, 2 * SLOT) == data[: 2 * SLOT]
    assert at(vm, 0, MIB) == data[2 * SLOT :]
    put(vm, SLOT + 100, b"guest")
    assert (tree / "a").read_bytes()[100:105] == b"guest"
    with open(tree / "a", "r+b") as file:
        file.write(b"host")
    assert at(vm, SLOT, 4) == b"host"
    assert vm.device.stats["dax_mapped"] == 3
    vm.forget(node)  # the mapping needs no node
    assert at(vm, SLOT, 4) == b"host"
    vm.removemapping((SLOT, SLOT), (0, SLOT))
    assert at(vm, SLOT, SLOT) == at(vm, 0, SLOT) == bytes(SLOT)
    assert at(vm, 2 * SLOT, 100) == data[SLOT : SLOT + 100]
    assert vm.device.stats["dax_mapped"] == 1


def test_mapping_again_replaces_what_was_there(tree: Path, mount: Callable[..., FuseVm]) -> None:
    (tree / "a").write_bytes(b"a" * SLOT)
    (tree / "b").write_bytes(b"b" * 8192)
    vm = mount(dax=WINDOW)
    vm.setupmapping(vm.lookup("a").nodeid, 0, SLOT, 0)
    vm.setupmapping(vm.lookup("b").nodeid, 0, 4096, 0)
    assert at(vm, 0, 4097) == b"b" * 4096 + b"\0"
    assert vm.device.stats["dax_mapped"] == 1


def test_a_mapping_to_read_never_reaches_the_file(tree: Path, mount: Callable[..., FuseVm]) -> None:
    (tree / "a").write_bytes(b"a" * 8192)
    vm = mount(dax=WINDOW, read_only=True)
    node = vm.lookup("a").nodeid
    assert refused(vm.setupmapping, node, 0, SLOT, 0, 3) == "EROFS"
    assert refused(vm.setupmapping, node, 0, SLOT, 0, 1) == "EROFS"
    vm.setupmapping(node, 0, SLOT, 0, 2)
    with open(tree / "a", "r+b") as file:
        file.write(b"host")
    assert at(vm, 0, 5) == b"hosta"
    put(vm, 0, b"guest")
    assert (tree / "a").read_bytes()[:5] == b"hosta"


@pytest.mark.parametrize(
    ("foffset", "size", "moffset", "flags"),
    [
        (0, SLOT, WINDOW, 2),
        (0, SLOT, WINDOW - MIB, 2),
        (0, 2 * SLOT, WINDOW - SLOT, 2),
        (0, WINDOW + SLOT, 0, 2),
        (0, SLOT, (1 << 64) - SLOT, 2),
        (0, (1 << 64) - SLOT, SLOT, 2),
        (0, (1 << 64) - 4096, 0, 2),
        (0, 0, 0, 2),
        (0, 1, 0, 2),
        (0, 4095, 0, 2),
        (0, SLOT, 4096, 2),
        (4096, SLOT, 0, 2),
        (1 << 63, SLOT, 0, 2),
        ((1 << 63) - SLOT, SLOT, 0, 2),
        ((1 << 64) - SLOT, SLOT, 0, 2),
        (0, SLOT, 0, 4),
        (0, SLOT, 0, 1 << 63),
    ],
)
def test_bounds_alignment_and_flags(
    tree: Path, mount: Callable[..., FuseVm], foffset: int, size: int, moffset: int, flags: int
) -> None:
    (tree / "a").write_bytes(b"a" * 4096)
    vm = mount(dax=WINDOW)
    answer = refused(vm.setupmapping, vm.lookup("a").nodeid, foffset, size, moffset, flags)
    assert answer in ("EINVAL", "EOVERFLOW")
    assert at(vm, 0, WINDOW) == bytes(WINDOW)
    assert vm.device.stats["dax_mapped"] == 0
    if answer == "EINVAL" and foffset == 0 and flags == 2:
        assert refused(vm.removemapping, (moffset, size)) == "EINVAL"


def test_only_regular_files_are_mapped(tree: Path, mount: Callable[..., FuseVm]) -> None:
    (tree / "link").symlink_to("../secret")
    os.mkfifo(tree / "fifo")
    vm = mount(dax=WINDOW)
    for node in (fuse.ROOT, vm.lookup("link").nodeid, vm.lookup("fifo").nodeid):
        assert refused(vm.setupmapping, node, 0, SLOT, 0) == "EINVAL"
    assert refused(vm.setupmapping, 99, 0, SLOT, 0) == "ESTALE"


def test_a_removal_that_claims_more_ranges_than_it_has(mount: Callable[..., FuseVm]) -> None:
    vm = mount(dax=WINDOW)
    for count in (1, 0xFFFF_FFFF):
        assert refused(vm.ask, fuse.REMOVEMAPPING, 1, count.to_bytes(4, "little")) == "EINVAL"
    vm.ask(fuse.REMOVEMAPPING, 1, bytes(4))


def test_mappings_go_with_the_session(tree: Path, mount: Callable[..., FuseVm]) -> None:
    (tree / "a").write_bytes(b"a" * 4096)
    vm = mount(dax=WINDOW)
    for again in range(3):
        vm.setupmapping(vm.lookup("a").nodeid, 0, SLOT, 0)
        assert at(vm, 0, 1) == b"a"
        if again == 0:
            vm.ask(fuse.DESTROY, 0)
        if again == 2:
            vm.driver.bring_up()
            vm.base = vm.driver.allocator.next
        else:
            vm.init()
        assert at(vm, 0, 1) == b"\0"
        assert held(tree) == 1


def test_a_truncated_file_is_repaired_and_comes_back(tree: Path, mount: Callable[..., FuseVm]) -> None:
    (tree / "a").write_bytes(b"a" * SLOT)
    (tree / "small").write_bytes(b"s" * 100)
    vm = mount(dax=WINDOW)
    window = vm.device.window
    assert window is not None
    vm.setupmapping(vm.lookup("a").nodeid, 0, SLOT, 0, 3)
    vm.setupmapping(vm.lookup("small").nodeid, 0, SLOT, SLOT, 3)
    os.truncate(tree / "a", 5000)
    assert window.repair()
    assert not window.repair(), "all was mended"
    assert at(vm, 0, SLOT) == b"a" * 5000 + bytes(SLOT - 5000)
    assert at(vm, SLOT, SLOT) == b"s" * 100 + bytes(SLOT - 100)
    with open(tree / "small", "ab") as file:
        file.write(b"t" * 10000)
    assert vm.getattr(vm.lookup("small").nodeid).size == 10100  # from here on the guest may look there
    assert at(vm, SLOT, 10100) == b"s" * 100 + b"t" * 10000
    assert vm.device.stats["dax_repairs"] == 1


PLACE = 0x1_4000_0000


def shown(mount: Callable[..., FuseVm]) -> FuseVm:
    """A guest that knows where the window is, as one of a machine does."""
    vm = mount(dax=WINDOW, init=False)
    vm.device.shm_regions[0] = (PLACE, WINDOW)
    vm.driver.bring_up()
    vm.base = vm.driver.allocator.next
    vm.init()
    return vm


def transfer(vm: FuseVm, opcode: int, node: int, fh: int, at: int, size: int) -> int:
    """A READ or WRITE of the start of a file whose data is at `at` of the window; the count in the reply."""
    vm.driver.allocator.next = vm.base
    writes = opcode == fuse.WRITE
    body = struct.pack("<QQIIQII", fh, 0, size, 0, 0, 0, 0)
    data = Buffer(PLACE + at, size, not writes)
    parts = [vm.buffer(vm.header(opcode, node, len(body) + size * writes)), vm.buffer(body)]
    head, told = vm.buffer(16, device_writes=True), vm.buffer(8, device_writes=True)
    written = vm.submit([*parts, data, head, told] if writes else [*parts, head, data])
    answer = vm.reply(written, head, told if writes else None) if writes or written == 16 else b""
    return int.from_bytes(answer[:4], "little") if writes else written - 16


def test_pages_of_a_mapped_file_are_the_data_of_a_write_or_a_read(tree: Path, mount: Callable[..., FuseVm]) -> None:
    """As git does: it writes from a mapping of one file to another one."""
    text = os.urandom(SLOT)
    (tree / "a").write_bytes(text)
    (tree / "b").write_bytes(b"")
    vm = shown(mount)
    source, target = vm.lookup("a").nodeid, vm.lookup("b").nodeid
    vm.setupmapping(source, 0, SLOT, SLOT, 3)
    fh = vm.open(target, os.O_RDWR)
    assert transfer(vm, fuse.WRITE, target, fh, SLOT + 100, 5000) == 5000
    assert (tree / "b").read_bytes() == text[100:5100]
    assert transfer(vm, fuse.READ, target, fh, SLOT + 7, 5000) == 5000
    assert (tree / "a").read_bytes() == text[:7] + text[100:5100] + text[5007:]
    os.truncate(tree / "a", 0)  # by the host: the pages are gone
    assert refused(transfer, vm, fuse.WRITE, target, fh, SLOT, 5000) == "EFAULT"
    assert refused(transfer, vm, fuse.READ, target, fh, SLOT, 5000) == "EFAULT"
    assert transfer(vm, fuse.WRITE, target, fh, 0, 4096) == 4096, "unused parts are memory"


@pytest.mark.parametrize("opcode", [fuse.READ, fuse.WRITE, fuse.GETATTR, fuse.LOOKUP, fuse.SETXATTR, fuse.READDIR])
@pytest.mark.parametrize("place", range(5))
def test_nothing_else_is_in_the_window(tree: Path, mount: Callable[..., FuseVm], opcode: int, place: int) -> None:
    """The pages are gone: whoever touched them would end the process."""
    (tree / "a").write_bytes(b"a" * SLOT)
    vm = shown(mount)
    node = vm.lookup("a").nodeid
    vm.setupmapping(node, 0, SLOT, 0, 3)
    os.truncate(tree / "a", 0)
    body = b"a".ljust(41, b"\0")
    parts = [
        vm.buffer(vm.header(opcode, node, len(body))), vm.buffer(body[:20]), vm.buffer(body[20:]),
        vm.buffer(16, device_writes=True), vm.buffer(4096, device_writes=True),
    ]  # fmt: skip
    if place == 4 and opcode == fuse.READ:
        return
    parts[place] = Buffer(PLACE, parts[place].size, parts[place].device_writes)
    ring = vm.driver.queues[1]
    ring.add(parts)
    vm.driver.kick(1)
    until(lambda: vm.device.stats["needs_reset"] == 1)
    assert vm.log[-1].endswith("the buffer is not inside guest memory (§2.7.5)")
    assert not ring.reap()


def test_random_mappings_are_what_a_model_says(tree: Path, mount: Callable[..., FuseVm]) -> None:
    for name in "ab":
        (tree / name).write_bytes(name.encode() * WINDOW)
    vm = mount(dax=WINDOW)
    nodes = {name: vm.lookup(name).nodeid for name in "ab"}
    model = ["\0"] * (WINDOW // SLOT)
    choose = random.Random(3)
    for _ in range(300):
        slot = choose.randrange(len(model))
        count = choose.randint(1, len(model) - slot)
        name = choose.choice("ab\0")
        if name == "\0":
            vm.removemapping((slot * SLOT, count * SLOT))
        else:
            vm.setupmapping(nodes[name], slot * SLOT, count * SLOT, slot * SLOT, choose.choice((2, 3)))
        model[slot : slot + count] = [name] * count
        for index, expected in enumerate(model):
            assert at(vm, index * SLOT + choose.randrange(SLOT), 1) == expected.encode()
    assert vm.device.stats["dax_mapped"] == sum(name != "\0" for name in model)


def test_a_window_that_cannot_be(tree: Path, mount: Callable[..., FuseVm]) -> None:
    with pytest.raises(ConfigError):
        mount(dax=1 << 60)


def test_a_mapping_of_an_open_file_makes_room_for_its_descriptor(
    tree: Path, mount: Callable[..., FuseVm], few_descriptors: int
) -> None:
    for i in range(200):
        (tree / f"{i}").write_bytes(b"x")
    vm = mount(dax=WINDOW)
    set_descriptor_limit(KEPT + few_descriptors)
    nodes = [vm.lookup(f"{i}").nodeid for i in range(200)]
    while (next_number := os.dup(0)) < few_descriptors:
        os.close(next_number)
        vm.open(nodes[0])
    os.close(next_number)
    vm.setupmapping(nodes[0], 0, SLOT, 0)
    assert at(vm, 0, 1) == b"x"


def test_more_slots_than_the_process_may_have_are_refused(tree: Path) -> None:
    """vm.max_map_count is of the whole process: two windows share it, and a closed one gives its part back."""
    used, limit = dax_slots().used, dax_slots().limit
    size = (limit - used) // 2 + 1 << 21
    with FuseVm(tree, dax=size), pytest.raises(ConfigError, match="more mappings and descriptors than"):
        FuseVm(tree, dax=size)
    assert dax_slots().used == used
    FuseVm(tree, dax=size).close()


def test_a_closed_share_holds_nothing(tree: Path) -> None:
    vm = FuseVm(tree)
    vm.opendir()
    vm.close()
    assert held(tree) == 0
