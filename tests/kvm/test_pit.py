# SPDX-License-Identifier: Apache-2.0
"""A timer that is made when the guest first uses it is, after any accesses, what KVM's own would be after them."""

from __future__ import annotations

import random
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.kvm.guests import PATIENCE, run, write_guest
from tests.waiting import until
from vmm import Machine
from vmm.errors import KvmError
from vmm.kvm import abi as kvm_abi

MakeGuest = Callable[..., Machine]
Access = tuple[int, int | None]  # port; what is written, None: a read

STATE = struct.Struct("<" + "IH10Bq" * 3 + "I36x")
FIELDS = (
    "count latched_count count_latched status_latched status read_state write_state write_latch rw_mode mode bcd gate"
    " count_load_time"
).split()
RESULTS, HELD = 0x20_0000, 0x20_1000
# What the time decides: the output, the refresh of memory, how far a count is. What port 0x43 reads as, nobody says.
OUTPUT, MOVING = 0x80, 0x30

PLAIN: list[list[Access]] = [
    [],
    [(0x43, 0x34), (0x40, 0x9C), (0x40, 0x2E)],  # a clock tick of 100 Hz
    [(0x43, 0x30), (0x40, 0), (0x40, 0)],  # Linux 6.14 switches it off
    [(0x61, None), (0x61, 1), (0x43, 0xB0), (0x42, 0xFF), (0x42, 0xFF), (0x61, None)],  # Linux measures its TSC
    [(0x43, 0xB6), (0x42, 0x11), (0x42, 0x22), (0x61, 3), (0x61, None)],  # a beep
    [(0x43, 0x14), (0x40, 7)],
    [(0x43, 0x2E), (0x40, 7)],
    [(0x43, 0x36), (0x43, 0xE2), (0x40, None), (0x43, 0xE2), (0x40, None)],  # what was told, read back
    [(0x43, 0x74), (0x43, 0x40), (0x41, None), (0x41, None)],
    [(0x43, 0xFF), (0x43, None), (0x41, None)],
    [(0x42, 5)],
]


def _random(seed: int) -> list[Access]:
    draw = random.Random(seed)
    ports = [0x43, 0x43, 0x43, 0x40, 0x41, 0x42, 0x61]
    return [(draw.choice(ports), draw.choice([None, *draw.choices(range(256), k=3)])) for _ in range(draw.randrange(9))]


def _program(accesses: list[Access]) -> str:
    lines = [f"mov edi, {RESULTS}"]
    for port, value in accesses:
        lines += [f"in al, {port}", "stosb"] if value is None else [f"mov al, {value}", f"out {port}, al"]
    return "\n".join([*lines, "mov al, 5", "out 0xf4, al", "hlt"])


def _outcome(vm: Machine, accesses: list[Access]) -> tuple[list[dict[str, int]], list[int]]:
    assert run(vm).code == 5
    vm._board.pit.make()
    state = bytearray(STATE.size)
    kvm_abi.kvm_ioctl(vm.vm.fd, kvm_abi.KVM_GET_PIT2, state)
    values = STATE.unpack(state)
    channels = [dict(zip(FIELDS, values[at:], strict=False)) for at in range(0, 39, 13)]
    for channel in channels:
        channel["status"] &= ~OUTPUT
        del channel["latched_count"], channel["count_load_time"]
    ports = [port for port, value in accesses if value is None]
    read = vm.memory.read(RESULTS, len(ports))
    told = [value & ~MOVING for port, value in zip(ports, read, strict=True) if port == 0x61]
    return [*channels, {"flags": values[-1]}], told


@pytest.mark.parametrize("some", [PLAIN, [_random(seed) for seed in range(12)]], ids=["plain", "random"])
def test_timer_made_late_is_as_kvms(guest: MakeGuest, some: list[list[Access]]) -> None:
    for accesses in some:
        late, early = guest(_program(accesses)), guest(_program(accesses))
        early._board.pit.make()
        assert _outcome(late, accesses) == _outcome(early, accesses), accesses
        late.close()
        early.close()


def test_status_that_was_latched_before_the_timer_is_there(guest: MakeGuest) -> None:
    vm = guest(_program([(0x43, 0x36), (0x43, 0xE2), (0x40, None)]))
    run(vm)
    assert vm.memory.read(RESULTS, 1)[0] == OUTPUT | 0x36  # a square wave begins high


def test_guest_that_uses_no_timer_makes_none(guest: MakeGuest) -> None:
    vm = guest(_program([]))
    run(vm)
    with pytest.raises(KvmError, match="KVM_GET_PIT2"):
        kvm_abi.kvm_ioctl(vm.vm.fd, kvm_abi.KVM_GET_PIT2, bytearray(STATE.size))


def _is_there(vm: Machine) -> bool:
    try:
        kvm_abi.kvm_ioctl(vm.vm.fd, kvm_abi.KVM_GET_PIT2, bytearray(STATE.size))
    except KvmError:
        return False
    return True


@pytest.mark.parametrize("before", [[], [(0x43, 0x36)], PLAIN[4]], ids=["unused", "control word", "counting"])
def test_a_copy_has_the_timer_that_the_guest_has_used(guest: MakeGuest, before: list[Access]) -> None:
    waits = f"mov byte ptr [{HELD}], 1\n1: mov al, [{HELD}]\ncmp al, 2\njne 1b\n"
    after: list[Access] = [(0x43, 0xE2), (0x40, None)]
    vm = guest(_program(before).rsplit("mov al, 5", 1)[0] + waits + _program(after))
    vm.start()
    until(lambda: vm.memory.read(HELD, 1) == b"\x01")
    (copy,) = vm.fork()
    assert _is_there(copy) == _is_there(vm) == bool(before)
    for machine in (vm, copy):
        machine.memory.write(HELD, b"\x02")
        stop = machine.wait(PATIENCE)
        assert stop is not None and stop.code == 5
    told = [machine.memory.read(RESULTS, 1)[0] & ~OUTPUT for machine in (vm, copy)]
    assert told[0] == told[1]
    copy.close()


def test_behind_filters_a_vcpu_makes_it(tmp_path: Path) -> None:
    kernel = write_guest(tmp_path, _program(PLAIN[1]))
    command = [sys.executable, "-m", "vmm", "run", "--memory", "4M", kernel]
    assert subprocess.run(command, stdin=subprocess.DEVNULL, timeout=PATIENCE).returncode == 5
