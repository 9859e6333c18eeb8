# SPDX-License-Identifier: Apache-2.0
"""Nothing acknowledged after FLUSH is lost when the VMM is killed in the middle of writing.

A process is device and driver in one; it tells over a pipe which rounds of writes were flushed, and is killed with
SIGKILL while more are under way. That a flush reaches the disk itself is for test_blk.py.
"""

from __future__ import annotations

import os
import random
import select
import signal
import struct
import time
from pathlib import Path

import pytest

from tests.forked import fork
from tests.virtio import blk_driver
from virtio.blk.device import Block, Disk
from virtio.mmio import VirtioMmio
from virtio.testing import Allocator, MmioDriver
from vmm import _uring
from vmm.irq import IrqLine
from vmm.memory import GuestMemory

KILLS = 50
BLOCKS = 64  # of 4 KiB on the disk
ROUND = 12  # writes before each flush
STAMP = struct.Struct("<Q")


def blocks(round_: int) -> list[int]:
    """Where round `round_` writes."""
    return random.Random(round_).sample(range(BLOCKS), ROUND)


def write_until_killed(path: Path, engine: str, direct: bool, told: int) -> None:
    ram = GuestMemory(4 << 20)
    irq = IrqLine(5)
    device = Block(Disk(str(path), direct=direct), engine=engine)
    driver = MmioDriver(VirtioMmio(device, ram, irq), Allocator(0x1000, (4 << 20) - 0x1000))
    (ring,) = driver.bring_up()
    start = ring.allocator.next

    def run(requests: list[tuple[int, int, bytes]]) -> None:
        ring.allocator.next = start
        statuses = []
        for kind, sector, data in requests:
            buffers = [ring.buffer(blk_driver.HEADER.pack(kind, 0, sector))]
            if data:
                at = ring.allocator.alloc(len(data), 4096)
                ram.write(at, data)
                # In two buffers, so that a write may be cut in the middle.
                buffers += [ring.buffer(0)._replace(addr=at + i, size=2048) for i in (0, 2048)]
            statuses.append(ring.buffer(b"\xee", device_writes=True))
            ring.add([*buffers, statuses[-1]])
        ring.want_interrupt()
        driver.kick()
        left = len(requests)
        while left := left - len(ring.reap()):
            ring.want_interrupt()
            select.select([irq.fd], [], [], 0.01)
            irq.take()
        assert all(ram.read(status.addr, 1) == b"\0" for status in statuses)

    round_ = 0
    while True:
        round_ += 1
        run([(blk_driver.T_OUT, 8 * block, STAMP.pack(round_) * 512) for block in blocks(round_)])
        run([(blk_driver.T_FLUSH, 0, b"")])
        os.write(told, STAMP.pack(round_))


@pytest.mark.large
@pytest.mark.parametrize("direct", [False, True], ids=["cached", "direct"])
@pytest.mark.parametrize("engine", ["sync", "io_uring"])
def test_nothing_flushed_is_lost_by_kill_9(tmp_path: Path, engine: str, direct: bool) -> None:
    if engine == "io_uring" and (refused := _uring.probe()):
        pytest.skip(f"LAYER MISSING: io_uring: {os.strerror(refused)}")
    unfinished = 0
    for kill in range(KILLS):
        path = tmp_path / f"disk{kill}.img"
        path.write_bytes(bytes(BLOCKS * 4096))
        heard, told = os.pipe()
        pid = fork()
        if pid == 0:
            try:
                write_until_killed(path, engine, direct, told)
            finally:
                os._exit(1)
        os.close(told)
        with os.fdopen(heard, "rb") as pipe:
            assert len(pipe.read(8)) == 8, "the first round was flushed"
            time.sleep(random.Random(kill).uniform(0, 0.004))
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            assert os.WTERMSIG(status) == signal.SIGKILL
            rest = pipe.read()
        Disk(str(path)).close()  # what io_uring had under way is over now: until then the lock is held
        flushed = STAMP.unpack(rest[-8:])[0] if rest else 1
        last = [0] * BLOCKS  # the round whose write of the block was flushed last
        for round_ in range(1, flushed + 1):
            for block in blocks(round_):
                last[block] = round_
        # The round after that may be there in part, as far as a sector; no other may.
        image = path.read_bytes()
        for block in range(BLOCKS):
            allowed = {last[block], *([flushed + 1] if block in blocks(flushed + 1) else [])}
            for sector in range(8):
                at = block * 4096 + sector * 512
                found = {stamp for (stamp,) in STAMP.iter_unpack(image[at : at + 512])}
                assert found <= allowed, f"kill {kill}, block {block}: {found}, flushed last: {last[block]}"
                unfinished += found == {flushed + 1}
        path.unlink()
    print(f"{KILLS} kills, {unfinished} sectors of rounds that were not flushed")
