# SPDX-License-Identifier: Apache-2.0
"""``pyvmm check``: what this host offers a VMM, and what to do about what it lacks."""

from __future__ import annotations

import errno
import os
import sys
import time

from vmm import _uring, launched
from vmm.commands.parser import paint
from vmm.errors import ConfigError, VmmError
from vmm.kvm import abi
from vmm.kvm.vm import OPTIONAL, REQUIRED, Kvm, software_kvm
from vmm.machine.machine import Machine
from vmm.testing import tiny_elf

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    # (status, what, finding): status is "ok", "lack" (something optional) or "FAIL" (no VM runs without it).
    Line = tuple[str, str, str]

MEASURE_SECONDS = 0.1
_LOOP_OF_TWO = bytes.fromhex("41ebfd")  # inc ecx; jmp back to it
_COLOURS = {"ok": 32, "lack": 33, "FAIL": 31}  # green, yellow, red
# Emulated kernel code was measured at about 1 instruction per microsecond, native code at a thousand and more.
NATIVE_INSTRUCTIONS_PER_US = 50


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``pyvmm check``."""
    parser.add_argument("--kvm", metavar="PATH", default="/dev/kvm", help="the KVM device (default: /dev/kvm)")


def main(args: argparse.Namespace) -> int:
    """Print one line a finding; 0 where a VM can run, else 1."""
    worst = 0
    for status, what, finding in findings(args.kvm):
        shown = paint(f"{status:5}", _COLOURS[status], sys.stdout)
        print(f"{shown}{what:32}{finding}", flush=True)
        worst |= status == "FAIL"
    return int(worst)


def findings(path: str) -> Iterator[Line]:
    """Every check, in the order in which a lack matters."""
    try:
        kvm = Kvm(path)
    except ConfigError as error:
        yield "FAIL", path, error.problem
    else:
        try:
            yield "ok", path, "there and permitted"
            yield from _kvm_findings(kvm)
        finally:
            kvm.close()
    yield _device("/dev/net/tun", "tap networking", "modprobe tun")
    yield _device("/dev/vhost-vsock", "vsock in the host kernel", "modprobe vhost_vsock; pyvmm's own vsock needs none")
    yield _io_uring()
    yield _landlock()
    yield _hugepages()
    yield ("ok", "fast starts", "yes") if launched.warm else ("lack", "fast starts", "pyvmm prepare makes them")


def _kvm_findings(kvm: Kvm) -> Iterator[Line]:
    yield "ok", "API version", str(abi.KVM_API_VERSION)
    for name, number in REQUIRED.items():
        if kvm.check(number):
            yield "ok", name, "yes"
        else:
            yield "FAIL", name, "missing, and no VM runs without it: use Linux 4.11 or later"
    for name, number in OPTIONAL.items():
        yield ("ok", name, "yes") if kvm.check(number) else ("lack", name, "missing; guests keep time less well")
    yield "ok", "vCPUs a VM", f"up to {kvm.max_vcpus()}"
    if software := software_kvm():
        yield "lack", "hardware KVM", f"no: this is {software}, in software; for stock Linux use pyvmm lab, or --lab"
    else:
        yield "ok", "hardware KVM", "yes"
    try:
        speed = ring0_speed(kvm.path)
    except VmmError as error:
        yield "FAIL", "a guest in ring 0", f"does not run: {error}"
        return
    finding = f"{speed:.1f} instructions per microsecond"
    if speed < NATIVE_INSTRUCTIONS_PER_US:
        yield "lack", "ring-0 speed", f"{finding}: emulated, too slow for Linux; use pyvmm lab, or --lab"
    else:
        yield "ok", "ring-0 speed", finding


def ring0_speed(path: str) -> float:
    """Instructions per microsecond of a counting loop in ring 0, measured for a tenth of a second.

    :param path: the KVM device
    :raises VmmError: the guest did not run
    """
    kernel = os.memfd_create("loop", os.MFD_CLOEXEC)
    try:
        os.write(kernel, tiny_elf(_LOOP_OF_TWO))
        with Machine(f"/proc/self/fd/{kernel}", memory="4M", kvm=path, seccomp=False) as vm:
            start = time.perf_counter()
            vm.start()
            if (ended := vm.wait(MEASURE_SECONDS)) is not None:
                raise VmmError(str(ended))
            vm.pause()
            took = time.perf_counter() - start
            instructions: int = 2 * vm.vcpus[0].regs.rcx
            return instructions / (took * 1e6)
    finally:
        os.close(kernel)


def _device(path: str, what: str, remedy: str) -> Line:
    if not os.path.exists(path):
        return "lack", path, f"missing ({what}); {remedy}"
    if not os.access(path, os.R_OK | os.W_OK):
        return "lack", path, f"not permitted ({what}); join its group or run as root"
    return "ok", path, what


def _io_uring() -> Line:
    refused = _uring.probe()
    if not refused:
        return "ok", "io_uring", "yes"
    if refused == errno.ENOSYS:
        return "lack", "io_uring", "not in this kernel; disks use preadv and pwritev"
    return "lack", "io_uring", "refused; set kernel.io_uring_disabled to 0, or disks use preadv and pwritev"


def _landlock() -> Line:
    from vmm.jail import _seccomp

    version = _seccomp.landlock()
    if version < 1:
        return "lack", "Landlock", "none: threads have their seccomp filters alone (Linux 5.13, lsm=landlock)"
    return "ok", "Landlock", f"ABI {version}"


def _hugepages() -> Line:
    with open("/proc/meminfo") as meminfo:
        values = dict(line.split(":", 1) for line in meminfo)
    free = int(values.get("HugePages_Free", "0"))
    size = values.get("Hugepagesize", "").strip()
    if free:
        return "ok", "hugepages", f"{free} free of {size}"
    return "lack", "hugepages", "none reserved; write a number to /proc/sys/vm/nr_hugepages for faster guests"
