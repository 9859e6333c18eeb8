# SPDX-License-Identifier: Apache-2.0
"""Pools: copies that are ready go on at once, are made anew, and are never more than the limit."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.kvm.guests import PATIENCE
from tests.kvm.test_fork import COUNTER
from tests.waiting import until
from vmm import DriveConfig, Machine, Pool, undertaker
from vmm.config.devices import VsockConfig
from vmm.errors import ConfigError, SnapshotError, VmmError

MakeGuest = Callable[..., Machine]


def _count(vm: Machine) -> int:
    return int.from_bytes(vm.memory.read(0x200004, 4), "little")


@pytest.fixture
def counter(guest: MakeGuest) -> Machine:
    vm = guest(COUNTER)
    vm.start()
    until(lambda: _count(vm) > 0)
    vm.pause()
    return vm


def _has_gone_on(vm: Machine, at: int) -> bool:
    return _count(vm) > at


def test_what_is_taken_runs_from_where_the_machine_was(counter: Machine) -> None:
    with Pool(counter, size=2) as pool:
        at = _count(counter)
        for _ in range(5):
            with pool.take(PATIENCE) as vm:
                assert vm.state == "Running"
                until(partial(_has_gone_on, vm, at))
        assert _count(counter) == at
        assert pool.wait_until_full(PATIENCE)
        assert pool.ready == 2


@pytest.mark.parametrize("most", ["count", "memory"])
def test_a_limit_is_kept_and_a_closed_copy_makes_room(counter: Machine, most: str) -> None:
    limits: dict[str, Any] = {"limit": 2} if most == "count" else {"limit": 9, "memory": counter.config.memory * 5 // 2}
    with Pool(counter, size=1, **limits) as pool:
        first, second = pool.take(PATIENCE), pool.take(PATIENCE)
        with pytest.raises(TimeoutError, match=r"no copy was ready within 0\.2 s"):
            pool.take(0.2)
        first.close()
        pool.take(PATIENCE).close()
        second.close()


def test_what_cannot_be_made_is_told_to_who_takes(counter: Machine) -> None:
    broken = True

    def change(config: object, number: int) -> object:
        if broken:
            raise VmmError(f"no {number}")
        return config

    with Pool(counter, size=1, change=change) as pool:  # type: ignore[arg-type]
        for _ in range(2):
            with pytest.raises(VmmError, match="no "):
                pool.take(PATIENCE)
        broken = False
        while True:  # one more failure may be on its way
            with contextlib.suppress(VmmError):
                pool.take(PATIENCE).close()
                break


def test_a_closed_pool(counter: Machine) -> None:
    pool = Pool(counter, size=3)
    taken = pool.take(PATIENCE)
    waiting: list[object] = []

    def wait() -> None:
        with pytest.raises(VmmError, match="the pool is closed"):
            while True:
                waiting.append(pool.take(PATIENCE))

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.05)
    pool.close()
    thread.join()
    pool.close()
    assert taken.state == "Running", "what was taken is its taker's"
    for machine in (taken, *waiting):
        machine.close()


def test_an_image_serves_and_each_copy_has_its_disk(tmp_path: Path, guest: MakeGuest) -> None:
    (tmp_path / "disk").write_bytes(b"parent" * 1024)
    vm = guest(COUNTER, drives=[DriveConfig(str(tmp_path / "disk"))])
    image = vm.freeze()
    vm.close()
    with Pool(image, size=2) as pool:
        machines = [pool.take(PATIENCE) for _ in range(3)]
        for machine in machines:
            os.pwrite(machine.blocks["drive_0"].disk.fd, b"child!", 0)
            machine.close()
    assert (tmp_path / "disk").read_bytes() == b"parent" * 1024


def test_what_cannot_be_shared_is_refused_at_once(guest: MakeGuest) -> None:
    from virtio.rng import Entropy

    vm = guest("hlt", devices=[Entropy(name="mine")])
    with pytest.raises(SnapshotError, match="mine"):
        Pool(vm)
    with pytest.raises(ValueError, match="limit must be at least the size"):
        Pool(vm, size=3, limit=2)
    ram = vm.config.memory >> 20
    with pytest.raises(ConfigError, match=rf"^Pool memory {3 * ram - 1}M: must be at least {3 * ram}M, for 3 copies$"):
        Pool(vm, size=3, memory=f"{3 * ram - 1}M")


def test_nothing_is_left(counter: Machine) -> None:
    def count() -> tuple[int, int]:
        gc.collect()
        undertaker.wait()
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    for _ in range(2):
        with Pool(counter, size=2) as pool:
            pool.take(PATIENCE).close()
        before = count()
    for _ in range(5):
        with Pool(counter, size=3) as pool:
            for _ in range(5):
                pool.take(PATIENCE).close()
    del pool
    assert count() == before


def test_copies_of_a_pool_and_of_forks_have_sockets_of_their_own(tmp_path: Path, guest: MakeGuest) -> None:
    vm = guest(COUNTER, vsock=VsockConfig(3, str(tmp_path / "v")))
    with Pool(vm, size=1) as pool, vm.fork()[0], pool.take(PATIENCE), pool.take(PATIENCE), vm.fork()[0]:
        assert pool.wait_until_full(PATIENCE)
        assert sorted(path.name for path in tmp_path.glob("v*")) == ["v", *(f"v.{number}" for number in range(5))]


def test_a_copy_that_cannot_be_closed_keeps_no_other_from_it(counter: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[Machine] = []
    close = Machine.close

    def fail(self: Machine) -> None:
        close(self)
        closed.append(self)
        raise OSError(5, "no more")

    pool = Pool(counter, size=3)
    assert pool.wait_until_full(PATIENCE)
    monkeypatch.setattr(Machine, "close", fail)
    with pytest.raises(OSError, match="no more"):
        pool.close()
    assert len(closed) == 3


def test_a_copy_that_cannot_start_is_closed(counter: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Machine] = []

    def start(self: Machine, *, paused: bool) -> None:
        made.append(self)
        raise VmmError("no thread")

    with monkeypatch.context() as patch:
        patch.setattr(Machine, "start", start)
        with Pool(counter, size=1) as pool, pytest.raises(VmmError, match="no thread"):
            pool.take(PATIENCE)
    assert made and all(machine.closed for machine in made)
