# SPDX-License-Identifier: Apache-2.0
"""``Machine`` as a program meets it: a kernel's path, an exit as a value, asyncio."""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.kvm.guests import write_guest
from vmm import Exit, Machine, StopReason
from vmm.api import ApiError, types
from vmm.api.actions import Vmm
from vmm.kvm import abi as kvm_abi
from vmm.kvm import vm as kvm

EXIT_7 = "mov al, 7; out 0xf4, al"
FOREVER = "again: inc ecx; jmp again"


class Slow:
    """Bus device whose reads wait for ``answer``."""

    def __init__(self) -> None:
        self.asked, self.answer = threading.Event(), threading.Event()

    def read(self, offset: int, data: memoryview) -> None:
        self.asked.set()
        self.answer.wait()
        data[0] = 0x5A

    def write(self, offset: int, data: memoryview) -> None: ...


def test_a_path_is_enough(tmp_path: Path) -> None:
    path = Path(write_guest(tmp_path, EXIT_7))
    for kernel in (path, str(path)):
        with Machine(kernel, memory="4M") as vm:
            vm.start()
            assert vm.wait(10) == Exit(StopReason.GUEST_EXIT, 7)


def test_interrupt_controllers_are_made_long_before_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # At once KVM lets the memory wait for milliseconds, and after it the VM's end.
    asked: list[int] = []

    def kvm_ioctl(fd: int, request: int, argument: Any = 0) -> int:
        asked.append(request)
        return real(fd, request, argument)

    real = kvm_abi.kvm_ioctl
    monkeypatch.setattr(kvm, "kvm_ioctl", kvm_ioctl)
    prepared = kvm.prepare()
    assert asked.count(kvm_abi.KVM_CREATE_IRQCHIP) == 1
    with Machine(write_guest(tmp_path, EXIT_7), memory="4M", prepared=prepared) as vm:
        assert kvm_abi.KVM_SET_USER_MEMORY_REGION not in asked, "not before it is needed"
        vm.start()
        assert vm.wait(10) == Exit(StopReason.GUEST_EXIT, 7)
    assert asked.count(kvm_abi.KVM_SET_USER_MEMORY_REGION) == 1
    assert asked.count(kvm_abi.KVM_CREATE_VM) == asked.count(kvm_abi.KVM_CREATE_IRQCHIP) == 1


def test_several_machines_in_one_event_loop(tmp_path: Path) -> None:
    async def main() -> list[Exit]:
        vms = [Machine(path, memory="4M") for _ in range(4)]
        try:
            return await asyncio.gather(*(vm.run() for vm in vms))
        finally:
            for vm in vms:
                vm.close()

    path = write_guest(tmp_path, EXIT_7)
    assert asyncio.run(main()) == [Exit(StopReason.GUEST_EXIT, 7)] * 4


def test_the_event_loop_goes_on_and_a_cancelled_task_stops_the_vm(tmp_path: Path) -> None:
    async def main() -> None:
        with Machine(write_guest(tmp_path, FOREVER), memory="4M") as vm:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(vm.run(), 0.05)
            assert vm.wait(10) == Exit(StopReason.REQUESTED)

    asyncio.run(main())


def test_one_that_was_started_or_has_ended(tmp_path: Path) -> None:
    async def main() -> None:
        with Machine(write_guest(tmp_path, FOREVER), memory="4M") as vm:
            vm.start()
            task = asyncio.create_task(vm.run())
            await asyncio.sleep(0)
            vm.stop()
            assert await task == await vm.run() == Exit(StopReason.REQUESTED)

    asyncio.run(main())


def test_a_devices_mistake_is_raised(tmp_path: Path) -> None:
    class Broken:
        def read(self, offset: int, data: memoryview) -> None:
            raise LookupError("the device is broken")

        def write(self, offset: int, data: memoryview) -> None: ...

    async def main() -> None:
        with Machine(write_guest(tmp_path, "mov dx, 0x510; in al, dx"), memory="4M") as vm:
            vm.pio.add(0x510, 1, Broken(), "broken")
            with pytest.raises(LookupError, match="the device is broken"):
                await vm.run()

    asyncio.run(main())


def test_a_held_vcpu_goes_on_while_the_program_computes(tmp_path: Path) -> None:
    with Machine(write_guest(tmp_path, "again: out 0x80, al; jmp again"), memory="4M") as vm:
        vm.start()
        loop = vm.vcpus[0].loop
        while not loop.exits:
            time.sleep(0.001)
        vm.pause()
        paused, exits = loop.exits, loop.exits
        interval, end = sys.getswitchinterval(), time.monotonic() + 30
        sys.setswitchinterval(1000)  # this thread keeps the GIL
        try:
            vm.resume()
            while exits == paused and time.monotonic() < end:
                exits = loop.exits
        finally:
            sys.setswitchinterval(interval)
        assert exits > paused


def test_a_pause_that_waits_for_a_device_can_be_interrupted(tmp_path: Path) -> None:
    slow = Slow()

    def interrupt(number: int, frame: object) -> None:
        raise InterruptedError

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with Machine(write_guest(tmp_path, f"mov dx, 0x510; in al, dx; {EXIT_7}"), memory="4M") as vm:
            vm.pio.add(0x510, 1, slow, "slow")
            vm.start()
            assert slow.asked.wait(30)
            with pytest.raises(InterruptedError):
                signal.setitimer(signal.ITIMER_REAL, 0.01)
                vm.pause()
            slow.answer.set()  # and it is not held
            assert vm.wait(30) == Exit(StopReason.GUEST_EXIT, 7)
    finally:
        signal.signal(signal.SIGALRM, before)


def test_an_end_that_was_waited_for_and_interrupted_is_waited_for_again(tmp_path: Path) -> None:
    # Before Python 3.13, a thread whose join() a signal's handler has left seems to have ended.
    slow = Slow()

    def interrupt(number: int, frame: object) -> None:
        raise InterruptedError

    before = signal.signal(signal.SIGALRM, interrupt)
    vm = Machine(write_guest(tmp_path, f"mov dx, 0x510; in al, dx; {FOREVER}"), memory="4M")
    try:
        vm.pio.add(0x510, 1, slow, "slow")
        vm.start()
        assert slow.asked.wait(30)
        vm.stop()
        with pytest.raises(InterruptedError):
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            vm.wait()
        threading.Timer(0.3, slow.answer.set).start()
        vm.close()
        assert slow.answer.is_set(), "a vCPU was closed in the middle of an access"
    finally:
        slow.answer.set()
        vm.close()
        signal.signal(signal.SIGALRM, before)


def test_a_pause_that_another_thread_takes_back_is_over(tmp_path: Path) -> None:
    slow = Slow()
    with Machine(write_guest(tmp_path, f"mov dx, 0x510; in al, dx; {FOREVER}"), memory="4M") as vm:
        vm.pio.add(0x510, 1, slow, "slow")
        vm.start()
        assert slow.asked.wait(30)
        pause = threading.Thread(target=vm.pause, daemon=True)
        pause.start()
        while vm.state != "Paused":
            time.sleep(0.001)
        vm.resume()
        slow.answer.set()
        pause.join(10)
        assert not pause.is_alive() and vm.state == "Running"


def test_a_paused_vcpu_has_what_its_last_access_read(tmp_path: Path) -> None:
    slow = Slow()
    with Machine(write_guest(tmp_path, f"mov dx, 0x510; in al, dx; read: {FOREVER}"), memory="4M") as vm:
        at = vm.vcpus[0].regs.rip
        vm.pio.add(0x510, 1, slow, "slow")
        vm.start()
        assert slow.asked.wait(30)
        pause = threading.Thread(target=vm.pause)
        pause.start()
        while vm.state != "Paused":
            time.sleep(0.001)
        slow.answer.set()
        pause.join(30)
        regs = vm.vcpus[0].regs
        assert regs.rax & 0xFF == 0x5A and regs.rip > at + 4  # after the two instructions, of 4 and 1 bytes


def test_a_start_of_the_apis_may_fail_and_be_tried_again(tmp_path: Path) -> None:
    kernel = Path(write_guest(tmp_path, FOREVER))
    code = kernel.read_bytes()
    vmm = Vmm()
    vmm.handle("ConfigureBootSource", types.BootSource(kernel_image_path=str(kernel)))
    vmm.handle("SetVsockDevice", types.Vsock(guest_cid=3, uds_path=str(tmp_path / "v")))
    kernel.write_bytes(b"no kernel")
    with pytest.raises(ApiError, match="Start microvm error"):
        vmm.handle("StartMicroVm")
    kernel.write_bytes(code)
    vmm.handle("StartMicroVm")
    assert (tmp_path / "v").is_socket(), "the host's programs connect to it"
    vmm.close()
