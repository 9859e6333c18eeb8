# SPDX-License-Identifier: Apache-2.0
"""Exit cost: port accesses of a guest, answered in Cython and in Python, over KVM's own cost; on /dev/kvm.

KVM's own cost is the same machine and guest with a loop in C around KVM_RUN that does nothing with the exit.
Of two guests one does a plain `out` again and again, one exit each; the other a long `rep insb`, which KVM
hands over by up to 1024 accesses an exit: what the VMM does for each is not lost then in what exits vary by.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from benches.peers import common
from benches.peers.common import Row, compare
from benches.peers.firecracker import Missing
from vmm import Machine, Stop
from vmm.kvm.vcpu import Vcpu
from vmm.testing import tiny_elf

EXITS = 1000
ITEMS = 100 * 1024
ROUNDS = 15
SCRATCH_PORT = 0x3FF  # the serial port's scratch register: the least that a device in Cython can do
PYTHON_PORT = 0x700
EXIT_PORT = 0xF4
# Issue 2 sets no figure; these would show that something on the way got slow.
GOAL_CYTHON, GOAL_PYTHON = 1.1, 1.5
GOAL_CYTHON_NS, GOAL_PYTHON_NS = 100.0, 2000.0

BARE = r"""
#include <errno.h>
#include <linux/kvm.h>
#include <stddef.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

/* Run the vCPU until its guest writes `last`; return the accesses before that, or -1. */
long bare(int fd, size_t size, int last)
{
    struct kvm_run *run = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    long accesses = 0;
    if (run == MAP_FAILED) return -1;
    for (;;) {
        if (ioctl(fd, KVM_RUN, 0) < 0) {
            if (errno == EINTR || errno == EAGAIN) continue;
            accesses = -1;
            break;
        }
        if (run->exit_reason != KVM_EXIT_IO) { accesses = -1; break; }
        if (run->io.port == last) break;
        accesses += run->io.count;
    }
    munmap(run, size);
    return accesses;
}
"""


class Counter:
    """The smallest device in Python that counts its accesses."""

    def __init__(self) -> None:
        self.count = 0

    def read(self, offset: int, data: memoryview) -> None:
        """Count, and leave `data` as it is."""
        self.count += 1

    def write(self, offset: int, data: memoryview) -> None:
        """Count."""
        self.count += 1


class Guest(NamedTuple):
    """A guest that accesses one port `accesses` times, then ends by the exit port."""

    kernel: Path
    accesses: int


def write_guests(directory: Path, port: int) -> tuple[Guest, Guest]:
    """Write both guests for `port`: the one of single exits, the one of long strings."""
    end = bytes((0xE6, EXIT_PORT, 0xF4))  # out EXIT_PORT, al; hlt
    port_to_dx = b"\x66\xba" + port.to_bytes(2, "little")
    # mov ecx, EXITS; mov dx, port; again: out dx, al; dec ecx; jnz again
    single = b"\xb9" + EXITS.to_bytes(4, "little") + port_to_dx + b"\xee\x49\x75\xfc" + end
    # mov edi, 2 MiB; mov ecx, ITEMS; mov dx, port; cld; rep insb
    string = b"\xbf\0\0\x20\0\xb9" + ITEMS.to_bytes(4, "little") + port_to_dx + b"\xfc\xf3\x6c" + end
    guests = []
    for code, accesses in ((single, EXITS), (string, ITEMS)):
        path = directory / f"{accesses}-{port:x}.elf"
        path.write_bytes(tiny_elf(code))
        guests.append(Guest(path, accesses))
    return guests[0], guests[1]


def nanoseconds(guest: Guest, run: Callable[[Machine, Vcpu], int]) -> float:
    """Time of one access in a new machine whose only vCPU is driven by `run`, on a thread of its own.

    :param run: runs the vCPU to the guest's end, and returns how many accesses it saw
    """
    took: list[int] = []
    seen: list[int] = []
    with Machine(kernel=str(guest.kernel), memory="4M") as vm:
        vcpu = vm.vcpus[0]

        def drive() -> None:
            vcpu.loop.attach("bench")
            start = time.perf_counter_ns()
            seen.append(run(vm, vcpu))
            took.append(time.perf_counter_ns() - start)
            vcpu.loop.detach()

        thread = threading.Thread(target=drive)
        thread.start()
        thread.join()
    if seen != [guest.accesses]:
        raise Missing(f"the guest made {guest.accesses} accesses, {seen} were seen")
    return took[0] / guest.accesses


def through_cython(vm: Machine, vcpu: Vcpu) -> int:
    """Run to the end. The accesses are to the serial port, which is written in Cython."""
    serial = vm.serial
    try:
        vcpu.run()
    except Stop:
        pass
    if vcpu.loop.python_exits != 1:  # the exit port's
        raise Missing(f"{vcpu.loop.python_exits - 1} accesses took the GIL")
    return vm.pio.hits(serial)


def through_python(vm: Machine, vcpu: Vcpu) -> int:
    """Run to the end. The accesses are to a device in Python."""
    device = Counter()
    vm.pio.add(PYTHON_PORT, 1, device, "bench")
    try:
        vcpu.run()
    except Stop:
        pass
    return device.count


def rows() -> list[Row]:
    """What an exit costs in Cython and in Python, as a multiple of KVM's own cost and in ns on top of it."""
    common.need_kvm()
    common.need_compiler()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        library = directory / "bare.so"
        compiler = ["cc", "-O2", "-shared", "-fPIC", "-o", str(library), "-xc", "-"]
        subprocess.run(compiler, input=BARE.encode(), check=True)
        function = ctypes.CDLL(str(library)).bare
        function.restype = ctypes.c_long
        function.argtypes = ctypes.c_int, ctypes.c_size_t, ctypes.c_int

        def bare(vm: Machine, vcpu: Vcpu) -> int:
            return int(function(vcpu.fd, vm.vm.vcpu_mmap_size, EXIT_PORT))

        out, insb = write_guests(directory, SCRATCH_PORT)
        python_out, python_insb = write_guests(directory, PYTHON_PORT)
        single = common.in_turn(
            ROUNDS,
            bare=lambda: nanoseconds(out, bare),
            cython=lambda: nanoseconds(out, through_cython),
            python=lambda: nanoseconds(python_out, through_python),
        )
        string = common.in_turn(
            ROUNDS,
            bare=lambda: nanoseconds(insb, bare),
            cython=lambda: nanoseconds(insb, through_cython),
            python=lambda: nanoseconds(python_insb, through_python),
        )
    peer = "bare C loop"
    rows = [
        compare("exit, device in Cython", "ns", single["cython"], single["bare"], peer, GOAL_CYTHON),
        compare("exit, device in Python", "ns", single["python"], single["bare"], peer, GOAL_PYTHON),
    ]
    for language, goal in (("Cython", GOAL_CYTHON_NS), ("Python", GOAL_PYTHON_NS)):
        over = [a - b for a, b in zip(string[language.lower()], string["bare"], strict=True)]
        rows.append(common.alone(f"access, device in {language}, over KVM's own cost", "ns", over, goal))
    return rows
