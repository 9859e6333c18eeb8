# SPDX-License-Identifier: Apache-2.0
"""Devices come and go while a guest reads where they are. ``python -m tests.kvm.test_attach 1000``: each so often."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from queue import Queue
from typing import TYPE_CHECKING, Any

import pytest

from boot.board import VIRTIO_GSIS
from boot.layout import VIRTIO_MMIO, VIRTIO_MMIO_STRIDE
from tests.kvm import guests
from tests.kvm.test_virtio import BRING_UP, DATA, EXIT, REQUEST, place_request
from tests.virtio import blk_driver
from tests.waiting import until
from virtio import spec
from virtio.console import Console
from virtio.device import VirtioDevice
from virtio.net.device import Net
from virtio.rng import Entropy
from virtio.testing import Allocator, MmioDriver
from vmm import Machine, undertaker
from vmm.config.devices import BalloonConfig, DriveConfig, EntropyConfig, ShareConfig, VsockConfig
from vmm.errors import ConfigError, KvmError, SnapshotError, VmmError
from vmm.machine.attach import Attached
from vmm.machine.build import Builder

if TYPE_CHECKING:
    from vmm.machine.build import DeviceConfig

    What = VirtioDevice | DeviceConfig

MakeGuest = Callable[..., Machine]

# Reads two registers of each of four slots and writes one, for ever: through the page, through exits, and where
# nothing is.
BUSY = "again:\n" + "".join(
    f"""
    mov ebx, {VIRTIO_MMIO + slot * VIRTIO_MMIO_STRIDE:#x}
    mov eax, dword ptr [ebx]
    mov eax, dword ptr [ebx + {spec.MMIO_INTERRUPT_STATUS}]
    mov dword ptr [ebx + {spec.MMIO_SHM_SEL}], 0
    """
    for slot in range(4)
) + "jmp again\n"  # fmt: skip
# Reads the first device's magic number until it has been there, and until it has gone.
SEES = f"""
    mov ebx, {VIRTIO_MMIO:#x}
come:
    pause
    cmp dword ptr [ebx], {spec.MMIO_MAGIC:#x}
    jne come
    mov byte ptr [0x300000], 1
go:
    pause
    cmp dword ptr [ebx], 0xffffffff
    jne go
    mov al, 42
    mov dx, 0xf4
    out dx, al
"""


class Cable:
    """A network's end for a device: frames by a socket, as passt has them."""

    stream = True
    name = "cable"

    def __init__(self) -> None:
        ours, self.theirs = socket.socketpair()
        ours.setblocking(False)
        self.fds = [ours.detach()]

    def set_offloads(self, features: int) -> None:
        """None are offered."""

    def set_pairs(self, count: int) -> None:
        """There is one."""

    def gone(self) -> str:
        return "the cable is cut"


def kinds(directory: Path) -> dict[str, Callable[[], What]]:
    """How to make a device of each kind."""
    for disk in ("sync", "async"):
        (directory / disk).write_bytes(bytes(1 << 16))
    (directory / "share").mkdir()
    cable = Cable()
    return {
        "sync": lambda: DriveConfig(str(directory / "sync"), engine="sync"),
        "async": lambda: DriveConfig(str(directory / "async"), engine="io_uring", queues=2),
        "net": lambda: Net(cable, b"\x06\0\0\0\0\x01"),
        "share": lambda: ShareConfig("share", str(directory / "share")),
        "dax": lambda: ShareConfig("dax", str(directory / "share"), dax=2 << 20),
        "vsock": lambda: VsockConfig(3, str(directory / "v")),
        "entropy": EntropyConfig,
        "balloon": lambda: BalloonConfig(0),
        "console": lambda: Console(ports=("port",)),
        "own": Entropy,
    }


class _Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in
                "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]  # fmt: skip


def held(vm: Machine) -> tuple[dict[str, int], dict[str, int]]:
    """What this process and `vm` have: what must be the same again, and bytes, which caches move a little."""
    gc.collect()
    undertaker.wait()
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _Mallinfo
    exact = {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "slots": len(vm.vm.slots),
        "ranges": len(vm.mmio.claims) + len(vm.pio.claims),
        "devices": len(vm.devices),
    }
    return exact, {"C": mallinfo2().uordblks, "Python": sys.getallocatedblocks() * 32}


def bring_up(vm: Machine, attached: Attached) -> None:
    """Be its driver as far as DRIVER_OK, so that its threads run; each queue is looked at once."""
    driver = MmioDriver(attached.transport, Allocator(0x200000, 0x180000))
    driver.bring_up(size=8)
    for queue in range(len(driver.queues)):
        driver.set(spec.MMIO_QUEUE_NOTIFY, queue)


def rounds(vm: Machine, makers: dict[str, Callable[[], What]], count: int) -> None:
    """Attach and detach one device of each kind, `count` times; one more stays meanwhile, so that slots differ."""
    for _ in range(count):
        previous = ""
        for make in makers.values():
            attached = vm.attach(make())
            bring_up(vm, attached)
            if previous:
                vm.detach(previous)
            previous = attached.id
        vm.detach(previous)


def check(vm: Machine, directory: Path, count: int) -> None:
    """Nothing is left after `count` rounds that was not there after some to fill the caches."""
    makers = kinds(directory)
    vm.start()
    rounds(vm, makers, 2)
    before, bytes_before = held(vm)
    rounds(vm, makers, count)
    after, bytes_after = held(vm)
    assert after == before
    for kind, value in bytes_after.items():
        # Less than 16 bytes for each device that came and went.
        assert value - bytes_before[kind] < max(32 << 10, 16 * count * len(makers)), (kind, bytes_before, bytes_after)
    assert vm.state == "Running"


def test_devices_come_and_go_and_leave_nothing(guest: MakeGuest, tmp_path: Path) -> None:
    vm = guest(BUSY)
    check(vm, tmp_path, 12)
    assert vm.vcpus[0].exits["mmio_read"] > 0
    vm.stop()


def test_guest_sees_a_device_come_and_go(guest: MakeGuest) -> None:
    vm = guest(SEES)
    vm.start()
    own = Entropy()
    attached = vm.attach(own)
    assert (attached.id, attached.base, attached.gsi) == ("virtio-rng", VIRTIO_MMIO, VIRTIO_GSIS[0])
    while vm.memory.read(0x300000, 1) == b"\0" and vm.state == "Running":
        pass
    vm.detach("virtio-rng")
    stop = vm.wait(guests.PATIENCE)
    assert stop is not None and stop.code == 42
    assert vm.devices == {}


def test_guest_reads_a_disk_that_came_later(guest: MakeGuest, tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(b"".join(bytes([i]) * 512 for i in range(64)))
    wait = f"waits:\n pause\n cmp dword ptr [{VIRTIO_MMIO:#x}], {spec.MMIO_MAGIC:#x}\n jne waits\n"
    vm = guest(f"{wait}{BRING_UP}{REQUEST}mov al, byte ptr [{DATA + 511:#x}]\nend:\n{EXIT}")
    place_request(vm, blk_driver.T_IN, 42, None)
    vm.start()
    attached = vm.attach(DriveConfig(str(tmp_path / "disk"), id="late"))
    stop = vm.wait(guests.PATIENCE)
    assert stop is not None and stop.code == 42
    assert vm.blocks == {"late": attached.device}
    assert attached.transport.notified == 0, "KVM's ioeventfd takes them"


def test_configured_device_gives_its_file_back(guest: MakeGuest, tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(512))
    config = DriveConfig(str(tmp_path / "disk"))
    vm = guest(BUSY, drives=(config,), entropy=True)
    vm.start(paused=True)
    with pytest.raises(ConfigError, match="in use"):
        vm.attach(config)
    vm.detach("drive_0")
    assert list(vm.devices) == ["virtio-rng"]
    with pytest.raises(SnapshotError, match="devices: a configured device was detached"):
        vm.freeze()
    again = vm.attach(config)
    assert again.slot == 0 and vm.state == "Paused"


def test_place_is_lowest_and_names_are_told_apart(guest: MakeGuest) -> None:
    vm = guest(BUSY)
    ids = [vm.attach(Entropy()).id for _ in VIRTIO_GSIS]
    assert ids[:3] == ["virtio-rng", "virtio-rng.1", "virtio-rng.2"]
    with pytest.raises(ConfigError, match=f"devices {len(ids) + 1}: at most {len(ids)} virtio devices fit"):
        vm.attach(BalloonConfig(0))
    vm.detach("virtio-rng.1")
    assert vm.attach(BalloonConfig(0)).slot == 1
    vm.detach("virtio-rng.2")
    with pytest.raises(ConfigError, match="balloon virtio-balloon: is in use"):
        vm.attach(BalloonConfig(0))
    with pytest.raises(SnapshotError, match="virtio-balloon: was attached later"):
        vm.freeze()
    with pytest.raises(VmmError, match="device nothing does not exist; devices: virtio-rng, "):
        vm.detach("nothing")


def test_attachment_that_fails_leaves_nothing(guest: MakeGuest, monkeypatch: pytest.MonkeyPatch) -> None:
    vm = guest(BUSY)
    own = Entropy()
    vm.detach(vm.attach(own).id)  # everything is imported
    before, _ = held(vm)
    rings = []

    def no_room(fd: int, address: int, value: int, *, bind: bool = True) -> None:
        rings.append(bind)
        if bind and len(rings) == 2:
            raise KvmError(28, "KVM_IOEVENTFD")
        ioeventfd(fd, address, value, bind=bind)

    ioeventfd = vm.vm.ioeventfd
    monkeypatch.setattr(vm.vm, "ioeventfd", no_room)
    with pytest.raises(KvmError, match="KVM_IOEVENTFD"):
        vm.attach(own)
    assert rings == [True, True, False]
    assert held(vm)[0] == before
    monkeypatch.undo()
    vm.mmio.add(VIRTIO_MMIO + 8, 4, vm.rtc, "in the way")  # never asked
    with pytest.raises(ConfigError, match="claimed by in the way"):
        vm.attach(own)
    vm.mmio.remove(vm.rtc)
    vm.mmio.reclaim()
    assert held(vm)[0] == before


def test_configured_console_is_the_machines(guest: MakeGuest) -> None:
    vm = guest(BUSY, virtio_console=True)
    output: Queue[bytes] = Queue()
    vm.on_console(output.put)
    vm.start()
    driver = MmioDriver(vm.devices["virtio-console"].transport, Allocator(0x200000, 0x180000))
    ring = driver.bring_up(size=8, without=spec.CONSOLE_F_MULTIPORT)[1]
    ring.add([ring.buffer(b"hvc0")])
    driver.kick(1)
    assert output.get(timeout=guests.PATIENCE) == b"hvc0"
    vm.stop()


def test_what_cannot_be_changed_says_so(guest: MakeGuest) -> None:
    vm = guest(BUSY, virtio_console=True)
    with pytest.raises(VmmError, match="is the machine's console"):
        vm.detach("virtio-console")
    with pytest.raises(TypeError, match="expected a device or its configuration, not int"):
        vm.attach(7)  # type: ignore[arg-type]
    vm.start()
    vm.stop()
    for device in (Entropy(), BalloonConfig(0)):
        with pytest.raises(VmmError, match="has ended"):
            vm.attach(device)
    assert list(vm.devices) == ["virtio-console"]


def test_a_device_that_is_not_there_yet_is_not_seen(guest: MakeGuest) -> None:
    asked, answer = threading.Event(), threading.Event()

    class Slow:
        def read(self, offset: int, data: memoryview) -> None:
            asked.set()
            answer.wait(guests.PATIENCE)

        def write(self, offset: int, data: memoryview) -> None: ...

    vm = guest("mov dx, 0x510; in al, dx\nagain: jmp again")
    vm.pio.add(0x510, 1, Slow(), "slow")
    vm.start()
    assert asked.wait(guests.PATIENCE)
    attaching = threading.Thread(target=vm.attach, args=(EntropyConfig(),))
    attaching.start()
    until(lambda: vm._run.holds)
    assert (vm.stats, vm.devices, vm.virtio) == ({}, {}, ())
    answer.set()
    attaching.join(guests.PATIENCE)
    assert list(vm.stats) == ["virtio-rng"]


def test_devices_that_are_attached_at_once_have_each_their_own(
    guest: MakeGuest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = guest(BUSY)
    both = threading.Barrier(2)
    made = Builder._made

    def slowly(self: Builder, *what: Any) -> Attached:
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.5)
        return made(self, *what)

    monkeypatch.setattr(Builder, "_made", slowly)
    for name in "ab":
        (tmp_path / name).write_bytes(bytes(512))
    drives = [DriveConfig(str(tmp_path / name), id=name) for name in "ab"]
    attaching = [threading.Thread(target=vm.attach, args=(drive,)) for drive in drives]
    for thread in attaching:
        thread.start()
    for thread in attaching:
        thread.join(guests.PATIENCE)
    disks = {name: block.disk for name, block in vm.blocks.items()}
    vm.detach("a")
    assert disks["a"].fd == -1 and os.fstat(disks["b"].fd).st_ino == (tmp_path / "b").stat().st_ino


def test_a_devices_own_thread_is_refused_what_would_wait_for_it(guest: MakeGuest) -> None:
    told: Queue[str] = Queue()

    class Hypercall(Entropy):
        thread_kind: Any = None

        def process(self, queue_index: int) -> None:
            for call in (vm.freeze, lambda: vm.fork(devices=lambda _: ()), lambda: vm.detach(self.name), vm.close):
                with pytest.raises(VmmError) as error:
                    call()
                told.put(str(error.value))
            super().process(queue_index)

    device = Hypercall(name="hypercall")
    vm = guest(BUSY, devices=[device])
    vm.start()
    driver = MmioDriver(vm.devices["hypercall"].transport, Allocator(0x200000, 0x180000))
    ring = driver.bring_up(size=8)[0]
    ring.add([ring.buffer(8, device_writes=True)])
    answer = "a device's own thread would wait for itself; let another thread do this"
    with vm._devices_lock:  # as who detaches it has it, and waits for its threads
        driver.kick()
        assert [told.get(timeout=guests.PATIENCE) for _ in range(4)] == [answer] * 4
    until(ring.reap)  # and the device goes on
    vm.detach("hypercall")


def test_a_device_that_cannot_be_closed_keeps_no_other_from_it(
    guest: MakeGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = [Entropy(name=name) for name in ("first", "second")]
    vm = guest(BUSY, devices=devices)
    vm.start()
    allocator = Allocator(0x200000, 0x180000)
    for each in vm.virtio:
        MmioDriver(each, allocator).bring_up(size=8)

    def reset() -> None:
        raise ZeroDivisionError("a bug in my device")

    monkeypatch.setattr(devices[1], "reset", reset)
    with pytest.raises(ZeroDivisionError):
        vm.close()
    assert not {"first", "second"} & {thread.name for thread in threading.enumerate()}
    assert not devices[0].notify_fds and not devices[1].notify_fds


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        with Machine(kernel=guests.write_guest(Path(name), BUSY), memory="4M") as machine:
            begun = time.monotonic()
            check(machine, Path(name), int(sys.argv[1]))
            print(f"{sys.argv[1]} of each kind in {time.monotonic() - begun:.1f} s; nothing is left")


def test_a_line_that_is_not_free_for_a_bus_device_is_refused(guest: MakeGuest) -> None:
    vm = guest("hlt")
    with pytest.raises(ConfigError, match="gsi 4: is not free for a device of your own; use 3 or 8"):
        vm.irq_line(4)
    first, second = vm.irq_line(8), vm.irq_line(8)
    assert first.fd != second.fd
    vm.close()
    assert first.fd == second.fd == -1
