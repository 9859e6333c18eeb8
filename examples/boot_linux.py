# SPDX-License-Identifier: Apache-2.0
"""Boots a Linux, prints what its console says with the time of each line, and ends with the guest's exit status.

pyvmm pull busybox
python examples/boot_linux.py busybox '-- sh -c "uname -a; exit 3"'
python examples/boot_linux.py vmlinux 'quiet' initrd.img
"""

from __future__ import annotations

import sys
import time

from vmm import DriveConfig, Machine, VmConfig, images


class Lines:
    """Cuts console output, which comes in pieces, into lines."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.rest = b""

    def __call__(self, data: bytes) -> None:
        *whole, self.rest = (self.rest + data).split(b"\n")
        for line in whole:
            print(f"{time.monotonic() - self.began:6.2f} s  {line.decode(errors='replace').rstrip()}")


def configuration(kernel: str, append: str, initrd: str | None) -> VmConfig:
    """The VM of an image by its name, or of a kernel by its path."""
    image = images.resolve(kernel)
    if image is None:
        return VmConfig(kernel, initrd=initrd, append=append, memory="256M")
    root = DriveConfig(image.rootfs, root=True)
    return VmConfig(
        image.kernel, initrd=initrd or image.initrd, cmdline=f"console=ttyS0 panic=-1 {image.cmdline}", append=append,
        memory="256M", drives=[root],
    )  # fmt: skip


def main(kernel: str = "busybox", append: str = "", initrd: str | None = None) -> int:
    """Boot it; returns the status that ``pyvmm run`` would end with."""
    with Machine(configuration(kernel, append, initrd)) as vm:
        vm.on_console(Lines())
        vm.start()
        ended = vm.wait(timeout=120)
    print(f"the guest: {ended or 'did not end within two minutes'}")
    return 1 if ended is None else ended.status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
