# SPDX-License-Identifier: Apache-2.0
"""``pyvmm run``: boot a kernel on this terminal and end with the guest's status."""

from __future__ import annotations

import os
import sys

from vmm.config import DEFAULT_CMDLINE, MAX_VCPUS, DriveConfig, VmConfig
from vmm.errors import ConfigError
from vmm.events import StopReason

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from vmm.machine import Machine

STATUS_INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``pyvmm run``."""
    add = parser.add_argument
    add("kernel", metavar="KERNEL", help="vmlinux, PVH ELF or bzImage; or the name of a pulled image, as debian")
    add("rootfs", metavar="ROOTFS", nargs="?", help="raw image of the root file system; the first disk, /dev/vda")
    add("--initrd", metavar="F", help="initial ramdisk")
    cmdline = parser.add_mutually_exclusive_group()
    cmdline.add_argument("--cmdline", metavar="S", help=f"kernel command line (default: {DEFAULT_CMDLINE!r})")
    cmdline.add_argument("--append", metavar="S", default="", help="added to the default command line")
    add("--cpus", metavar="N", type=int, default=1, help=f"vCPUs, 1 to {MAX_VCPUS} (default: 1)")
    add("--memory", metavar="SIZE", default="512M", help="guest RAM, as 512M or 2G (default: 512M)")
    add("--disk", metavar="PATH[,ro]", action="append", default=[], help="a further disk; may be repeated")
    add("--console", metavar="WHERE", default="stdio", help="serial console: stdio, file:PATH or none")
    add("--kvm", metavar="PATH", default="/dev/kvm", help="the KVM device (default: /dev/kvm)")
    add("--protocol", default="auto", choices=("auto", "linux64", "pvh"), help="boot protocol (default: auto)")
    add("--unpack", default="auto", choices=("auto", "always", "never"),
        help="unpack a bzImage on the host (default: auto, where that is faster)")  # fmt: skip
    add("--lab", action="store_true", help="run it on an emulated machine that has real KVM (see pyvmm lab)")
    add("--dry-run", action="store_true", help="check everything, say what would run, run nothing")
    add("-v", "--verbose", action="store_true", help="say what is run and how it ended")


def config_from(args: argparse.Namespace) -> VmConfig:
    """The configuration that the command line means.

    :raises ConfigError: it means none
    """
    kernel, initrd, rootfs, append = args.kernel, args.initrd, args.rootfs, args.append
    cmdline = args.cmdline
    if not os.path.exists(kernel) and "/" not in kernel:
        from vmm import images

        image = images.resolve(kernel)
        if image is not None:
            kernel, initrd, rootfs = image.kernel, initrd or image.initrd, rootfs or image.rootfs
            append = f"{image.cmdline} {append}".strip()
        elif any(offered["name"] == kernel for offered in images.available()):
            raise ConfigError("kernel", kernel, f"is not here yet; fetch it with: pyvmm pull {kernel}")
    drives = [DriveConfig.parse(text) for text in args.disk]
    if rootfs is not None:
        root = DriveConfig.parse(rootfs)
        root.is_root_device = True
        drives.insert(0, root)
    return VmConfig(
        kernel,
        initrd=initrd,
        cmdline=cmdline,
        append=append,
        cpus=args.cpus,
        memory=args.memory,
        drives=drives,
        console=args.console,
        kvm=args.kvm,
        protocol=args.protocol,
        unpack=args.unpack,
    )


def main(args: argparse.Namespace) -> int:
    """Run the VM; see ``vmm.events.EXIT_STATUS`` for what is returned."""
    config = config_from(args)
    if args.lab and not os.environ.get("PYVMM_LAB"):
        return _run_in_lab(config)
    _refuse_linux_on_software_kvm(config)
    from vmm.machine import Machine

    vm = Machine(config)
    try:
        if args.verbose or args.dry_run:
            print(describe(vm), file=sys.stdout if args.dry_run else sys.stderr, flush=True)
        if args.dry_run:
            return 0
        return _run(vm, verbose=args.verbose)
    finally:
        vm.close()


def _run(vm: Machine, *, verbose: bool) -> int:
    import signal

    interrupts = 0

    def on_signal(number: int, frame: object) -> None:
        nonlocal interrupts
        interrupts += 1
        if interrupts > 1:
            # The orderly way is stuck, or the person at the keyboard does not want to wait for it.
            vm.console.restore_terminal()
            os._exit(STATUS_INTERRUPTED)
        vm.stop()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, on_signal)
    signal.signal(signal.SIGCONT, lambda number, frame: vm.console.enter_raw_mode())
    vm.start()
    stop = vm.wait()
    assert stop is not None  # wait() without a time limit
    vm.close()
    if verbose or stop.reason not in (StopReason.POWEROFF, StopReason.GUEST_EXIT, StopReason.REQUESTED):
        print(f"pyvmm: guest ended: {stop}", file=sys.stderr)
    return stop.status


def describe(vm: Machine) -> str:
    """What will run, a line each: for ``-v`` and ``--dry-run``."""
    loaded, config = vm.loaded, vm.config
    lines = [
        f"kernel   {config.kernel}: {loaded.kind}, {loaded.protocol} entry {loaded.entry:#x}"
        + (f", unpacked here ({loaded.unpacked})" if loaded.unpacked else ""),
        f"cmdline  {vm.cmdline}",
        f"memory   {config.memory >> 20} MiB: "
        + ", ".join(f"{r.gpa:#x}-{r.gpa + r.size - 1:#x}" for r in vm.memory.regions),
        f"cpus     {config.cpus}",
    ]
    if config.initrd:
        lines.append(f"initrd   {config.initrd}: {loaded.initrd[1]} bytes at {loaded.initrd[0]:#x}")
    for space in (vm.pio, vm.mmio):
        for start, size, _, name in space.claims:
            lines.append(f"{space.name:8} {start:#x}-{start + size - 1:#x} {name}")
    for place, drive in enumerate(config.drives):
        mode = "read-only" if drive.is_read_only else "read-write"
        lines.append(f"disk     /dev/vd{chr(ord('a') + place)} {drive.path_on_host}, {mode}")
    return "\n".join(lines)


def _refuse_linux_on_software_kvm(config: VmConfig) -> None:
    # Linux would stop in its first second there, or crawl for minutes, without a word.
    from boot import load
    from vmm.kvm import software_kvm

    software = software_kvm()
    if software and load.probe(config.kernel).is_linux:
        raise ConfigError(
            "--kvm", config.kvm,
            f"is a software KVM ({software}), on which Linux does not reach user space; add --lab to run it on an"
            " emulated machine with real KVM",
        )  # fmt: skip


def _run_in_lab(config: VmConfig) -> int:
    from vmm import lab

    written = [os.path.dirname(os.path.abspath(d.path_on_host)) for d in config.drives if not d.is_read_only]
    if config.console.startswith("file:"):
        written.append(os.path.dirname(os.path.abspath(config.console.removeprefix("file:"))))
    argv = [word for word in sys.argv[1:] if word != "--lab"]
    print("pyvmm run: in the lab, a machine emulated by QEMU with real KVM inside", file=sys.stderr, flush=True)
    return lab.run([sys.executable, "-m", "vmm.cli", *argv], write=sorted(set(written)))



