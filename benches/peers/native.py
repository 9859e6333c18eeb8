# SPDX-License-Identifier: Apache-2.0
"""A Linux that runs natively on this /dev/kvm, for every VMM alike: r3, where KVM is a software KVM.

``PYVMM_BENCH_LAB=1`` goes to the lab instead, where stock kernels run, slowed by emulation.
"""

from __future__ import annotations

import os
from pathlib import Path

from benches.peers.firecracker import Missing
from tests.linux import r3
from vmm.errors import VmmError
from vmm.kvm.vm import software_kvm

CMDLINE = f"{r3.CMDLINE} quiet loglevel=1"
# What QEMU's microvm needs for it; it also wants reboot=t.
QEMU_CPU, QEMU_MACHINE = "host,-arch-capabilities", "microvm,acpi=off,rtc=off"


def here() -> bool:
    """Whether r3 is the kernel to measure with."""
    return software_kvm() is not None and not os.environ.get("PYVMM_BENCH_LAB")


def kernel() -> Path:
    """r3's vmlinux, built the first time.

    :raises Missing: the kernel cannot be built here
    """
    try:
        return r3.vmlinux()
    except VmmError as error:
        raise Missing(str(error)) from None
