# SPDX-License-Identifier: Apache-2.0
"""The guest's kernel of the linux layer: Debian's where KVM runs a stock Linux, elsewhere r3; initramfs for both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.linux import r3
from vmm.images import apt, guest, initramfs
from vmm.kvm.vm import runs_linux

# Take a driver away from its devices and give it back: as a module, or where it is built in by its name.
RELOAD = r"""#!/bin/sh
grep -qs "^$1 " /proc/modules && { rmmod "$1" && modprobe "$1"; exit; }
cd "/sys/bus/virtio/drivers/$1" || exit
for device in virtio*; do echo "$device" >unbind && echo "$device" >bind || exit; done
"""


class Kernel(NamedTuple):
    """A guest kernel."""

    path: str
    version: str  # of its package
    tree: Path | None  # the package, with the modules; None: all drivers are built in

    def initrd(
        self, modules: Sequence[str], init: str, files: Mapping[str, str | bytes] | None = None,
        on_demand: Sequence[str] = (),
    ) -> bytes:  # fmt: skip
        """An initramfs with busybox, ``reload DRIVER`` and the modules, as far as this kernel has any."""
        more = {"sbin/reload": RELOAD, **(files or {})}
        if self.tree is None:
            return initramfs.build_initramfs(Path(), (), init, files=more)
        return initramfs.build_initramfs(self.tree, modules, init, on_demand=on_demand, files=more)


def debian(suite: str | None = None) -> Kernel:
    """Debian's cloud kernel, a bzImage.

    :param suite: another Debian's name; None: this host's
    :raises PullError: the kernel cannot be fetched
    """
    package = apt.package("linux-image-cloud-amd64", suite=suite)
    return Kernel(str(apt.kernel_of(package.tree)[0]), package.version, package.tree)


def ring3() -> Kernel:
    """r3, an ELF file for one vCPU.

    :raises PullError: the kernel cannot be fetched or built
    """
    path = r3.vmlinux()
    return Kernel(str(path), path.name, None)


def kernel() -> Kernel:
    """The one that KVM here runs.

    :raises PullError: the kernel cannot be fetched or built
    """
    return debian() if runs_linux() else ring3()


def cpus(wanted: int) -> int:
    """That many vCPUs, or as many as this host's guest kernel has."""
    return wanted if runs_linux() else 1


def session() -> bytes:
    """An initramfs with the images' session: without root= a shell on the console.

    :raises PullError: busybox cannot be fetched
    """
    files = guest.busybox_files("initramfs")
    return kernel().initrd(guest.MODULES, guest.INIT, files, on_demand=guest.ON_DEMAND_MODULES)
