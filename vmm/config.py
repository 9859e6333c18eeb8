# SPDX-License-Identifier: Apache-2.0
"""What a VM is to be, its devices apart: see :mod:`vmm.device_config`."""

from __future__ import annotations

import os

from boot.cmdline import Cmdline, parameter
from vmm.device_config import Config, EntropyConfig
from vmm.errors import ConfigError
from vmm.options import did_you_mean, parse_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from vmm.device_config import (
        BalloonConfig,
        DriveConfig,
        FsConfig,
        MmdsConfig,
        NetConfig,
        RateLimiterConfig,
        VsockConfig,
    )
    from vmm.kvm.cpu_template import CpuTemplate

MAX_VCPUS = 64
MAX_EXIT_PORT = 0xFFFC  # the device has four bytes
MAX_POLL_US = 10_000
# More than the host has is fine: a guest costs what it touches.
MIN_MEMORY, MAX_MEMORY = 1 << 20, 1 << 40
DEFAULT_MEMORY = 512 << 20
DEFAULT_EXIT_PORT = 0xF4
# What a stock kernel needs to talk to us and to end: a console, a reset that we see, and no waiting after a panic.
DEFAULT_CMDLINE = "console=ttyS0 reboot=k panic=-1 i8042.noaux i8042.nomux i8042.dumbkbd"


class VmConfig(Config):
    """A whole VM.

    :param kernel: path of a vmlinux or any PVH ELF, or a bzImage
    :param initrd: path of an initial ramdisk
    :param cmdline: the kernel's command line; None for ``DEFAULT_CMDLINE``
    :param append: added to the command line
    :param cpus: vCPUs, 1 to 64
    :param smt: two of them make a core
    :param cpu_template: what CPUID and MSRs are to be otherwise (:class:`vmm.kvm.cpu_template.CpuTemplate`), or None
    :param memory: bytes of guest RAM, or a size such as ``"512M"``
    :param huge_pages: ``"None"``, or ``"2M"``: in huge pages that the host has set aside
    :param track_dirty_pages: KVM notes which pages the guest writes
    :param drives: disks in the order in which the guest finds them
    :param network_interfaces: in the order in which the guest finds them
    :param vsock: the socket device, or None
    :param shares: shared directories
    :param entropy: whether the guest gets the host's random numbers; True is the same as ``EntropyConfig()``
    :param balloon: the memory balloon, or None
    :param mmds: how the guest reaches the metadata service; None: not at all
    :param poll_us: microseconds that an idle device looks for work before it sleeps: less latency, more CPU
    :param console: where the console's output goes: ``"stdio"``, ``"raw"`` (the same, without keys of our own, and
        output that nobody takes is lost), ``"file:PATH"`` or ``"none"``
    :param console_rate_limiter: of the bytes of its output: what is too much is lost; None: no limit
    :param keyboard: ACPI tells the guest of its keyboard, for ``Machine.send_ctrl_alt_del``; a driver for it costs time
    :param boot_timer: a byte 123 at 0xd0000000 logs how long the guest took; devices are one window further up
    :param virtio_console: the console is /dev/hvc0, much faster than the serial port, whose output then goes nowhere
    :param kvm: the KVM device
    :param exit_port: port of the exit device, or None for no such device
    :param protocol: boot protocol: ``"auto"``, ``"linux64"`` or ``"pvh"``
    :param unpack: unpack a bzImage on the host: ``"auto"``, ``"always"`` or ``"never"``
    :raises ConfigError: a value out of its range; names the field, the value and what is allowed
    """

    __slots__ = (
        "append", "balloon", "boot_timer", "cmdline", "console", "console_rate_limiter", "cpu_template", "cpus",
        "drives", "entropy", "exit_port", "huge_pages", "initrd", "kernel", "keyboard", "kvm", "memory", "mmds",
        "network_interfaces", "poll_us", "protocol", "shares", "smt", "track_dirty_pages", "unpack", "virtio_console",
        "vsock",
    )  # fmt: skip

    def __init__(
        self,
        kernel: str | os.PathLike[str],
        *,
        initrd: str | os.PathLike[str] | None = None,
        cmdline: str | None = None,
        append: str = "",
        cpus: int = 1,
        smt: bool = False,
        cpu_template: CpuTemplate | None = None,
        memory: int | str = DEFAULT_MEMORY,
        huge_pages: str = "None",
        track_dirty_pages: bool = False,
        drives: Sequence[DriveConfig] = (),
        network_interfaces: Sequence[NetConfig] = (),
        vsock: VsockConfig | None = None,
        shares: Sequence[FsConfig] = (),
        entropy: EntropyConfig | bool | None = None,
        balloon: BalloonConfig | None = None,
        mmds: MmdsConfig | None = None,
        poll_us: int = 0,
        console: str = "none",
        console_rate_limiter: RateLimiterConfig | None = None,
        keyboard: bool = False,
        boot_timer: bool = False,
        virtio_console: bool = False,
        kvm: str = "/dev/kvm",
        exit_port: int | None = DEFAULT_EXIT_PORT,
        protocol: str = "auto",
        unpack: str = "auto",
    ) -> None:
        self.kernel = os.fspath(kernel)
        self.initrd = None if initrd is None else os.fspath(initrd)
        self.cmdline = cmdline
        self.append = append
        self.cpus = cpus
        self.smt = smt
        self.cpu_template = cpu_template
        self.huge_pages = huge_pages
        self.track_dirty_pages = track_dirty_pages
        self.memory = parse_size("memory", memory)
        self.drives = tuple(drives)
        self.network_interfaces = tuple(network_interfaces)
        self.vsock = vsock
        self.shares = tuple(shares)
        self.entropy = (EntropyConfig() if entropy else None) if isinstance(entropy, bool) else entropy
        self.balloon = balloon
        self.mmds = mmds
        self.poll_us = poll_us
        self.console = console
        self.console_rate_limiter = console_rate_limiter
        self.keyboard = keyboard
        self.boot_timer = boot_timer
        self.virtio_console = virtio_console
        self.kvm = kvm
        self.exit_port = exit_port
        self.protocol = protocol
        self.unpack = unpack
        self._check()

    @classmethod
    def from_settings(cls, kernel: str | os.PathLike[str] | None, settings: Mapping[str, Any]) -> VmConfig:
        """A configuration by its parameters' names; `kernel` None: it is one of them.

        :raises ConfigError: a value out of its range
        :raises TypeError: there is no such parameter, or the kernel is missing
        """
        for name in settings:
            if name not in cls.__slots__:
                raise TypeError(f"Machine has no parameter {name!r}{did_you_mean(name, cls.__slots__)}")
        if kernel is None and "kernel" not in settings:
            raise TypeError("Machine needs a kernel: its path, or a VmConfig")
        return cls(**settings) if kernel is None else cls(kernel, **settings)

    def _word(self, name: str, value: object) -> str:
        if name != "memory" or not isinstance(value, int):
            return super()._word(name, value)
        for shift, unit in ((30, "G"), (20, "M"), (10, "K")):
            if value >> shift << shift == value:
                return repr(f"{value >> shift}{unit}")
        return repr(value)

    def _check(self) -> None:
        if not 1 <= self.cpus <= MAX_VCPUS:
            raise ConfigError("cpus", self.cpus, f"must be 1 to {MAX_VCPUS}")
        if self.smt and self.cpus > 1 and self.cpus % 2:
            raise ConfigError("cpus", self.cpus, "must be 1 or an even number with smt")
        if not MIN_MEMORY <= self.memory <= MAX_MEMORY:
            raise ConfigError("memory", self.memory, f"bytes must be {MIN_MEMORY} (1M) to {MAX_MEMORY} (1T)")
        if not 0 <= self.poll_us <= MAX_POLL_US:
            raise ConfigError("poll", self.poll_us, f"must be 0 to {MAX_POLL_US} microseconds")
        if self.exit_port is not None and not 0 <= self.exit_port <= MAX_EXIT_PORT:
            raise ConfigError("exit port", self.exit_port, f"must be 0 to {MAX_EXIT_PORT}")
        # KVM's slots are whole pages.
        self.memory &= -4096
        if self.console not in ("stdio", "raw", "none") and not self.console.removeprefix("file:") != self.console:
            raise ConfigError("console", self.console, "must be stdio, raw, none or file:PATH")
        if self.console == "file:":
            raise ConfigError("console", self.console, "the path is empty")
        for field, allowed in (
            ("protocol", ("auto", "linux64", "pvh")),
            ("unpack", ("auto", "always", "never")),
            ("huge_pages", ("None", "2M")),
        ):
            if getattr(self, field) not in allowed:
                raise ConfigError(field, getattr(self, field), f"must be one of {', '.join(allowed)}")
        roots = [drive.is_root_device for drive in self.drives] + [share.is_root_device for share in self.shares]
        if sum(roots) > 1:
            raise ConfigError("drives", "", "only one can be the root device")
        interfaces = [net.iface_id or f"eth{place}" for place, net in enumerate(self.network_interfaces)]
        if self.mmds and (unknown := [name for name in self.mmds.network_interfaces if name not in interfaces]):
            problem = (
                "The list of network interface IDs provided contains at least one ID that does not correspond to any "
                "existing network interface."
            )
            raise ConfigError("network_interfaces", unknown[0], problem)
        tags = [share.tag for share in self.shares]
        if twice := [tag for tag in tags if tags.count(tag) > 1]:
            raise ConfigError("share tag", twice[0], "must be unique for each share")

    @property
    def root_parameters(self) -> str:
        """What the command line is given about the root device; ``""`` where its words say it themselves."""
        if self.cmdline is not None or Cmdline(self.append).has("root"):
            return ""
        for place, drive in enumerate(self.drives):
            if drive.is_root_device:
                return f"root=/dev/vd{chr(ord('a') + place)} {'ro' if drive.is_read_only else 'rw'}"
        for share in self.shares:
            if share.is_root_device:
                return f"{parameter('root', share.tag)} rootfstype=virtiofs {'ro' if share.read_only else 'rw'}"
        return ""

    @property
    def full_cmdline(self) -> str:
        """The command line as the guest's kernel gets it, but for what the machine adds about its own devices."""
        return self._words(self.root_parameters)

    @property
    def rootless_cmdline(self) -> str:
        """The same without ``root_parameters``, for who adds them himself."""
        return self._words("")

    def _words(self, root: str) -> str:
        default = DEFAULT_CMDLINE.replace("ttyS0", "hvc0") if self.virtio_console else DEFAULT_CMDLINE
        line = Cmdline(default if self.cmdline is None else self.cmdline)
        line.append(root)
        line.append(self.append)
        return str(line)
