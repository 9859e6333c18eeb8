# SPDX-License-Identifier: Apache-2.0
"""The host kernel's own FUSE client on a share: random programs end as on a plain file system, and known ones work."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.virtio import fuse_client as fuse
from tests.virtio.fuse_kernel import KernelMount, kernel_mounts, mount
from tests.virtio.fuse_programs import RENAME_WHITEOUT, differences, empty, picture

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
CACHES = ("auto", "always", "none")
# What a kernel does not know for which every file has to be opened.
OPENING = fuse.NO_OPEN_SUPPORT | fuse.NO_OPENDIR_SUPPORT
PROGRAMS = 40
LENGTH = 300


@pytest.fixture
def kernel_mount(tmp_path: Path) -> Iterator[Callable[..., KernelMount]]:
    if not os.path.exists("/dev/fuse"):
        pytest.fail("LAYER MISSING: the kernel's FUSE client: /dev/fuse")
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)
    yield from kernel_mounts(tmp_path)


def small_disk(size: int) -> int:
    """A tmpfs of `size` bytes, mounted nowhere: a descriptor of its root."""
    libc = ctypes.CDLL(None, use_errno=True)
    fs = libc.syscall(430, b"tmpfs", 0)  # fsopen
    assert fs >= 0 and libc.syscall(431, fs, 1, b"size", str(size).encode(), 0) == 0  # fsconfig: a string
    assert libc.syscall(431, fs, 6, None, None, 0) == 0  # fsconfig: create
    root: int = libc.syscall(432, fs, 0, 0)  # fsmount
    os.close(fs)
    assert root >= 0
    return root


@pytest.mark.large
@pytest.mark.parametrize(("cache", "hide"), [("auto", 0), ("none", 0), ("always", 0), ("always", OPENING)])
def test_random_programs_end_as_on_a_plain_file_system(
    tmp_path: Path, kernel_mount: Callable[..., KernelMount], cache: str, hide: int
) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    plain.chmod(0o777)
    share = kernel_mount(cache=cache, threads=2, hide=hide)
    for seed in range(PROGRAMS):
        found = share.call(differences, str(plain), str(share.path), seed, LENGTH)
        assert not found, "\n".join(found)
        assert picture(str(plain)) == picture(str(tmp_path / "shared"))
        for directory in (plain, share.path):
            share.call(empty, str(directory))
    assert (share.vm.seen[fuse.OPEN] == share.vm.seen[fuse.OPENDIR] == 1) == (cache == "always" and not hide)
    assert share.vm.device.stats["bad_requests"] == share.vm.device.stats["handles"] == 0


def fill_by_mapping(path: str, size: int) -> str:
    """Map a sparse file, write all of it and have it kept: how that ends."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, size)
    try:
        with mmap.mmap(fd, size) as view:
            view[:] = b"x" * size
            view.flush()
        os.fsync(fd)
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    finally:
        os.close(fd)
    return "kept"


@pytest.mark.parametrize("cache", CACHES)
def test_pages_that_a_full_disk_does_not_take_are_an_error(
    kernel_mount: Callable[..., KernelMount], cache: str
) -> None:
    root = small_disk(256 << 10)
    share = kernel_mount(shared=Path(f"/proc/self/fd/{root}"), cache=cache)
    assert share.call(fill_by_mapping, str(share.path / "a"), 128 << 10) == "kept"
    assert share.call(fill_by_mapping, str(share.path / "b"), 512 << 10) == "ENOSPC"
    os.close(root)


def overlay(share: str, lower: str, merged: str) -> tuple[str, list[str]]:
    """An overlay with its upper layer on the share, as Docker has it: what is done there, and what is listed after."""
    for name in ("upper", "work"):
        os.mkdir(f"{share}/{name}")
    mount("overlay", merged, "overlay", 0, f"lowerdir={lower},upperdir={share}/upper,workdir={share}/work")
    os.unlink(f"{merged}/gone")
    with open(f"{merged}/changed", "a") as file:
        file.write(" and more")
    os.rename(f"{merged}/moved", f"{merged}/sub/moved")
    os.unlink(f"{merged}/sub/inner")
    os.rmdir(f"{merged}/whole")
    os.mkdir(f"{merged}/whole")  # opaque: nothing of the lower one
    os.setxattr(f"{merged}/changed", "user.note", b"value")
    with open(f"{merged}/new", "w") as file:
        file.write(Path(f"{merged}/changed").read_text())
    names = sorted(os.path.relpath(os.path.join(at, name), merged)
                   for at, dirs, files in os.walk(merged) for name in (*dirs, *files))  # fmt: skip
    return Path(f"{merged}/new").read_text(), names


@pytest.mark.parametrize("cache", CACHES)
def test_the_upper_layer_of_an_overlay(tmp_path: Path, kernel_mount: Callable[..., KernelMount], cache: str) -> None:
    lower, merged, upper = tmp_path / "lower", tmp_path / "merged", tmp_path / "shared" / "upper"
    for directory in (lower, merged, lower / "sub", lower / "whole"):
        directory.mkdir()
    for name in ("gone", "changed", "moved", "sub/inner"):
        (lower / name).write_text(name)
    share = kernel_mount(cache=cache)
    text, names = share.call(overlay, str(share.path), str(lower), str(merged))
    assert text == "changed and more"
    assert names == ["changed", "new", "sub", "sub/moved", "whole"]
    for name in ("gone", "moved", "sub/inner"):
        status = os.lstat(upper / name)
        assert stat.S_ISCHR(status.st_mode) and status.st_rdev == 0, f"{name} is not a whiteout"
    assert os.getxattr(upper / "whole", "trusted.overlay.opaque") == b"y"
    assert os.getxattr(upper / "changed", "user.note") == b"value"


def whiteout(path: str, uid: int) -> None:
    """A user leaves a whiteout behind."""
    os.chdir(path)
    os.setegid(uid)
    os.seteuid(uid)
    try:
        os.close(os.open("a", os.O_CREAT | os.O_WRONLY))
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.renameat2(-100, b"a", -100, b"b", RENAME_WHITEOUT) == 0
    finally:
        os.seteuid(0)
        os.setegid(0)


def test_a_whiteout_is_its_makers(tmp_path: Path, kernel_mount: Callable[..., KernelMount]) -> None:
    share = kernel_mount()
    share.call(whiteout, str(share.path), 1234)
    status = os.lstat(tmp_path / "shared" / "a")
    assert (status.st_mode, status.st_rdev, status.st_uid, status.st_gid) == (stat.S_IFCHR, 0, 1234, 1234)
    assert os.lstat(tmp_path / "shared" / "b").st_uid == 1234
