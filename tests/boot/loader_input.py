# SPDX-License-Identifier: Apache-2.0
"""One fuzz input: bytes are read as a kernel file and options, loaded, and what must hold is checked.

Shared by the coverage-guided fuzzer (tests/fuzz/fuzz_loaders.py), the properties beside it and the replay
of what they found (tests/regressions/test_loaders.py), so that a finding stays a finding.
"""

from __future__ import annotations

import os
import struct

from typing_extensions import Buffer

from boot import layout
from boot.load import Loaded, load, probe
from tests.boot.kernel_images import MIB, Phdr, bzimage, compress, elf, note, pvh_note
from vmm.errors import ConfigError
from vmm.memory import GuestMemory

RAM = 8 * MIB
METHODS = ("gzip", "xz", "lzma", "bzip2", "zstd", "lz4")
# Numbers at which something turns over.
EDGES = (
    0, 1, 3, 4, 8, 0x40, 0x7F, 0xFF, 0x1F1, 0x200, 0xFFF, 0x1000, 0x7000, 0x8000, 0x9FC00,
    MIB - 1, MIB, MIB + 1, 2 * MIB, RAM - 4096, RAM - 1, RAM, RAM + 1, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF,
    1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - RAM, (1 << 64) - 4096, (1 << 64) - 1,
)  # fmt: skip


class Bytes:
    """The input, consumed from the front; zeros when it is used up."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def take(self, size: int) -> bytes:
        taken, self.data = self.data[:size], self.data[size:]
        return taken.ljust(size, b"\0")

    def byte(self, below: int = 256) -> int:
        return self.take(1)[0] % below

    def number(self, bits: int) -> int:
        """An edge, an edge and a little, or any number."""
        how = self.byte()
        if how < 128:
            value = EDGES[how % len(EDGES)]
        elif how < 192:
            value = EDGES[how % len(EDGES)] + self.take(1)[0] - 128
        else:
            value = int.from_bytes(self.take(bits // 8), "little")
        return value & ((1 << bits) - 1)

    def maybe(self, bits: int) -> int | None:
        return self.number(bits) if self.byte() & 1 else None


class Watched(GuestMemory):
    """Guest memory that notes each stretch it was written at."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.writes: list[tuple[int, int]] = []

    def slice(self, gpa: int, size: int) -> memoryview:
        view = super().slice(gpa, size)
        self.writes.append((gpa, gpa + size))
        return view

    def write(self, gpa: int, data: Buffer) -> None:
        super().write(gpa, data)
        self.writes.append((gpa, gpa + len(memoryview(data))))


def image(source: Bytes) -> bytes:
    """Build the kernel file that the input describes."""
    match source.byte(6):
        case 0:
            return source.data
        case 1:
            return _elf(source)
        case 2:
            return _bzimage(source, source.data)
        case 3:
            method = METHODS[source.byte(len(METHODS))]
            return _bzimage(source, compress(method, _elf(source)))
        case 4:
            method = METHODS[source.byte(len(METHODS))]
            return bzimage(compress(method, source.data), init_size=RAM // 2, pref_address=2 * MIB)
        case _:
            notes = Phdr(kind=4, data=source.data, align=source.byte(9))
            return elf([Phdr(data=b"\xf4" * 16), notes], bits=32 + 32 * source.byte(2))


def _elf(source: Bytes) -> bytes:
    phdrs = []
    for _ in range(source.byte(5)):
        kind = (1, 1, 1, 4, 3, 6)[source.byte(6)]
        data = source.take(source.byte(64))
        if kind == 4 and source.byte(4):
            data = pvh_note(source.number(32)) + note(b"Linux", 0x101, data)
        if source.byte(8):  # mostly something that can be loaded
            paddr = MIB + 4096 * source.byte()
            phdrs.append(Phdr(kind, paddr, data, len(data) + source.byte()))
        else:
            phdrs.append(
                Phdr(
                    kind, source.number(64), data, source.maybe(64), source.maybe(64), source.byte(17),
                    source.maybe(64), source.maybe(64),
                )
            )  # fmt: skip
    bits = 32 if source.byte(4) == 0 else 64
    try:
        return elf(
            phdrs,
            bits=bits,
            entry=phdrs[0].paddr if phdrs and source.byte(8) else source.number(bits),
            kind=source.byte(5) if source.byte(8) == 0 else 2,
            phnum=source.maybe(16) if source.byte(16) == 0 else None,
            phoff=source.maybe(bits) if source.byte(16) == 0 else None,
        )
    except struct.error:  # a 64-bit number in a 32-bit file
        return elf([])


def _bzimage(source: Bytes, payload: bytes) -> bytes:
    broken = source.byte(4) == 0
    return bzimage(
        payload,
        setup_sects=source.byte(8),
        initrd_addr_max=source.number(32) if broken else 0x7FFF_FFFF,
        kernel_alignment=source.number(32) if broken else 1 << source.byte(32),
        relocatable=source.byte(2),
        cmdline_size=source.number(32),
        payload_offset=0x240 + source.byte(16),
        payload_length=source.maybe(32) if broken else None,
        pref_address=source.number(64) if broken else 2 * MIB,
        init_size=source.number(32) if broken else RAM // 2,
        syssize=source.maybe(32) if broken else None,
    )


def run(data: bytes) -> Loaded | None:
    """Load what the input describes; return what was loaded, None where it was refused as it should be.

    :raises AssertionError: when something that must hold does not; any other exception is a finding too
    """
    source = Bytes(data)
    flags = source.byte()
    protocol = ("auto", "auto", "linux64", "pvh")[flags & 3]
    unpack = ("always", "auto", "always", "never")[flags >> 2 & 3]
    cmdline = "x" * source.number(16) if flags & 16 else "console=ttyS0"
    initrd_size = source.number(32) if flags & 32 else 0
    kernel = os.memfd_create("kernel")
    initrd = os.memfd_create("initrd")
    try:
        os.write(kernel, image(source))
        os.ftruncate(initrd, initrd_size)
        with Watched(RAM) as memory:
            try:
                probe(f"/proc/self/fd/{kernel}").needs_ring0  # noqa: B018 - reading it is the point
                loaded = load(
                    memory, f"/proc/self/fd/{kernel}", cmdline=cmdline, protocol=protocol, unpack=unpack,
                    initrd_path=f"/proc/self/fd/{initrd}" if flags & 32 else None,
                )  # fmt: skip
            except ConfigError as error:
                assert str(error) and "\n" not in str(error)
                _check_written(memory, None)
                return None
            _check_written(memory, loaded)
            _check(memory, loaded, initrd_size)
            return loaded
    finally:
        os.close(kernel)
        os.close(initrd)


def _check_written(memory: Watched, loaded: Loaded | None) -> None:
    """What was written into the areas of the boot is the loader's; all else the kernel's and the initrd's."""
    own = [
        (layout.PVH_START_INFO, layout.PVH_END),
        (layout.ZERO_PAGE, layout.ZERO_PAGE_END),
        (layout.CMDLINE, layout.CMDLINE_END),
    ]
    for start, end in memory.writes:
        assert 0 <= start <= end <= RAM
        inside = [area for area in own if area[0] <= start and end <= area[1]]
        if inside:
            continue
        for name, low, high in layout.BOOT_AREAS:
            assert end <= low or high <= start, f"{start:#x}..{end:#x} written over the {name}"
        if loaded is not None:
            spans = [loaded.kernel, loaded.initrd]
            assert any(at <= start and end <= at + size for at, size in spans), f"{start:#x}..{end:#x} is nobody's"


def _check(memory: GuestMemory, loaded: Loaded, initrd_size: int) -> None:
    start, size = loaded.kernel
    assert start <= loaded.entry < start + size
    assert start + size <= RAM
    assert sum(loaded.initrd) <= RAM
    assert loaded.protocol in ("linux64", "pvh")
    if loaded.protocol == "pvh":
        assert memory.read(layout.PVH_START_INFO, 4) == struct.pack("<I", 0x336E_C578)
    else:
        assert memory.read(layout.ZERO_PAGE + 0x202, 4) == b"HdrS"
    at, size = loaded.initrd
    assert size == initrd_size
    if size:
        assert at % 4096 == 0 and layout.HIMEM <= at and at + size <= RAM
