# SPDX-License-Identifier: Apache-2.0
"""A device's state: what stops and goes on, what another device takes over, and what is refused."""

from __future__ import annotations

import copy
import os
import random
import select
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.virtio import blk_driver
from tests.virtio.fuse_client import DESTROY, FuseError, FuseVm
from tests.virtio.vsock_driver import CREDIT_UPDATE, EVENT, REQUEST, RST, RW, Vm
from tests.waiting import PATIENCE
from virtio import spec
from virtio.balloon import Balloon
from virtio.blk.device import Block, Disk
from virtio.console import OUTPUT_MAX, Console
from virtio.device import VirtioDevice
from virtio.fs.device import ShareDevice
from virtio.mmio import VirtioMmio
from virtio.rng import Entropy
from virtio.testing import Allocator, DeviceHost
from vmm.errors import SnapshotError
from vmm.irq import IrqLine
from vmm.memory import GuestMemory

SECTORS = 256


def _move(host: DeviceHost[Any], device: VirtioDevice) -> None:
    """Go on with `device` in place of the host's, on the same memory, as after a snapshot."""
    host.transport.stop()
    state = msgspec.msgpack.decode(msgspec.msgpack.encode(host.transport.save()))
    host.transport.close()
    host.device = device
    host.transport = host.driver.transport = VirtioMmio(device, host.ram, host.irq, warn=host.log.append)
    host.transport.restore(state)
    host.transport.go_on()


@pytest.fixture
def host(ram: GuestMemory) -> Iterator[DeviceHost[Entropy]]:
    host = DeviceHost(Entropy(), ram, Allocator(0x1000, ram.size - 0x1000))
    yield host
    host.close()


def _conversation(path: Path, *, cuts: bool) -> tuple[bytes, bytes, dict[str, int]]:
    # The same requests, with the device replaced between and below them; what the guest and the disk have then.
    path.write_bytes(bytes(SECTORS * 512))
    rng, dice = random.Random(5), random.Random(7)
    with GuestMemory(4 << 20) as ram, Disk(str(path)) as disk:
        host = DeviceHost(Block(disk, queues=2, serial="s"), ram, Allocator(0x1000, ram.size - 0x1000))
        host.driver.bring_up(size=64)
        answers = b""
        for _ in range(120):
            queue = rng.randrange(2)
            ring = host.driver.queues[queue]
            write = rng.random() < 0.6
            size = 512 * rng.randrange(1, 5)
            header = struct.pack("<IIQ", int(write), 0, rng.randrange(SECTORS - 4))
            data = ring.buffer(rng.randbytes(size)) if write else ring.buffer(size, device_writes=True)
            head = ring.add([ring.buffer(header), data, ring.buffer(1, device_writes=True)])
            status = data.addr + size
            ring.want_interrupt()
            host.driver.kick(queue)
            if cuts and dice.random() < 0.5:
                _move(host, Block(disk, queues=2, serial="s"))
            host.reap(queue, head)
            if cuts and dice.random() < 0.3:
                _move(host, Block(disk, queues=2, serial="s"))
            answers += ram.read(data.addr, size) + ram.read(status, 1)
        counters = {queue: driver.used_idx for queue, driver in enumerate(host.driver.queues)}
        host.close()
    return answers, path.read_bytes(), {str(key): value for key, value in counters.items()}


def test_a_conversation_with_cuts_ends_as_one_without(tmp_path: Path) -> None:
    whole = _conversation(tmp_path / "whole", cuts=False)
    assert _conversation(tmp_path / "cut", cuts=True) == whole
    assert any(whole[1])


def test_a_stopped_device_holds_nothing_and_goes_on(host: DeviceHost[Entropy]) -> None:
    ring = host.driver.bring_up()[0]
    for _ in range(50):
        host.transport.stop()
        ring.want_interrupt()
        head = ring.add([ring.buffer(16, device_writes=True)])
        host.driver.kick()
        assert not ring.reap(), "it is stopped"
        host.transport.go_on()
        assert host.reap(0, head) == 16


@pytest.mark.parametrize("event_idx", [True, False])
def test_a_lost_interrupt_comes_again_and_no_other(host: DeviceHost[Entropy], event_idx: bool) -> None:
    ring = host.driver.bring_up(without=0 if event_idx else spec.F_EVENT_IDX)[0]
    for seen in (False, True):
        ring.reap()
        ring.want_interrupt()
        head = ring.add([ring.buffer(16, device_writes=True)])
        host.driver.kick()
        assert select.select([host.irq.fd], [], [], PATIENCE)[0]
        host.irq.take()  # it is lost, or the driver's handler takes it
        if seen:
            assert [head for head, _ in ring.reap()][-1] == head
            ring.want_interrupt()
        host.transport.stop()
        assert not select.select([host.irq.fd], [], [], 0)[0]
        host.transport.go_on()
        told = bool(select.select([host.irq.fd], [], [], 0)[0])
        assert told is (not seen or not event_idx)
        if told:
            host.irq.take()
    host.transport.interrupt.config()
    host.irq.take()
    host.transport.stop()
    host.transport.go_on()
    assert select.select([host.irq.fd], [], [], 0)[0], "a change that it has not acknowledged"


def test_a_device_at_every_stage_of_its_start(ram: GuestMemory, host: DeviceHost[Entropy]) -> None:
    driver = host.driver
    steps: list[Any] = [
        lambda: driver.set(spec.MMIO_STATUS, 0),
        lambda: driver.add_status(spec.ACKNOWLEDGE),
        lambda: driver.add_status(spec.DRIVER),
        lambda: driver.accept(driver.offered()),
        lambda: driver.add_status(spec.FEATURES_OK),
        lambda: driver.set(spec.MMIO_QUEUE_SEL, 0),
    ]
    for step in steps:
        step()
        before = {offset: driver.get(offset) for offset in range(0, 0x100, 4)}
        _move(host, Entropy())
        assert {offset: driver.get(offset) for offset in range(0, 0x100, 4)} == before
    ring = driver.bring_up()[0]
    assert host.submit(0, [ring.buffer(8, device_writes=True)]) == 8


def test_the_driver_hears_of_a_changed_configuration(tmp_path: Path, ram: GuestMemory) -> None:
    for name, sectors in (("small", 8), ("large", 16)):
        (tmp_path / name).write_bytes(bytes(sectors * 512))
    with Disk(str(tmp_path / "small")) as small, Disk(str(tmp_path / "large")) as large:
        host = DeviceHost(Block(small), ram, Allocator(0x1000, ram.size - 0x1000))
        host.driver.bring_up()
        generation = host.driver.get(spec.MMIO_CONFIG_GENERATION)
        _move(host, Block(large))
        assert host.driver.get(spec.MMIO_CONFIG_GENERATION) != generation
        assert host.driver.take_interrupt() & spec.INTERRUPT_CONFIG
        assert host.driver.config(0, 8) == (16).to_bytes(8, "little")
        host.close()


def test_a_disk_goes_on_where_the_host_gives_no_blocks_back(
    tmp_path: Path, ram: GuestMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As one that was copied to a file system without holes, or replaced by one there before the snapshot.
    (tmp_path / "disk").write_bytes(bytes(8 * 512))
    with Disk(str(tmp_path / "disk")) as disk:
        host = DeviceHost(Block(disk), ram, Allocator(0x1000, ram.size - 0x1000))
        host.driver.bring_up()
        assert host.device.features & spec.BLK_F_DISCARD
        monkeypatch.setattr(Disk, "can_discard", lambda self: False)
        _move(host, Block(disk))
        assert not host.device.features & spec.BLK_F_DISCARD
        ring = host.driver.queues[0]
        status = ring.buffer(b"\xff")._replace(device_writes=True)
        sectors = ring.buffer(512, device_writes=True)
        host.submit(0, [ring.buffer(struct.pack("<IIQ", blk_driver.T_IN, 0, 0)), sectors, status])
        assert ram.read(status.addr, 1) == b"\0"
        host.close()


def test_the_balloon_hands_its_buffer_back(ram: GuestMemory) -> None:
    host = DeviceHost(Balloon(stats_polling_interval_s=3600), ram, Allocator(0x1000, 1 << 20))
    host.driver.bring_up()
    stats = host.driver.queues[2]
    stats.want_interrupt()
    head = stats.add([stats.buffer(spec.BALLOON_STAT.pack(0, 1))])
    host.driver.kick(2)
    while host.device.counters["stats_updates"] == 0:
        pass
    assert not stats.reap(), "it keeps the buffer until it asks for the next"
    host.transport.stop()
    assert stats.reap() == [(head, 0)]
    host.transport.go_on()
    host.close()


def test_the_balloon_remembers_what_it_was_given(ram: GuestMemory) -> None:
    host = DeviceHost(Balloon(2), ram, Allocator(0x1000, 1 << 20))
    host.driver.bring_up()
    host.transport.write(spec.MMIO_CONFIG + 4, memoryview((512).to_bytes(4, "little")))
    _move(host, Balloon(2))
    assert host.device.statistics()["actual_pages"] == 512
    assert host.driver.config(4, 4) == (512).to_bytes(4, "little")
    host.close()


def test_a_console_goes_on_with_its_ports(ram: GuestMemory) -> None:
    host = DeviceHost(Console(["second"]), ram, Allocator(0x1000, 1 << 20))
    host.driver.bring_up()
    control = host.driver.queues[3]
    for port, event in ((0xFFFF_FFFF, 0), (0, 3), (1, 3), (1, 6)):
        host.submit(3, [control.buffer(spec.CONSOLE_CONTROL.pack(port, event, 1))])
    assert host.device.ports[1].guest_open
    _move(host, Console(["second"]))
    assert [port.guest_open for port in host.device.ports] == [False, True]
    host.device.ports[1].feed(b"hello")
    data = host.driver.queues[4].buffer(16, device_writes=True)
    assert host.submit(4, [data]) == 5
    assert ram.read(data.addr, 5) == b"hello"
    host.close()


@pytest.mark.parametrize("moves", [False, True])
def test_output_without_room_waits_while_its_machine_is_copied(ram: GuestMemory, moves: bool) -> None:
    """It is neither lost nor there twice, and the copy has what its guest had not got rid of."""
    host = DeviceHost(Console(), ram, Allocator(0x1000, ram.size - 0x1000))
    host.driver.bring_up(without=spec.CONSOLE_F_MULTIPORT)
    ports = [host.device.ports[0]]
    ring = host.driver.queues[1]
    whole = random.Random(3).randbytes(OUTPUT_MAX + 3 * 1000)
    text = ring.buffer(whole)
    host.submit(1, [text._replace(size=OUTPUT_MAX)])
    for at in range(OUTPUT_MAX, len(whole), 1000):
        ring.add([text._replace(addr=text.addr + at, size=1000)])
    host.driver.kick(1)
    for _ in range(3):
        time.sleep(0.05)  # it waits for room
        if moves:
            _move(host, Console())
            ports.append(host.device.ports[0])
        else:
            host.transport.stop()
            host.transport.go_on()
    got = b""
    for port in ports[:-1]:  # they have no guest any more
        port.close()
        while part := port.wait_output():
            got += part
    while len(got) < len(whole):
        got += ports[-1].wait_output()
    assert got == whole
    assert [port.lost for port in ports] == [0] * len(ports)
    host.close()


def test_what_serves_already_gets_no_second_thread(host: DeviceHost[Entropy]) -> None:
    # A driver that is at work before the machine starts: two threads on one epoll take one another's wake-ups.
    host.driver.bring_up()
    before = threading.active_count()
    host.transport.go_on()
    assert threading.active_count() == before
    host.transport.stop()
    host.transport.go_on()
    assert threading.active_count() == before


def test_a_device_goes_on_after_a_stop_that_a_signal_ended(ram: GuestMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    # As a Ctrl-C while a machine is frozen: KeyboardInterrupt comes out, and the guest goes on.
    host = DeviceHost(Entropy(), ram, Allocator(0x1000, ram.size - 0x1000))
    ring = host.driver.bring_up()[0]
    begun, may_end = threading.Event(), threading.Event()

    def busy(size: int) -> bool:
        begun.set()
        return may_end.wait(PATIENCE)

    def interrupt(*_: object) -> None:
        may_end.set()
        raise KeyboardInterrupt

    monkeypatch.setattr(host.device, "_granted", busy)
    head = ring.add([host.room(16)])
    host.driver.kick()
    assert begun.wait(PATIENCE)
    before = signal.signal(signal.SIGUSR1, interrupt)
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR1))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            host.transport.stop()
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)
    host.transport.go_on()
    host.reap(0, head)
    assert host.submit(0, [host.room(16)]) == 16
    host.close()


def test_an_interrupted_close_waits_for_the_devices_thread(ram: GuestMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    # What the thread uses is closed next: guest memory, the disk's descriptor.
    host = DeviceHost(Entropy(), ram, Allocator(0x1000, ram.size - 0x1000))
    ring = host.driver.bring_up()[0]
    begun, over = threading.Event(), threading.Event()

    def busy(size: int) -> bool:
        begun.set()
        time.sleep(0.5)
        over.set()
        return True

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(host.device, "_granted", busy)
    ring.add([host.room(16)])
    host.driver.kick()
    assert begun.wait(PATIENCE)
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)  # one is not enough for the impatient
    try:
        with pytest.raises(KeyboardInterrupt):
            host.transport.close()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert over.is_set() and not host.transport.notify_fds
    host.irq.close()


def test_a_reset_that_raises_keeps_nothing_open(ram: GuestMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    host = DeviceHost(Console(), ram, Allocator(0x1000, ram.size - 0x1000))
    host.driver.bring_up()

    def reset() -> None:
        raise ZeroDivisionError("a bug in my device")

    monkeypatch.setattr(host.device, "reset", reset)
    with pytest.raises(ZeroDivisionError):
        host.close()
    host.close()
    host.irq.close()
    assert not host.transport.status
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == (threads, descriptors)


@pytest.mark.parametrize("kind", ["in C", "in Python"])
def test_the_same_thread_serves_after_a_stop(tmp_path: Path, ram: GuestMemory, kind: str) -> None:
    # However soon one call follows the other; a hold must not end and make threads, which the host may refuse.
    (tmp_path / "disk").write_bytes(bytes(SECTORS * 512))
    others = set(threading.enumerate())
    with Disk(str(tmp_path / "disk")) as disk:
        device: VirtioDevice = Block(disk) if kind == "in C" else Entropy()
        host = DeviceHost(device, ram, Allocator(0x1000, ram.size - 0x1000))
        host.driver.bring_up()
        (thread,) = set(threading.enumerate()) - others
        data = host.driver.queues[0].buffer(512, device_writes=True)
        read = [host.driver.queues[0].buffer(struct.pack("<IIQ", 0, 0, 0))] if kind == "in C" else []
        status = [host.driver.queues[0].buffer(1, device_writes=True)] if kind == "in C" else []
        for _ in range(300):
            host.transport.stop()
            host.transport.stop()
            host.transport.go_on()
        assert host.submit(0, [*read, data, *status]) == 512 + len(status)
        host.transport.stop()
        assert set(threading.enumerate()) - others == {thread}
        host.transport.go_on()
        host.transport.reset()
        assert not thread.is_alive()
        for turn in range(50):
            host.driver.bring_up()
            (thread,) = set(threading.enumerate()) - others
            host.transport.stop()
            host.transport.go_on()
            host.transport.reset() if turn < 49 else host.transport.close()
            assert not thread.is_alive()


def test_connections_survive_a_stop_and_a_copy_hears_that_they_are_gone(tmp_path: Path, ram: GuestMemory) -> None:
    vm = Vm(tmp_path / "v", ram)
    try:
        client, port = vm.host_open()
        vm.transport.stop()
        client.sendall(b"while it stands")
        vm.transport.go_on()
        assert vm.receive(RW).data == b"while it stands"
        assert vm.device.connections == 1
        events = vm.queue(EVENT)
        events.want_interrupt()
        head = events.add([events.buffer(b"\xff" * 4)._replace(device_writes=True)])
        buffer = vm.allocator.taken[-1][0]
        vm.driver.kick(EVENT)
        vm.transport.stop()
        state = vm.transport.save()
        vm.transport.close()
        vm.transport = vm.driver.transport = VirtioMmio(vm.device, ram, vm.irq, warn=vm.log.append)
        vm.device.settle_wait = 60
        vm.transport.restore(state)
        vm.transport.go_on()
        done: list[tuple[int, int]] = []
        while not done:
            done = events.reap()
        assert done == [(head, 4)]
        assert ram.read(buffer, 4) == bytes(4), "VIRTIO_VSOCK_EVENT_TRANSPORT_RESET"
        assert vm.device.connections == 0
        # Until it gives the buffer back it may close what begins now: host programs wait.
        vm.host_socket().sendall(b"CONNECT 1024\n")
        vm.silence()
        assert vm.device.connections == 0
        events.add([events.buffer(b"\xff" * 4)._replace(device_writes=True)])
        # A program that still has its end of an earlier one has that one's ports.
        assert vm.receive(REQUEST).src_port != port
        vm.host_open()
    finally:
        vm.close()


def test_what_comes_right_after_a_stop_is_seen_when_it_goes_on(tmp_path: Path, ram: GuestMemory) -> None:
    # The thread finds the stop and then the bytes in one look, because it runs only when this one sleeps.
    vm = Vm(tmp_path / "v", ram)
    cpus = os.sched_getaffinity(0)
    try:
        client, _ = vm.host_open()
        (tid,) = [each.native_id for each in threading.enumerate() if each.name == "virtio-vsock"]
        assert tid is not None
        os.sched_setscheduler(tid, os.SCHED_IDLE, os.sched_param(0))
        for each in (0, tid):
            os.sched_setaffinity(each, {min(cpus)})
        for number in range(20):
            time.sleep(0.01)  # it sleeps by then
            vm.device._workers[0].wake()
            client.send(b"%d" % number)
            vm.transport.stop()
            vm.transport.go_on()
            assert vm.receive(RW).data == b"%d" % number
    finally:
        os.sched_setaffinity(0, cpus)
        vm.close()


def test_a_copy_goes_on_with_one_connection_and_resets_the_others(tmp_path: Path, ram: GuestMemory) -> None:
    vm = Vm(tmp_path / "v", ram)
    try:
        events = vm.queue(EVENT)
        events.add([events.buffer(b"\xff" * 4)._replace(device_writes=True)])
        kept, port = vm.host_open()
        _, lost_port = vm.host_open()
        kept.sendall(b"asked")
        before = vm.receive(RW)
        vm.send(RW, before.dst_port, port, b"answered", fwd_cnt=5)
        assert kept.recv(100) == b"answered"
        kept.sendall(b"read by the guest later")
        assert vm.receive(RW).data == b"read by the guest later"
        vm.transport.stop()
        state = msgspec.msgpack.decode(msgspec.msgpack.encode(vm.transport.save()))
        vm.transport.close()
        vm.transport = vm.driver.transport = VirtioMmio(vm.device, ram, vm.irq, warn=vm.log.append)
        vm.device.settle_wait = 60
        vm.transport.restore(state)
        assert vm.device.keep(lost_port + 1000) is None
        stream = vm.device.keep(port)
        assert stream is not None and vm.device.keep(lost_port) is None
        vm.sockets.append(stream)
        vm.transport.go_on()
        assert vm.receive(RST).src_port == lost_port
        stream.sendall(b"asked again")
        after = vm.receive(RW)
        assert (after.src_port, after.dst_port, after.data) == (port, before.dst_port, b"asked again")
        assert (after.fwd_cnt, after.buf_alloc) == (8, before.buf_alloc)
        for number in range(40):  # more than the device granted before: credit goes on, too
            vm.send(RW, before.dst_port, port, bytes([number]) * 10_000, fwd_cnt=39)
            assert stream.recv(10_000, socket.MSG_WAITALL) == bytes([number]) * 10_000
        assert vm.device.connections == 1 and not events.reap()
        vm.host_socket().sendall(b"CONNECT 1024\n")  # is taken at once: there is nothing to settle
        while (packet := vm.receive()).op == CREDIT_UPDATE:
            pass
        assert packet.op == REQUEST and packet.src_port not in (port, lost_port)
    finally:
        vm.close()


def test_a_connection_whose_guest_has_no_answer_yet_is_not_kept(tmp_path: Path, ram: GuestMemory) -> None:
    vm = Vm(tmp_path / "v", ram, posted=0)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{tmp_path}/v_80")
        server.listen()
        vm.raw([vm.queue(1).buffer(vm.packet(REQUEST, 1025, 80).pack())])
        vm.transport.stop()
        ((guest_port, host_port, idle, *_),) = vm.transport.save()["device"]["connections"]
        assert (guest_port, host_port, idle) == (1025, 80, 0)
        vm.close()


def test_no_damaged_connection_is_kept(tmp_path: Path, ram: GuestMemory) -> None:
    vm = Vm(tmp_path / "v", ram)
    try:
        _, port = vm.host_open()
        vm.transport.stop()
        good = vm.transport.save()
        (numbers,) = good["device"]["connections"]
        vm.transport.close()
        for damaged in (
            [numbers[:8]], [[*numbers, 0]], [numbers, numbers], [[-1, *numbers[1:]]], [["x", *numbers[1:]]],
            [[*numbers[:8], 1 << 31]], [[*numbers[:6], 1 << 31, *numbers[7:]]], [numbers] * 5000, 5, [5],
        ):  # fmt: skip
            transport = VirtioMmio(vm.device, ram, vm.irq, warn=vm.log.append)
            with pytest.raises(SnapshotError, match="the state is damaged"):
                transport.restore({**good, "device": {"connections": damaged}})
            transport.close()
        vm.transport = vm.driver.transport = VirtioMmio(vm.device, ram, vm.irq, warn=vm.log.append)
        vm.transport.restore({**good, "device": {}})  # of a device that saved none
        assert vm.device.keep(port) is None
    finally:
        vm.close()


@pytest.mark.parametrize("dax", [0, 2 << 20])
def test_a_share_with_a_window_is_saved_unless_the_guest_has_mounted_it(tmp_path: Path, dax: int) -> None:
    (tmp_path / "file").write_bytes(b"")
    with FuseVm(tmp_path, dax=dax) as vm:
        vm.lookup("file")
        vm.transport.stop()
        if dax:
            with pytest.raises(SnapshotError, match=f"virtio-fs: the guest has mounted {tmp_path} with a DAX window"):
                vm.transport.save()
        else:
            assert vm.transport.save()["device"]
        vm.transport.go_on()
        vm.ask(DESTROY, 0)
        vm.transport.stop()
        state = msgspec.msgpack.decode(msgspec.msgpack.encode(vm.transport.save()))
        vm.transport.close()
        vm.device.close()
        vm.device = ShareDevice("share", str(tmp_path), dax=dax)
        vm.transport = vm.driver.transport = VirtioMmio(vm.device, vm.ram, vm.line, warn=vm.log.append)
        vm.transport.restore(state)
        vm.transport.go_on()
        with pytest.raises(FuseError):
            vm.lookup("file")  # nothing is mounted
        vm.init()
        assert vm.lookup("file").nodeid
        assert not vm.log


def test_another_devices_state_is_refused(ram: GuestMemory, irq: IrqLine, host: DeviceHost[Entropy]) -> None:
    host.driver.bring_up()
    host.transport.stop()
    good = host.transport.save()

    def refusal(change: dict[str, Any], device: VirtioDevice | None = None) -> str:
        transport = VirtioMmio(device or Entropy(), ram, irq)
        with pytest.raises(SnapshotError) as refused:
            transport.restore({**copy.deepcopy(good), **change})
        transport.close()
        return str(refused.value)

    assert refusal({}, Console()) == "virtio-console: the state is that of a device of type 4"
    assert refusal({"queues": []}) == "virtio-rng: has 1 queues, the state 0"
    assert "does not offer feature bits 0x1," in refusal({"features": good["features"] | 1})
    assert "is not inside guest memory" in refusal({"queues": [{**good["queues"][0], "used": 1 << 40}]})
    assert "not a power of two" in refusal({"queues": [{**good["queues"][0], "size": 3}]})
    assert "the state is damaged" in refusal({"select": {}})


def test_no_damaged_state_does_more_than_be_refused(ram: GuestMemory, irq: IrqLine) -> None:
    host = DeviceHost(Console(["x"]), ram, Allocator(0x1000, 1 << 20))
    host.driver.bring_up()
    host.transport.stop()
    good = host.transport.save()
    host.close()
    rng = random.Random(1)
    odd = [None, -1, 0, 1, 1 << 16, 1 << 64, "x", b"", b"x" * 300, [], [1], {}, {"a": 1}, 1.5, True]
    refused = 0
    for _ in range(600):
        state = copy.deepcopy(good)
        at: Any = state
        while True:
            key = rng.choice(list(at) if isinstance(at, dict) else range(len(at)))
            if isinstance(at[key], dict | list) and at[key] and rng.random() < 0.7:
                at = at[key]
                continue
            at[key] = rng.choice(odd)
            break
        transport = VirtioMmio(Console(["x"]), ram, irq)
        try:
            transport.restore(state)
            transport.go_on()
        except SnapshotError:
            refused += 1
        transport.close()
    assert refused > 200
