# SPDX-License-Identifier: Apache-2.0
"""An image in a directory: ``state`` and ``memory``; written whole or not at all, and judged like any input when read.

``state`` is a header of 32 bytes and a msgpack document::

    0   8  magic "PYVMMIMG"
    8   4  format, little endian
    12  4  CRC-32 of all that follows
    16  16 what ``memory`` has in its last 16 bytes, too: the two belong together

``memory`` is guest RAM, one region after the other, with holes for what is zero, and a page that ends in those 16
bytes.
"""

from __future__ import annotations

import os
import stat
import struct
import zlib

import msgspec

from vmm import __version__
from vmm._mapping import copy_sparse
from vmm.config.devices import DEVICES, NetworkPolicy, RateLimiterConfig
from vmm.config.option import check_call
from vmm.config.vm import VmConfig
from vmm.durable import make_beside, put_whole, remove_left_behind, sync, write_all, write_whole
from vmm.errors import ConfigError, SnapshotError, host_errors
from vmm.memory import GuestMemory, MemoryFile, Piece, offset_of, spans

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from vmm.machine.snapshot import Image

FORMAT = 2  # 2: the configuration has the names of vmm.config
STATE, MEMORY = "state", "memory"
TOUCHED = MEMORY + ".touched"
ABOUT = "sandbox.json"  # of a sandbox: what it has beside its machine
_FILES = (STATE, MEMORY, TOUCHED, ABOUT)
_MAGIC = b"PYVMMIMG"
_HEADER = struct.Struct("<8sII16s")
_PAGE = 4096
MERGING = "user.pyvmm.merging"  # the attribute of a memory file into which a Diff is written: see vmm.api.diff
_STATE_MAX = 1 << 30  # 64 vCPUs and all devices take 1 MiB, and each file that a guest knows of a share 0.1 KiB
_CONFIGS = {kind.__name__: kind for kind in (VmConfig, *DEVICES, NetworkPolicy, RateLimiterConfig)}
# Not in a file: a template is in the vCPUs' state already, and a descriptor is this process's.
_LEFT_OUT = {"cpu_template", "fd"}


def save(image: Image, directory: str, *, about: bytes = b"") -> None:
    """Write `image` as `directory`, which takes the place of an image that is there; readable to its owner only.

    :param about: the contents of the file ``ABOUT``; empty: no such file
    :raises ConfigError: something else is there
    :raises HostError: the image cannot be written; a previous one is unchanged
    """
    if "\0" in directory:
        raise ConfigError("snapshot", repr(directory), "must have no NUL in it")
    directory = os.path.realpath(directory)  # a link stays, and what it names is replaced
    if os.path.lexists(directory) and not _is_ours(directory):
        raise ConfigError("snapshot", directory, "exists and is not a snapshot of pyvmm: it is left alone")
    with host_errors("write the snapshot", directory):
        remove_left_behind(directory, _remove_ours)
        made, lock = make_beside(directory, directory=True)
        try:
            mark = os.urandom(16)
            _write(os.path.join(made, MEMORY), lambda fd: _write_marked_memory(image, fd, mark))
            _write(os.path.join(made, STATE), lambda fd: write_all(fd, encode(image, mark)))
            if about:
                _write(os.path.join(made, ABOUT), lambda fd: write_all(fd, about))
            sync(made)
            put_whole(made, directory)
        finally:
            _remove(made)
            os.close(lock)
        sync(os.path.dirname(directory))


def load(directory: str, *, record: bool = False) -> Image:
    """The image in `directory`; its memory is mapped, not read, so the files stay as they are while it is used.

    :param record: see :meth:`Image.load`
    :raises HostError: the files cannot be read
    :raises SnapshotError: this is not an image, or it is damaged or has another format; the message says which
    """
    if "\0" in directory:
        raise SnapshotError(repr(directory), "must have no NUL in it")
    with host_errors("read the snapshot", directory):
        data, file_of_memory = _read_both(directory)
    memory = file_of_memory.fd
    image, mark = decode(data, directory)
    size = image.config.memory
    with host_errors("read the snapshot", directory):
        end = os.fstat(memory).st_size
        there = os.pread(memory, len(mark), size + _PAGE - len(mark))
    wanted = size + _PAGE if any(mark) else size  # the API's files have no mark
    if end != wanted:
        raise SnapshotError(directory, f"{MEMORY} has {end} bytes; the guest's memory has {wanted}")
    if any(mark) and there != mark:
        raise SnapshotError(directory, f"{MEMORY} and {STATE} belong to different snapshots")
    if is_merging(memory):
        raise SnapshotError(directory, f"{MEMORY} has half of a Diff, whose writer was killed")
    prefetch(file_of_memory, os.path.join(directory, TOUCHED), size)
    image.memory = pieces_of(file_of_memory, size)
    if record:
        image.handler = file_of_memory
    return image


def _read_both(directory: str) -> tuple[bytes, MemoryFile]:
    # Of one image: another may take its place meanwhile.
    while True:
        before = os.stat(directory)
        try:
            data = read_state(os.path.join(directory, STATE))
            file = MemoryFile(open_regular(os.path.join(directory, MEMORY)), at_once=True)
        except FileNotFoundError:
            if os.path.samestat(before, os.stat(directory)):
                raise
        else:
            if os.path.samestat(before, os.stat(directory)):
                return data, file


def is_merging(fd: int) -> bool:
    """Whether the memory file `fd` has half of a Diff."""
    try:
        return bool(os.getxattr(fd, MERGING))
    except OSError:  # it has not, or the file system has no such attributes
        return False


def open_regular(path: str) -> int:
    """A descriptor to read the file from; a FIFO or a device, which may hold us up or never end, is refused.

    :raises OSError: the file cannot be opened
    :raises SnapshotError: the path is not that of a regular file
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError:
        raise SnapshotError(path, "must have no NUL in it") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise SnapshotError(path, "is not a regular file")
    return fd


def read_state(path: str) -> bytes:
    """What is in the file ``state``.

    :raises OSError: the file cannot be read
    :raises SnapshotError: the file is not a regular one, or is too large to be a ``state``
    """
    with open(open_regular(path), "rb") as file:
        if os.fstat(file.fileno()).st_size > _STATE_MAX:
            raise SnapshotError(path, "is not a snapshot of pyvmm: it is too large")
        return file.read(_STATE_MAX)


def encode(image: Image, mark: bytes, *, config: VmConfig | None = None, api: bytes = b"") -> bytes:
    """The file ``state``.

    :param config: in place of the image's
    :param api: what the API keeps with it; ``Image.api`` when it is read
    """
    document = {
        "pyvmm": __version__,
        "config": _plain(config or image.config),
        "cmdline": image.cmdline,
        "vcpus": image.vcpus,
        "vm": image.vm,
        "board": image.board,
        "virtio": image.virtio,
        "api": api,
    }
    body = mark + msgspec.msgpack.encode(document)
    return _HEADER.pack(_MAGIC, FORMAT, zlib.crc32(body), mark) + body[len(mark) :]


def format_of(data: bytes, name: str) -> int:
    """The format of a file ``state``, which may be another than ours.

    :raises SnapshotError: the file is not a snapshot
    """
    if len(data) < _HEADER.size or not data.startswith(_MAGIC):
        raise SnapshotError(name, "is not a snapshot of pyvmm")
    number: int = _HEADER.unpack_from(data)[1]
    return number


def decode(data: bytes, name: str) -> tuple[Image, bytes]:
    """An image without its memory, and the mark of that.

    :param data: the file ``state``
    :param name: the image's name, for messages
    :raises SnapshotError: this is not an image, or it is damaged or has another format
    """
    from vmm.machine.snapshot import Image

    number = format_of(data, name)
    _, _, checksum, mark = _HEADER.unpack_from(data)
    intact = zlib.crc32(data[_HEADER.size - len(mark) :]) == checksum
    if number != FORMAT:
        writer = _writer(data[_HEADER.size :]) if intact else "another pyvmm"
        raise SnapshotError(
            name, f"was written by {writer} in format {number}; pyvmm {__version__} reads format {FORMAT}"
        )
    if not intact:
        raise SnapshotError(name, "is damaged: its checksum does not match")
    try:
        document = msgspec.msgpack.decode(data[_HEADER.size :])
        config = _configuration(document.pop("config"))
        if not isinstance(config, VmConfig):
            raise TypeError("no configuration")
        document.pop("pyvmm")
        check_call("snapshot", Image.__init__, document)
        return Image(config, memory=[], **document), mark
    except (msgspec.DecodeError, RecursionError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise SnapshotError(name, f"is damaged: {error}") from None


def write_memory(pieces: list[Piece], size: int, fd: int, runs: list[tuple[int, int]] | None = None) -> None:
    """Write `pieces`, in order of address, of `size` bytes of guest RAM to the new file `fd`; elsewhere it has holes.

    :param runs: (guest address, bytes) of what of them, in order: all of that, as a hole means that nothing has changed
        there. None: all but zeros
    """
    os.ftruncate(fd, size)
    if runs is None:
        for piece in pieces:
            if piece.file is not None:
                copy_sparse(piece.file.fd, piece.offset, piece.size, fd, offset_of(piece.gpa))
        return
    with GuestMemory(size, pieces=pieces) as memory:
        for gpa, length in runs:
            write_all(fd, memory.slice(gpa, length), offset_of(gpa))


def _write_marked_memory(image: Image, fd: int, mark: bytes) -> None:
    size = image.config.memory
    write_memory(image.memory, size, fd)
    os.ftruncate(fd, size + _PAGE)
    write_all(fd, mark, size + _PAGE - len(mark))


def record(touched: list[tuple[int, int]], path: str) -> None:
    """Write which pages of guest RAM a machine has touched, for ``prefetch``.

    :param touched: offset in the file and bytes of each run of pages, in order, from ``GuestMemory.touched``
    :raises HostError: the file cannot be written
    """
    with host_errors("write the list of touched pages", path):
        write_whole((path, lambda fd: write_all(fd, msgspec.msgpack.encode(touched))))


def prefetch(memory: MemoryFile, path: str, size: int) -> None:
    """Have the kernel read the pages that ``record`` has named at `path`, and wait for none; a hint, never an error."""
    try:
        with open(open_regular(path), "rb") as file:
            runs = msgspec.msgpack.decode(file.read(_STATE_MAX), type=list[tuple[int, int]])
        for at, length in runs:
            if 0 <= at < size and 0 < length <= size - at:
                os.posix_fadvise(memory.fd, at, length, os.POSIX_FADV_WILLNEED)
    except (OSError, SnapshotError, msgspec.MsgspecError):
        pass  # nobody has recorded it, or what is there is damaged


def pieces_of(file: MemoryFile, size: int) -> list[Piece]:
    """Guest RAM as it is in `file`."""
    return [Piece(start, length, file, offset_of(start)) for start, length in spans(size)]


def _plain(value: Any) -> Any:
    kind = type(value)
    if kind.__name__ in _CONFIGS:
        fields = {name: _plain(getattr(value, name)) for name in kind.OPTIONS if name not in _LEFT_OUT}
        if fields.get("mode") == "fd":
            fields |= {"mode": "tap", "tap": "-"}  # to be named by who goes on from it
        return {"is": kind.__name__, **fields}
    return [_plain(each) for each in value] if isinstance(value, tuple | list) else value


def _configuration(value: Any) -> Any:
    if isinstance(value, dict):
        kind = _CONFIGS[value.pop("is")]
        return kind(**{name: _configuration(field) for name, field in value.items()})
    return tuple(_configuration(each) for each in value) if isinstance(value, list) else value


def _writer(body: bytes) -> str:
    try:
        return f"pyvmm {msgspec.msgpack.decode(body)['pyvmm']}"
    except (msgspec.DecodeError, RecursionError, KeyError, TypeError):
        return "another pyvmm"


def _write(path: str, fill: Callable[[int], None]) -> None:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        fill(fd)
        os.fsync(fd)
    finally:
        os.close(fd)


def _is_ours(directory: str) -> bool:
    try:
        return set(os.listdir(directory)) <= {*_FILES}
    except OSError:
        return False


def _remove_ours(directory: str) -> None:
    if _is_ours(directory):
        _remove(directory)


def _remove(directory: str) -> None:
    # The old image, or half of the new one; nothing where all went well.
    for name in _FILES:
        try:
            os.unlink(os.path.join(directory, name))
        except FileNotFoundError:
            pass
    try:
        os.rmdir(directory)
    except FileNotFoundError:
        pass
