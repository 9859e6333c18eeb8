# SPDX-License-Identifier: Apache-2.0
"""The host kernel's own FUSE client finds again what a share has forgotten: by file handle, and without descriptors."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.virtio.fuse_kernel import KernelMount
from tests.virtio.test_fs_hostile import few_descriptors
from tests.virtio.test_fs_kernel import kernel_mount
from vmm.budget import KEPT, set_descriptor_limit

__all__ = ["few_descriptors", "kernel_mount"]

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
AT_EMPTY_PATH = 0x1000
Mount = Callable[..., KernelMount]


def open_by_handle(top: str, names: list[str]) -> list[str]:
    """What files have, and the directories' paths, by handles taken before the kernel dropped its caches."""
    libc = ctypes.CDLL(None, use_errno=True)
    taken = []
    for name in names:
        handle = ctypes.create_string_buffer(struct.pack("<Ii", 128, 0), 136)
        mount_id = ctypes.c_int()
        if libc.name_to_handle_at(-100, os.fsencode(f"{top}/{name}"), handle, ctypes.byref(mount_id), 0):
            raise OSError(ctypes.get_errno(), "name_to_handle_at")
        taken.append(handle)
    Path("/proc/sys/vm/drop_caches").write_text("2")
    root = os.open(top, os.O_RDONLY)
    found = []
    for handle in taken:
        fd = libc.open_by_handle_at(root, handle, os.O_RDONLY)
        if fd < 0:
            raise OSError(ctypes.get_errno(), "open_by_handle_at")
        path = os.readlink(f"/proc/self/fd/{fd}")
        if os.path.isdir(f"/proc/self/fd/{fd}"):  # the kernel has found its way up, by LOOKUP of ".."
            found.append(f"{path.removeprefix(top)}: {os.listdir(fd)}")
        else:
            found.append(os.read(fd, 99).decode())
        os.close(fd)
    os.close(root)
    return found


def read_all(top: str) -> dict[str, str]:
    """Every file's content, by the way to it."""
    return {
        os.path.join(at, name).removeprefix(top): Path(at, name).read_text()
        for at, _, names in os.walk(top) for name in names
    }  # fmt: skip


def move_about(top: str) -> list[str]:
    """Work in directories that move meanwhile, as a shell that stands in one does."""
    inside = os.open(f"{top}/d0", os.O_RDONLY)
    os.mkdir(f"{top}/new")
    os.rename(f"{top}/d0", f"{top}/new/moved")
    seen = list(read_all(top).values())  # what takes every descriptor
    file = os.open("f0", os.O_RDWR, dir_fd=inside)
    os.write(file, b"written")
    os.rename("f1", "renamed", src_dir_fd=inside, dst_dir_fd=inside)
    os.close(file)
    os.close(inside)
    return seen


def test_file_handles_outlive_the_kernels_caches(tmp_path: Path, kernel_mount: Mount) -> None:
    share = kernel_mount()
    (tmp_path / "shared" / "a" / "b").mkdir(parents=True)
    (tmp_path / "shared" / "a" / "b" / "file").write_text("text")
    (tmp_path / "shared" / "top").write_text("top")
    names = ["a/b/file", "top", "a/b", "a"]
    assert share.call(open_by_handle, str(share.path), names) == [
        "text", "top", "/a/b: ['file']", "/a: ['b']",
    ]  # fmt: skip


@pytest.mark.large
def test_a_tree_of_more_files_than_descriptors(tmp_path: Path, kernel_mount: Mount, few_descriptors: int) -> None:
    for i in range(30):
        (tmp_path / "shared" / f"d{i}").mkdir()
        for j in range(100):
            (tmp_path / "shared" / f"d{i}" / f"f{j}").write_text(f"{i}/{j}")
    share = kernel_mount(threads=2)
    set_descriptor_limit(KEPT + few_descriptors)
    wanted = {f"/d{i}/f{j}": f"{i}/{j}" for i in range(30) for j in range(100)}
    for _ in range(2):
        assert share.call(read_all, str(share.path)) == wanted
    assert sorted(share.call(move_about, str(share.path))) == sorted(wanted.values())
    moved = tmp_path / "shared" / "new" / "moved"
    assert (moved / "f0").read_text() == "written" and (moved / "renamed").read_text() == "0/1"
    assert share.vm.device.stats["reopened"] > 1000
    assert max(int(fd) for fd in os.listdir("/proc/self/fd")) <= few_descriptors
