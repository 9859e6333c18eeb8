# SPDX-License-Identifier: Apache-2.0
"""Snapshots that somebody damaged: each is refused by one line, or makes a machine that runs and ends."""

from __future__ import annotations

import copy
import os
import random
import struct
import tempfile
import zlib
from pathlib import Path
from typing import Any

import msgspec

from tests.kvm.guests import write_guest
from tests.virtio.fuse_client import FuseClient
from virtio.testing import Allocator, MmioDriver
from vmm import DriveConfig, Image, Machine
from vmm.config.devices import BalloonConfig, EntropyConfig, RateLimiterConfig, ShareConfig, VsockConfig
from vmm.errors import VmmError
from vmm.machine.snapshot_file import MEMORY, STATE

SIZE = 4 << 20
HEADER = 32
# Runs on: what the host does to it must end it.
GUEST = "1: inc dword ptr [0x200000]\n jmp 1b"
NUMBERS = (
    0, 1, -1, 2, 3, 7, 8, 15, 16, 64, 127, 128, 255, 256, 1023, 4096, 32768, 65535, 65536, SIZE - 1, SIZE, SIZE + 1,
    3 << 30, 0xD000_0000, 0xFEE0_0000, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 63) - 1, -(1 << 63),
    (1 << 64) - 1,
)  # fmt: skip
OTHERS: tuple[object, ...] = (
    None, True, False, 0.5, float("inf"), float("nan"), "", "x", "\0", "é" * 40, "a" * 5000, "/", "/dev/null",
    "/dev/zero", "raw", "qcow2", "2M", "linux", "DriveConfig", "VmConfig", b"", b"\0" * 7, b"\xff" * 4096, [], {},
    [[]], {"is": "VmConfig"}, {"is": []}, {1: 2}, [None] * 70,
)  # fmt: skip


class Victim:
    """One good snapshot of a machine with every device that takes part, and a directory for bad ones."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory()
        self.directory = Path(self._directory.name)
        (self.directory / "disk").write_bytes(bytes(65536))
        (self.directory / "shared/dir").mkdir(parents=True)
        (self.directory / "shared/dir/file").write_bytes(b"shared")
        limit = RateLimiterConfig((1 << 20, 0, 100), None)
        with Machine(
            kernel=write_guest(self.directory, GUEST), memory=SIZE, cpus=2, virtio_console=True,
            drives=[DriveConfig(str(self.directory / "disk"), rate_limiter=limit)], entropy=EntropyConfig(),
            balloon=BalloonConfig(1, deflate_on_oom=True, stats_interval_s=1),
            vsock=VsockConfig(3, str(self.directory / "vsock")),
            shares=[ShareConfig("share", str(self.directory / "shared"))],
        ) as vm:  # fmt: skip
            rings = Allocator(3 << 20, 1 << 20)
            for transport in vm.virtio:
                if transport.device is vm.shares["share"]:
                    guest = FuseClient(transport, vm.memory, rings, None, size=16)
                    guest.open(guest.walk("dir/file").nodeid)
                    guest.opendir()
                    rings.next = guest.driver.allocator.next
                else:
                    MmioDriver(transport, rings).bring_up(size=16)
            vm.freeze().save(str(self.directory / "good"))
        self.good = (self.directory / "good" / STATE).read_bytes()
        self.document: dict[str, Any] = msgspec.msgpack.decode(self.good[HEADER:])
        self.bad = self.directory / "bad"
        self.bad.mkdir()
        os.link(self.directory / "good" / MEMORY, self.bad / MEMORY)

    def __enter__(self) -> Victim:
        return self

    def __exit__(self, *_: object) -> None:
        self._directory.cleanup()

    def damaged(self, seed: int) -> bytes:
        """A file ``state`` that is wrong somewhere; most have the checksum that makes them look right."""
        dice = random.Random(seed)
        kind = dice.random()
        if kind < 0.6:
            document = copy.deepcopy(self.document)
            for _ in range(dice.choice((1, 1, 1, 2, 4))):
                _change(document, dice)
            try:
                return sealed(self.good[:HEADER] + msgspec.msgpack.encode(document))
            except (TypeError, ValueError, OverflowError):  # no such document can be written
                return self.damaged(seed + (1 << 40))
        data = bytearray(self.good)
        if kind < 0.65:
            return bytes(data[: dice.randrange(len(data))])
        if kind < 0.7:
            at = dice.randrange(len(data))
            data[at] ^= 1 << dice.randrange(8)
            return bytes(data)
        for _ in range(dice.choice((1, 1, 2, 8))):
            at = dice.randrange(HEADER, len(data))
            if dice.random() < 0.5:
                data[at] = dice.randrange(256)
            elif dice.random() < 0.5:
                del data[at : at + dice.randrange(1, 64)]
            else:
                data[at:at] = dice.randbytes(dice.randrange(1, 8))
        return sealed(bytes(data))

    def try_(self, state: bytes) -> str:
        """Load it, make a machine of it, let that run for a moment.

        :returns: why it was refused, or nothing
        :raises Exception: what no user should see
        """
        (self.bad / STATE).write_bytes(state)
        (self.directory / "vsock").unlink(missing_ok=True)
        try:
            image = Image.load(str(self.bad))
            image.config.console = "none"
            with Machine(image=image) as vm:
                vm.start()
                vm.wait(0.001)
        except VmmError as error:
            why = str(error)
            if not why or "\n" in why or len(why) > 1200:
                raise AssertionError(f"no single line: {why!r}") from error
            return why
        return ""


def sealed(state: bytes) -> bytes:
    """`state` with the checksum that it should have."""
    return state[:12] + struct.pack("<I", zlib.crc32(state[16:])) + state[16:]


def _change(document: Any, dice: random.Random) -> None:
    """Damage one place of it."""
    places: list[tuple[Any, Any]] = []
    queue = [document]
    while queue:
        value = queue.pop()
        if isinstance(value, dict | list):
            keys = list(value) if isinstance(value, dict) else list(range(len(value)))
            if keys and isinstance(keys[0], int) and len(keys) > 8:
                keys = dice.sample(keys, 8)  # model-specific registers are many, and much alike
            places += [(value, key) for key in keys]
            queue += [value[key] for key in keys]
    holder, key = dice.choice(places)
    old = holder[key]
    step = dice.random()
    if isinstance(old, bytes) and old and step < 0.7:
        data = bytearray(old)
        for _ in range(dice.choice((1, 1, 4, 64))):
            data[dice.randrange(len(data))] = dice.choice((0, 1, 0x7F, 0x80, 0xFF, dice.randrange(256)))
        holder[key] = bytes(data) if step < 0.6 else bytes(data) * 2 if step < 0.65 else bytes(data[: len(data) // 2])
    elif isinstance(old, int) and step < 0.8:
        holder[key] = dice.choice((*NUMBERS, old + 1, old - 1, old ^ 1 << dice.randrange(32)))
    elif step < 0.85:
        del holder[key]
    elif step < 0.9:
        other, name = dice.choice(places)
        holder[key] = copy.deepcopy(other[name])
    elif isinstance(holder, dict) and step < 0.92:
        holder[dice.choice(("more", "is", "", 1, True, "fd", "cpus"))] = holder.pop(key)
    elif isinstance(holder, list) and step < 0.95:
        holder.append(copy.deepcopy(old))
    else:
        holder[key] = dice.choice((*NUMBERS, *OTHERS))
