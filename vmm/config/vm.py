# SPDX-License-Identifier: Apache-2.0
"""What a VM is to be, its devices apart: see :mod:`vmm.config.devices`."""

from __future__ import annotations

import os

from vmm.cmdline import Cmdline, parameter
from vmm.config import check_path, did_you_mean, parse_size, size_text
from vmm.config.option import REQUIRED, Config, option
from vmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any, TypedDict

    from vmm.config.cpu_template import CpuTemplate
    from vmm.config.devices import (
        BalloonConfig,
        DriveConfig,
        EntropyConfig,
        MmdsConfig,
        NetConfig,
        RateLimiterConfig,
        ShareConfig,
        VsockConfig,
    )
    from vmm.config.typed import Given

    class VmSettings(TypedDict, total=False):
        """The parameters of ``VmConfig`` as keywords of ``Machine``."""

        # Written by ``python -m tools.declared``, from here
        kernel: str | os.PathLike[str]
        initrd: str | os.PathLike[str] | None
        cmdline: str | None
        append: str
        cpus: int
        smt: bool
        cpu_template: CpuTemplate | None
        memory: int | str
        huge_pages: str | None
        track_dirty_pages: bool
        drives: Sequence[DriveConfig]
        nets: Sequence[NetConfig]
        vsock: VsockConfig | None
        shares: Sequence[ShareConfig]
        entropy: EntropyConfig | bool | None
        balloon: BalloonConfig | None
        mmds: MmdsConfig | None
        virtio_console: bool
        poll_us: int
        console: str
        console_rate_limiter: RateLimiterConfig | None
        keyboard: bool
        boot_timer: bool
        kvm: str | os.PathLike[str]
        exit_port: int | None
        protocol: str
        unpack: str
        # to here.


MAX_VCPUS = 64
MAX_EXIT_PORT = 0xFFFC  # the device has four bytes
MAX_POLL_US = 10_000
# More than the host has is fine: a guest costs what it touches.
MIN_MEMORY, MAX_MEMORY = 1 << 20, 1 << 40
DEFAULT_MEMORY = 512 << 20
DEFAULT_EXIT_PORT = 0xF4
# What a stock kernel needs to talk to us and to end: a console, a reset that we see, and no waiting after a panic.
DEFAULT_CMDLINE = "console=ttyS0 reboot=k panic=-1 i8042.noaux i8042.nomux i8042.dumbkbd"


def _memory(field: str, size: int | str) -> int:
    size = parse_size(field, size)
    if not MIN_MEMORY <= size <= MAX_MEMORY:
        raise ConfigError(field, size, "must be 1M to 1T; a number without K, M, G or T is in bytes")
    return size & -4096  # KVM's slots are whole pages


def _entropy(field: str, given: EntropyConfig | bool) -> EntropyConfig | None:
    if given is True:
        from vmm.config.devices import EntropyConfig

        return EntropyConfig()
    return given or None


def _console(field: str, where: str) -> str:
    if where not in ("stdio", "raw", "none") and not where.startswith(("file:", "unix:")):
        raise ConfigError(field, where, "must be stdio, raw, none, file:PATH or unix:PATH")
    if where in ("file:", "unix:"):
        raise ConfigError(field, where, "the path is empty")
    return where


class VmConfig(Config):
    """The configuration of a VM."""

    kernel: Given[str, str | os.PathLike[str]] = option(
        help="path of a vmlinux or any PVH ELF, or a bzImage", kw_only=False, check=check_path, api="kernel_image_path"
    )
    initrd: Given[str | None, str | os.PathLike[str] | None] = option(
        help="initial ramdisk", default=None, check=check_path, word="--initrd", metavar="F", api="initrd_path"
    )
    cmdline: str | None = option(
        help=f"kernel command line, instead of {DEFAULT_CMDLINE!r}",
        default=None, word="--cmdline", metavar="S", api="boot_args",
    )  # fmt: skip
    append: str = option(help="added to the default command line", default="", word="--append", metavar="S")
    cpus: int = option(
        help=f"vCPUs, 1 to {MAX_VCPUS} (default: 1)",
        default=1, least=1, most=MAX_VCPUS, word="--cpus", metavar="N",
        api="vcpu_count", api_default=REQUIRED, api_bits=8,
    )  # fmt: skip
    smt: bool = option(help="two vCPUs make a core", default=False, api="smt")
    cpu_template: CpuTemplate | None = option(
        help="what CPUID and MSRs are to be otherwise (vmm.CpuTemplate)", default=None
    )
    memory: Given[int, int | str] = option(
        help="guest RAM, such as 512M or 2G (default: 512M)",
        default=DEFAULT_MEMORY, check=_memory, word="--memory", metavar="SIZE",
        api="memory", api_bits=63, extension=True,
    )  # fmt: skip
    huge_pages: str | None = option(
        help="2M: guest RAM in huge pages that the host has set aside",
        default=None, choices={None: "None", "2M": "2M"}, api="huge_pages",
    )  # fmt: skip
    track_dirty_pages: bool = option(
        help="KVM notes the pages the guest writes", default=False, api="track_dirty_pages"
    )
    drives: Sequence[DriveConfig] = option(help="disks, in the order in which the guest finds them", default=())
    nets: Sequence[NetConfig] = option(
        help="network interfaces, in the order in which the guest finds them", default=()
    )
    vsock: VsockConfig | None = option(help="the socket device, or None", default=None)
    shares: Sequence[ShareConfig] = option(help="shared directories", default=())
    entropy: Given[EntropyConfig | None, EntropyConfig | bool | None] = option(
        help="give the guest random numbers of the host",
        default=None, check=_entropy, word="--rng",
    )  # fmt: skip
    balloon: BalloonConfig | None = option(help="the memory balloon, or None", default=None)
    mmds: MmdsConfig | None = option(help="how the guest reaches the metadata service; None: not at all", default=None)
    virtio_console: bool = option(
        help="the console is /dev/hvc0, faster than the serial port",
        default=False, word="--virtio-console", api="virtio_console", extension=True,
    )  # fmt: skip
    poll_us: int = option(
        help="most microseconds that an idle device looks for work before it sleeps; 0: none (default: 5)",
        default=5, least=0, most=MAX_POLL_US, word="--poll", metavar="US", api="poll_us", api_bits=32, extension=True,
    )  # fmt: skip
    console: str = option(
        help="the console: stdio; unix:PATH, a socket for pyvmm attach; file:PATH, its output alone; none; or raw, "
        "which is stdio without the escape key: its unread output is lost (default: stdio; of the library: none)",
        default="none", check=_console, word="--console", metavar="WHERE",
        api="console", api_means="raw", extension=True,
    )  # fmt: skip
    console_rate_limiter: RateLimiterConfig | None = option(
        help="of the bytes of its output: what is too much is lost; None: no limit", default=None
    )
    keyboard: bool = option(
        help="ACPI tells the guest of its keyboard, for Machine.send_ctrl_alt_del; a driver for it costs time",
        default=False,
    )  # fmt: skip
    boot_timer: bool = option(
        help="a byte 123 at 0xd0000000 logs how long the guest took; devices are one window further up", default=False
    )
    kvm: Given[str, str | os.PathLike[str]] = option(
        help="the KVM device (default: /dev/kvm)", default="/dev/kvm", word="--kvm", metavar="PATH", check=check_path
    )
    exit_port: int | None = option(
        help="port of the exit device, or None for no such device", default=DEFAULT_EXIT_PORT,
        least=0, most=MAX_EXIT_PORT, api="exit_port", api_means=None, api_bits=16, nullable=True, extension=True,
    )  # fmt: skip
    protocol: str = option(
        help="boot protocol: linux64, pvh or auto (default: auto)", default="auto",
        choices=("auto", "linux64", "pvh"), word="--protocol", metavar="P", api="protocol", extension=True,
    )  # fmt: skip
    unpack: str = option(
        help="unpack a bzImage on the host: always, never, or auto: if it is faster (default)", default="auto",
        choices=("auto", "always", "never"), word="--unpack", metavar="WHEN", api="unpack", extension=True,
    )  # fmt: skip

    @classmethod
    def from_settings(cls, kernel: str | os.PathLike[str] | None, settings: Mapping[str, Any]) -> VmConfig:
        """Make a configuration of named parameters. If `kernel` is None, it must be one of them.

        :raises ConfigError: a value out of its range
        :raises TypeError: an unknown parameter, or no kernel
        """
        for name in settings:
            if name not in cls.OPTIONS:
                raise TypeError(f"Machine has no parameter {name!r}{did_you_mean(name, cls.OPTIONS)}")
        if kernel is None and "kernel" not in settings:
            raise TypeError("Machine needs a kernel: its path, or a VmConfig")
        return cls(**settings) if kernel is None else cls(kernel, **settings)

    def shown(self, name: str, value: object) -> str:
        """A value of the parameter `name` as Python code; memory has its unit."""
        return repr(size_text(value)) if name == "memory" and isinstance(value, int) else repr(value)

    def _check(self) -> None:
        if self.smt and self.cpus > 1 and self.cpus % 2:
            raise ConfigError("cpus", self.cpus, "must be 1 or an even number with smt")
        roots = [drive.root for drive in self.drives] + [share.root for share in self.shares]
        if sum(roots) > 1:
            raise ConfigError("drives", "", "only one can be the root device")
        interfaces = [net.id or f"eth{number}" for number, net in enumerate(self.nets)]
        if self.mmds and (unknown := [name for name in self.mmds.interfaces if name not in interfaces]):
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
        """The words about the root device for the command line; ``""`` if it already names a root."""
        if self.cmdline is not None or Cmdline(self.append).has("root"):
            return ""
        for number, drive in enumerate(self.drives):
            if drive.root:
                return f"root=/dev/vd{chr(ord('a') + number)} {'ro' if drive.read_only else 'rw'}"
        for share in self.shares:
            if share.root:
                return f"{parameter('root', share.tag)} rootfstype=virtiofs {'ro' if share.read_only else 'rw'}"
        return ""

    @property
    def full_cmdline(self) -> str:
        """The command line of the guest's kernel, without the words that the machine adds about its own devices."""
        return self.cmdline_with(self.root_parameters)

    def cmdline_with(self, root: str) -> str:
        """The same with other words about the root device, or ``""``, in the place of ``root_parameters``."""
        default = DEFAULT_CMDLINE.replace("ttyS0", "hvc0") if self.virtio_console else DEFAULT_CMDLINE
        line = Cmdline(default if self.cmdline is None else self.cmdline)
        line.append(root)
        line.append(self.append)
        return str(line)
