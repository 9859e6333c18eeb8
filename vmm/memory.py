# SPDX-License-Identifier: Apache-2.0
"""Guest RAM around the hole below 4 GiB: memfds mapped shared, pieces of files copied on write, or pages that a page
fault handler brings; numpy views."""

from __future__ import annotations

import errno
import mmap
import os

from vmm import undertaker
from vmm._fastpath import GuestRam
from vmm._mapping import advise, copy_pages, map_over, populate, private_runs, unmarked_runs
from vmm.closing import Closing
from vmm.errors import ConfigError, HostError, SnapshotError, host_errors

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from typing import Any

    import numpy.typing as npt

    from vmm._uffd import Recorder
    from vmm.uffd import FaultHandler

    Runs = list[tuple[int, int]]  # (guest address, or offset in a region; bytes), in order

GIB = 1 << 30
# Between these no RAM is mapped: IOAPIC, local APICs, the TSS of KVM and every virtio-mmio window are there.
HOLE_START = 3 * GIB
HOLE_END = 4 * GIB
# Shared memory with no swap reserved for it: a guest may be given more than the host has free, and pays as it touches.
_MAP_FLAGS = mmap.MAP_SHARED | getattr(mmap, "MAP_NORESERVE", 0x4000)
_PRIVATE_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
# A process has 65,530 mappings (vm.max_map_count): so many pieces at most for what was written since the last freeze,
# in all, and for what the guest has given back, which from this size on is worth one. A message takes 253 descriptors.
_RUNS_MAX = 512
_PIECES_MAX = 4096
_FILES_MAX = 200
_HOLE_LEAST = 64 << 10
_HOT_MAX = 2 << 20  # bytes
_HUGE_2MB = os.MFD_HUGETLB | os.MFD_HUGE_2MB
_MAP_HUGE_2MB = 0x4_0000 | 21 << 26  # MAP_HUGETLB and its MAP_HUGE_2MB
_pagemap = -1


def pagemap() -> int:
    """An open /proc/self/pagemap, kept for the process; to be called before a jail that has no /proc.

    :raises OSError: the file cannot be opened
    """
    global _pagemap
    if _pagemap < 0:
        _pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    return _pagemap


class MemoryFile:
    """A memfd or file with contents of guest RAM, that machines and images map; closed with the last of them.

    :param fd: owned from here on
    :param at_once: it is closed and unmapped at its end, not soon after: a file of a file system that may be unmounted
        then, or huge pages, of which there are few
    """

    __slots__ = ("at_once", "fd")

    def __init__(self, fd: int, *, at_once: bool = False) -> None:
        self.fd = fd
        self.at_once = at_once

    # The two are not looked up when it ends: at the interpreter's end, modules are empty.
    def __del__(
        self, bury: Callable[[int], None] = undertaker.bury_from_finalizer, close: Callable[[int], None] = os.close
    ) -> None:
        (close if self.at_once else bury)(self.fd)


class Piece:
    """`size` bytes of guest RAM from `gpa`: those of `file` from `offset`, or zeros where it is None. Not changed."""

    __slots__ = ("file", "gpa", "offset", "size")

    def __init__(self, gpa: int, size: int, file: MemoryFile | None, offset: int = 0) -> None:
        self.gpa = gpa
        self.size = size
        self.file = file
        self.offset = offset

    def part(self, start: int, end: int) -> Piece:
        """What of it lies in the guest addresses [start, end), which it overlaps."""
        first, last = max(start, self.gpa), min(end, self.gpa + self.size)
        return Piece(first, last - first, self.file, self.offset + first - self.gpa)

    def __repr__(self) -> str:
        source = f"{self.offset:#x} of file {self.file.fd}" if self.file is not None else "zeros"
        return f"Piece({self.gpa:#x}, {self.size:#x}, {source})"


class Region:
    """One stretch of guest RAM: ``gpa`` and ``size`` in bytes, mapped at ``address``.

    ``file`` is a memfd that backs all of it from offset 0, mapped shared, until ``GuestMemory.freeze``.
    """

    __slots__ = ("address", "file", "gpa", "size")

    def __init__(self, gpa: int, size: int, address: int, file: MemoryFile | None) -> None:
        self.gpa = gpa
        self.size = size
        self.address = address
        self.file = file

    def __repr__(self) -> str:
        return f"Region({self.gpa:#x}, {self.size:#x})"


def spans(size: int) -> Runs:
    """(guest address, bytes) of each stretch of `size` bytes of RAM."""
    return [(0, min(size, HOLE_START)), *([(HOLE_END, size - HOLE_START)] if size > HOLE_START else [])]


def offset_of(gpa: int) -> int:
    """Where `gpa` is in a file of RAM: the stretches follow each other, without the hole."""
    return gpa if gpa < HOLE_START else gpa - HOLE_END + HOLE_START


def overlay(pieces: list[Piece], new: Piece) -> int:
    """Put `new` over what was there of `pieces`, which are in order of address and disjoint, and stay so.

    :returns: how many pieces of zeros are gone
    """
    from bisect import bisect_left, bisect_right  # no launch needs it

    end = new.gpa + new.size
    first = bisect_right(pieces, new.gpa, key=lambda piece: piece.gpa + piece.size)
    after = bisect_left(pieces, end, first, key=lambda piece: piece.gpa)
    parts = [new]
    if first < after and pieces[first].gpa < new.gpa:
        parts.insert(0, pieces[first].part(0, new.gpa))
    if first < after and (last := pieces[after - 1]).gpa + last.size > end:
        parts.append(last.part(end, 1 << 64))
    kept = (part.file is None for part in parts if part is not new)
    gone = sum(piece.file is None for piece in pieces[first:after]) - sum(kept)
    pieces[first:after] = parts
    return gone


class GuestMemory(GuestRam, Closing):
    """Guest RAM of ``size`` bytes from address 0. What exceeds 3 GiB begins at 4 GiB.

    Owns one mapping for each region. A context manager; ``close`` is idempotent. Slices and views that outlive it
    stay readable.

    :param size: bytes, a positive multiple of the page size (4096)
    :param huge: use pages of 2 MiB that the host has set aside (hugetlbfs); `size` is a multiple of that then
    :param pieces: what is in it, disjoint and in order of address, as ``freeze`` returns it; it is mapped and not
        copied, and stays as it is. None: zeros, in a memfd a region; in memory without a file where RLIMIT_FSIZE
        allows no memfd of that size
    :param hot: what copies of a machine write to as soon as they run: had as pages of its own at once, in one call for
        neighbours in place of several faults for each. Closing this memory sets it to what was written, if that is more
    :param handler: what brings each page when it is first touched, whatever `pieces` are: the socket of a program, see
        :mod:`vmm.uffd`; or the file of this memory, then a thread of ours does, which notes their order; ``""``: none
    :raises ConfigError: the size is invalid
    :raises HostError: the host has no room to map it; a ``vmm.uffd.HandlerError`` for a failure of the handler
    :raises SnapshotError: a handler together with huge pages, or `pieces` of another size
    """

    def __init__(
        self, size: int, *, huge: bool = False, pieces: Sequence[Piece] | None = None, hot: Runs | None = None,
        handler: str | MemoryFile = "",
    ) -> None:  # fmt: skip
        if huge and handler:
            raise SnapshotError("memory", "in huge pages cannot be filled by a page fault handler")
        if handler:
            pieces = ()
        page = 2 << 20 if huge else mmap.PAGESIZE
        if size <= 0 or size % page:
            raise ConfigError("memory", size, f"bytes of RAM must be a positive multiple of {page}")
        if pieces and (there := sum(piece.size for piece in pieces)) != size:
            raise SnapshotError("memory", f"the state has {there >> 20} MiB, the configuration {size >> 20} MiB")
        self.size = size
        self.huge = huge
        self.regions: tuple[Region, ...] = ()
        self._pieces: list[Piece] | None = None if pieces is None or handler else list(pieces)
        self._given_back: list[Piece] = []  # zeros since ``written`` began, in order of address
        self._handler: FaultHandler | Recorder | None = None
        self._recorder: Recorder | None = None  # the same one, where it is of this kind
        self._hot = hot
        self._holes = 0  # taken from vmm.budget.holes
        self._marks = -1  # userfaultfd of the marks; whether all of RAM can be marked, and something was
        self._markable = self._marked = False
        try:
            files = self._files() if pieces is None else None
            if files is None and not huge and pieces is None:
                self._pieces = pieces = [Piece(*span, None) for span in spans(size)]
            # Huge pages are reserved: one that is not there at a touch would kill us.
            shared = mmap.MAP_SHARED if huge else _MAP_FLAGS
            lone = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | _MAP_HUGE_2MB if huge and pieces is None else _PRIVATE_FLAGS
            for index, (gpa, length) in enumerate(spans(size)):
                file = files[index] if files is not None else None
                self.map_region(gpa, mmap.mmap(file.fd if file else -1, length, flags=shared if file else lone))
                self.regions += (Region(gpa, length, self.host_address(gpa, length), file),)
            for piece in pieces or ():
                self._map_piece(piece)
            for gpa, length in tuple(hot or ()):
                populate(self.host_address(gpa, length), length)
        except OSError as error:
            self.close()
            pages = " in huge pages (/proc/sys/vm/nr_hugepages)" if huge else ""
            raise HostError(error.errno or 0, f"map {size >> 20} MiB of guest memory{pages}") from error
        if handler:
            self._handler = self._connected(handler)

    def _connected(self, handler: str | MemoryFile) -> FaultHandler | Recorder:
        mappings = [(region.address, region.size, offset_of(region.gpa)) for region in self.regions]
        try:
            with host_errors("record which pages are touched"):
                if isinstance(handler, str):
                    from vmm.uffd import FaultHandler

                    return FaultHandler(handler, mappings)
                from vmm._uffd import Recorder

                self._recorder = Recorder(handler, mappings)
                return self._recorder
        except HostError:
            self.close()
            raise

    def _files(self) -> list[MemoryFile] | None:
        # A memfd a region; None: the limit on the size of files, which a memfd is, allows none so large.
        files = []
        for _, length in spans(self.size):
            fd = os.memfd_create("guest-ram", os.MFD_CLOEXEC | (_HUGE_2MB if self.huge else 0))
            files.append(MemoryFile(fd, at_once=self.huge))
            try:
                os.ftruncate(files[-1].fd, length)
            except OSError as error:
                if error.errno != errno.EFBIG:
                    raise
                return None
        return files

    def _map_piece(self, piece: Piece) -> None:
        fd = piece.file.fd if piece.file is not None else -1
        map_over(self.host_address(piece.gpa, piece.size), piece.size, fd, piece.offset)
        self._markable = False

    def freeze(self) -> list[Piece]:
        """The present contents of RAM, for others to map. This memory becomes copy-on-write.

        Nothing may write to RAM meanwhile. The first call copies nothing; a later one copies what was written since.
        Addresses, slices and views stay valid. If a page fault handler supplies the memory, the first call fetches
        and copies all of it. The handler is not needed after it, but stays connected.

        :returns: pieces that cover all of RAM and never change
        :raises SnapshotError: RAM is in huge pages
        :raises OSError: the host has no memory left; RAM is unchanged
        """
        if self.huge:
            raise SnapshotError("memory", "in huge pages cannot be shared copy-on-write")
        pieces = self._pieces
        if pieces is None:
            gathered = self._gathered() if self._handler is not None else [region.file for region in self.regions]
            pieces = [Piece(region.gpa, region.size, file) for region, file in zip(self.regions, gathered, strict=True)]
            try:
                for piece in pieces:
                    if self._handler is None:
                        undertaker.bury_pages(self.host_address(piece.gpa, piece.size), piece.size)
                    self._map_piece(piece)
                self._pieces = pieces
            except BaseException:  # a signal's handler's, too
                self._pieces = None
                for region in self.regions:  # or what is written from here on would not be in its file
                    if region.file is not None:
                        map_over(region.address, region.size, region.file.fd, 0, shared=True)
                raise
            if self._handler is not None:
                self._handler.release()
            for region in self.regions:
                region.file = None
        else:
            for region in self.regions:
                self._move_to_file(region, pieces)
        self._given_back = []
        return list(pieces)

    def _gathered(self) -> list[MemoryFile]:
        # All that the handler has, as the copy touches each page, and what was written over it: a memfd a region, with
        # holes for zeros.
        if self._recorder is not None:
            self._recorder.stop_noting()
        files = []
        for region in self.regions:
            files.append(MemoryFile(os.memfd_create("guest-ram", os.MFD_CLOEXEC)))
            os.ftruncate(files[-1].fd, region.size)
            copy_pages(region.address, region.size, files[-1].fd, 0)
        return files

    def written(self) -> Runs:
        """(guest address, bytes) of ranges written or given back since the last ``freeze``, or ``take_written`` that
        returned True.

        Before the first of these, all of RAM.
        """
        if self._pieces is None:
            return spans(self.size)
        return self._changed(self._unmarked if self._marked else self._private)

    def prepare_marks(self) -> None:
        """Prepare for ``take_written``. Call it before entering a jail without userfaultfd."""
        from vmm import _uffd

        try:
            self._marks = _uffd.create_marks()
        except OSError:
            pass  # before Linux 6.7: every ``take_written`` is followed by ``freeze``

    def take_written(self) -> tuple[Runs, bool]:
        """The result of ``written``, and whether it starts anew from here on. If not, only a ``freeze`` does that.

        Nothing may write to RAM meanwhile. No byte is copied: pages are marked, and a write removes the mark.

        :raises OSError: the host has no memory left
        """
        if self._pieces is None or self._marks < 0:
            return self.written(), False
        if not self._markable:
            from vmm import _uffd

            for region in self.regions:
                _uffd.register(self._marks, region.address, region.size, marks=True)
            self._markable = True
        self._marked = True
        changed = self._changed(lambda region: self._unmarked(region, mark=True))
        self._given_back = []
        return changed, True

    def touched(self) -> Runs:
        """(offset in this memory's file, bytes) of each run of pages, in the order in which they were first touched.

        :raises SnapshotError: this memory is not brought by a thread of ours
        :raises HostError: a page could not be read
        """
        if self._recorder is None:
            raise SnapshotError("memory", "is not recorded: load the image with record=True")
        with host_errors("read a page of guest memory"):
            return self._recorder.order()

    def _changed(self, find: Callable[[Region], Runs]) -> Runs:
        # What `find` gives of each region, by guest address, and what was given back.
        runs = [(region.gpa + at, size) for region in self.regions for at, size in find(region)]
        return joined(sorted(runs + [(piece.gpa, piece.size) for piece in self._given_back]))

    def _private(self, region: Region) -> Runs:
        return private_runs(pagemap(), region.address, region.size)

    def _unmarked(self, region: Region, *, mark: bool = False) -> Runs:
        return unmarked_runs(pagemap(), region.address, region.size, mark)

    def _move_to_file(self, region: Region, pieces: list[Piece]) -> None:
        # What was written since goes to a file of its own, with holes elsewhere, and is mapped from there. `pieces` has
        # each before it is mapped: if that fails, or a signal's handler raises, it is found again as written.
        runs = self._private(region)
        if not runs:
            return
        if len(pieces) > _PIECES_MAX or len({piece.file for piece in pieces}) > _FILES_MAX:
            runs = joined(sorted(runs + _moved_before(region, pieces)))
        gap = mmap.PAGESIZE
        while len(runs) > _RUNS_MAX:  # each is a mapping in every copy: pages between near ones go with them
            gap *= 2
            runs = joined(runs, gap)
        file = MemoryFile(os.memfd_create("guest-ram-written", os.MFD_CLOEXEC))
        os.ftruncate(file.fd, region.size)
        for at, size in runs:
            copy_pages(region.address + at, size, file.fd, at)
        for at, size in runs:
            piece = Piece(region.gpa + at, size, file, at)
            self._put_back_holes(overlay(pieces, piece))
            self._map_piece(piece)

    def discard(self, part: memoryview) -> int:
        """Return to the host all pages that lie completely inside `part`. They read as zeros from here on.

        :param part: a memoryview from ``slice`` or a chain, of any alignment
        :returns: the number of bytes that were returned
        :raises ValueError: `part` is not a slice of this RAM
        :raises OSError: the host refused
        """
        if self._handler is None and self._pieces is None:
            return super().discard(part)
        gpa, size = self.whole_pages(part)
        if self._pieces is None:
            if size:  # the handler hears of it, before this returns, and brings zeros from then on
                advise(self.host_address(gpa, size), size, mmap.MADV_DONTNEED)
            return size
        hole = Piece(gpa, size, None)
        if size >= _HOLE_LEAST and self._make_hole(hole, self._pieces):
            overlay(self._given_back, hole)
            if len(self._given_back) > _PIECES_MAX:  # so many are not told apart until ``written`` begins anew
                self._given_back = [Piece(*span, None) for span in spans(self.size)]
        elif size:
            self.slice(gpa, size)[:] = bytes(size)
        return size

    def _make_hole(self, hole: Piece, pieces: list[Piece]) -> bool:
        # Give its pages back; False: there are too many holes.
        from bisect import bisect_right

        from vmm.budget import holes  # no launch needs these

        around = pieces[bisect_right(pieces, hole.gpa, key=lambda piece: piece.gpa) - 1]
        if around.file is None and hole.gpa + hole.size <= around.gpa + around.size:
            advise(self.host_address(hole.gpa, hole.size), hole.size, mmap.MADV_DONTNEED)
            return True
        # Elsewhere a file is below, which is others', too, and shows through a page that is merely dropped.
        if len(pieces) >= _PIECES_MAX or not holes.ask(1):
            return False
        self._holes += 1
        try:
            self._map_piece(hole)
        except OSError:
            self._put_back_holes(1)
            raise
        self._put_back_holes(overlay(pieces, hole))
        return True

    def _put_back_holes(self, count: int) -> None:
        # Those of the image that this memory was made of were not taken.
        count = min(count, self._holes)
        if count > 0:
            from vmm.budget import holes

            self._holes -= count
            holes.put_back(count)

    def view(self, gpa: int = 0, size: int | None = None, dtype: Any = "u1") -> npt.NDArray[Any]:
        """A numpy array over guest RAM: shared with the running guest, not copied.

        :param gpa: first guest physical address
        :param size: bytes, within one region; None: the rest of the region
        :param dtype: any numpy dtype whose size divides `size`
        :returns: a one-dimensional array, which keeps the mapping alive
        :raises GuestMemoryError: the range is not inside one region
        """
        import numpy  # 100 ms that launching a VM does not pay

        if size is None:
            size = next((r.gpa + r.size - gpa for r in self.regions if r.gpa <= gpa < r.gpa + r.size), 1)
        return numpy.frombuffer(self.slice(gpa, size), dtype=dtype)

    def close(self) -> None:
        """Give the mappings and memfds back."""
        if self._hot is not None and self.regions:
            try:
                self._given_back = []  # no copy is to have these
                runs = self.written()
                known, found = (sum(size for _, size in each) for each in (self._hot, runs))
                if known < found <= _HOT_MAX:  # one that did a lot of work tells nothing about its beginning
                    self._hot[:] = runs
            except OSError:
                pass  # no descriptor left for /proc/self/pagemap, or no /proc
            self._hot = None
        if self._handler is not None:
            self._handler.close()
            self._handler = self._recorder = None
        if self._marks >= 0:
            os.close(self._marks)
            self._marks = -1
        for region in self.regions:
            if region.file is not None and not self.huge:  # in steps, which hold up the address space for less
                undertaker.bury_pages(region.address, region.size)
        at_once = self.huge or any(piece.file.at_once for piece in self._pieces or () if piece.file is not None)
        for mapping in self.unmap_all():
            undertaker.close_mapping(mapping, at_once=at_once)
        self.regions = ()
        self._pieces = None
        self._put_back_holes(self._holes)


def _moved_before(region: Region, pieces: list[Piece]) -> Runs:
    # Of `region`, what is in any file but the one with the most of it.
    inside = [piece for piece in pieces if 0 <= piece.gpa - region.gpa < region.size and piece.file is not None]
    sizes: dict[MemoryFile | None, int] = {}
    for piece in inside:
        sizes[piece.file] = sizes.get(piece.file, 0) + piece.size
    most = max(sizes, key=lambda file: sizes[file], default=None)
    return [(piece.gpa - region.gpa, piece.size) for piece in inside if piece.file is not most]


def joined(runs: Iterable[tuple[int, int]], gap: int = 0) -> Runs:
    """Runs (start, length), in order, with those made one that overlap or have at most `gap` between them."""
    found: Runs = []
    for at, size in runs:
        if found and at - sum(found[-1]) <= gap:
            start, length = found[-1]
            found[-1] = start, max(length, at + size - start)
        else:
            found.append((at, size))
    return found
