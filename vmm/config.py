# SPDX-License-Identifier: Apache-2.0
"""What a VM is to be: typed, checked when it is made, one shape for the command line, the library and the API.

Plain classes with slots: a data class library costs more to import than this whole VMM takes to start.
"""

from __future__ import annotations

import os

from vmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_VCPUS = 64
MIN_MEMORY = 1 << 20
DEFAULT_MEMORY = 512 << 20
DEFAULT_EXIT_PORT = 0xF4
# What a stock kernel needs to talk to us and to end: a console, a reset that we see, and no waiting after a panic.
DEFAULT_CMDLINE = "console=ttyS0 reboot=k panic=-1 i8042.noaux i8042.nomux i8042.dumbkbd"

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_size(field: str, text: str | int) -> int:
    """Bytes of a size as people write it: ``512M``, ``2G``, ``1.5GiB``, ``65536``.

    :param field: the option it came from, for the message
    :raises ConfigError: it is no size
    """
    allowed = "a size is a positive number with K, M, G or T, as 512M or 2G"
    if isinstance(text, int):
        return text
    number = text.strip().upper()
    for suffix in ("IB", "B"):
        number = number.removesuffix(suffix)
    unit = number[-1:] if number[-1:] in _UNITS else ""
    number = number[: len(number) - len(unit)].strip()
    whole, point, part = number.partition(".")
    # str.isdigit() takes other scripts' digits; int() would too, and a size in them is a typing mistake.
    if not whole.isascii() or not whole.isdigit() or (point and not (part.isascii() and part.isdigit())):
        raise ConfigError(field, text, allowed)
    if len(number) > 18:
        raise ConfigError(field, text, allowed)
    scale = 10 ** len(part)
    return int(int(whole + part) * _UNITS[unit] // scale)


class DriveConfig:
    """One disk.

    :param path_on_host: a raw image or a block device
    :param is_read_only: the guest cannot write it
    :param is_root_device: the guest's root file system is on it
    :param drive_id: its name in messages and in the API; made up from its place if left out
    """

    __slots__ = ("drive_id", "is_read_only", "is_root_device", "path_on_host")

    def __init__(
        self,
        path_on_host: str,
        *,
        is_read_only: bool = False,
        is_root_device: bool = False,
        drive_id: str | None = None,
    ) -> None:
        if not path_on_host:
            raise ConfigError("disk", "", "the path is empty")
        self.path_on_host = os.fspath(path_on_host)
        self.is_read_only = is_read_only
        self.is_root_device = is_root_device
        self.drive_id = drive_id

    @classmethod
    def parse(cls, text: str) -> DriveConfig:
        """From ``PATH[,ro]``. A comma in the path itself is written twice.

        :raises ConfigError: an option that is not known
        """
        path, *options = text.replace(",,", "\0").split(",")
        for option in options:
            if option != "ro":
                raise ConfigError("--disk", text, f"unknown option {option!r}; allowed: ro")
        return cls(path.replace("\0", ","), is_read_only="ro" in options)


class VmConfig:
    """A whole VM.

    :param kernel: path of a vmlinux or any PVH ELF, or a bzImage
    :param initrd: path of an initial ramdisk
    :param cmdline: the kernel's command line; None for ``DEFAULT_CMDLINE``
    :param append: added to the command line
    :param cpus: vCPUs, 1 to 64
    :param memory: bytes of guest RAM, or a size such as ``"512M"``
    :param drives: disks in the order in which the guest finds them
    :param console: where the serial port's output goes: ``"stdio"``, ``"file:PATH"`` or ``"none"``
    :param kvm: the KVM device
    :param exit_port: port of the exit device, or None for no such device
    :param protocol: boot protocol: ``"auto"``, ``"linux64"`` or ``"pvh"``
    :param unpack: unpack a bzImage on the host: ``"auto"``, ``"always"`` or ``"never"``
    :raises ConfigError: a value out of its range; names the field, the value and what is allowed
    """

    __slots__ = (
        "append", "cmdline", "console", "cpus", "drives", "exit_port", "initrd", "kernel", "kvm", "memory",
        "protocol", "unpack",
    )  # fmt: skip

    def __init__(
        self,
        kernel: str,
        *,
        initrd: str | None = None,
        cmdline: str | None = None,
        append: str = "",
        cpus: int = 1,
        memory: int | str = DEFAULT_MEMORY,
        drives: Sequence[DriveConfig] = (),
        console: str = "none",
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
        self.memory = parse_size("memory", memory)
        self.drives = tuple(drives)
        self.console = console
        self.kvm = kvm
        self.exit_port = exit_port
        self.protocol = protocol
        self.unpack = unpack
        self._check()

    def _check(self) -> None:
        if not 1 <= self.cpus <= MAX_VCPUS:
            raise ConfigError("cpus", self.cpus, f"must be 1 to {MAX_VCPUS}")
        host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if not MIN_MEMORY <= self.memory <= host:
            raise ConfigError("memory", self.memory, f"bytes must be {MIN_MEMORY} (1M) to {host} (all this host has)")
        # KVM's slots are whole pages.
        self.memory &= -4096
        if self.console not in ("stdio", "none") and not self.console.removeprefix("file:") != self.console:
            raise ConfigError("console", self.console, "must be stdio, none or file:PATH")
        if self.console == "file:":
            raise ConfigError("console", self.console, "the path is empty")
        for field, allowed in (("protocol", ("auto", "linux64", "pvh")), ("unpack", ("auto", "always", "never"))):
            if getattr(self, field) not in allowed:
                raise ConfigError(field, getattr(self, field), f"must be one of {', '.join(allowed)}")
        if sum(drive.is_root_device for drive in self.drives) > 1:
            raise ConfigError("drives", "", "only one can be the root device")

    @property
    def full_cmdline(self) -> str:
        """The command line as the guest's kernel gets it, but for what the machine adds about its own devices."""
        parts = [DEFAULT_CMDLINE if self.cmdline is None else self.cmdline]
        for place, drive in enumerate(self.drives):
            if drive.is_root_device and self.cmdline is None and "root=" not in self.append:
                parts.append(f"root=/dev/vd{chr(ord('a') + place)} {'ro' if drive.is_read_only else 'rw'}")
        return " ".join(part for part in (*parts, self.append) if part)
