# SPDX-License-Identifier: Apache-2.0
"""Frozen and forked machines: tiny guests that go on from the same instruction, each on its own."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import resource
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.guide import programs
from tests.kvm.guests import PATIENCE, run
from tests.waiting import until
from virtio.mmio import VirtioMmio
from virtio.testing import Allocator, MmioDriver
from vmm import DriveConfig, Image, Machine, Pool, StopReason, VmConfig, undertaker
from vmm.config.devices import BalloonConfig, EntropyConfig, RateLimiterConfig, ShareConfig
from vmm.errors import ConfigError, HostError, SnapshotError, VmmError
from vmm.kvm.abi import kvm_ioctl
from vmm.kvm.vm import software_kvm
from vmm.machine import snapshot
from vmm.machine.private_disk import private_copy
from vmm.machine.snapshot import _child_config, child_of

KVM_CLOCK_REALTIME, IA32_TSC = 4, 0x10
KVM_SET_DEBUGREGS, KVM_GET_VCPU_EVENTS, KVM_SET_VCPU_EVENTS = 0x4080_AEA2, 0x8040_AE9F, 0x4040_AEA0
MakeGuest = Callable[..., Machine]

# Counts in memory until the byte at 0x200000 is not 0, then ends with it.
COUNTER = """
    xor ebx, ebx
1:  inc ebx
    mov [0x200004], ebx
    mov al, [0x200000]
    test al, al
    jz 1b
    mov dx, 0xf4
    out dx, al
    hlt
"""


def _end(vm: Machine, status: int) -> None:
    vm.memory.write(0x200000, bytes((status,)))
    stop = vm.wait(PATIENCE)
    assert stop is not None and (stop.reason, stop.code) == (StopReason.GUEST_EXIT, status)


def _count(vm: Machine) -> int:
    return int.from_bytes(vm.memory.read(0x200004, 4), "little")


def _until_it_counts(vm: Machine, above: int = 0) -> None:
    until(lambda: _count(vm) > above)


def test_children_go_on_from_the_same_instruction_and_each_on_its_own(guest: MakeGuest) -> None:
    vm = guest(COUNTER)
    vm.start()
    _until_it_counts(vm, 1000)
    before = _count(vm)
    children = vm.fork(3)
    for child in children:
        assert _count(child) >= before
        _until_it_counts(child, before + 1000)
    for status, child in enumerate(children, 5):
        _end(child, status)
        child.close()
    assert vm.state == "Running"
    _end(vm, 3)


def test_a_fork_of_a_fork_of_a_fork(guest: MakeGuest) -> None:
    vm = guest(COUNTER)
    vm.start()
    line = [vm]
    for _ in range(5):
        _until_it_counts(line[-1], _count(line[-1]) + 100)
        line += line[-1].fork()
    for status, machine in enumerate(line, 10):
        _end(machine, status)
        machine.close()


def test_a_paused_machine_stays_paused_and_its_children_run(guest: MakeGuest) -> None:
    vm = guest(COUNTER)
    vm.start()
    _until_it_counts(vm)
    vm.pause()
    at = _count(vm)
    (child,) = vm.fork()
    _until_it_counts(child, at)
    assert _count(vm) == at
    assert vm.state == "Paused"
    assert child.vcpus[0].fd != vm.vcpus[0].fd
    _end(child, 9)
    child.close()
    vm.resume()
    _end(vm, 4)


def test_an_image_is_not_changed_by_who_goes_on_from_it(guest: MakeGuest) -> None:
    vm = guest(COUNTER)
    vm.start()
    _until_it_counts(vm)
    vm.pause()
    at, rip = _count(vm), vm.vcpus[0].regs.rip
    image = vm.freeze()
    vm.resume()
    _end(vm, 1)
    vm.close()
    for status in (2, 3):
        with Machine(image=image) as machine:
            assert (_count(machine), machine.vcpus[0].regs.rip) == (at, rip)
            machine.start()
            _until_it_counts(machine, at)
            _end(machine, status)


def woken(vector: int, source: str) -> str:
    """A guest in 32-bit protected mode: `source` sets the PICs' masks and has the handler of this vector."""
    return f"""
    lgdt [gdt_descriptor]
    lidt [idt_descriptor]
    mov esp, 0x90000
    mov eax, offset handler
    mov word ptr [idt + {vector} * 8], ax
    shr eax, 16
    mov word ptr [idt + {vector} * 8 + 6], ax
    mov al, 0x11
    out 0x20, al
    mov al, 0x20
    out 0x21, al
    mov al, 4
    out 0x21, al
    mov al, 1
    out 0x21, al
{source}
    .balign 8
gdt: .quad 0, 0, 0x00cf9b000000ffff, 0x00cf93000000ffff
gdt_descriptor: .word 31
    .long gdt
idt: .fill {vector}, 8, 0
    .word 0, 0x10, 0x8e00, 0
idt_descriptor: .word {vector + 1} * 8 - 1
    .long idt
"""


# A one-shot PIT interrupt after about 50 ms wakes a halted guest, which then ends with 7.
HALTED = woken(
    0x20,
    """
    mov al, 0xfe
    out 0x21, al
    mov al, 0x30
    out 0x43, al
    mov al, 0xff
    out 0x40, al
    out 0x40, al
    mov byte ptr [0x200008], 1
    sti
1:  hlt
    jmp 1b
handler:
    mov al, 7
    mov dx, 0xf4
    out dx, al
    hlt
""",
)


def test_guests_frozen_while_halted_wake_by_their_timer(guest: MakeGuest) -> None:
    rounds = 0
    while rounds < 20:
        vm = guest(HALTED)
        vm.start()
        while not vm.memory.read(0x200008, 1)[0]:
            time.sleep(0.0005)
        try:
            (child,) = vm.fork()
        except VmmError as error:
            assert "ended" in str(error)
            continue  # we were not run for longer than its timer
        rounds += 1
        for machine in (child, vm):
            stop = machine.wait(PATIENCE)
            assert stop is not None and stop.code == 7
            machine.close()


# Stores each byte that arrives at the serial port at 0x200004, woken through the IOAPIC or the PIC.
READER = woken(
    0x24,
    """
    mov al, %(pic)s
    out 0x21, al
    mov ebx, 0xfee00000
    mov dword ptr [ebx + 0xf0], 0x1ff
    mov dword ptr [ebx + 0x350], %(lint0)s
    mov edx, 0xfec00000
    mov dword ptr [edx], 0x19
    mov dword ptr [edx + 0x10], 0
    mov dword ptr [edx], 0x18
    mov dword ptr [edx + 0x10], %(entry)s
    mov dx, 0x3fc
    mov al, 0x0b
    out dx, al
    mov dx, 0x3f9
    mov al, 1
    out dx, al
    mov byte ptr [0x200008], 1
1:  sti
    hlt
    jmp 1b
handler:
    mov dx, 0x3fd
    in al, dx
    test al, 1
    jz 2f
    mov dx, 0x3f8
    in al, dx
    mov byte ptr [0x200004], al
2:  mov dword ptr [ebx + 0xb0], 0
    mov al, 0x20
    out 0x20, al
    ret 8  # no iret here: a software KVM does not emulate it
""",
)
IOAPIC = {"pic": "0xff", "lint0": "0x10700", "entry": "0x24"}
PIC = {"pic": "0xef", "lint0": "0x700", "entry": "0x10024"}


@pytest.mark.parametrize(("wiring", "chip", "offset"), [(IOAPIC, 2, 24), (PIC, 0, 8)], ids=["IOAPIC", "PIC"])
def test_a_freeze_in_the_middle_of_an_interrupts_pulse(
    guest: MakeGuest, wiring: dict[str, str], chip: int, offset: int
) -> None:
    # KVM raises and lowers a line in two steps, on a thread of its own. A line that stays high in a copy has no edge.
    vm = guest(READER % wiring)
    vm.start()
    until(lambda: vm.memory.read(0x200008, 1) == b"\1")
    time.sleep(0.01)  # it halts
    image = vm.freeze()
    chips = [bytearray(each) for each in image.vm["irqchips"]]
    chips[chip][offset] |= 1 << 4  # Source: linux/kvm.h: kvm_ioapic_state.irr, kvm_pic_state.last_irr
    image.vm["irqchips"] = [bytes(each) for each in chips]
    with Machine(image=image) as copy:
        copy.start()
        for byte in (b"a", b"b"):
            time.sleep(0.01)
            copy.serial.feed(byte)
            until(lambda byte=byte: copy.memory.read(0x200004, 1) == byte)  # type: ignore[misc]


def test_a_machine_that_is_started_paused_runs_no_instruction(guest: MakeGuest) -> None:
    vm = guest(COUNTER)
    vm.start(paused=True)
    assert vm.state == "Paused"
    time.sleep(0.1)
    assert _count(vm) == 0
    vm.resume()
    _until_it_counts(vm)
    _end(vm, 8)


def test_a_frozen_machine_before_its_start(guest: MakeGuest) -> None:
    vm = guest(COUNTER)
    image = vm.freeze()
    with Machine(image=image) as machine:
        machine.start()
        _until_it_counts(machine)
        _end(machine, 6)
    vm.memory.write(0x200000, b"\x05")
    assert run(vm).code == 5


def _driven(vm: Machine, name: str) -> MmioDriver:
    driver = MmioDriver(vm.devices[name].transport, Allocator(0x300000, 0x10000))
    driver.bring_up(size=16)
    return driver


def test_devices_of_a_machine_that_was_not_started_do_nothing_after_a_freeze(guest: MakeGuest) -> None:
    # Their threads would have begun before there were filters.
    vm = guest(COUNTER, entropy=True)
    _driven(vm, "virtio-rng")
    image = vm.freeze()
    assert vm.devices["virtio-rng"].transport.serving, "it served before"
    with Machine(image=image) as copy:
        (child,) = copy.fork()
        assert not copy.devices["virtio-rng"].transport.serving
        copy.start()
        assert copy.devices["virtio-rng"].transport.serving and child.devices["virtio-rng"].transport.serving
        child.close()


def test_a_start_beside_a_freeze_begins_after_it(guest: MakeGuest) -> None:
    vm = guest(COUNTER, entropy=True)
    _driven(vm, "virtio-rng")
    with Machine(image=vm.freeze()) as copy:
        starts = threading.Thread(target=copy.start)
        rng = copy.devices["virtio-rng"].transport

        def meanwhile() -> None:
            starts.start()
            starts.join(0.1)
            assert not rng.serving, "it would write to RAM that is read"

        copy._freeze(meanwhile)
        starts.join(PATIENCE)
        assert rng.serving


def test_a_machine_that_is_being_started_is_closed_by_a_signals_handler(
    guest: MakeGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = guest(COUNTER)
    confine = vm._confine

    def handled() -> tuple[str | None, str | None]:
        vm.close()
        return confine()

    monkeypatch.setattr(vm, "_confine", handled)
    with contextlib.suppress(VmmError):
        vm.start()
    assert vm.state == "Stopped"


def test_a_close_beside_a_start_ends_what_has_begun(guest: MakeGuest, monkeypatch: pytest.MonkeyPatch) -> None:
    vm = guest(COUNTER)
    closes, count = threading.Thread(target=vm.close), vm._count_ranges

    def meanwhile() -> int:
        if not vm.closed:
            closes.start()
            closes.join(0.1)
        return count()

    monkeypatch.setattr(vm, "_count_ranges", meanwhile)
    vm.start()
    closes.join(PATIENCE)
    assert vm.state == "Stopped" and not vm._run._own, "no vCPU runs in memory that was given back"


def test_devices_go_on_after_a_freeze_of_a_guest_that_has_just_ended(
    guest: MakeGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it has sent before is on its way, and what is held at the end is lost."""
    vm = guest(COUNTER, entropy=True)
    driver = _driven(vm, "virtio-rng")
    vm.start()
    hold = vm._run.hold

    def held(reason: str) -> None:
        hold(reason)
        vm.stop()  # as by a power-off that was under way

    monkeypatch.setattr(vm._run, "hold", held)
    with pytest.raises(VmmError, match="a machine that has ended cannot be frozen"):
        vm.freeze()
    ring = driver.queues[0]
    ring.add([ring.buffer(16, device_writes=True)])
    driver.kick()
    until(ring.reap)


class _Interrupt(BaseException):
    """What the handler of a signal raises, as KeyboardInterrupt."""


def _interrupted(call: Callable[[], object], number: int) -> bool:
    """Raise at the `number`-th of the places of `call` where handlers of signals run; whether there are so many."""
    left = [number]

    def look(frame: Any, event: str, argument: object) -> None:
        if event not in ("call", "c_return") or frame.f_code.co_filename == threading.__file__:
            return  # a Condition that is interrupted in its own code stays locked: Python's limitation
        left[0] -= 1
        if left[0] < 0:
            raise _Interrupt  # and nothing is looked at any more

    try:
        sys.setprofile(look)
        call()
    except _Interrupt:
        pass
    finally:
        sys.setprofile(None)
    return left[0] < 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # raised where a file is given back
@pytest.mark.parametrize("what", ["freeze", "pause"])
def test_wherever_a_signals_handler_raises_the_guest_and_its_devices_go_on(guest: MakeGuest, what: str) -> None:
    vm = guest(COUNTER, entropy=True)
    _driven(vm, "virtio-rng")
    vm.start()
    rng = vm.devices["virtio-rng"].transport
    call: Callable[[], object] = getattr(vm, what)
    number, again = 0, True
    while again:
        call()  # once whole, so that the next one has as much to do as those before
        vm.resume()
        again = _interrupted(call, number)
        assert rng.serving and (not vm._run.holds or not again), number
        number += 1
    vm.resume()
    assert number > 5
    _until_it_counts(vm, _count(vm))
    _end(vm, 3)


def test_an_ended_machine_is_refused(guest: MakeGuest) -> None:
    vm = guest("hlt")
    vm.start()
    vm.stop()
    with pytest.raises(VmmError, match="ended"):
        vm.fork()


def test_what_is_one_machines_is_refused_by_name(tmp_path: Path, guest: MakeGuest) -> None:
    from virtio.rng import Entropy

    vm = guest("hlt", devices=[Entropy(name="mine")])
    with pytest.raises(SnapshotError, match="mine: is a device of your program: give each copy its own by devices="):
        vm.fork()


def test_copies_have_devices_of_their_own(guest: MakeGuest) -> None:
    from virtio.rng import Entropy
    from vmm import Pool

    def devices(number: int) -> list[Entropy]:
        made.append(Entropy(name="mine"))
        return made[-1:]

    made: list[Entropy] = []
    vm = guest(COUNTER, devices=[Entropy(name="mine")])
    for child in vm.fork(2, devices=devices):
        assert child.devices["mine"].device in made
        child.close()
    with Pool(vm, size=1, devices=devices) as pool, pool.take(PATIENCE) as copy:
        assert copy.devices["mine"].device in made[2:]
    with pytest.raises(ValueError, match="process of its own"):
        vm.fork(devices=devices, isolated=True)


def test_devices_of_ones_own_are_in_copies_where_they_were(tmp_path: Path, guest: MakeGuest) -> None:
    # Though one that came before them has gone, and another has taken its place.
    from virtio.rng import Entropy

    def devices(number: int) -> list[Entropy]:
        return [Entropy(name=name) for name in vm.devices]

    vm = guest(COUNTER, devices=[Entropy(name=name) for name in ("one", "two", "three")])
    for name in ("two", "one"):
        vm.detach(name)
        (child,) = vm.fork(devices=devices)
        assert {id: each.base for id, each in child.devices.items()} == {
            id: each.base for id, each in vm.devices.items()
        }
        child.close()
    assert vm.attach(Entropy(name="four")).slot == 0
    vm.freeze().save(str(tmp_path / "image"))
    for image in (vm.freeze(), Image.load(str(tmp_path / "image"))):
        with Machine(image=image, devices=devices(0)) as copy:
            assert [(id, each.slot) for id, each in copy.devices.items()] == [("three", 2), ("four", 0)]
    for damaged in (2, -1, 99, 1.0, "1", [0]):  # in use, or no slot
        image.virtio[1]["slot"] = damaged
        with Machine(image=image, devices=devices(0)) as copy:
            assert [each.slot for each in copy.devices.values()] == [2, 0]


def test_a_fork_that_fails_leaves_no_disk(tmp_path: Path, guest: MakeGuest, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(bytes(4096))
    vm = guest(COUNTER, drives=[DriveConfig(str(tmp_path / name)) for name in ("a", "b")])
    image = vm.freeze()
    make = child_of(vm)
    copied: list[str] = []

    def copy(source: int, path: str) -> int:
        copied.append(os.path.basename(path))
        if path.endswith("b"):
            raise HostError(errno.ENOSPC, "copy the disk", path)
        return private_copy(source, path)

    monkeypatch.setattr(snapshot, "private_copy", copy)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(4):
        with pytest.raises(HostError, match=r"copy the disk .*b: No space left"):
            make(0)
        assert len(os.listdir("/proc/self/fd")) == before
    assert copied == ["a", "b"] * 4
    (tmp_path / "b").unlink()
    with pytest.raises(HostError, match=r"open the disk .*b: No such file"):
        Pool(image)


def test_without_a_descriptor_left_the_host_is_named(tmp_path: Path, guest: MakeGuest) -> None:
    (tmp_path / "disk").write_bytes(bytes(4096))
    plain, vm = guest(COUNTER), guest(COUNTER, drives=[DriveConfig(str(tmp_path / "disk"))])
    make, isolate = child_of(vm), child_of(plain, isolated=True)
    vm.start()
    _until_it_counts(vm)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    os.close(lowest := os.dup(0))
    for call, what in (
        (vm.freeze, "freeze guest memory"),
        (lambda: make(0), f"copy the disk {tmp_path}/disk"),
        (lambda: isolate(0), "make a process for the copy"),
    ):
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))
        try:
            with pytest.raises(HostError, match=f"^{what}.*: Too many open files$"):
                call()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    _until_it_counts(vm, _count(vm))
    _end(vm, 3)


def test_each_child_has_disks_of_its_own(tmp_path: Path, guest: MakeGuest) -> None:
    image = tmp_path / "disk"
    image.write_bytes(b"parent" * 1024)
    read_only = tmp_path / "ro"
    read_only.write_bytes(b"shared" * 1024)
    vm = guest(COUNTER, drives=[DriveConfig(str(image)), DriveConfig(str(read_only), read_only=True)])
    vm.start()
    children = vm.fork(2)
    inodes = {os.fstat(machine.blocks["drive_0"].disk.fd).st_ino for machine in (vm, *children)}
    assert len(inodes) == 3
    for child in children:
        os.pwrite(child.blocks["drive_0"].disk.fd, b"child!", 0)
        assert os.pread(child.blocks["drive_1"].disk.fd, 6, 0) == b"shared"
        child.close()
    assert image.read_bytes() == b"parent" * 1024


def test_a_disk_is_copied_as_one_file_or_the_other(
    tmp_path: Path, guest: MakeGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(b"a" * 4096)
    (tmp_path / "b").write_bytes(b"b" * 4096)
    vm = guest(COUNTER, drives=[DriveConfig(str(tmp_path / "a"))])
    vm.start()
    threads: list[threading.Thread] = []

    def copy(source: int, path: str) -> int:
        if not threads:
            threads.append(threading.Thread(target=vm.blocks["drive_0"].replace, args=[str(tmp_path / "b")]))
            threads[0].start()
            threads[0].join(0.1)
        return private_copy(source, path)

    monkeypatch.setattr(snapshot, "private_copy", copy)
    (child,) = vm.fork()
    threads[0].join(PATIENCE)
    assert [os.pread(each.blocks["drive_0"].disk.fd, 1, 0) for each in (vm, child)] == [b"b", b"a"]
    child.close()


def test_a_fork_that_fails_closes_all_that_it_has_made(guest: MakeGuest, monkeypatch: pytest.MonkeyPatch) -> None:
    vm = guest(COUNTER)
    started: list[Machine] = []
    closed: list[Machine] = []
    close = Machine.close

    def start(self: Machine, **how: object) -> None:
        started.append(self)
        if len(started) == 3:
            raise VmmError("no thread")

    def fail(self: Machine) -> None:
        close(self)
        closed.append(self)
        raise OSError(5, "no more")

    with monkeypatch.context() as patch:
        patch.setattr(Machine, "start", start)
        patch.setattr(Machine, "close", fail)
        with pytest.raises(OSError, match="no more"):
            vm.fork(5)
    assert sorted(closed, key=id) == sorted(started, key=id)


@pytest.mark.parametrize("ends", [False, True])
def test_devices_go_on_after_a_freeze_where_the_machine_was_started(
    guest: MakeGuest, monkeypatch: pytest.MonkeyPatch, ends: bool
) -> None:
    # Also where it ends meanwhile: a guest may have sent something right before.
    vm = guest(COUNTER, entropy=EntropyConfig())
    vm.start()
    driver = MmioDriver(vm.devices["virtio-rng"].transport, Allocator(0x210000, 0x100000))
    driver.bring_up(size=8)
    image = vm.freeze()
    went_on: list[object] = []
    go_on = VirtioMmio.go_on

    def note(self: VirtioMmio) -> None:
        went_on.append(self)
        go_on(self)

    with Machine(image=image) as copy:
        monkeypatch.setattr(VirtioMmio, "go_on", note)
        threads = threading.active_count()
        copy.freeze()
        assert not went_on and threading.active_count() == threads, "it was not started"
        if ends:
            vm._freeze(vm.stop)
        else:
            vm.freeze()
        assert went_on == [*vm.virtio]
        copy.start()
        _end(copy, 6)


def test_the_disk_of_a_copy_is_in_no_image_by_a_number(tmp_path: Path, guest: MakeGuest) -> None:
    """That would be another file's by the time somebody opens it."""
    (tmp_path / "disk").write_bytes(b"parent" * 1024)
    vm = guest(COUNTER, drives=[DriveConfig(str(tmp_path / "disk"))])
    (child,) = vm.fork()
    os.pwrite(child.blocks["drive_0"].disk.fd, b"child!", 0)
    image = child.freeze()
    path = image.config.drives[0].path
    assert path.startswith(f"{tmp_path}/#") and path.endswith(" (deleted)")
    with open(tmp_path / "other", "w+b") as other:
        other.write(bytes(4096))
        with pytest.raises(ConfigError, match=r"disk .*\(deleted\): cannot be opened: No such file"):
            Machine(image=image)
        with pytest.raises(HostError, match=r"open the disk .*\(deleted\): No such file"):
            Pool(image)
    (grandchild,) = child.fork()  # its disk is beside the first one's, where a reflink may be possible
    assert os.readlink(f"/proc/self/fd/{grandchild.blocks['drive_0'].disk.fd}").startswith(f"{tmp_path}/#")
    assert os.pread(grandchild.blocks["drive_0"].disk.fd, 6, 0) == b"child!"
    (tmp_path / "mine").write_bytes(bytes(4096))
    (other,) = vm.fork(change=lambda config, _: config.replaced(drives=[DriveConfig(str(tmp_path / "mine"))]))
    assert other.freeze().config.drives[0].path == str(tmp_path / "mine")
    for machine in (child, grandchild, other):
        machine.close()


def test_a_copy_of_a_qcow2_disk_is_raw_and_whole() -> None:
    config = VmConfig("kernel", drives=[DriveConfig("a", format="qcow2", backing="b", backing_format="qcow2")])
    assert _child_config(config, {0: 7}, 0).drives == (DriveConfig("/proc/self/fd/7", format="raw"),)


def test_a_thousand_forks_leave_nothing(guest: MakeGuest) -> None:
    # 200 here; PYVMM_FORKS=1000 for all of them.
    vm = guest("1: hlt\njmp 1b", memory="16M")  # idle, as most of a thousand are
    vm.start()

    def fork(count: int) -> None:
        for _ in range(count // 10):
            for child in vm.fork(10):
                child.close()

    def count() -> tuple[int, int, int]:
        gc.collect()
        undertaker.wait()
        descriptors = os.listdir("/proc/self/fd")
        memory = sum("guest-ram" in line for line in Path("/proc/self/maps").read_text().splitlines())
        return len(descriptors), threading.active_count(), memory

    fork(20)  # the second one opens what says which pages were written; and stacks and arenas are kept
    before, resident = count(), _resident()
    fork(int(os.environ.get("PYVMM_FORKS", "200")))
    assert count() == before
    assert _resident() - resident < 8 << 20


def test_copies_find_room_for_their_descriptors(guest: MakeGuest) -> None:
    for child in guest(COUNTER).fork(2):
        child.close()
    status = Path("/proc/self/status").read_text()
    assert int(status.partition("FDSize:")[2].split()[0]) >= 1024, "each doubling makes a copy wait for RCU"


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("paired", [False, True], ids=["alone", "beside the host's"])
def test_the_clock_has_gone_on_in_a_copy(guest: MakeGuest, paired: bool) -> None:
    """By the host's time, whether KVM said that of the moment itself (where the host's clock is its TSC) or not."""
    vm = guest(COUNTER)
    vm.start()
    vm.pause()
    image = vm.freeze()
    layout = struct.Struct("<QIIQ")  # clock, flags, padding, realtime
    clock, flags, _, realtime = layout.unpack_from(image.vm["clock"])
    assert abs(realtime - time.time_ns()) < 60 * 10**9
    before = 1000 * 10**9
    rest = image.vm["clock"][layout.size :]
    image.vm["clock"] = layout.pack(clock, flags | KVM_CLOCK_REALTIME if paired else 0, 0, realtime - before) + rest
    image.vcpus[0]["realtime"] -= before
    with Machine(image=image) as copy:
        access = copy.kvm.state_access()
        now = layout.unpack_from(access.get_clock(copy.vm.fd))[0]
        vcpu = access.save_vcpu(copy.vcpus[0].fd)
    assert 0 <= now - clock - before < 60 * 10**9
    if not software_kvm():  # whose guests have the host's TSC
        cycles = vcpu["msrs"][IA32_TSC] - image.vcpus[0]["msrs"][IA32_TSC]
        assert 0 <= cycles / vcpu["tsc_khz"] / 1000 - 1000 < 60


def test_a_guest_is_told_that_it_was_paused(guest: MakeGuest) -> None:
    """As in Firecracker: or Linux takes a long pause for a CPU that hangs, and may panic (softlockup_panic)."""
    # A kvm-clock at 0x210000, and then the counter. 0x4b564d01 is MSR_KVM_SYSTEM_TIME_NEW.
    vm = guest("mov ecx, 0x4b564d01; mov eax, 0x210001; xor edx, edx; wrmsr;" + COUNTER)
    flags = 0x210000 + 29  # of struct pvclock_vcpu_time_info
    vm.start()
    _until_it_counts(vm, 100)
    for _ in range(2):
        assert not vm.memory.read(flags, 1)[0] & 2, "PVCLOCK_GUEST_STOPPED"
        vm.pause()
        vm.resume()
        until(lambda: vm.memory.read(flags, 1)[0] & 2)
        vm.memory.write(flags, bytes((vm.memory.read(flags, 1)[0] & ~2,)))  # as Linux does
    _end(vm, 3)


def test_every_part_of_a_vcpu_is_in_the_copy(guest: MakeGuest) -> None:
    # Parts that are as in a new vCPU are not set: whether they are has to be found out each time.
    vm = guest(COUNTER, cpus=2)
    access = vm.kvm.state_access()
    debugregs, events = bytearray(128), bytearray(64)
    for changed in (False, True, False):
        for vcpu in vm.vcpus:
            for register, value in ((0, 0x1234 * changed), (5, 0x400 | 1 * changed)):  # DR0, and DR7 that enables it
                struct.pack_into("<Q", debugregs, 8 * register, value)
            struct.pack_into("<Q", debugregs, 32, 0xFFFF0FF0)  # DR6
            kvm_ioctl(vcpu.fd, KVM_SET_DEBUGREGS, debugregs)
            kvm_ioctl(vcpu.fd, KVM_GET_VCPU_EVENTS, events)
            events[13] = changed  # an NMI is pending
            kvm_ioctl(vcpu.fd, KVM_SET_VCPU_EVENTS, events)
        image = vm.freeze()
        assert image.vcpus[1]["debugregs"] == debugregs and image.vcpus[1]["vcpu_events"][13] == changed
        with Machine(image=image) as copy:
            for vcpu, state in zip(copy.vcpus, image.vcpus, strict=True):
                found = access.save_vcpu(vcpu.fd)
                for each in (found, state):
                    del each["realtime"]
                    each["msrs"].pop(IA32_TSC)
                assert found == state


def test_an_image_stays_as_it_is_when_a_device_of_ones_own_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for program in programs("devices.md")[8::2][:2]:  # a device with a list, and its guest
        exec(compile(program, "devices.md", "exec"), names)
    jobs = names["Jobs"]()
    with Machine(names["squares"], memory="16M", devices=[jobs]) as vm:
        vm.start()
        jobs.give(1, 3)
        until(lambda: jobs.results == {1: 9})
        image = vm.freeze()
        jobs.jobs.append(struct.pack("<II", 1, 4))
        assert image.virtio[0]["device"] == {"jobs": []}
        monkeypatch.setattr(jobs, "save", lambda: {"jobs": object()})
        with pytest.raises(SnapshotError, match=r"^jobs: its save\(\) returned what a snapshot cannot hold: .*object"):
            vm.freeze()
        jobs.wake(0)  # the machine goes on
        until(lambda: jobs.results == {1: 16})


def test_what_a_wrong_argument_is_told(guest: MakeGuest) -> None:
    vm: Any = guest(COUNTER)
    calls: list[tuple[Callable[[], object], str]] = [
        # What mypy refuses, too, is what is tested.
        (lambda: Machine(image=5), "Machine: image must be an Image, not 5"),  # type: ignore[arg-type]
        (lambda: vm.fork("3"), "Machine.fork: count must be a whole number, not '3'"),
        (lambda: vm.fork(-1), "Machine.fork: count must be 0 or more, not -1"),
        (lambda: Pool(vm, change=5), "Pool: change must be a function or None, not 5"),  # type: ignore[arg-type]
        (lambda: vm.on_exit(None), "Machine.on_exit: callback must be a function, not None"),
        (lambda: vm.on_console("x"), "Machine.on_console: callback must be a function, not 'x'"),
        (lambda: Pool("vm"), "Pool: source must be a Machine or an Image, not 'vm'"),  # type: ignore[arg-type]
        (lambda: Pool(vm, size=0), "Pool: size must be 1 or more, not 0"),
        (lambda: Pool(vm, limit=3), "Pool: limit must be at least the size, 4, not 3"),
    ]
    for call, told in calls:
        with pytest.raises((TypeError, ValueError)) as error:
            call()
        assert str(error.value) == told


@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize("size", ["2M", "8M"])
def test_a_copy_has_the_memory_of_its_image(guest: MakeGuest, size: str, isolated: bool) -> None:
    with pytest.raises(VmmError, match=rf"^memory: the state has 4 MiB, the configuration {size[0]} MiB$"):
        guest(COUNTER).fork(change=lambda config, _: config.replaced(memory=size), isolated=isolated)


def test_a_bus_device_in_ram_is_refused(guest: MakeGuest) -> None:
    vm = guest(COUNTER)
    at = vm.memory.size - 4096
    vm.mmio.add(at, 4096, vm.rtc, "mine")
    with pytest.raises(ConfigError, match=f"mmio range {at:#x}-{at + 4095:#x}: of mine is in guest RAM"):
        vm.start()


def test_a_copy_has_what_was_changed_since_the_start(tmp_path: Path, guest: MakeGuest) -> None:
    for name in ("first", "second", "other"):
        (tmp_path / name).write_bytes(name.encode().ljust(4096, b"\0"))
    (tmp_path / "share").mkdir()
    drives = [DriveConfig(str(tmp_path / "first"), read_only=True), DriveConfig(str(tmp_path / "other"))]
    vm = guest(
        COUNTER, drives=drives, balloon=BalloonConfig(0, stats_interval_s=1),
        shares=[ShareConfig("tag", str(tmp_path / "share"), rate_limiter=RateLimiterConfig((1 << 20, 0, 100)))],
    )  # fmt: skip
    assert vm.freeze().config == vm.config
    vm.blocks["drive_0"].replace(str(tmp_path / "second"))
    vm.blocks["drive_1"].set_rate_limit((1 << 20, 5, 100), None)
    vm.shares["tag"].set_rate_limit((0, 0, 0), (7, 0, 1000))
    assert vm.balloon is not None
    vm.balloon.set_amount(2)
    vm.balloon.set_polling_interval(9)
    vm.freeze().save(str(tmp_path / "image"))
    config = Image.load(str(tmp_path / "image")).config
    assert [drive.path for drive in config.drives] == [str(tmp_path / name) for name in ("second", "other")]
    assert [drive.rate_limiter for drive in config.drives] == [None, RateLimiterConfig((1 << 20, 5, 100))]
    assert config.shares[0].rate_limiter == RateLimiterConfig(None, (7, 0, 1000))
    assert config.balloon is not None and (config.balloon.amount_mib, config.balloon.stats_interval_s) == (2, 9)
    (child,) = vm.fork()
    assert os.pread(child.blocks["drive_0"].disk.fd, 6, 0) == b"second"
    assert child.balloon is not None and child.balloon.amount_mib == 2
    child.close()


def test_a_copy_of_a_qcow2_disk_has_what_is_in_it(tmp_path: Path, guest: MakeGuest) -> None:
    if not shutil.which("qemu-img") or not shutil.which("qemu-storage-daemon"):
        pytest.skip("LAYER MISSING: qcow2: apt install qemu-utils qemu-system-common")
    if not os.access("/dev/fuse", os.R_OK | os.W_OK) or (os.geteuid() and not shutil.which("fusermount3")):
        pytest.skip("LAYER MISSING: qcow2: no /dev/fuse for this user")
    (tmp_path / "base").write_bytes(b"base" * 16384)
    image = tmp_path / "disk"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", tmp_path / "base", image], check=True)
    vm = guest(COUNTER, drives=[DriveConfig(str(image), format="qcow2", backing=str(tmp_path / "base"))])
    os.pwrite(vm.blocks["drive_0"].disk.fd, b"mine", 512)
    assert vm.freeze().config == vm.config
    (child,) = vm.fork()
    assert os.pread(child.blocks["drive_0"].disk.fd, 8, 510) == b"semineba"
    child.close()
    frozen = vm.freeze()
    with pytest.raises(SnapshotError, match="disk: is a qcow2 image: only a running machine shows what is in it"):
        Pool(frozen)
    (tmp_path / "other").write_bytes(bytes(4096))
    vm.blocks["drive_0"].replace(str(tmp_path / "other"))
    assert vm.freeze().config.drives == (DriveConfig(str(tmp_path / "other"), format="raw"),)
