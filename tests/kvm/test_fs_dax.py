# SPDX-License-Identifier: Apache-2.0
"""A guest of a few instructions uses a share's DAX window on a real /dev/kvm."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from boot import layout
from tests.kvm.guests import run
from tests.virtio.fuse_client import FuseClient
from virtio.testing import Allocator
from vmm import Machine
from vmm.config.devices import ShareConfig
from vmm.kvm.vm import software_kvm

MakeGuest = Callable[..., Machine]

SLOT = 2 << 20
# Where the guest sees the window's first 2 MiB: linear address 1 GiB, mapped by a table of the test's.
LINEAR = 1 << 30
EXIT = "mov dx, 0xf4\n out dx, al\n"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "a").write_bytes(bytes([7]) * SLOT)
    return shared


def prepare(vm: Machine, name: str, flags: int) -> FuseClient:
    """Map the file `name` into the window, as a driver would, and the window into the guest's page tables."""
    transport = vm.virtio[0]
    gpa, size = transport.device.shm_regions[0]
    assert (gpa, size) == (layout.dax_windows(4 << 20), 2 * SLOT)
    directory = layout.PAGE_TABLES + 0x2000 + 0x1000  # of the second GiB: PML4, PDPT, first GiB, this
    vm.memory.write(directory, (gpa | 0x83).to_bytes(8, "little"))
    client = FuseClient(transport, vm.memory, Allocator(0x200000, 0x1F0000), None, size=32)
    client.setupmapping(client.lookup(name).nodeid, 0, SLOT, 0, flags)
    return client


def share(tree: Path, **settings: object) -> dict[str, object]:
    return {"shares": (ShareConfig("tag", str(tree), dax=2 * SLOT, **settings),), "bits": 64}  # type: ignore[arg-type]


def test_guest_reads_and_writes_the_file_itself(guest: MakeGuest, tree: Path) -> None:
    code = f"mov rbx, {LINEAR:#x}\n mov byte ptr [rbx + 5000], 42\n mov al, [rbx + 100000]\n"
    vm = guest(code + EXIT, **share(tree))
    prepare(vm, "a", 3)
    assert run(vm).code == 7
    assert (tree / "a").read_bytes()[4999:5002] == bytes([7, 42, 7])


def test_a_write_where_only_reading_was_asked_for_stays_in_the_guest(guest: MakeGuest, tree: Path) -> None:
    code = f"mov rbx, {LINEAR:#x}\n mov byte ptr [rbx], 42\n mov al, [rbx]\n add al, [rbx + 1]\n"
    vm = guest(code + EXIT, **share(tree, read_only=True))
    prepare(vm, "a", 2)
    assert run(vm).code == 49
    assert (tree / "a").read_bytes() == bytes([7]) * SLOT


def test_the_window_without_a_file_is_memory(guest: MakeGuest, tree: Path) -> None:
    code = f"mov rbx, {LINEAR:#x}\n mov byte ptr [rbx], 42\n mov al, [rbx]\n"
    vm = guest(code + EXIT, **share(tree))
    prepare(vm, "a", 3).removemapping((0, SLOT))
    assert run(vm).code == 42
    assert (tree / "a").read_bytes() == bytes([7]) * SLOT


def test_guest_lives_when_a_mapped_file_is_truncated(guest: MakeGuest, tree: Path) -> None:
    code = f"mov rbx, {LINEAR:#x}\n mov al, [rbx + 100000]\n mov byte ptr [rbx + 200000], 1\n add al, [rbx]\n"
    vm = guest(code + EXIT, **share(tree))
    prepare(vm, "a", 3)
    os.truncate(tree / "a", 100)
    # A KVM that emulates this code takes what is gone for a device's register that nobody has: 0xff.
    expected = ((0xFF + 7) & 0xFF, 0) if software_kvm() else (7, 1)
    assert (run(vm).code, vm.virtio[0].device.stats["dax_repairs"]) == expected
    assert (tree / "a").read_bytes() == bytes([7]) * 100
