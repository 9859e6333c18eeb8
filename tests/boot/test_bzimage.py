# SPDX-License-Identifier: Apache-2.0
"""bzImage: the setup header validated field by field, and where the kernel goes."""

from __future__ import annotations

import ctypes
import os
import tracemalloc
from typing import Any

import pytest

from boot import payload
from boot.bzimage import parse as bzimage_header
from boot.load import load, probe
from boot.source import Source
from tests.boot.conftest import KernelFile, refused
from tests.boot.kernel_images import MIB, Phdr, bzimage, compress, elf, vmlinux
from vmm.errors import ConfigError
from vmm.memory import GuestMemory


def zlib_stored(count: int) -> bytes:
    """A gzip stream of so many stored blocks without a byte."""
    return b"\x1f\x8b\x08\0\0\0\0\0\0\x03" + b"\0\0\0\xff\xff" * count + b"\x01\0\0\xff\xff" + bytes(8)


METHODS = ("gzip", "xz", "lzma", "bzip2", "zstd", "lz4")


def test_a_kernel_is_loaded_at_its_preferred_address(memory: GuestMemory, kernel: KernelFile) -> None:
    image = bzimage(b"\xcc" * 512)
    loaded = load(memory, kernel(image), unpack="never")
    assert (loaded.kind, loaded.protocol, loaded.needs_ring0) == ("bzimage", "linux64", True)
    assert loaded.entry == 16 * MIB + 0x200
    assert loaded.kernel == (16 * MIB, 8 * MIB)
    assert memory.read(16 * MIB, len(image) - 1024) == image[1024:]


def test_setup_sects_of_0_means_4(memory: GuestMemory, kernel: KernelFile) -> None:
    image = bzimage(setup_sects=0)
    load(memory, kernel(image), unpack="never")
    assert memory.read(16 * MIB, 1024) == image[5 * 512 : 5 * 512 + 1024].ljust(1024, b"\0")


def test_a_preferred_address_below_1_mib_is_moved_up_where_the_kernel_can_be(
    memory: GuestMemory, kernel: KernelFile
) -> None:
    loaded = load(memory, kernel(bzimage(pref_address=0x8000, kernel_alignment=0x20_0000)), unpack="never")
    assert loaded.entry == 2 * MIB + 0x200
    text = refused(memory, kernel(bzimage(pref_address=0x8000, relocatable=0)))
    assert "at 0x8000, below 1 MiB, and is not relocatable" in text


@pytest.mark.parametrize("release", [b"6.1.0-test", b""])
def test_a_bzimage_is_a_linux(kernel: KernelFile, release: bytes) -> None:
    kind = probe(kernel(bzimage(compress("xz", vmlinux()), release=release)))
    assert (kind.kind, kind.needs_ring0) == ("bzimage", True)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"loadflags": 0}, "is a zImage (boot protocol 2.15)"),
        ({"version": 0x20B}, "has boot protocol 2.11; the 64-bit entry needs 2.12"),
        ({"version": 0x200}, "has boot protocol 2.00"),
        ({"xloadflags": 0}, "is a 32-bit kernel"),
        ({"xloadflags": 0xFFFE}, "is a 32-bit kernel"),
        ({"boot_flag": 0}, "lacks the setup header"),
        ({"kernel_alignment": 0}, "kernel_alignment 0x0"),
        ({"kernel_alignment": 0x30_0000}, "kernel_alignment 0x300000"),
        ({"setup_sects": 255, "start": b"MZ"}, ""),
        ({"syssize": 0xFFFF_FFFF}, "is truncated: the kernel ends at byte 68719477"),
        ({"payload_length": 0xFFFF_FFFF}, "is truncated: the payload ends at byte"),
        ({"payload_offset": 0x240, "payload_length": 1 << 20}, "is truncated: the payload"),
        (
            {"init_size": 0xFFFF_FFFF},
            "needs 4194303 KiB at 0x1000000, not all of it below 3 GiB",
        ),
        ({"pref_address": 2**64 - 1}, "not all of it below 3 GiB"),
        ({"pref_address": 1 << 32}, "needs 8192 KiB at 0x100000000, not all of it below 3 GiB"),
        (
            {"pref_address": 60 * MIB},
            "needs 8192 KiB at 0x3c00000, so 68 MiB of guest memory or more; there are 64",
        ),
    ],
)
def test_headers_that_cannot_be(memory: GuestMemory, kernel: KernelFile, options: dict[str, Any], found: str) -> None:
    image = bzimage(**options)
    if options.get("setup_sects") == 255:
        load(memory, kernel(image), unpack="never")  # the most that fits in the field is legal
        image, found = image[: 256 * 512], "its setup ends at byte 131072"
    assert found in refused(memory, kernel(image))


def test_truncated_at_every_byte(memory: GuestMemory, kernel: KernelFile) -> None:
    image = bzimage(b"\xcc" * 64)
    for size in range(1, len(image) - 15):
        text = refused(memory, kernel(image[:size]))
        if size >= 0x206:
            assert "truncated" in text


def test_a_signature_behind_the_kernel_is_no_harm(memory: GuestMemory, kernel: KernelFile) -> None:
    image = bzimage() + b"signature" * 100
    assert load(memory, kernel(image), unpack="never").kernel == (16 * MIB, 8 * MIB)


# Unpacking on the host.


@pytest.mark.parametrize("method", METHODS)
def test_every_compression_gives_the_kernel_inside(memory: GuestMemory, kernel: KernelFile, method: str) -> None:
    text = bytes(range(256)) * 1000
    loaded = load(memory, kernel(bzimage(compress(method, vmlinux(text) + b"relocations"))))
    assert (loaded.unpacked, loaded.protocol, loaded.entry) == (method, "linux64", 16 * MIB)
    assert loaded.kernel == (16 * MIB, 2 * MIB + 256 + 8192)
    assert memory.read(16 * MIB, len(text)) == text
    assert memory.read(18 * MIB, 256 + 8192) == b"data" * 64 + bytes(8192)


def test_a_kernel_of_several_lz4_blocks(kernel: KernelFile) -> None:
    text = os.urandom(20 * MIB)  # three blocks, of which none packs
    image = elf([Phdr(data=text, paddr=16 * MIB)], entry=16 * MIB)
    with GuestMemory(64 * MIB) as memory:
        load(memory, kernel(bzimage(compress("lz4", image), init_size=40 * MIB)), unpack="always")
        assert memory.read(16 * MIB, len(text)) == text


def test_pvh_from_a_bzimage(memory: GuestMemory, kernel: KernelFile) -> None:
    path = kernel(bzimage(compress("gzip", vmlinux())))
    loaded = load(memory, path, protocol="pvh")
    assert (loaded.protocol, loaded.entry) == ("pvh", 16 * MIB + 0x10)
    assert "needs it unpacked" in refused(memory, path, protocol="pvh", unpack="never")


def test_a_compression_that_is_unknown_is_left_to_the_guest(memory: GuestMemory, kernel: KernelFile) -> None:
    for packed in (b"\x89LZO\0\r\n\x1a\n" + bytes(64), b"no compression" * 8, b""):
        path = kernel(bzimage(packed))
        assert load(memory, path).unpacked == ""
        assert "cannot be unpacked" in refused(memory, path, unpack="always")


@pytest.mark.parametrize(("method", "library"), [("lz4", "liblz4.so.1"), ("zstd", "libzstd.so.1")])
def test_without_the_library_the_guest_unpacks(
    memory: GuestMemory, kernel: KernelFile, method: str, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    path = kernel(bzimage(compress(method, vmlinux())))
    monkeypatch.setattr(ctypes, "CDLL", absent)
    loaded = load(memory, path)
    assert (loaded.unpacked, loaded.entry) == ("", 16 * MIB + 0x200)
    assert f"cannot be unpacked: {library} is not installed" in refused(memory, path, unpack="always")


@pytest.mark.parametrize("method", METHODS)
def test_a_payload_cut_short_or_corrupt(memory: GuestMemory, kernel: KernelFile, method: str) -> None:
    good = compress(method, vmlinux(bytes(range(256)) * 100))
    size = good[-4:]
    for cut in (20, len(good) // 2, len(good) - 8):
        text = refused(memory, kernel(bzimage(good[:cut] + size)), unpack="always")
        assert f"holds a {method} payload that" in text
    for at in range(12, len(good) - 4, 97):
        bad = bytearray(good)
        bad[at] ^= 0xFF
        try:
            load(memory, kernel(bzimage(bytes(bad))), unpack="always")
        except ConfigError as error:
            assert f"holds a {method} payload that" in str(error)


@pytest.mark.parametrize("method", METHODS)
def test_a_payload_that_swells_beyond_what_it_declares(kernel: KernelFile, method: str) -> None:
    bomb = bytearray(compress(method, vmlinux() + bytes(8 * MIB)))
    bomb[-4:] = (2 * MIB).to_bytes(4, "little")
    with GuestMemory(128 * MIB) as memory:
        text = refused(memory, kernel(bzimage(bytes(bomb))), unpack="always")
    assert "unpacks to more than the 2097152 bytes it declares" in text


@pytest.mark.parametrize("method", METHODS)
def test_a_payload_that_declares_more_than_the_kernel_may_take(
    memory: GuestMemory, kernel: KernelFile, method: str
) -> None:
    bomb = bytearray(compress(method, vmlinux()))
    bomb[-4:] = b"\xff\xff\xff\xff"
    text = refused(memory, kernel(bzimage(bytes(bomb))), unpack="always")
    assert f"unpacks to 4294967295 bytes, more than the {8 * MIB} that it may take" in text


def test_an_unpacked_kernel_is_validated_like_any_other(memory: GuestMemory, kernel: KernelFile) -> None:
    low = elf([Phdr(data=b"x", paddr=0x7000)], entry=0x7000)
    for image, found in (
        (low, "unpacks to a file that has segment 0 (0x7000 to 0x7001) on the zero page"),
        (b"not an ELF file" * 100, "unpacks to a file that is not a valid ELF file"),
        (b"\x7fELF", "unpacks to a file that has no room for the ELF identification"),
        (elf([Phdr(data=b"x", offset=1 << 40)]), "unpacks to a file that is truncated"),
        (elf([Phdr(data=b"x", paddr=1 << 40)], entry=1 << 40), "outside guest memory"),
    ):
        assert found in refused(memory, kernel(bzimage(compress("gzip", image))), unpack="always")


@pytest.mark.parametrize("size", [0, 1])
def test_lz4_blocks_of_nothing_are_refused_at_the_first(memory: GuestMemory, kernel: KernelFile, size: int) -> None:
    block = b"\x01\0\0\0\0" if size == 0 else b"\x02\0\0\0\x10x"
    packed = b"\x02\x21\x4c\x18" + block * 100_000 + MIB.to_bytes(4, "little")
    text = refused(memory, kernel(bzimage(packed)), unpack="always")
    assert f"a block of {size} bytes, not 8388608, before the last" in text


@pytest.mark.parametrize("method", METHODS)
def test_nothing_in_a_payload_makes_many_small_steps(kernel: KernelFile, method: str) -> None:
    """As many turns of the loop as MiB go in and out, and a few; whatever the payload is made of."""
    streams = {
        "gzip": lambda: zlib_stored(200_000),
        "zstd": lambda: b"\x28\xb5\x2f\xfd\x00\x58" + bytes(3) * 300_000 + b"\x01\0\0",
        "lz4": lambda: compress("lz4", bytes(32 * MIB))[:-4],
    }
    packed = streams.get(method, lambda: compress(method, bytes(16 * MIB))[:-4])()
    size = b"" if method == "gzip" else bytes(4)
    with Source("kernel", kernel(bzimage(packed + size))) as source:
        setup = bzimage_header(source)
        assert payload.compression(source, setup) == method
        steps, out = 0, 0
        for chunk in payload.chunks(method, source, setup):
            steps, out = steps + 1, out + len(chunk)
    assert steps <= (len(packed) >> 20) + (out >> 20) + 3


@pytest.mark.parametrize("method", ["gzip", "xz", "bzip2"])
def test_a_payload_that_swells_costs_no_host_memory(kernel: KernelFile, method: str) -> None:
    """32 MiB of zeros behind the kernel, all of them declared: chunks come and go."""
    path = kernel(bzimage(compress(method, vmlinux() + bytes(32 * MIB)), init_size=64 * MIB))
    with GuestMemory(128 * MIB) as memory:
        tracemalloc.start()
        try:
            load(memory, path, unpack="always")
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < 12 * MIB
