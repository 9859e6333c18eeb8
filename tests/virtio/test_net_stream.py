# SPDX-License-Identifier: Apache-2.0
"""What comes to the guest over a stream, as passt's: frames in any pieces, and what was on its way at a reset."""

from __future__ import annotations

import fcntl
import struct
import termios
import threading
from random import Random
from typing import Any

import pytest

from tests.virtio.net_driver import Stream, Vm
from tests.virtio.test_net import LARGE
from virtio import spec

ROOM = 1500  # of a frame in one of the driver's buffers


def _frame(number: int, size: int) -> bytes:
    return b"\x02" * 12 + b"\x08\0" + struct.pack(">I", number) + bytes(number + place & 0xFF for place in range(size))


def _send(stream: Stream, frames: list[bytes], random: Random) -> threading.Thread:
    data = b"".join(struct.pack(">I", len(frame)) + frame for frame in frames)

    def run() -> None:
        at = 0
        while at < len(data):
            size = random.choice((1, 2, 3, 5, 60, 1400, 20_000))
            stream.other.sendall(data[at : at + size])
            at += size

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def _receive(vm: Vm, frames: list[bytes]) -> int:
    # The number of the next frame, which is whole.
    frame = vm.receive(lambda _: True)[1]
    (number,) = struct.unpack_from(">I", frame, 14)
    same = frame == frames[number]  # not compared by assert, which would show both
    assert same, f"frame {number} is not what was sent"
    return int(number)


@pytest.mark.parametrize("without", [0, spec.NET_F_MRG_RXBUF | LARGE], ids=["merged", "one buffer"])
@pytest.mark.parametrize("seed", range(4))
def test_frames_in_any_pieces(stack: Any, seed: int, without: int) -> None:
    random, stream = Random(seed), Stream(stack)
    vm = Vm(stack, tap=stream, without=without)
    vm.offer(32)  # a large frame may come when there are too few, and more of them while it is read
    frames = [_frame(number, random.choice((1, 40, 1400, 1480, 2034, 2035, 20_000))) for number in range(300)]
    frames.append(_frame(len(frames), 0))
    thread = _send(stream, frames, random)
    got = [_receive(vm, frames)]
    while got[-1] != len(frames) - 1:
        got.append(_receive(vm, frames))
    thread.join()
    assert got == sorted(set(got))
    assert not without or got == [number for number, frame in enumerate(frames) if len(frame) <= ROOM]
    assert vm.device.stats["rx_too_long"] == len(frames) - len(got)


@pytest.mark.parametrize("seed", range(4))
def test_after_a_reset_frames_are_whole(stack: Any, seed: int) -> None:
    random, stream = Random(seed), Stream(stack)
    vm = Vm(stack, tap=stream)
    frames = [_frame(number, random.choice((0, 40, 1400, 2035, 20_000))) for number in range(400)]
    frames.append(_frame(len(frames), 0))
    thread = _send(stream, frames, random)
    got: list[int] = []
    vm.offer(32)
    while not got or got[-1] != len(frames) - 1:
        got.append(_receive(vm, frames))
        # The last ones must not be among those that the former driver had in its buffers.
        if got[-1] < len(frames) - 100 and random.random() < 0.05:
            vm.bring_up()
            vm.offer(32)
    thread.join()
    assert got == sorted(set(got))


def test_small_frames_are_read_ahead(stack: Any) -> None:
    stream = Stream(stack)
    vm = Vm(stack, tap=stream)
    frames = [_frame(number, 1400) for number in range(40)]
    stream.other.sendall(b"".join(struct.pack(">I", len(frame)) + frame for frame in frames))
    vm.offer(1)
    assert _receive(vm, frames) == 0
    (unread,) = struct.unpack("i", fcntl.ioctl(stream.other, termios.TIOCOUTQ, bytes(4)))
    assert unread == 0  # one call has read them all; no event comes for the rest
    assert [_receive(vm, frames) for _ in frames[1:]] == list(range(1, len(frames)))
