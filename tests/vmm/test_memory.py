# SPDX-License-Identifier: Apache-2.0
"""Guest RAM: the hole, the one checked accessor, lifetimes."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import random
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

import vmm.budget
from vmm import _mapping, undertaker
from vmm._budget import Budget
from vmm.errors import ConfigError, GuestMemoryError
from vmm.memory import GIB, GuestMemory, MemoryFile, Piece, joined, overlay, pagemap

MIB = 1 << 20


def test_small_guest_is_one_region() -> None:
    with GuestMemory(64 * MIB) as memory:
        assert [(r.gpa, r.size) for r in memory.regions] == [(0, 64 * MIB)]


@pytest.mark.parametrize(
    ("size", "regions"),
    [
        (3 * GIB, [(0, 3 * GIB)]),
        (3 * GIB + 4096, [(0, 3 * GIB), (4 * GIB, 4096)]),
        (64 * GIB, [(0, 3 * GIB), (4 * GIB, 61 * GIB)]),
        (1024 * GIB, [(0, 3 * GIB), (4 * GIB, 1021 * GIB)]),
    ],
)
def test_ram_goes_on_above_the_hole(size: int, regions: list[tuple[int, int]]) -> None:
    with GuestMemory(size) as memory:
        assert [(r.gpa, r.size) for r in memory.regions] == regions
        last = regions[-1]
        memory.write(sum(last) - 1, b"x")
        assert memory.read(sum(last) - 1, 1) == b"x"


@pytest.mark.parametrize("size", [0, -4096, 1, 4095, 4097])
def test_size_must_be_whole_pages(size: int) -> None:
    with pytest.raises(ConfigError, match="4096"):
        GuestMemory(size)


def test_last_byte_is_legal_and_the_next_is_not() -> None:
    with GuestMemory(MIB) as memory:
        memory.write(MIB - 4, b"last")
        assert memory.read(MIB - 4, 4) == b"last"
        assert len(memory.slice(MIB, 0)) == 0
        for gpa, size in ((MIB - 3, 4), (MIB, 1), (MIB + 1, 0), (-1, 1), (1 << 64, 1), ((1 << 64) - 1, 2), (0, -1)):
            with pytest.raises(GuestMemoryError) as caught:
                memory.slice(gpa, size)
            assert (caught.value.gpa, caught.value.size) == (gpa, size)
            with pytest.raises(GuestMemoryError):
                memory.read(gpa, size)


def test_nothing_reaches_across_the_hole() -> None:
    with GuestMemory(4 * GIB) as memory:
        for gpa, size in ((3 * GIB - 1, 2), (3 * GIB, 1), (4 * GIB - 1, 1), (4 * GIB - 1, 2), (0, 4 * GIB)):
            with pytest.raises(GuestMemoryError):
                memory.slice(gpa, size)


@given(gpa=st.integers(-(1 << 65), 1 << 65), size=st.integers(-(1 << 65), 1 << 65))
def test_accessor_agrees_with_arithmetic(gpa: int, size: int) -> None:
    with GuestMemory(MIB) as memory:
        if 0 <= gpa and 0 <= size and gpa + size <= MIB:
            assert len(memory.slice(gpa, size)) == size
        else:
            with pytest.raises(GuestMemoryError):
                memory.slice(gpa, size)


def test_slice_is_the_memory_itself() -> None:
    with GuestMemory(MIB) as memory:
        memory.slice(100, 3)[:] = b"abc"
        assert memory.read(99, 5) == b"\0abc\0"


def test_view_is_a_shared_numpy_array() -> None:
    with GuestMemory(MIB) as memory:
        words = memory.view(0, MIB, dtype="<u4")
        assert words.shape == (MIB // 4,)
        words[1] = 0x04030201
        assert memory.read(4, 4) == bytes((1, 2, 3, 4))
        memory.write(8, b"\xff\xff\xff\xff")
        assert words[2] == 0xFFFFFFFF
        assert numpy.shares_memory(memory.view(), memory.view())
        with pytest.raises(GuestMemoryError):
            memory.view(MIB)


def test_slices_outlive_close() -> None:
    memory = GuestMemory(MIB)
    memory.write(0, b"kept")
    view, array = memory.slice(0, 4), memory.view(0, 4)
    memory.close()
    memory.close()
    assert bytes(view) == array.tobytes() == b"kept"
    with pytest.raises(GuestMemoryError):
        memory.read(0, 1)


def test_close_gives_every_descriptor_back() -> None:
    before = os.listdir("/proc/self/fd")
    for _ in range(10):
        GuestMemory(4 * GIB).close()
    undertaker.wait()
    assert len(os.listdir("/proc/self/fd")) == len(before)


def _blocks(memory: GuestMemory) -> list[int]:
    return [os.fstat(region.file.fd).st_blocks for region in memory.regions if region.file]


@given(start=st.integers(0, 5 * 4096), size=st.integers(0, 5 * 4096))
def test_discard_makes_holes_of_whole_pages_only(start: int, size: int) -> None:
    with GuestMemory(16 * 4096) as memory:
        memory.write(0, b"\xff" * memory.size)
        first, end = -(-start // 4096), (start + size) // 4096
        holes = max(0, end - first)
        assert memory.discard(memory.slice(start, size)) == 4096 * holes
        assert _blocks(memory)[0] * 512 == (16 - holes) * 4096
        for page in range(16):
            inside = holes and first <= page < end
            assert memory.read(page * 4096, 4096) == (b"\0" if inside else b"\xff") * 4096


def test_holes_of_all_copies_have_a_limit_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hole is two mappings: 16 copies of a guest that gives back every other 64 KiB took all that a process has."""
    monkeypatch.setattr("vmm.budget.holes", Budget(5))
    with GuestMemory(1 << 20) as original:
        original.write(0, b"\xee" * (1 << 20))
        pieces = original.freeze()
        for _ in range(2):
            with GuestMemory(1 << 20, pieces=pieces) as one, GuestMemory(1 << 20, pieces=pieces) as other:
                made = []
                for memory in (one, other):
                    before = _mappings()
                    for at in range(0, 4 * 128 << 10, 128 << 10):
                        assert memory.discard(memory.slice(at, 64 << 10)) == 64 << 10
                        assert memory.read(at, 128 << 10) == bytes(64 << 10) + b"\xee" * (64 << 10)
                    made.append(_mappings() - before)
                assert made[0] > 6 > made[1]
    assert vmm.budget.holes.used == 0


def test_a_hole_counts_once_however_often_it_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest that reports its free pages gives the same ones back again and again: they took the whole limit."""
    monkeypatch.setattr("vmm.budget.holes", budget := Budget(8))
    with GuestMemory(4 * MIB) as memory:
        memory.write(0, b"\xee" * memory.size)
        memory.freeze()
        for _ in range(10):
            for at in (0, MIB, MIB + (128 << 10)):
                memory.write(at, b"used again")
                memory.discard(memory.slice(at, 128 << 10))
                assert memory.read(at, 128 << 10) == bytes(128 << 10)
            assert budget.used == 3
        memory.discard(memory.slice(64 << 10, 64 << 10))
        memory.discard(memory.slice(MIB, 256 << 10))
        memory.discard(memory.slice(0, 128 << 10))
        assert budget.used == 2
        assert not memory._private(memory.regions[0]), "none of it takes memory"
        memory.write(MIB, b"x" * (256 << 10))
        memory.freeze()
        assert budget.used == 1, "a freeze has put a file in a hole's place"
        with pytest.raises(OSError, match="no room"), monkeypatch.context() as patch:
            patch.setattr("vmm.memory.map_over", _no_room)
            memory.discard(memory.slice(2 * MIB, 128 << 10))
        assert budget.used == 1
    assert budget.used == 0


def _no_room(*_: object) -> None:
    raise OSError(errno.ENOMEM, "no room")


def test_what_is_given_back_in_a_hole_is_told_as_written() -> None:
    with GuestMemory(4 * MIB) as memory:
        memory.prepare_marks()
        memory.write(0, b"\xee" * memory.size)
        memory.freeze()
        memory.discard(memory.slice(0, MIB))
        memory.write(256 << 10, b"used again")
        memory.take_written()
        memory.discard(memory.slice(256 << 10, 128 << 10))
        assert memory.written() == [(256 << 10, 128 << 10)]


def test_what_is_given_back_in_a_hole_takes_few_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmm.memory._PIECES_MAX", 6)
    with GuestMemory(4 * MIB) as memory:
        memory.freeze()
        memory.discard(memory.slice(0, 4 * MIB))
        for at in range(0, 4 * MIB, 128 << 10):
            memory.write(at, b"\xee" * (64 << 10))
            memory.discard(memory.slice(at, 64 << 10))
            assert len(memory._given_back) <= 6
        assert not memory._private(memory.regions[0])
        assert memory.written() == [(0, 4 * MIB)]


def _mappings() -> int:
    undertaker.wait()  # for those of memory that was closed before
    return len(Path("/proc/self/maps").read_bytes().splitlines())


def test_discard_in_the_second_region_reaches_its_memfd() -> None:
    with GuestMemory(3 * GIB + 4 * 4096) as memory:
        memory.write(4 * GIB, b"x" * 4 * 4096)
        assert memory.discard(memory.slice(4 * GIB + 4096, 2 * 4096)) == 2 * 4096
        assert _blocks(memory) == [0, 16]


def test_discard_takes_nothing_but_this_memory() -> None:
    with GuestMemory(MIB) as memory, GuestMemory(MIB) as other:
        for part in (memoryview(bytearray(8192)), other.slice(0, 4096)):
            with pytest.raises(ValueError, match="slice of this guest"):
                memory.discard(part)
        with pytest.raises(BufferError):
            memory.discard(memoryview(bytes(8192)))


# Freezing


def _fill(memory: GuestMemory, rng: random.Random, model: dict[int, bytes], changes: int) -> None:
    for _ in range(changes):
        region = rng.choice(memory.regions)
        page = region.gpa + rng.randrange(region.size // 4096) * 4096
        model[page] = rng.randbytes(8)
        memory.write(page, model[page])


def _same(memory: GuestMemory, model: dict[int, bytes]) -> None:
    for page, data in model.items():
        assert memory.read(page, 8) == data, hex(page)


@pytest.mark.parametrize("by", ["scan", "walk"])
def test_frozen_memory_stays_while_its_machine_and_its_copies_write(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if by == "walk":  # as before Linux 6.7
        monkeypatch.setattr("vmm.memory.private_runs", _mapping.walk_private_runs)
    rng = random.Random(1)
    now: dict[int, bytes] = {}
    frozen: list[tuple[GuestMemory, dict[int, bytes]]] = []
    with GuestMemory(64 * MIB) as memory:
        for round_ in range(5):
            _fill(memory, rng, now, 300)
            copy = GuestMemory(memory.size, pieces=memory.freeze())
            assert memory.written() == [], "what was written is in the file"
            frozen.append((copy, dict(now)))
            if round_ % 2:
                _fill(copy, rng, frozen[-1][1], 50)
                again = GuestMemory(memory.size, pieces=copy.freeze())
                frozen.append((again, dict(frozen[-1][1])))
        for copy, model in frozen:
            _same(copy, model)
        _same(memory, now)
    for copy, _ in frozen:
        copy.close()


def test_only_what_was_written_since_is_copied() -> None:
    with GuestMemory(256 * MIB) as memory:
        memory.write(0, b"x" * (8 * MIB))
        assert [(piece.gpa, piece.size) for piece in memory.freeze()] == [(0, 256 * MIB)]
        memory.write(5 * 4096 + 7, b"y")
        memory.write(100 * MIB, b"z" * 8192)
        assert memory.written() == [(5 * 4096, 4096), (100 * MIB, 8192)]
        pieces = memory.freeze()
        assert [piece.size for piece in pieces if piece.file is not pieces[0].file] == [4096, 8192]
        assert sum(piece.size for piece in pieces) == memory.size


def test_many_scattered_pages_are_few_mappings() -> None:
    with GuestMemory(64 * MIB) as memory:
        memory.freeze()
        for page in range(0, 64 * MIB, 2 * 4096):
            memory.write(page, b"x")
        pieces = memory.freeze()
        assert len(pieces) <= 1100
        with GuestMemory(memory.size, pieces=pieces) as copy:
            assert copy.read(0, 64 * MIB) == memory.read(0, 64 * MIB)


@pytest.mark.parametrize("size", [4096, 64 << 10, 2 * MIB])
def test_what_is_given_back_after_a_freeze_is_zeros_here_and_as_it_was_there(size: int) -> None:
    with GuestMemory(16 * MIB) as memory:
        memory.write(0, b"\x5a" * (16 * MIB))
        pieces = memory.freeze()
        assert memory.discard(memory.slice(4 * MIB, size)) == size
        assert memory.read(4 * MIB, size) == bytes(size)
        memory.write(4 * MIB + 100, b"again")
        second = memory.freeze()
        with GuestMemory(memory.size, pieces=pieces) as first_copy, GuestMemory(memory.size, pieces=second) as copy:
            assert first_copy.read(4 * MIB, size) == b"\x5a" * size
            assert copy.read(4 * MIB, size) == memory.read(4 * MIB, size)
            assert copy.read(4 * MIB + 100, 5) == b"again"
            assert copy.read(4 * MIB + size, 10) == b"\x5a" * 10


def test_however_often_it_is_frozen_it_has_few_mappings_and_files() -> None:
    rng = random.Random(4)
    with GuestMemory(256 * MIB) as memory:
        now: dict[int, bytes] = {}
        for _ in range(30):
            _fill(memory, rng, now, 600)
            pieces = memory.freeze()
        assert len(pieces) <= 6000, "a process may have 65,530"
        _same(memory, now)
        for number in range(300):
            memory.write(number * 8192, b"%d" % number)
            pieces = memory.freeze()
        assert len({piece.file.fd for piece in pieces if piece.file is not None}) <= 210
        with GuestMemory(memory.size, pieces=pieces) as copy:
            assert copy.read(0, 256 * MIB) == memory.read(0, 256 * MIB)


def test_slices_and_addresses_survive_a_freeze() -> None:
    with GuestMemory(4 * MIB) as memory:
        view, address = memory.slice(0, 4096), memory.host_address(0, 4096)
        view[0] = 7
        memory.freeze()
        view[1] = 8
        assert memory.host_address(0, 4096) == address
        assert memory.read(0, 2) == b"\x07\x08"


def test_its_files_go_with_the_last_that_maps_them() -> None:
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        memory = GuestMemory(4 * MIB)
        memory.write(0, b"x")
        copy = GuestMemory(memory.size, pieces=memory.freeze())
        memory.write(0, b"y")
        memory.freeze()
        memory.close()
        assert copy.read(0, 1) == b"x"
        copy.close()
    del memory, copy
    gc.collect()
    undertaker.wait()
    assert len(os.listdir("/proc/self/fd")) == before


def test_pieces_over_one_another_are_the_last_of_each_page() -> None:
    rng = random.Random(5)
    files = [MemoryFile(os.memfd_create("piece")) for _ in range(3)]
    pieces = [Piece(0, 64, None)]
    model: dict[int, tuple[MemoryFile | None, int]] = {at: (None, at) for at in range(64)}
    for _ in range(300):
        first = rng.randrange(64)
        new = Piece(first, rng.randrange(1, 65 - first), rng.choice(files), rng.randrange(1000))
        overlay(pieces, new)
        model |= {at: (new.file, new.offset + at - first) for at in range(first, first + new.size)}
        found = [(each, at) for each in pieces for at in range(each.gpa, each.gpa + each.size)]
        assert [at for _, at in found] == list(range(64))
        assert all(model[at] == (each.file, each.offset + at - each.gpa) for each, at in found)


def _marked(memory: GuestMemory) -> None:
    memory.prepare_marks()
    memory.freeze()
    if not memory.take_written()[1]:
        pytest.skip("this kernel has no marks (before Linux 6.7)")


def test_marks_tell_what_was_written_since_and_copy_nothing() -> None:
    rng = random.Random(2)
    with GuestMemory(64 * MIB) as memory:
        _marked(memory)
        now: dict[int, bytes] = {}
        for _ in range(5):
            changed: dict[int, bytes] = {}
            _fill(memory, rng, changed, 300)
            now |= changed
            for written in (memory.written(), memory.take_written()[0]):
                assert {page for gpa, size in written for page in range(gpa, gpa + size, 4096)} == set(changed)
            assert memory.written() == memory.take_written()[0] == []
        copy = GuestMemory(memory.size, pieces=memory.freeze())
        assert memory.written() == [] and memory.take_written() == ([], True), "a freeze begins anew, too"
        memory.write(MIB, b"x")
        assert memory.take_written() == ([(MIB, 4096)], True)
        now.pop(MIB, None)
        _same(memory, now)
        _same(copy, now)
        copy.close()


def test_marks_stand_beside_pages_that_were_given_back() -> None:
    with GuestMemory(4 * MIB) as memory:
        memory.write(0, b"x" * (2 * MIB))
        _marked(memory)
        memory.discard(memory.slice(0, MIB))
        memory.write(4096, b"y")
        memory.write(2 * MIB, b"z")
        with open("/proc/self/exe", "rb", buffering=0) as file:
            file.readinto(memory.slice(3 * MIB, 4096))  # as a device does, by the kernel
        assert memory.written() == [(0, MIB), (2 * MIB, 4096), (3 * MIB, 4096)]
        assert memory.take_written() == ([(0, MIB), (2 * MIB, 4096), (3 * MIB, 4096)], True)
        assert memory.take_written() == ([], True)
        assert memory.read(0, 4096) == bytes(4096) and memory.read(MIB, 1) == b"x"


def test_without_marks_what_was_written_is_told_until_a_freeze(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> int:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr("vmm._uffd.create_marks", none)  # as before Linux 6.7
    with GuestMemory(4 * MIB) as memory:
        memory.prepare_marks()
        assert memory.take_written() == ([(0, 4 * MIB)], False)
        memory.freeze()
        memory.write(0, b"x")
        for _ in range(2):
            assert memory.take_written() == ([(0, 4096)], False)


def test_a_copy_has_the_pages_at_once_that_one_before_wrote_to() -> None:
    hot: list[tuple[int, int]] = []
    with GuestMemory(64 * MIB) as memory:
        memory.write(0, b"x" * MIB)
        pieces = memory.freeze()

    def copy(writes: dict[int, int]) -> list[tuple[int, int]]:
        with GuestMemory(64 * MIB, pieces=pieces, hot=hot) as made:
            found = made.written()
            assert made.read(0, 64 * MIB) == b"x" * MIB + bytes(63 * MIB), "nothing else than before"
            for gpa, size in writes.items():
                made.write(gpa, bytes(size))
        return found

    few = {4096: 1, 40 * MIB: 8192}
    assert copy({0: 1}) == []
    assert copy(few) == [(0, 4096)]
    assert copy({}) == [(0, 8192), (40 * MIB, 8192)]
    # One that did a lot teaches nothing.
    assert copy({8 * MIB: 3 * MIB}) == copy({}) == [(0, 8192), (40 * MIB, 8192)]


@given(runs=st.lists(st.tuples(st.integers(0, 80), st.integers(1, 9))), gap=st.integers(0, 3))
def test_joined_runs_are_the_same_bytes_and_stand_apart(runs: list[tuple[int, int]], gap: int) -> None:
    found = joined(sorted(runs), gap)
    covered = {byte for start, size in runs for byte in range(start, start + size)}
    held = {byte for start, size in found for byte in range(start, start + size)}
    assert covered <= held and (gap or covered == held)
    assert all(sum(one) + gap < other[0] for one, other in pairwise(found))


def test_memory_that_a_program_leaves_open_ends_with_it_in_silence() -> None:
    code = (
        "import os; from vmm.memory import GuestMemory; memories = [GuestMemory(1 << 24) for _ in range(2)]\n"
        "memories[0].freeze(); os.kept = memories  # longer than our modules are there\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_memory_of_a_file_on_a_disk_is_closed_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(4 * MIB))
    file = MemoryFile(os.open(tmp_path / "file", os.O_RDONLY), at_once=True)
    descriptor = file.fd
    memory = GuestMemory(4 * MIB, pieces=[Piece(0, 4 * MIB, file)])
    hold = threading.Event()
    undertaker._do(hold.wait)  # what is buried now is not closed before this is over
    try:
        memory.close()
        del file, memory
        assert str(tmp_path) not in Path("/proc/self/maps").read_text()
        with pytest.raises(OSError):
            os.fstat(descriptor)
    finally:
        hold.set()


def mapped() -> set[str]:
    """The mappings of memfds of guests in this process; other tests may have some, too."""
    with open("/proc/self/maps", encoding="ascii") as file:
        return {line for line in file if "guest-ram" in line}


def test_pages_that_are_moved_aside_are_those_of_the_mapping_until_they_are_unmapped() -> None:
    before = mapped()
    with GuestMemory(8 * MIB) as memory:
        memory.view()[::4096] = 7
        address = memory.host_address(0, 8 * MIB)
        aside = _mapping.move_aside(address, 8 * MIB)
        assert aside and aside % (2 * MIB) == address % (2 * MIB)
        entries = os.pread(pagemap(), 8 * (8 * MIB // 4096), address // 4096 * 8)
        assert not any(entries[7::8]), "a page is there"
        assert len(mapped() - before) == 2
        memory.write(4096, b"x")
        assert ctypes.string_at(aside + 4096, 2) == b"x\0"
        assert memory.read(4 * MIB, 1) == b"\7"
        _mapping.unmap(aside, 8 * MIB)
        assert len(mapped() - before) == 1


def test_pages_that_the_kernel_does_not_move_are_unmapped_in_their_place(monkeypatch: pytest.MonkeyPatch) -> None:
    before = mapped()
    assert _mapping.move_aside(4096, 2 * MIB) == 0  # nothing is mapped there
    monkeypatch.setattr(undertaker, "move_aside", lambda address, size: 0)  # as before Linux 5.13
    with GuestMemory(4 * MIB) as memory:
        memory.write(MIB, b"there")
        pieces = memory.freeze()
        with GuestMemory(4 * MIB, pieces=pieces) as copy:
            assert memory.read(MIB, 5) == copy.read(MIB, 5) == b"there"
    del pieces
    undertaker.wait()
    assert not mapped() - before


def test_others_read_and_write_while_memory_is_frozen_or_moved_aside() -> None:
    before = mapped()
    stop = threading.Event()
    seen: list[bytes] = []

    def work() -> None:
        while not stop.is_set():
            seen.append(memory.read(3 * MIB, 1))
            memory.write(MIB, b"w")

    with GuestMemory(16 * MIB) as memory:
        memory.view()[::4096] = 7
        thread = threading.Thread(target=work)
        thread.start()
        try:
            for _ in range(200):
                undertaker.bury_pages(memory.host_address(0, 16 * MIB), 16 * MIB)
            memory.freeze()
        finally:
            stop.set()
            thread.join()
        assert set(seen) == {b"\7"}
        view = memory.view()
    undertaker.wait()
    assert view[3 * MIB] == 7, "a view outlives its memory, whose pages were moved aside"
    del view
    assert not mapped() - before


@pytest.mark.parametrize("again", [False, True], ids=["the first", "a later one"])
@pytest.mark.parametrize("failure", [OSError(errno.ENOMEM, "Cannot allocate memory"), KeyboardInterrupt()])
def test_a_freeze_that_fails_midway_loses_nothing(
    again: bool, failure: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    with GuestMemory(3 * GIB + MIB) as memory:
        places = 0, MIB, 4 * GIB
        if again:
            memory.freeze()
        for gpa in places:
            memory.write(gpa, b"before")
        calls: list[int] = []

        def no_room(*arguments: object, **how: bool) -> None:
            calls.append(1)
            if len(calls) == 2 and isinstance(failure, OSError):
                raise failure
            _mapping.map_over(*arguments, **how)  # type: ignore[arg-type]  # what it got, passed on
            if len(calls) == 2:
                raise failure  # a signal's handler's, which runs as soon as the call is over

        with monkeypatch.context() as patch:
            patch.setattr("vmm.memory.map_over", no_room)
            with pytest.raises(type(failure)):
                memory.freeze()
        memory.write(8192, b"meanwhile")
        with GuestMemory(memory.size, pieces=memory.freeze()) as copy:
            for each in (memory, copy):
                assert [each.read(gpa, 6) for gpa in places] == [b"before"] * 3
                assert each.read(8192, 9) == b"meanwhile"
