# SPDX-License-Identifier: Apache-2.0
"""Random programs of a guest and its devices, cut at random: what is cut ends as what was never cut.

``PYVMM_CUTS=300`` for so many programs.
"""

from __future__ import annotations

import os
import random
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from boot import layout
from tests.kvm.guests import write_guest
from tests.waiting import until
from virtio import spec
from virtio.rng import Entropy
from virtio.testing import Allocator, Buffer, MmioDriver
from vmm import DriveConfig, Image, Machine, undertaker
from vmm.api.snapshots import _memory_file, create
from vmm.api.types import BootSource, SnapshotCreate, VmConfiguration
from vmm.config.devices import BalloonConfig
from vmm.machine.snapshot_file import decode, pieces_of

SECTORS, RAM, DATA = 128, 8 << 20, 0x400000  # what lies above DATA is written and given back at random
CUTS = ("freeze", "fork", "save", "full", "diff", "new diff", "pause", "own")


class Run:
    """One program; `cut` decides what happens between its steps."""

    def __init__(self, place: Path, kernel: str, seed: int, *, cut: bool) -> None:
        self.place, self.cut = place, cut
        place.mkdir()
        (place / "disk").write_bytes(bytes(SECTORS * 512))
        self.disk = str(place / "disk")
        self.rng, self.dice = random.Random(seed), random.Random(~seed)
        self.answers: list[Any] = []
        self.steps: list[str] = []
        self.vmm: Any = SimpleNamespace(
            unsaved=[], whole=VmConfiguration(boot_source=BootSource(kernel_image_path="guest")),
            metrics=SimpleNamespace(store=lambda *_: None),
        )  # fmt: skip
        self.based = False
        self.vm = Machine(
            kernel, memory=RAM, drives=[DriveConfig(self.disk)], balloon=BalloonConfig(0), entropy=True,
            track_dirty_pages=True, devices=[Entropy(name="first"), Entropy(name="second")],
        )  # fmt: skip
        self.own = ["first", "second"]
        allocator = Allocator(0x200000, 0x200000)
        self.drivers = {}
        for name in ("drive_0", "virtio-balloon", "virtio-rng", "second"):
            self.drivers[name] = MmioDriver(self.vm.devices[name].transport, allocator)
            self.drivers[name].bring_up(size=16, without=spec.F_EVENT_IDX if self.rng.random() < 0.3 else 0)
        self.room = allocator.alloc(0x8000, 4096)

    def submit(self, name: str, queue: int, *buffers: Buffer) -> int:
        ring = self.drivers[name].queues[queue]
        head = ring.add(buffers)
        self.drivers[name].kick(queue)
        if self.cut and self.dice.random() < 0.3:
            self.go_on()  # while it is under way
        ((found, size),) = until(self.drivers[name].queues[queue].reap)
        assert found == head
        return int(size)

    def step(self) -> None:
        what = self.rng.choice(("write", "write", "zero", "give", "take", "read", "put", "random"))
        at = DATA + self.rng.randrange((RAM - DATA) >> 12) * 4096
        size = min(self.rng.choice((4096, 8192, 65536, 1 << 18)), RAM - at)
        memory, room = self.vm.memory, self.room
        self.steps.append(what)
        if what == "write":
            memory.write(at + self.rng.randrange(4096 - 8), self.rng.randbytes(8))
        elif what == "zero":
            memory.write(at, bytes(size))
        elif what == "give":
            pages = struct.pack(f"<{size >> 12}I", *range(at >> 12, at + size >> 12))
            memory.write(room, pages)
            self.submit("virtio-balloon", 0, Buffer(room, len(pages)))
        elif what == "random":
            name = self.rng.choice(("virtio-rng", "second"))
            self.answers.append(self.submit(name, 0, Buffer(room, 16, True)))
            self.vm.memory.write(room, bytes(16))
        elif what in ("read", "put"):
            sector = self.rng.randrange(SECTORS - 8)
            memory.write(room, struct.pack("<IIQ", int(what == "put"), 0, sector))
            if what == "put":
                memory.write(room + 4096, self.rng.randbytes(4096))
            buffers = Buffer(room, 16), Buffer(room + 4096, 4096, what == "read"), Buffer(room + 16, 1, True)
            self.answers.append(self.submit("drive_0", 0, *buffers))
        if self.cut and self.dice.random() < 0.4:
            self.go_on()

    def go_on(self) -> None:
        how = self.dice.choice(CUTS)
        self.steps.append(how)
        if how == "own":  # a device in front of another goes, or another comes
            if "first" in self.own:
                self.vm.detach("first")
                self.own.remove("first")
            else:
                self.vm.attach(Entropy(name="first"))
                self.own.append("first")
            return
        before = self.vm
        if how in ("freeze", "fork", "save"):
            self.based = False  # a Diff has what was written since the machine was made
        if how == "pause":
            if before.state == "Not started":
                before.start()
            before.pause()
            return
        if how == "fork":
            (after,) = before.fork(devices=lambda _: [Entropy(name=name) for name in self.own])
            after.pause()
            before.close()
            self.become(after)
            return
        if how in ("full", "diff", "new diff"):
            image = self.through_files(how)
        else:
            image = before.freeze()
            if how == "save":
                image.save(str(self.place / "image"))
                image = Image.load(str(self.place / "image"))
        data = os.pread(before.blocks["drive_0"].disk.fd, SECTORS * 512, 0)
        before.close()
        self.disk = str(self.place / f"disk{len(self.steps)}")
        Path(self.disk).write_bytes(data)
        config = image.config.replaced(drives=[DriveConfig(self.disk)])
        self.become(Machine(config, image=image, devices=[Entropy(name=name) for name in self.own]))

    def through_files(self, how: str) -> Image:
        kind = "Full" if how == "full" or not self.based else "Diff"
        names = {"snapshot_path": str(self.place / "state"), "mem_file_path": str(self.place / "memory")}
        merged = how == "new diff" and kind == "Diff"
        if merged:
            names["mem_file_path"] += ".diff"
            Path(names["mem_file_path"]).unlink(missing_ok=True)
        if self.vm.state == "Running":
            self.vm.pause()
        create(self.vmm, self.vm, SnapshotCreate(**names, snapshot_type=kind))  # type: ignore[arg-type]  # the words are known
        undertaker.wait()
        if merged:
            lay_over(self.place / "memory.diff", self.place / "memory")
        self.based = True
        image, _ = decode((self.place / "state").read_bytes(), "state")
        # By a name of its own: the next Diff writes into the file of before.
        copy = self.place / f"memory{len(self.steps)}"
        copy.write_bytes((self.place / "memory").read_bytes())
        image.memory = pieces_of(_memory_file(str(copy), RAM), RAM)
        return image

    def become(self, after: Machine) -> None:
        self.vm = after
        for name, driver in self.drivers.items():
            driver.transport = after.devices[name].transport
            for ring in driver.queues:
                ring.ram = after.memory
        for transport in after.virtio:
            transport.go_on()

    def result(self) -> tuple[Any, ...]:
        memory = bytearray(self.vm.memory.read(0, RAM))
        memory[layout.VM_GENERATION : layout.VM_GENERATION + 16] = bytes(16)
        disk = os.pread(self.vm.blocks["drive_0"].disk.fd, SECTORS * 512, 0)
        self.vm.close()
        return self.answers, disk, bytes(memory[DATA:]), bytes(memory[self.room : self.room + 0x8000])


def lay_over(diff: Path, base: Path) -> None:
    """As Firecracker's snapshot-editor does it: what is no hole."""
    with open(diff, "rb") as source, open(base, "r+b") as target:
        end = 0
        while True:
            try:
                start = os.lseek(source.fileno(), end, os.SEEK_DATA)
            except OSError:
                return
            end = os.lseek(source.fileno(), start, os.SEEK_HOLE)
            os.pwrite(target.fileno(), os.pread(source.fileno(), end - start, start), start)


@pytest.mark.parametrize("seed", range(int(os.environ.get("PYVMM_CUTS", "6"))))
def test_what_is_cut_ends_as_what_was_never_cut(tmp_path: Path, seed: int) -> None:
    kernel = write_guest(tmp_path, "1: hlt\njmp 1b")
    whole, cut = (Run(tmp_path / name, kernel, seed, cut=name == "cut") for name in ("whole", "cut"))
    try:
        for _ in range(40):
            whole.step()
            cut.step()
        for found, wanted in zip(cut.result(), whole.result(), strict=True):
            assert found == wanted, cut.steps
    finally:
        whole.vm.close()
        cut.vm.close()
