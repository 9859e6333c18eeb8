# SPDX-License-Identifier: Apache-2.0
"""What a machine of a snapshot has touched is read beforehand for the next one; a damaged record harms nobody."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from tests.cached import forget, is_cached
from tests.kvm.guests import PATIENCE
from tests.waiting import until
from vmm import HostError, Image, Machine, SnapshotError, StopReason
from vmm.machine.snapshot_file import TOUCHED

MakeGuest = Callable[..., Machine]
PAGE = 4096
SIZE = 16 << 20
ADDRESSES = [0x400000 + number * (1 << 20) for number in range(8)]
FAR = ADDRESSES[0] + (512 << 10)


@pytest.fixture
def saved(tmp_path: Path, guest: MakeGuest) -> Path:
    vm = guest("1: hlt\njmp 1b", memory=SIZE)
    vm.memory.write(0x400000, b"\x05" * (SIZE - 0x400000))
    vm.freeze().save(str(tmp_path / "image"))
    return tmp_path / "image"


def test_what_was_touched_is_recorded_in_order(saved: Path) -> None:
    with Machine(image=Image.load(str(saved), record=True)) as vm:
        for address in (0x600000, 0x601000, 0x500000, 0x600000):
            assert vm.memory.read(address, 1) == b"\x05"
        vm.memory.write(0x700000, b"new")
        assert vm.memory.read(0x700000, 4) == b"new\x05"
        copy = vm.fork()[0]  # brings the rest, which nobody has touched
        vm.record_touched(str(saved))
        assert copy.memory.read(0x700000, 4) == b"new\x05"
        assert copy.memory.read(0x800000, 4096) == b"\x05" * 4096
        copy.close()
    recorded = msgspec.msgpack.decode((saved / TOUCHED).read_bytes())
    assert recorded[-3:] == [[0x600000, 0x2000], [0x500000, 0x1000], [0x700000, 0x1000]]  # after a page of the load


def test_a_machine_that_runs_is_recorded(saved: Path, guest: MakeGuest) -> None:
    with Machine(image=Image.load(str(saved), record=True)) as vm:
        vm.start()
        until(lambda: vm.memory.touched() != [])
        assert not vm.memory.discard(vm.memory.slice(0x900000, 100))
        assert vm.memory.discard(vm.memory.slice(0x900000, PAGE)) == PAGE
        assert vm.memory.read(0x900000, PAGE) == bytes(PAGE), "given back, so the file is not asked"
        vm.pause()
        vm.record_touched(str(saved))
    (first, *_) = msgspec.msgpack.decode((saved / TOUCHED).read_bytes())
    assert first[0] < 0x400000, "the guest's own code"


def test_a_machine_of_an_image_without_record_is_refused(saved: Path) -> None:
    with Machine(image=Image.load(str(saved))) as vm:
        with pytest.raises(SnapshotError, match=r"^memory: is not recorded: load the image with record=True$"):
            vm.record_touched(str(saved))


def test_a_file_that_was_cut_is_an_error_of_the_machine(saved: Path) -> None:
    with Machine(image=Image.load(str(saved), record=True)) as vm:
        os.truncate(saved / "memory", 0)
        vm.start()
        stop = vm.wait(timeout=PATIENCE)
        assert stop is not None and stop.reason == StopReason.INTERNAL_ERROR
        with pytest.raises(HostError, match="read a page of guest memory"):
            vm.record_touched(str(saved))


def test_what_was_touched_is_there_at_the_next_load(saved: Path) -> None:
    memory = os.open(saved / "memory", os.O_RDONLY)
    forget(memory)
    if is_cached(memory, FAR):
        os.close(memory)
        pytest.skip("LAYER MISSING: prefetch: a file system whose files can be out of memory")
    with Machine(image=Image.load(str(saved), record=True)) as vm:
        for address in ADDRESSES:
            assert vm.memory.read(address, 1) == b"\x05"
        vm.record_touched(str(saved))
    forget(memory)
    assert not any(is_cached(memory, address) for address in (*ADDRESSES, FAR))
    image = Image.load(str(saved))
    end = time.monotonic() + PATIENCE
    while not all(is_cached(memory, address) for address in ADDRESSES):
        assert time.monotonic() < end
        time.sleep(0.002)
    assert not is_cached(memory, FAR), "nobody has touched it"
    os.close(memory)
    image.save(str(saved))
    assert sorted(os.listdir(saved)) == ["memory", "state"], "of another snapshot nothing is recorded"


@pytest.mark.parametrize(
    "data", [b"", b"\xc1", msgspec.msgpack.encode([[-1, 5], [0, 0], [1 << 62, 5], [5, 1 << 62]]), b"\x91\x01"]
)
def test_a_damaged_record_harms_nobody(saved: Path, data: bytes) -> None:
    (saved / TOUCHED).write_bytes(data)
    with Machine(image=Image.load(str(saved))) as vm:
        assert vm.memory.read(ADDRESSES[0], 1) == b"\x05"


def test_a_record_that_is_no_file_harms_nobody(saved: Path) -> None:
    os.mkfifo(saved / TOUCHED)
    Image.load(str(saved))
