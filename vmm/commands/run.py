# SPDX-License-Identifier: Apache-2.0
"""``pyvmm run``: boot a kernel on this terminal and end with the guest's status."""

from __future__ import annotations

import os
import sys

from vmm import launched, signals, threads, undertaker
from vmm.cmdline import Cmdline
from vmm.config import attribute, did_you_mean, fill_from_files
from vmm.config.vm import VmConfig
from vmm.errors import ConfigError, VmmError
from vmm.exits import StopReason

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable
    from typing import Any

    from vmm.config import Arguments, Table
    from vmm.machine.machine import Machine

STATUS_INTERRUPTED = 130
CONSOLE = "stdio"
# How the name of a container image begins; as a root file system dir: is a directory that is shared.
CONTAINERS = ("oci:", "docker-archive:", "dir:")


# By the option: the parameter of VmConfig that it is.
PARAMETERS = {each.word: (name, each) for name, each in VmConfig.OPTIONS.items() if each.word}
OPTIONS: Table = (
    *((word, each.metavar, None if each.metavar else False, each.help) for word, (_, each) in PARAMETERS.items()),
    ("--disk", "PATH[,ro][,...]", [], "another disk; may be repeated"),
    ("--share", "TAG=DIR[,ro][,...]", [], "a directory for the guest: mount -t virtiofs TAG DIR; may be repeated"),
    ("--net", "tap=NAME|auto|user[,...]", [], "a network interface; may be repeated"),
    ("--vsock", "cid=N,uds=PATH", None, "sockets between host and guest (see pyvmm vsock)"),
    ("--balloon", "MIB[,...]", None, "a memory balloon of that size"),
    ("--restore", "DIR", None, "start from a snapshot instead of a kernel (see pyvmm ctl)"),
    ("--no-seccomp", None, False, "turn the system call filters off"),
    ("--any-kernel", None, False, "start a stock Linux on a software KVM, although it will stop early"),
    ("--lab", None, False, "run it on an emulated machine that has real KVM (see pyvmm lab)"),
    ("--write-config", "FILE", None, "write a file for pyvmm serve --config-file; run nothing"),
    ("--dry-run", None, False, "check everything, print the VM; run nothing"),
    ("--verbose", None, False, "print what runs and how it ended"),
)
POSITIONAL = ("kernel", "rootfs")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``pyvmm run`` that are not in its table of options."""
    add = parser.add_argument
    add(
        "kernel",
        metavar="KERNEL",
        nargs="?",
        help="vmlinux, PVH ELF or bzImage; or the name of a pulled image, such as debian or oci:python:3.12",
    )
    add("rootfs", metavar="ROOTFS", nargs="?", help="the root file system: a raw image, dir:DIRECTORY, or oci:REF")


def config_from(args: Arguments, sources: dict[str, str] | None = None) -> VmConfig:
    """The configuration that the command line means, and what files say of what it leaves out.

    :param sources: what ``fill_from_files`` has returned already
    :raises ConfigError: the words mean no VM
    """
    if sources is None:
        sources = fill_from_files(args, "run", OPTIONS)
    kernel, initrd, rootfs, append = args.kernel, args.initrd, args.rootfs, args.append or ""
    if kernel is None:
        raise ConfigError("KERNEL", "", "is missing: give a kernel file, a pulled image, or --restore DIR")
    if args.cmdline is not None and append:
        raise ConfigError("--append", append, "cannot be combined with --cmdline, which is the whole command line")
    image = None
    if rootfs is not None and rootfs.startswith(CONTAINERS[:2]):
        image = _image(rootfs)
        initrd, rootfs = initrd or image.initrd, image.rootfs
    elif not os.path.exists(kernel) and ("/" not in kernel or kernel.startswith(CONTAINERS)):
        image = _image(kernel)
        if image is not None:
            kernel, initrd, rootfs = image.kernel, initrd or image.initrd, rootfs or image.rootfs
    if image is not None:
        # Where the root is, the configuration says: it may be another than the image's own.
        line = Cmdline(image.cmdline)
        line.remove("ro", "rw", "root")
        if rootfs != image.rootfs:
            line.remove("rootfstype", "overlay")
        line.append(_terminal_size())
        line.append(append)
        append = str(line)
    read_only = image is not None and image.config is not None and rootfs == image.rootfs
    values: dict[str, Any] = {"console": CONSOLE}
    for word, (name, each) in PARAMETERS.items():
        if (text := getattr(args, attribute(word))) not in (None, False):
            values[name] = text if each.metavar is None else _said(sources, word, text, each.meant, word)
    values |= {"initrd": initrd, "append": append}
    return VmConfig(kernel, **values, **_devices(args, rootfs, sources, read_only=read_only))


def _said(sources: dict[str, str], option: str, text: Any, make: Callable[..., Any], *words: str) -> Any:
    # The value that an option's text means; an error names the file that has it.
    if option not in sources:
        return make(*words, text)
    from vmm.config.files import named

    with named(sources[option]):
        return make(*words, text)


def _devices(args: Arguments, rootfs: str | None, sources: dict[str, str], *, read_only: bool) -> dict[str, Any]:
    if not (
        rootfs is not None or args.disk or args.share or args.net or args.vsock is not None or args.balloon is not None
    ):
        return {}  # a guest without devices does not pay for their declarations
    from vmm.config.devices import BalloonConfig, DriveConfig, NetConfig, ShareConfig, VsockConfig

    drives = [_said(sources, "--disk", text, DriveConfig.parse) for text in args.disk]
    shares = [_said(sources, "--share", text, ShareConfig.parse) for text in args.share]
    if rootfs is not None and rootfs.startswith("dir:"):
        shares.insert(0, ShareConfig.parse(f"rootfs={rootfs.removeprefix('dir:')}", root=True))
    elif rootfs is not None:
        root = DriveConfig.parse(rootfs, root=True)
        root.read_only |= read_only
        drives.insert(0, root)
    return {
        "drives": drives,
        "shares": shares,
        "nets": [_said(sources, "--net", text, NetConfig.parse) for text in args.net],
        "vsock": None if args.vsock is None else VsockConfig.parse(args.vsock),
        "balloon": None if args.balloon is None else _said(sources, "--balloon", args.balloon, BalloonConfig.parse),
    }


def _image(name: str) -> Any:
    # the pulled image of that name; None if no image has it
    from vmm import images

    image = images.resolve(name)
    if image is None and (name.startswith(CONTAINERS) or name in images.NAMES):
        raise ConfigError("image", name, f"is not in the cache; fetch it with: pyvmm pull {name}")
    if image is None and (guess := did_you_mean(name, images.NAMES)):
        raise ConfigError("KERNEL", name, f"is neither a file nor an image{guess}")
    return image


def _terminal_size() -> str:
    # A serial line cannot say how large the terminal is; our images' init takes it from the command line.
    if not os.isatty(1):
        return ""
    try:
        columns, lines = os.get_terminal_size(1)
    except OSError:
        return ""  # it has been hung up
    return f"LINES={lines} COLUMNS={columns} TERM={os.environ.get('TERM', 'vt100')}"


def main(args: Arguments) -> int:
    """Run the VM; see ``vmm.exits.Exit.status`` for what is returned."""
    if args.restore is not None:
        return _restore(args)
    config = config_from(args)
    if args.write_config is not None:
        return _write_config(config, args.write_config)
    if args.lab and not os.environ.get("PYVMM_LAB"):
        return _run_in_lab(config)
    from vmm.kvm import vm as kvm

    # As early as can be, and the memory as late: KVM then has nothing to wait for.
    prepared = None if args.dry_run else kvm.prepare(config.kvm)
    if not (args.dry_run or args.any_kernel):
        _refuse_linux_on_software_kvm(config)
    launched.spare_collections("vmm.machine.machine")
    from vmm.machine.machine import Machine

    _guard(args)
    with Machine(config, prepared=prepared, seccomp=not args.no_seccomp) as vm:
        if args.verbose or args.dry_run:
            print(describe(vm), file=sys.stdout if args.dry_run else sys.stderr, flush=True)
        if args.dry_run:
            return 0
        return _run(vm, verbose=args.verbose)


def _guard(args: Arguments) -> None:
    if not (args.no_seccomp or args.dry_run):
        from vmm.jail import seccomp

        seccomp.guard(alone=True)


def _restore(args: Arguments) -> int:
    launched.spare_collections("vmm.machine.machine")
    from vmm.machine.machine import Machine
    from vmm.machine.snapshot import Image

    others = [option for option, _, default, _ in OPTIONS if getattr(args, attribute(option)) not in (default, None)]
    strangers = sorted({*others} - {"--restore", "--console", "--verbose", "--no-seccomp", "--kvm"})
    if args.kernel is not None or strangers:
        what = args.kernel or strangers[0]
        raise ConfigError("--restore", args.restore, f"has its own configuration; {what} cannot change it")
    image = Image.load(args.restore or "")
    image.config = image.config.replaced(
        console=args.console or CONSOLE, kvm=args.kvm or VmConfig.OPTIONS["kvm"].default
    )
    _guard(args)
    with Machine(image=image, seccomp=not args.no_seccomp) as vm:
        return _run(vm, verbose=args.verbose)


def _write_config(config: VmConfig, path: str) -> int:
    import msgspec

    from vmm.api.translate import vm_body
    from vmm.durable import write_all, write_whole

    text = msgspec.json.format(msgspec.json.encode(vm_body(config)), indent=2) + b"\n"
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            with open(path, "wb") as file:  # a pipe, as /dev/stdout may be
                file.write(text)
        else:
            # For its owner alone, as all that we make: an address, a path or a boot argument may be somebody's secret.
            write_whole((path, lambda fd: write_all(fd, text)))
    except OSError as error:
        raise ConfigError("--write-config", path, f"cannot be written: {error.strerror}") from None
    return 0


def _run(vm: Machine, *, verbose: bool) -> int:
    interrupts = 0

    def on_signal(number: int, frame: object) -> None:
        nonlocal interrupts
        interrupts += 1
        if interrupts > 1:
            # The orderly way is stuck, or the person at the keyboard does not want to wait for it.
            vm.console.restore_terminal()
            os._exit(STATUS_INTERRUPTED)
        vm.stop()

    signals.on_end(on_signal)
    signals.on(signals.CONTINUED, lambda number, frame: vm.console.continued())
    signals.on_power(vm.press_power_button)
    launched.finish_start()
    try:
        vm.start()
        threads.enter(None if _starts_programs(vm.config) else "vmm")
    except VmmError:
        if not interrupts:  # else it was stopped before it could start
            raise
    stop = vm.wait()
    assert stop is not None  # wait() without a time limit
    undertaker.leave()
    vm.close()
    if verbose:
        for name, counters in vm.stats.items():
            counted = ", ".join(f"{what} {count}" for what, count in counters.items() if count)
            print(f"pyvmm: {name}: {counted or 'idle'}", file=sys.stderr)
    if verbose or stop.reason not in (StopReason.POWEROFF, StopReason.GUEST_EXIT, StopReason.REQUESTED):
        print(f"pyvmm: guest ended: {stop}", file=sys.stderr)
    return stop.status


def _starts_programs(config: VmConfig) -> bool:
    # They are ended, and what they did is undone, by the main thread.
    images = [drive.format for drive in config.drives]
    return "qcow2" in images or any(net.mode in ("user", "auto") for net in config.nets)


def describe(vm: Machine) -> str:
    """What will run, a line each: for ``-v`` and ``--dry-run``."""
    from boot.board import PARTS

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
    lines += [f"gsi      {part.gsi} {part.title}" for part in PARTS if part.gsi is not None]
    lines += [f"gsi      {each.gsi} {each.device.name}" for each in vm.devices.values()]
    for number, drive in enumerate(config.drives):
        mode = "read-only" if drive.read_only else "read-write"
        lines.append(f"disk     /dev/vd{chr(ord('a') + number)} {drive.path}, {mode}")
    for share in config.shares:
        mode = "read-only" if share.read_only else "read-write"
        lines.append(f"share    {share.tag} {share.path}, {mode}")
    for interface, net in enumerate(config.nets):
        lines.append(f"net      eth{interface}: {net.tap or net.mode}")
    if config.vsock is not None:
        lines.append(f"vsock    CID {config.vsock.cid}, {config.vsock.path}")
    return "\n".join(lines)


def _refuse_linux_on_software_kvm(config: VmConfig) -> None:
    # Linux would stop in its first second there, or crawl for minutes, without a word.
    from boot import load
    from vmm.kvm.vm import why_no_linux

    # The file is read once more only where KVM is software.
    if (why := why_no_linux()) and load.probe(config.kernel).needs_ring0:
        ways = "add --lab to run it on an emulated machine with real KVM, or --any-kernel to try it"
        raise ConfigError("--kvm", config.kvm, f"{why}; {ways}")


def _run_in_lab(config: VmConfig) -> int:
    from vmm import lab

    sockets = {"--vsock": config.vsock.path} if config.vsock is not None else {}
    if config.console.startswith("unix:"):
        sockets["--console"] = config.console
    for option, path in sockets.items():
        inside = "would be a socket inside the lab; run the VM and its clients there: pyvmm lab -- COMMAND"
        raise ConfigError(option, path, inside)
    written = [os.path.dirname(os.path.abspath(d.path)) for d in config.drives if not d.read_only]
    written += [os.path.abspath(share.path) for share in config.shares if not share.read_only]
    if config.console.startswith("file:"):
        written.append(os.path.dirname(os.path.abspath(config.console.removeprefix("file:"))))
    argv = [word for word in sys.argv[1:] if word != "--lab"]
    print("pyvmm run: in the lab, a machine emulated by QEMU with real KVM inside", file=sys.stderr, flush=True)
    return lab.run([sys.executable, "-m", "vmm", *argv], write=sorted(set(written)))
