# SPDX-License-Identifier: Apache-2.0
"""The loader's entry: files that are not kernels, where the initrd goes, options."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec

import pytest

from boot import layout
from boot.load import load, probe
from tests.boot.kernel_images import MIB, Phdr, bzimage, compress, elf, pvh_elf, vmlinux
from vmm.errors import ConfigError, HostError
from vmm.memory import GuestMemory

Arguments = ParamSpec("Arguments")


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    path = tmp_path / "kernel"
    path.write_bytes(pvh_elf())
    return path


def refused(
    field: str, path: str | Path, call: Callable[Arguments, object], *args: Arguments.args, **options: Arguments.kwargs
) -> str:
    with pytest.raises(ConfigError) as error:
        call(*args, **options)
    text = str(error.value)
    assert "\n" not in text
    assert (error.value.field, error.value.value) == (field, str(path))
    return text


def unusable(tmp_path: Path) -> dict[str, str]:
    """Paths that no file can be read from, with a word of what is said."""
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "socket"))
    server.close()
    return {
        "missing": "no such file",
        "empty": "is empty",
        ".": "is a directory",
        "fifo": "not a regular file",
        "socket": "no such device or address",
        "loop": "too many levels of symbolic links",
        "empty/x": "not a directory",
        "x" * 300: "file name too long",
    }


def test_paths_that_are_no_files(memory: GuestMemory, kernel: Path, tmp_path: Path) -> None:
    for name, found in unusable(tmp_path).items():
        path = tmp_path / name
        assert found in refused("kernel", path, load, memory, path)
        assert found in refused("kernel", path, probe, path)
        assert found in refused("initrd", path, load, memory, kernel, initrd_path=path)
    assert "not a path" in refused("kernel", "a\0b", load, memory, "a\0b")


def test_a_file_that_may_not_be_read(memory: GuestMemory, kernel: Path) -> None:
    kernel.chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # root may read everything
    try:
        assert "permission denied" in refused("kernel", kernel, load, memory, kernel)
    finally:
        os.seteuid(user)


def test_what_the_host_fails_at_is_not_the_users_mistake(
    memory: GuestMemory, kernel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pread", broken)
    with pytest.raises(HostError, match=r"read kernel .*Input/output error"):
        load(memory, kernel)
    monkeypatch.undo()
    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(HostError, match=r"read kernel .*Input/output error"):
        load(memory, kernel)


def arm64() -> bytes:
    image = bytearray(4096)
    image[0x38:0x3C] = b"ARM\x64"
    return bytes(image)


def riscv() -> bytes:
    image = bytearray(4096)
    image[0x30:0x38] = b"RISCV\0\0\0"
    return bytes(image)


def boot_sector() -> bytes:
    return bytes(510) + b"\x55\xaa" + bytes(4096)


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"\x1f\x8b\x08" + bytes(600), "compressed by gzip"),
        (b"\xfd7zXZ\0" + bytes(600), "compressed by xz"),
        (b"\x28\xb5\x2f\xfd" + bytes(600), "compressed by zstd"),
        (b"\x02\x21\x4c\x18" + bytes(600), "compressed by lz4"),
        (b"BZh9" + bytes(600), "compressed by bzip2"),
        (b"070701" + bytes(600), "an initrd, not a kernel"),
        (b"QFI\xfb" + bytes(600), "qcow2"),
        (b"!<arch>\ndebian-binary" + bytes(600), "archive"),
        (b"#!/bin/sh\n", "script"),
        (b"\x27\x05\x19\x56" + bytes(600), "U-Boot"),
        (arm64(), "arm64 Image"),
        (riscv(), "RISC-V Image"),
        (b"MZ" + bytes(4096), "EFI program without a Linux setup header"),
        (boot_sector(), "boot sector"),
        (b"hello, world\n", "neither an ELF kernel nor a bzImage"),
        (bytes(1 << 20), "neither an ELF kernel nor a bzImage"),
        (b"\x7fELF", "truncated: the ELF identification ends at byte 16, the file at 4"),
        (b"\0", "neither"),
    ],
)
def test_files_that_are_no_kernels(memory: GuestMemory, tmp_path: Path, data: bytes, found: str) -> None:
    path = tmp_path / "kernel"
    path.write_bytes(data)
    assert found in refused("kernel", path, load, memory, path)
    assert found in refused("kernel", path, probe, path)


def test_the_initrd_lies_as_high_as_it_can(memory: GuestMemory, kernel: Path, tmp_path: Path) -> None:
    initrd = tmp_path / "initrd"
    initrd.write_bytes(os.urandom(10_000))
    loaded = load(memory, kernel, initrd_path=initrd)
    assert loaded.initrd == (64 * MIB - 12288, 10_000)
    assert memory.read(*loaded.initrd) == initrd.read_bytes()


def test_the_initrd_stays_below_the_hole(kernel: Path, tmp_path: Path) -> None:
    initrd = tmp_path / "initrd"
    initrd.write_bytes(b"x" * 4097)
    with GuestMemory(6 << 30) as memory:
        assert load(memory, kernel, initrd_path=initrd).initrd == ((3 << 30) - 8192, 4097)


def test_the_initrd_obeys_initrd_addr_max(memory: GuestMemory, tmp_path: Path) -> None:
    path, initrd = tmp_path / "kernel", tmp_path / "initrd"
    initrd.write_bytes(b"x" * 4096)
    path.write_bytes(bzimage(initrd_addr_max=0x37F_FFFF))
    assert load(memory, path, initrd_path=initrd).initrd == (0x37F_F000, 4096)


def test_the_initrd_makes_way_for_the_kernel(memory: GuestMemory, tmp_path: Path) -> None:
    """The kernel ends at the top of memory, so the initrd goes below it, and further where that is taken."""
    path, initrd = tmp_path / "kernel", tmp_path / "initrd"
    initrd.write_bytes(b"i" * 4096)
    image = elf([Phdr(data=b"\xf4", paddr=63 * MIB, memsz=MIB), Phdr(data=b"a", paddr=62 * MIB, memsz=MIB - 4095)])
    path.write_bytes(image.replace(struct.pack("<Q", MIB), struct.pack("<Q", 63 * MIB), 1))
    loaded = load(memory, path, initrd_path=initrd)
    assert loaded.initrd == (62 * MIB - 4096, 4096)
    assert sum(loaded.kernel) == 64 * MIB


def test_an_initrd_that_does_not_fit(memory: GuestMemory, tmp_path: Path) -> None:
    path, initrd = tmp_path / "kernel", tmp_path / "initrd"
    path.write_bytes(vmlinux())
    with open(initrd, "wb") as file:
        file.truncate(46 * MIB)
    text = refused("initrd", initrd, load, memory, path, initrd_path=initrd)
    assert "does not fit: 47104 KiB beside a kernel of" in text
    assert "below 64 MiB" in text
    with open(initrd, "wb") as file:
        file.truncate(0xFFFF_FFFF)
    assert "does not fit" in refused("initrd", initrd, load, memory, path, initrd_path=initrd)


def test_the_command_line_is_bounded_by_the_kernels_own_limit(memory: GuestMemory, tmp_path: Path) -> None:
    path = tmp_path / "kernel"
    path.write_bytes(bzimage(cmdline_size=255))
    load(memory, path, cmdline="x" * 255)
    with pytest.raises(ConfigError, match="is 256 bytes long; this kernel takes 255"):
        load(memory, path, cmdline="x" * 256)
    path.write_bytes(bzimage(cmdline_size=0xFFFF_FFFF))
    room = layout.CMDLINE_END - layout.CMDLINE - 1
    load(memory, path, cmdline="x" * room)
    assert memory.read(layout.CMDLINE_END - 1, 1) == b"\0"
    with pytest.raises(ConfigError, match=f"takes {room}"):
        load(memory, path, cmdline="x" * (room + 1))


def test_an_elf_kernel_takes_what_linux_takes(memory: GuestMemory, kernel: Path) -> None:
    load(memory, kernel, cmdline="x" * 2047)
    with pytest.raises(ConfigError, match="cmdline"):
        load(memory, kernel, cmdline="x" * 2048)


def test_no_descriptor_is_left_open(memory: GuestMemory, kernel: Path, tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    load(memory, kernel, initrd_path=kernel)
    for bad in ("missing", "."):
        with pytest.raises(ConfigError):
            load(memory, tmp_path / bad)
    with pytest.raises(ConfigError):
        load(memory, kernel, cmdline="\0")
    assert os.listdir("/proc/self/fd") == before


def test_a_file_that_shrinks_while_it_is_read(
    memory: GuestMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "kernel"
    path.write_bytes(elf([Phdr(data=b"x" * 65536)]))
    real = os.preadv

    def shrunk(fd: int, buffers: list[memoryview], offset: int) -> int:
        os.truncate(path, 8192)
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", shrunk)
    assert "truncated" in refused("kernel", path, load, memory, path)


@pytest.mark.parametrize("unpack", ["always", "never"])
def test_a_host_that_reads_a_little_at_a_time(
    memory: GuestMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unpack: str
) -> None:
    """As 9p and FUSE file systems do: some of the bytes, and the rest when asked again. The end is 0 bytes."""
    elf_path, path, initrd = tmp_path / "elf", tmp_path / "bzimage", tmp_path / "initrd"
    image = vmlinux(os.urandom(300_000))
    elf_path.write_bytes(image)
    path.write_bytes(bzimage(compress("gzip", image)))
    initrd.write_bytes(os.urandom(100_000))
    whole = [probe(file).needs_ring0 for file in (elf_path, path)]
    with GuestMemory(64 * MIB) as other:
        load(other, path, initrd_path=initrd, unpack=unpack)
        expected = other.read(16 * MIB, 8 * MIB)
    pread, preadv = os.pread, os.preadv
    monkeypatch.setattr(os, "pread", lambda fd, size, offset: pread(fd, min(size, 300), offset))
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: preadv(fd, [views[0][:4999]], offset))
    assert [probe(file).needs_ring0 for file in (elf_path, path)] == whole
    loaded = load(memory, path, initrd_path=initrd, unpack=unpack)
    assert memory.read(16 * MIB, 8 * MIB) == expected
    assert memory.read(*loaded.initrd) == initrd.read_bytes()
