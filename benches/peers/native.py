# SPDX-License-Identifier: Apache-2.0
"""A Linux that runs natively on this /dev/kvm, for every VMM alike: r3 on a software KVM."""

from __future__ import annotations

import os
from pathlib import Path

from benches.peers.firecracker import Missing

# Source: tests/linux/r3/README.md. QEMU's microvm wants reboot=t.
CMDLINE = "console=ttyS0 quiet panic=-1 no-kvmapf 8250.nr_uarts=1 random.trust_cpu=1 reboot=k"


def kernel(flavour: str = "small") -> Path:
    """The vmlinux.

    :param flavour: small, or full: with ACPI, PCI, rng, balloon, virtio-console, DAX
    :raises Missing: it cannot be built here
    """
    if place := os.environ.get("PYVMM_R3"):
        return Path(place, flavour, "vmlinux")
    try:
        from tests.linux.r3 import vmlinux
    except ImportError:
        raise Missing("r3: no tests/linux/r3 here; set PYVMM_R3 to the directory of small/vmlinux") from None
    return Path(vmlinux(flavour))
