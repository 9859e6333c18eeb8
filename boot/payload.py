# SPDX-License-Identifier: Apache-2.0
"""Unpack the kernel inside a bzImage on the host, straight into guest memory.

The unpacked kernel runs at the address it was linked at: KASLR needs the relocations that only the kernel's
own unpacker applies (``unpack="never"``).

Why: writing fresh memory is cheaper from the host than by a guest, whose every first touch of a page is an
exit. From process start to the kernel's first line, KVM in the lab: lz4 (Debian 6.1) 0.7 s instead of 2.2,
gzip (Alpine 6.18) 2.2 instead of 4.0, xz (Debian 6.1) 6.3 instead of 7.6.

Nothing is trusted: output is made in chunks, so that a payload that swells costs no host memory, and no
more time than filling guest RAM; each turn of a loop here takes or gives 1 MiB, but for the last. Source:
arch/x86/boot/compressed/Makefile, scripts/Makefile.lib (what follows each format).
"""

from __future__ import annotations

from boot import elf

TYPE_CHECKING = False
if TYPE_CHECKING:
    import bz2
    import ctypes
    import lzma
    import zlib
    from collections.abc import Callable, Iterator

    from boot.bzimage import Setup
    from boot.source import Source
    from vmm.errors import ConfigError
    from vmm.memory import GuestMemory

    Chunk = bytes | memoryview
    Unpacker = bz2.BZ2Decompressor | lzma.LZMADecompressor | zlib._Decompress
    Fail = Callable[[str], ConfigError]

_MAGICS = (
    (b"\x1f\x8b", "gzip"),
    (b"\x02\x21\x4c\x18", "lz4"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\xfd7zXZ\0", "xz"),
    (b"\x5d\0\0", "lzma"),
    (b"BZh", "bzip2"),
    (b"\x89LZO", "lzo"),
)
_IN = 1 << 20
_OUT = 1 << 20
_LZ4_BLOCK = 8 << 20  # what the legacy frame's blocks unpack to, the last one to less
_LZ4_BLOCK_PACKED = _LZ4_BLOCK + _LZ4_BLOCK // 255 + 16
_WINDOW = 128 << 20  # xz and zstd of newer kernels use this much
_ZSTD_WINDOW_LOG_MAX = 100  # ZSTD_d_windowLogMax
_HEADERS = 64 << 10  # the program headers of the kernel lie in here


class Unsupported(Exception):
    """This payload cannot be unpacked on this host; the text says why. "auto" then lets the guest do it."""


def compression(source: Source, setup: Setup) -> str:
    """Return the name of the payload's compression, empty if it is not a known one."""
    if setup.payload_length < 16:
        return ""
    head = source.read(setup.payload, 8, "the payload")
    return next((name for magic, name in _MAGICS if head.startswith(magic)), "")


def chunks(name: str, source: Source, setup: Setup) -> Iterator[Chunk]:
    """The bytes of the payload's kernel, which is an ELF file, in order.

    :param name: the result of :func:`compression`
    :returns: an iterator; what it gives is valid until the next, and is not kept. Its user has to bound it: a small
        payload can be a large kernel. A broken payload raises ConfigError on the way.
    :raises Unsupported: for a method without a library here
    """
    opener = _METHODS.get(name)
    if opener is None:
        raise Unsupported(f"no way to unpack {name or 'an unknown compression'} on the host")
    # To what is not gzip, which has it by itself, the build adds the size.
    packed = setup.payload_length - (0 if name == "gzip" else 4)
    return opener(_Input(source, setup.payload, packed), _failing(name, source))


def _failing(name: str, source: Source) -> Fail:
    return lambda problem: source.fail(f"holds a {name} payload that {problem}")


def unpack(name: str, source: Source, setup: Setup, memory: GuestMemory) -> elf.Elf:
    """Unpack the payload's ELF kernel into guest memory, which must be fresh; return its headers and notes.

    :param name: the result of :func:`compression`
    :raises Unsupported: for a method without a library here; nothing was written then
    :raises ConfigError: when the payload is broken, or its kernel does not fit
    """
    packed = chunks(name, source, setup)
    fail = _failing(name, source)
    trailer = source.read(setup.payload + setup.payload_length - 4, 4, "the payload")
    size = int.from_bytes(trailer, "little")
    if size > memory.size or (setup.init_size and size > setup.init_size):
        room = min(memory.size, setup.init_size or memory.size)
        raise fail(f"unpacks to {size} bytes, more than the {room} that it may take")
    chunk = next(packed, b"")
    if len(chunk) < _HEADERS:
        chunk = bytes(chunk)
        for more in packed:
            chunk += more
            if len(chunk) >= _HEADERS:
                break
    found, pieces, notes = _pieces(memoryview(chunk), size, memory, fail)
    at = 0
    while True:
        end = at + len(chunk)
        if end > size:
            raise fail(f"unpacks to more than the {size} bytes it declares")
        view = memoryview(chunk)
        for offset, target in pieces:
            if offset >= end:
                break
            first = max(offset, at)
            last = min(offset + len(target), end)
            if first < last:
                target[first - offset : last - offset] = view[first - at : last - at]
        at = end
        if (following := next(packed, None)) is None:
            break
        chunk = following
    if at != size:
        raise fail(f"ends early: {at} of {size} bytes")
    for data, align in notes:
        found.add_notes(bytes(data), align, _kernel_failing(fail))
    return found


def _kernel_failing(fail: Fail) -> Fail:
    return lambda problem: fail(f"unpacks to a file that {problem}")


def _pieces(
    start: memoryview, size: int, memory: GuestMemory, fail: Fail
) -> tuple[elf.Elf, list[tuple[int, memoryview]], list[tuple[bytearray, int]]]:
    """What an ELF file's headers say, where which of its bytes go, and the notes among them with their alignment.

    :param start: its first bytes, with all headers
    :param size: bytes in the whole file
    """
    fail = _kernel_failing(fail)

    def read(offset: int, size: int, what: str) -> bytes:
        if offset + size > len(start):
            raise fail(f"has no room for {what}: it ends at byte {offset + size}")
        return bytes(start[offset : offset + size])

    found = elf.parse(read, size, fail)
    elf.check_room(found, memory, fail)
    notes = [(bytearray(length), align) for _, length, align in found.note_spans]
    pieces = [(s.offset, memory.slice(s.start, s.filesz)) for s in found.segments if s.filesz]
    pieces += [(span[0], memoryview(data)) for span, (data, _) in zip(found.note_spans, notes, strict=True)]
    return found, sorted(pieces, key=lambda piece: piece[0]), notes


class _Input:
    """The packed bytes, as a file to read once."""

    __slots__ = ("_at", "_source", "left")

    def __init__(self, source: Source, offset: int, size: int) -> None:
        self._source = source
        self._at = offset
        self.left = size

    def read(self, size: int = _IN) -> bytes:
        size = min(size, self.left)
        data = self._source.read(self._at, size, "the payload")
        self._at += size
        self.left -= size
        return data

    def read_into(self, view: memoryview) -> None:
        self._source.read_into(self._at, view, "the payload")
        self._at += len(view)
        self.left -= len(view)


def _library(name: str) -> ctypes.CDLL:
    # By ctypes, not by a package: it unpacks into a buffer of ours, which is five times as fast, and every
    # distribution that has apt, dnf or systemd has these libraries.
    import ctypes

    try:
        return ctypes.CDLL(name)
    except OSError:
        raise Unsupported(f"{name} is not installed") from None


def _buffer(size: int) -> tuple[ctypes.Array[ctypes.c_char], memoryview]:
    """Return ``size`` bytes as C sees them and as Python does; no page of them is touched yet."""
    import ctypes
    import mmap

    view = memoryview(mmap.mmap(-1, size))
    return (ctypes.c_char * size).from_buffer(view), view


def _gzip(packed: _Input, fail: Fail) -> Iterator[Chunk]:
    import zlib

    unpacker = zlib.decompressobj(31)  # 31: with gzip's header and checksum
    return _stream(unpacker, zlib.error, lambda: unpacker.unconsumed_tail or packed.read(), fail)


def _xz(packed: _Input, fail: Fail) -> Iterator[Chunk]:
    import lzma

    unpacker = lzma.LZMADecompressor(lzma.FORMAT_AUTO, memlimit=_WINDOW + (32 << 20))
    return _stream(unpacker, lzma.LZMAError, lambda: packed.read() if unpacker.needs_input else b"", fail)


def _bzip2(packed: _Input, fail: Fail) -> Iterator[Chunk]:
    import bz2

    unpacker = bz2.BZ2Decompressor()
    return _stream(unpacker, OSError, lambda: packed.read() if unpacker.needs_input else b"", fail)


def _stream(unpacker: Unpacker, broken: type[Exception], take: Callable[[], bytes], fail: Fail) -> Iterator[Chunk]:
    while not unpacker.eof:
        data = take()
        try:
            chunk = unpacker.decompress(data, _OUT)
        except broken as error:
            raise fail(f"is broken: {error}") from None
        if not data and not chunk:
            raise fail("is broken: it has no end")
        yield chunk


def _lz4(packed: _Input, fail: Fail) -> Iterator[Chunk]:
    import ctypes

    decompress = _library("liblz4.so.1").LZ4_decompress_safe
    decompress.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int)
    # One pair of buffers for all blocks: to touch the pages of a new one takes longer than to unpack into it.
    block, packed_view = _buffer(_LZ4_BLOCK_PACKED)
    buffer, view = _buffer(_LZ4_BLOCK)
    packed.read(4)  # the magic number
    while packed.left >= 4:
        length = int.from_bytes(packed.read(4), "little")
        if length == 0:  # padding: for Linux, too, the end
            return
        if length > min(packed.left, _LZ4_BLOCK_PACKED):
            raise fail(f"is broken: a block of {length} bytes where {packed.left} are left")
        packed.read_into(packed_view[:length])
        size = decompress(block, buffer, length, _LZ4_BLOCK)
        if size < 0:
            raise fail("is broken: a block does not unpack")
        # Only the last block is short. A file of blocks that give a byte or none would keep us for an hour.
        if size < _LZ4_BLOCK and packed.left >= 4:
            raise fail(f"is broken: a block of {size} bytes, not {_LZ4_BLOCK}, before the last")
        yield view[:size]


def _zstd(packed: _Input, fail: Fail) -> Iterator[Chunk]:
    import ctypes

    class Buffer(ctypes.Structure):  # ZSTD_inBuffer and ZSTD_outBuffer
        _fields_ = (("data", ctypes.c_void_p), ("size", ctypes.c_size_t), ("pos", ctypes.c_size_t))

    zstd = _library("libzstd.so.1")
    zstd.ZSTD_createDCtx.restype = ctypes.c_void_p
    zstd.ZSTD_getErrorName.restype = ctypes.c_char_p
    for name in ("ZSTD_decompressStream", "ZSTD_DCtx_setParameter"):
        getattr(zstd, name).restype = ctypes.c_size_t
    context = ctypes.c_void_p(zstd.ZSTD_createDCtx())
    if not context:
        raise Unsupported("libzstd has no memory left")
    buffer, view = _buffer(_OUT)
    source = Buffer(None, 0, 0)
    try:
        zstd.ZSTD_DCtx_setParameter(context, _ZSTD_WINDOW_LOG_MAX, _WINDOW.bit_length() - 1)
        left = 1
        while left:
            if source.pos == source.size:
                data = packed.read()  # kept by this name for as long as the library reads it
                source = Buffer(ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p), len(data), 0)
            target = Buffer(ctypes.cast(buffer, ctypes.c_void_p), _OUT, 0)
            left = zstd.ZSTD_decompressStream(context, ctypes.byref(target), ctypes.byref(source))
            if zstd.ZSTD_isError(ctypes.c_size_t(left)):
                raise fail(f"is broken: {zstd.ZSTD_getErrorName(ctypes.c_size_t(left)).decode()}")
            if not target.pos and not source.size:
                raise fail("is broken: it has no end")
            yield view[: target.pos]
    finally:
        zstd.ZSTD_freeDCtx(context)


_METHODS: dict[str, Callable[[_Input, Fail], Iterator[Chunk]]] = {
    "gzip": _gzip,
    "xz": _xz,
    "lzma": _xz,
    "bzip2": _bzip2,
    "lz4": _lz4,
    "zstd": _zstd,
}
