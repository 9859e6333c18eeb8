# SPDX-License-Identifier: Apache-2.0
"""Real kernels: Debian's, those that are in the cache already, and this host's own."""

from __future__ import annotations

import bz2
import lzma
import struct
import zlib
from pathlib import Path

import pytest

from boot.bzimage import parse
from boot.load import load, probe
from boot.payload import compression
from boot.source import Source
from vmm.images import apt, host
from vmm.lab.image import KERNEL_PACKAGE
from vmm.memory import GuestMemory

# Beside the one that is fetched: this host's, and what is in the cache for other reasons.
OTHERS = sorted({*(host.cache_root() / "debs").glob("*/boot/vmlinuz-*"), *Path("/boot").glob("vmlinuz-*")})


@pytest.fixture(params=[None, *filter(Path.is_file, OTHERS)], ids=lambda path: path.name if path else "debian")
def kernel(request: pytest.FixtureRequest) -> Path:
    found: Path | None = request.param
    return found or apt.kernel_of(apt.package(KERNEL_PACKAGE).tree)[0]


def unpacked(path: Path) -> bytes:
    """The ELF kernel inside, by other means than the loader's."""
    image = path.read_bytes()
    offset, length = struct.unpack_from("<II", image, 0x248)
    at = (image[0x1F1] + 1) * 512 + offset
    payload = image[at : at + length]
    with Source("kernel", path) as source:
        method = compression(source, parse(source))
    match method:
        case "gzip":
            return zlib.decompress(payload, 31)
        case "xz" | "lzma":
            return lzma.LZMADecompressor().decompress(payload)
        case "bzip2":
            return bz2.BZ2Decompressor().decompress(payload)
        case "zstd":
            import zstandard

            return zstandard.ZstdDecompressor().decompressobj().decompress(payload)
        case "lz4":
            from lz4 import block

            out, at = b"", 4
            while at < len(payload) - 4:
                size = int.from_bytes(payload[at : at + 4], "little")
                out += block.decompress(payload[at + 4 : at + 4 + size], uncompressed_size=8 << 20)
                at += 4 + size
            return out
    raise AssertionError("a real kernel has a compression that we know")


def zero(memory: GuestMemory, gpa: int, size: int) -> bool:
    return memory.read(gpa, size).count(0) == size


def test_its_headers(kernel: Path) -> None:
    kind = probe(kernel)
    assert (kind.kind, kind.needs_ring0) == ("bzimage", True)


def test_packed(kernel: Path) -> None:
    with GuestMemory(256 << 20) as memory:
        loaded = load(memory, kernel, cmdline="console=ttyS0", unpack="never")
        image = kernel.read_bytes()
        body = image[(image[0x1F1] + 1) * 512 :]
        assert loaded.entry == loaded.kernel[0] + 0x200
        assert memory.read(loaded.kernel[0], len(body)) == body


def test_unpacked_every_segment_is_in_its_place_and_nothing_else_is_written(kernel: Path) -> None:
    elf = unpacked(kernel)
    phoff, phnum = struct.unpack_from("<Q", elf, 32)[0], struct.unpack_from("<H", elf, 56)[0]
    with GuestMemory(256 << 20) as memory:
        loaded = load(memory, kernel, cmdline="console=ttyS0", unpack="always")
        assert loaded.entry == struct.unpack_from("<Q", elf, 24)[0]
        at = 1 << 20
        for index in range(phnum):
            kind, _, offset, _, paddr, filesz, memsz, _ = struct.unpack_from("<IIQQQQQQ", elf, phoff + 56 * index)
            if kind != 1:
                continue
            assert zero(memory, at, paddr - at), "between the segments there is nothing"
            assert memory.read(paddr, filesz) == elf[offset : offset + filesz]
            assert zero(memory, paddr + filesz, memsz - filesz), ".bss is zero"
            at = paddr + memsz
        assert at == sum(loaded.kernel)
        assert zero(memory, at, (256 << 20) - at)


def test_pvh_finds_the_note_of_a_kernel_that_has_one(kernel: Path) -> None:
    config = Path(str(kernel).replace("vmlinuz-", "config-"))
    if not config.is_file() or "CONFIG_PVH=y" not in config.read_text():
        pytest.skip(f"{kernel.name} was built without PVH, or its configuration is not beside it")
    with GuestMemory(256 << 20) as memory:
        loaded = load(memory, kernel, protocol="pvh")
        assert loaded.protocol == "pvh"
        start, size = loaded.kernel
        assert start < loaded.entry < start + size
        assert memory.read(loaded.entry, 1) == b"\xfc", "the entry begins with cld"
