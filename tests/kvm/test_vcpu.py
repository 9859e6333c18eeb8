# SPDX-License-Identifier: Apache-2.0
"""What a guest of a few instructions can do to the run loop, on a real /dev/kvm."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.kvm.guests import PATIENCE, run
from tests.waiting import until
from vmm import Exit, Machine, StopReason, threads
from vmm.config.devices import EntropyConfig
from vmm.errors import HostError, VmmError
from vmm.kvm import abi
from vmm.kvm.vcpu import Vcpu

MakeGuest = Callable[..., Machine]

EXIT = "mov dx, 0xf4\n out dx, al\n"


class Recorder:
    """A bus device that writes down what it is asked, and answers reads with 0x11, 0x12, ..."""

    def __init__(self) -> None:
        self.log: list[tuple[str, int, bytes]] = []

    def read(self, offset: int, data: memoryview) -> None:
        data[:] = bytes(0x11 + offset + i for i in range(len(data)))
        self.log.append(("read", offset, bytes(data)))

    def write(self, offset: int, data: memoryview) -> None:
        self.log.append(("write", offset, bytes(data)))


def test_exit_port_ends_with_the_guests_code(guest: MakeGuest) -> None:
    stop = run(guest("mov al, 42\n" + EXIT))
    assert (stop.reason, stop.code, stop.status) == (StopReason.GUEST_EXIT, 42, 42)


def test_pvh_registers(guest: MakeGuest) -> None:
    # The start info's magic, 0x336ec578, reached through ebx.
    stop = run(guest("mov al, [ebx]\n" + EXIT))
    assert stop.code == 0x78


def test_linux64_registers(guest: MakeGuest) -> None:
    # The setup header's "HdrS" at 0x202 of the zero page, reached through rsi in 64-bit mode.
    vm = guest("mov al, [rsi + 0x202]\n mov dx, 0xf4\n out dx, al\n", bits=64)
    assert vm.loaded.protocol == "linux64"
    assert run(vm).code == ord("H")


@pytest.mark.parametrize(("register", "width"), [("al", 1), ("ax", 2), ("eax", 4)])
def test_unclaimed_port_reads_all_ones(guest: MakeGuest, register: str, width: int) -> None:
    vm = guest(f"xor eax, eax\n mov dx, 0x1234\n in {register}, dx\n mov [0x200000], eax\n" + EXIT)
    run(vm)
    assert vm.memory.read(0x200000, 4) == b"\xff" * width + bytes(4 - width)
    assert vm.pio.unclaimed == 1


@pytest.mark.parametrize(("register", "width"), [("al", 1), ("ax", 2), ("eax", 4)])
def test_unmapped_mmio_reads_all_ones_and_swallows_writes(guest: MakeGuest, register: str, width: int) -> None:
    vm = guest(
        f"xor eax, eax\n mov {register}, [0xe0000000]\n mov [0xe0000000], {register}\n mov [0x200000], eax\n" + EXIT
    )
    run(vm)
    assert vm.memory.read(0x200000, 4) == b"\xff" * width + bytes(4 - width)
    assert vm.mmio.unclaimed == 2


def test_string_output_advances_the_data_not_the_port(guest: MakeGuest) -> None:
    vm = guest("mov esi, offset text\n mov ecx, 5\n mov dx, 0x510\n rep outsb\n" + EXIT + 'text: .ascii "hello"')
    device, beside = Recorder(), Recorder()
    vm.pio.add(0x510, 1, device, "recorder")
    vm.pio.add(0x511, 1, beside, "beside")
    run(vm)
    assert device.log == [("write", 0, bytes([c])) for c in b"hello"]
    assert beside.log == []


def test_string_input(guest: MakeGuest) -> None:
    vm = guest("mov edi, 0x200000\n mov ecx, 3\n mov dx, 0x510\n rep insw\n" + EXIT)
    vm.pio.add(0x510, 2, Recorder(), "recorder")
    run(vm)
    assert vm.memory.read(0x200000, 8) == b"\x11\x12" * 3 + b"\0\0"


def test_access_that_crosses_two_devices_meets_neither(guest: MakeGuest) -> None:
    vm = guest("mov eax, [0xe00007fe]\n mov [0x200000], eax\n" + EXIT)
    first, second = Recorder(), Recorder()
    # Within one page: KVM itself splits an access that crosses two.
    vm.mmio.add(0xE0000000, 0x800, first, "first")
    vm.mmio.add(0xE0000800, 0x800, second, "second")
    run(vm)
    assert first.log == second.log == []
    assert vm.memory.read(0x200000, 4) == b"\xff" * 4
    assert vm.mmio.unclaimed == 1


def test_device_sees_offsets_not_addresses(guest: MakeGuest) -> None:
    vm = guest("mov eax, 0x04030201\n mov [0xe0000010], eax\n mov eax, [0xe0000020]\n mov [0x200000], eax\n" + EXIT)
    device = Recorder()
    vm.mmio.add(0xE0000000, 0x1000, device, "recorder")
    run(vm)
    assert device.log[0] == ("write", 0x10, b"\1\2\3\4")
    assert device.log[1][:2] == ("read", 0x20)
    assert vm.memory.read(0x200000, 4) == bytes((0x31, 0x32, 0x33, 0x34))


def test_triple_fault(guest: MakeGuest) -> None:
    # No IDT, so a breakpoint is a double fault is a shutdown.
    stop = run(guest("ud2\n"))
    assert (stop.reason, stop.status) == (StopReason.TRIPLE_FAULT, 82)
    assert "0x100000" in str(stop)


def test_exit_has_another_handler(guest: MakeGuest) -> None:
    vm = guest("ud2\n mov al, 5\n out 0xf4, al\n")
    vcpu = vm.vcpus[0]
    sregs, regs, seen = vcpu.sregs, vcpu.regs, []

    def again(vcpu: Vcpu) -> None:
        seen.append(vcpu.index)
        vcpu.sregs = sregs
        regs.rip += 2  # past ud2
        vcpu.regs = regs

    vcpu.exit_handlers = {abi.KVM_EXIT_SHUTDOWN: again}
    stop = run(vm)
    assert (stop.reason, stop.code, seen) == (StopReason.GUEST_EXIT, 5, [0])


def test_exit_without_a_handler_ends_the_vm(guest: MakeGuest) -> None:
    vm = guest("ud2\n")
    vm.vcpus[0].exit_handlers = {}
    stop = run(vm)
    assert (stop.reason, stop.detail) == (StopReason.INTERNAL_ERROR, "vCPU 0: unexpected exit reason 8")


def test_jump_into_nothing_ends_the_vm(guest: MakeGuest) -> None:
    # No memory to fetch from: KVM cannot go on, and the VM ends with a reason instead of hanging.
    stop = run(guest("mov eax, 0xe0000000\n jmp eax\n"))
    assert stop.reason in (StopReason.INTERNAL_ERROR, StopReason.TRIPLE_FAULT)


def test_halt_with_interrupts_off_costs_no_cpu_and_can_be_stopped(guest: MakeGuest) -> None:
    vm = guest("mov byte ptr [0x200000], 1\n cli\n again: hlt\n jmp again\n")
    vm.start()
    until(lambda: vm.memory.read(0x200000, 1) == b"\1")
    assert vm.wait(0.3) is None
    before = vm.vcpus[0].loop.exits
    assert vm.wait(0.3) is None
    assert vm.vcpus[0].loop.exits == before, "an idle guest must not exit"
    vm.stop()
    stop = vm.wait(10)
    assert stop is not None and stop.reason is StopReason.REQUESTED


def test_pause_holds_the_guest_and_resume_lets_it_go_on(guest: MakeGuest) -> None:
    vm = guest("again: inc dword ptr [0x200000]\n jmp again\n")
    counter = vm.memory.view(0x200000, 4, dtype="<u4")
    vm.start()
    until(lambda: counter[0] > 0)
    vm.pause()
    assert vm.state == "Paused"
    held = int(counter[0])
    rip = vm.vcpus[0].regs.rip
    time.sleep(0.05)
    assert int(counter[0]) == held
    assert vm.vcpus[0].regs.rip == rip
    vm.resume()
    until(lambda: int(counter[0]) > held)
    vm.stop()
    assert vm.wait(10) is not None
    assert vm.state == "Stopped"


def test_registers_can_be_changed_while_paused(guest: MakeGuest) -> None:
    vm = guest("xor eax, eax\n mov byte ptr [0x200000], 1\n again: test eax, eax\n jz again\n" + EXIT)
    vm.start()
    until(lambda: vm.memory.read(0x200000, 1) == b"\1")
    vm.pause()
    regs = vm.vcpus[0].regs
    regs.rax = 7
    vm.vcpus[0].regs = regs
    vm.resume()
    stop = vm.wait(10)
    assert stop is not None and stop.code == 7


def test_device_exception_reaches_the_embedding_program(guest: MakeGuest) -> None:
    class Broken(Recorder):
        def write(self, offset: int, data: memoryview) -> None:
            raise ZeroDivisionError("a bug in my device")

    vm = guest("mov dx, 0x510\n out dx, al\n")
    vm.pio.add(0x510, 1, Broken(), "broken")
    vm.start()
    with pytest.raises(ZeroDivisionError, match="a bug in my device"):
        vm.wait(10)


def test_exit_callback_is_called_once(guest: MakeGuest) -> None:
    ends: list[Exit] = []
    vm = guest("mov al, 3\n" + EXIT)
    vm.on_exit(ends.append)
    run(vm)
    vm.stop()
    assert [end.code for end in ends] == [3]


def test_threads_carry_the_names_that_runtimes_look_for(guest: MakeGuest) -> None:
    vm = guest("again: hlt\n jmp again\n", cpus=2)
    vm.start()
    until(lambda: {"fc_vcpu 0", "fc_vcpu 1"} <= _thread_names())
    vm.stop()


def _thread_names() -> set[str]:
    names = set()
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/self/task/{task}/comm") as comm:
            names.add(comm.read().strip())
    return names


# Wakes every other CPU by INIT and STARTUP at 0x8000; each counts itself, and the first ends when all have.
SMP = """
    mov esi, offset trampoline
    mov edi, 0x8000
    mov ecx, 32
    rep movsb
    mov dword ptr [0xfee000f0], 0x1ff       # local APIC on
    mov dword ptr [0xfee00300], 0x000c4500  # INIT to all but self
    mov dword ptr [0xfee00300], 0x000c4608  # STARTUP at page 8
again:
    cmp dword ptr [0x7000], {others}
    jne again
    mov al, {others}
    mov dx, 0xf4
    out dx, al
trampoline:
    .code16
    xor ax, ax
    mov ds, ax
    lock inc dword ptr [0x7000]
stay:
    hlt
    jmp stay
"""


@pytest.mark.parametrize("cpus", [2, 4])
def test_other_processors_start(guest: MakeGuest, cpus: int) -> None:
    vm = guest(SMP.format(others=cpus - 1), cpus=cpus)
    vm.memory.write(0x7000, bytes(4))
    assert run(vm).code == cpus - 1


def test_sixty_four_processors_can_be_made(guest: MakeGuest) -> None:
    vm = guest("mov eax, 1\n cpuid\n shr ebx, 24\n mov al, bl\n" + EXIT, cpus=64)
    assert len(vm.vcpus) == 64
    assert run(vm).code == 0


def test_a_host_without_threads_ends_the_machine(guest: MakeGuest, monkeypatch: pytest.MonkeyPatch) -> None:
    vm = guest("again: jmp again", cpus=2)
    spawn = threads.spawn

    def scarce(kind: str, name: str, *rest: Any, **how: Any) -> Any:
        if name == "fc_vcpu 1":
            raise RuntimeError("can't start new thread")
        return spawn(kind, name, *rest, **how)

    monkeypatch.setattr(threads, "spawn", scarce)
    with pytest.raises(HostError, match="start the machine's threads"):
        vm.start()
    with pytest.raises(HostError, match="start the machine's threads"):
        vm.wait(PATIENCE)


def test_cpuid_says_hypervisor_and_x2apic(guest: MakeGuest) -> None:
    vm = guest("mov eax, 1\n cpuid\n mov [0x200000], ecx\n" + EXIT)
    run(vm)
    features = int.from_bytes(vm.memory.read(0x200000, 4), "little")
    assert features >> 31 & 1, "hypervisor bit"
    assert features >> 21 & 1, "x2apic"


def test_guest_output_reaches_on_console(guest: MakeGuest) -> None:
    text = 'text: .ascii "hello, console"'
    vm = guest("mov esi, offset text\n mov ecx, 14\n mov dx, 0x3f8\n rep outsb\n" + EXIT + text)
    heard: list[bytes] = []
    vm.on_console(heard.append)
    run(vm)
    vm.close()
    assert b"".join(heard) == b"hello, console"


def test_kicks_are_not_lost(guest: MakeGuest) -> None:
    vm = guest("again: jmp again\n")
    vm.start()
    for _ in range(50):
        vm.pause()
        vm.resume()
    finished = threading.Event()
    vm.on_exit(lambda stop: finished.set())
    vm.stop()
    assert finished.wait(10)


def test_ram_above_four_gib_is_a_slot_of_its_own(guest: MakeGuest) -> None:
    # PAE off and 32 bits: the guest cannot reach up there, but KVM has the slot and a device finds it.
    vm = guest("mov al, 1\n" + EXIT, memory="5G")
    assert [(r.gpa, r.size) for r in vm.memory.regions] == [(0, 3 << 30), (4 << 30, 2 << 30)]
    vm.memory.write((6 << 30) - 4, b"last")
    assert run(vm).code == 1


def test_exit_callback_that_raises_is_reported_and_holds_nobody_up(guest: MakeGuest, capfd: Any) -> None:
    def mine(stop: Exit) -> None:
        raise ZeroDivisionError("a bug in my callback")

    ends: list[Exit] = []
    vm = guest("again: jmp again")
    vm.on_exit(mine)
    vm.on_exit(ends.append)
    vm.start()
    vm.close()
    assert vm.vcpus[0].fd == -1 and len(ends) == 1
    assert "ZeroDivisionError: a bug in my callback" in capfd.readouterr().err


def test_wait_returns_after_the_exit_callbacks_of_another_thread(guest: MakeGuest) -> None:
    vm = guest("again: jmp again")
    called = []

    def late(stop: Exit) -> None:
        time.sleep(0.3)
        called.append(stop)

    vm.on_exit(late)
    vm.start()
    other = threading.Thread(target=vm.stop)
    other.start()
    assert vm.wait(PATIENCE) == called[0]
    other.join()


@pytest.mark.parametrize("seccomp", [False, True])
def test_exit_callback_may_wait_and_close(guest: MakeGuest, seccomp: bool, capfd: Any) -> None:
    vm = guest(EXIT)
    vm.seccomp = seccomp
    done = threading.Event()

    def close(stop: Exit) -> None:
        assert vm.wait() is stop
        vm.close()
        done.set()

    vm.on_exit(close)
    vm.start()
    assert done.wait(PATIENCE)
    for thread in vm._run._threads:
        thread.join(PATIENCE)
    assert capfd.readouterr().err == ""


def test_a_callback_for_which_no_thread_is_left_is_one_line(
    guest: MakeGuest, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    spawn = threads.spawn

    def scarce(kind: str, name: str, *rest: Any, **how: Any) -> Any:
        if name == "on_exit":
            raise RuntimeError("can't start new thread")
        return spawn(kind, name, *rest, **how)

    vm = guest(EXIT)
    vm.on_exit(print)
    vm.start(paused=True)
    monkeypatch.setattr(threads, "spawn", scarce)
    vm.resume()
    assert vm.wait(PATIENCE) is not None
    assert capfd.readouterr().err == "pyvmm: Nobody is told that the VM ended: can't start new thread\n"


def test_a_vcpus_own_thread_is_refused_what_would_hold_it(guest: MakeGuest) -> None:
    told: list[str] = []

    class Hypercall(Recorder):
        def write(self, offset: int, data: memoryview) -> None:
            for call in (vm.pause, vm.freeze, vm.fork, lambda: vm.detach("virtio-rng")):
                with pytest.raises(VmmError) as error:
                    call()
                told.append(str(error.value))

    vm = guest("mov dx, 0x510\n out dx, al\n" + EXIT, entropy=EntropyConfig())
    vm.pio.add(0x510, 1, Hypercall(), "hypercall")
    run(vm)
    assert told == ["a vCPU's own thread cannot hold the vCPUs; let another thread do this"] * 4


def test_a_vcpus_own_thread_is_refused_while_another_holds_the_vcpus(guest: MakeGuest) -> None:
    told: list[str] = []
    asked, answer = threading.Event(), threading.Event()

    class Hypercall(Recorder):
        def write(self, offset: int, data: memoryview) -> None:
            asked.set()
            answer.wait(PATIENCE)
            for call in (vm.freeze, lambda: vm.attach(EntropyConfig()), lambda: vm.detach("virtio-rng")):
                with pytest.raises(VmmError) as error:
                    call()
                told.append(str(error.value))

    vm = guest("mov dx, 0x510\n out dx, al\n" + EXIT, entropy=EntropyConfig())
    vm.pio.add(0x510, 1, Hypercall(), "hypercall")
    vm.start()
    assert asked.wait(PATIENCE)
    other = threading.Thread(target=vm.freeze)
    other.start()
    until(lambda: vm._run.holds)
    answer.set()
    other.join(10)
    assert told == ["a vCPU's own thread cannot hold the vCPUs; let another thread do this"] * 3
    assert vm.wait(PATIENCE) is not None


def test_a_machine_that_was_closed_is_not_started(guest: MakeGuest) -> None:
    vm = guest(EXIT)
    vm.close()
    with pytest.raises(VmmError, match="only once, and not after it was stopped"):
        vm.start()
    with pytest.raises(VmmError, match="ended cannot be frozen"):
        vm.freeze()


def test_a_host_without_threads_for_the_console_ends_the_machine(
    guest: MakeGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(kind: str, name: str, *rest: Any, **how: Any) -> Any:
        raise RuntimeError("can't start new thread")

    vm = guest("again: jmp again")
    vm.on_console(print)
    monkeypatch.setattr("vmm.machine.console.spawn", none_left)
    with pytest.raises(HostError, match=r"^start the machine's threads: Resource temporarily unavailable$"):
        vm.start()
    assert vm.state == "Stopped"
    with pytest.raises(HostError, match="start the machine's threads"):
        vm.wait(PATIENCE)


def test_a_host_without_descriptors_is_a_host_error(guest: MakeGuest, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*arguments: int) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    vm = guest(EXIT)
    monkeypatch.setattr(os, "eventfd", none_left)
    for call, what in (
        (lambda: guest(EXIT), "make the machine"),
        (lambda: vm.attach(EntropyConfig()), "attach virtio-rng"),
        (lambda: vm.irq_line(3), "make an interrupt line"),
    ):
        with pytest.raises(HostError, match=f"^{what}: Too many open files$"):
            call()
    monkeypatch.undo()
    assert vm.attach(EntropyConfig()).id == "virtio-rng"
