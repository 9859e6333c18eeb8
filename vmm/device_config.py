# SPDX-License-Identifier: Apache-2.0
"""What a device of a VM is to be: typed, checked when it is made, one shape for command line, library and API.

Plain classes with slots: a data class library costs more to import than this whole VMM takes to start.
"""

from __future__ import annotations

import os

from vmm.errors import ConfigError
from vmm.options import parse_count, parse_options, parse_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, Self

MAX_QUEUES = 8
MAX_FS_THREADS = 32
# Those below are reserved (virtio 1.2 §5.10.4), and so are all ones, which Kata gives nevertheless.
MIN_CID = 3
MAX_CID = 0xFFFF_FFFF
MAX_UDS_PATH = 107  # sockaddr_un, less its final NUL
DEFAULT_MMDS_ADDRESS = "169.254.169.254"


def check_names(**names: str | None) -> None:
    """Refuse names of files and interfaces that the kernel would read to their middle.

    :raises ConfigError: one has a NUL in it
    """
    for field, name in names.items():
        if name is not None and "\0" in name:
            raise ConfigError(field, repr(name), "must have no NUL in it")


class Config:
    """Prints as the call that makes it again; equal to another of the same values. Its slots are its parameters."""

    __slots__: tuple[str, ...] = ()
    __hash__ = None  # type: ignore[assignment]  # it can be changed

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in self.__slots__)

    def __repr__(self) -> str:
        make = type(self).__init__
        code = make.__code__
        names = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
        given = make.__defaults__ or ()
        defaults = dict(zip(code.co_varnames[code.co_argcount - len(given) : code.co_argcount], given, strict=True))
        defaults |= make.__kwdefaults__ or {}
        words = []
        for name in names:
            value = getattr(self, name)
            if name not in defaults:
                words.append(self._word(name, value))
            elif value != defaults[name]:
                words.append(f"{name}={self._word(name, value)}")
        return f"{type(self).__name__}({', '.join(words)})"

    def _word(self, name: str, value: object) -> str:
        return repr(value)

    def replaced(self, **changes: Any) -> Self:
        """The same with other values for some parameters, which are checked."""
        return type(self)(**{name: getattr(self, name) for name in self.__slots__} | changes)


class RateLimiterConfig(Config):
    """Token buckets, as Firecracker's API has them: ``(size, one_time_burst, refill_time)``, the last in milliseconds.

    :param bandwidth: in bytes; None: no limit
    :param ops: in operations; None: no limit
    :raises ConfigError: a number below 0, or above 2^63 - 1
    """

    __slots__ = ("bandwidth", "ops")

    def __init__(self, bandwidth: tuple[int, int, int] | None = None, ops: tuple[int, int, int] | None = None) -> None:
        for field, bucket in (("bandwidth", bandwidth), ("ops", ops)):
            if bucket is not None and not all(0 <= value < 1 << 63 for value in bucket):
                raise ConfigError(f"rate_limiter.{field}", bucket, "must have three numbers from 0 to 2^63 - 1")
        self.bandwidth = bandwidth
        self.ops = ops

    @property
    def limits(self) -> bool:
        """Whether there is any limit; a size or a time of 0 is none."""
        return any(bucket is not None and bucket[0] and bucket[2] for bucket in (self.bandwidth, self.ops))

    @classmethod
    def per_second(cls, bps: str | None, iops: str | None) -> RateLimiterConfig | None:
        """From the words ``bps=`` (bytes, with K, M, G) and ``iops=``: steady, in buckets of a tenth of a second.

        :raises ConfigError: not a number from 10
        """
        buckets: list[tuple[int, int, int] | None] = []
        for field, text in (("bps", bps), ("iops", iops)):
            value = None if text is None else parse_size(field, text)
            if value is not None and value < 10:
                raise ConfigError(field, text, "must be a number of at least 10, optionally with K, M or G")
            buckets.append(None if value is None else (value // 10, 0, 100))
        return None if buckets == [None, None] else cls(*buckets)


class DriveConfig(Config):
    """One disk.

    :param path_on_host: a raw image, a block device or a qcow2 image
    :param is_read_only: the guest cannot write it
    :param is_root_device: the guest's root file system is on it
    :param drive_id: its name in messages and in the API; made up from its place if left out
    :param queues: virtqueues, each with a thread of its own
    :param io_engine: ``Sync``, ``Async`` (io_uring), or None: what suits the file
    :param direct: open it with O_DIRECT, past the host's page cache
    :param cache_type: ``Writeback``: a flush of the guest's reaches the disk; ``Unsafe``: it does not
    :param rate_limiter: None: no limit
    :param image_format: ``raw``, ``qcow2``, or None: raw, unless it looks like another format, which is refused
    :param backing_file: of a qcow2 image: the file that it is a change of, which is read; without it, an image that
        names one is refused
    :param backing_format: of the backing file: ``raw``, which None means, or ``qcow2``
    :param any_size: an empty file is a disk, and one that is no multiple of 512 bytes long one without its last bytes:
        a runtime's placeholders, which are replaced by real disks while the VM runs
    """

    __slots__ = (
        "any_size", "backing_file", "backing_format", "cache_type", "direct", "drive_id", "image_format", "io_engine",
        "is_read_only", "is_root_device", "path_on_host", "queues", "rate_limiter",
    )  # fmt: skip

    def __init__(
        self,
        path_on_host: str,
        *,
        is_read_only: bool = False,
        is_root_device: bool = False,
        drive_id: str | None = None,
        queues: int = 1,
        io_engine: str | None = None,
        direct: bool = False,
        cache_type: str = "Writeback",
        rate_limiter: RateLimiterConfig | None = None,
        image_format: str | None = None,
        backing_file: str | None = None,
        backing_format: str | None = None,
        any_size: bool = False,
    ) -> None:
        if not path_on_host:
            raise ConfigError("disk", "", "the path is empty")
        if not 1 <= queues <= MAX_QUEUES:
            raise ConfigError("disk queues", queues, f"must be 1 to {MAX_QUEUES}")
        if io_engine not in (None, "Sync", "Async"):
            raise ConfigError("io_engine", io_engine, "must be Sync or Async")
        if cache_type not in ("Writeback", "Unsafe"):
            raise ConfigError("cache_type", cache_type, "must be Writeback or Unsafe")
        if image_format not in (None, "raw", "qcow2"):
            raise ConfigError("format", image_format, "must be raw or qcow2")
        if backing_format not in (None, "raw", "qcow2"):
            raise ConfigError("backing_format", backing_format, "must be raw or qcow2")
        if backing_file is not None and image_format != "qcow2":
            raise ConfigError("backing", backing_file, "is only for a qcow2 image (format=qcow2)")
        if backing_format is not None and backing_file is None:
            raise ConfigError(
                "backing_format", backing_format, "is only for an image with a backing file (backing=FILE)"
            )
        self.path_on_host = os.fspath(path_on_host)
        check_names(path_on_host=self.path_on_host, backing_file=backing_file)
        self.is_read_only = is_read_only
        self.is_root_device = is_root_device
        self.drive_id = drive_id
        self.queues = queues
        self.io_engine = io_engine
        self.direct = direct
        self.cache_type = cache_type
        self.rate_limiter = rate_limiter
        self.image_format = image_format
        self.backing_file = backing_file
        self.backing_format = backing_format
        self.any_size = any_size

    @classmethod
    def parse(cls, text: str) -> DriveConfig:
        """From ``PATH[,ro][,direct]`` and, each with a value, ``id``, ``queues``, ``engine`` and the other keys below.

        :raises ConfigError: it is something else
        """
        keys = ("id", "queues", "engine", "cache", "bps", "iops", "format", "backing", "backing_format")
        path, found = parse_options("--disk", text, ("ro", "direct"), keys, first=True)
        engine, cache = found.get("engine"), found.get("cache", "writeback")
        if engine not in (None, "sync", "io_uring"):
            raise ConfigError("engine", engine, "must be io_uring or sync")
        if cache not in ("writeback", "unsafe"):
            raise ConfigError("cache", cache, "must be writeback or unsafe")
        return cls(
            path,
            is_read_only="ro" in found,
            drive_id=found.get("id"),
            queues=parse_count("queues", found.get("queues", "1"), 1, MAX_QUEUES),
            io_engine={None: None, "sync": "Sync", "io_uring": "Async"}[engine],
            direct="direct" in found,
            cache_type=cache.capitalize(),
            rate_limiter=RateLimiterConfig.per_second(found.get("bps"), found.get("iops")),
            image_format=found.get("format"),
            backing_file=found.get("backing"),
            backing_format=found.get("backing_format"),
        )


class NetConfig(Config):
    """One network interface.

    :param host_dev_name: of a tap that is there; for mode ``auto`` of the one to be made, or None for ``pyvmmN``
    :param mode: ``tap``; ``auto``: a tap of our own, gone with the VM; ``user``: passt, without privileges; ``fd``
    :param fd: for mode ``fd``: an open tap, owned by the VM from here on
    :param guest_mac: as ``06:00:ac:10:00:02``; None: one of ours, the same each time for the same tap
    :param queues: pairs of virtqueues, each pair with a thread of its own
    :param mtu: in bytes, told to the guest, and set on a tap of our own; None: the guest's own default
    :param pcap: path of a file that gets every frame, both ways
    :param address: IPv4 of the host's side of a tap of our own, as ``10.0.0.1/24``
    :param nat: let the guest out by the host's address; needs `address`
    :param loopback: for mode ``user``: the gateway's address is the host's loopback, with all that listens there
    :param iface_id: its name in messages and in the API; made up from its place if left out
    :param rx_rate_limiter: of what the guest receives; None: no limit
    :param tx_rate_limiter: of what the guest sends; None: no limit
    :raises ConfigError: a value out of its range, or one that does not go with the mode
    """

    __slots__ = (
        "address", "fd", "guest_mac", "host_dev_name", "iface_id", "loopback", "mode", "mtu", "nat", "pcap", "queues",
        "rx_rate_limiter", "tx_rate_limiter",
    )  # fmt: skip

    def __init__(
        self,
        host_dev_name: str | None = None,
        *,
        mode: str = "tap",
        fd: int | None = None,
        guest_mac: str | None = None,
        queues: int = 1,
        mtu: int | None = None,
        pcap: str | None = None,
        address: str | None = None,
        nat: bool = False,
        loopback: bool = False,
        iface_id: str | None = None,
        rx_rate_limiter: RateLimiterConfig | None = None,
        tx_rate_limiter: RateLimiterConfig | None = None,
    ) -> None:
        if mode not in ("tap", "auto", "user", "fd"):
            raise ConfigError("net mode", mode, "must be tap, auto, user or fd")
        if mode == "tap" and not host_dev_name:
            raise ConfigError("host_dev_name", host_dev_name, "must be the name of a tap")
        if loopback and mode != "user":
            raise ConfigError("loopback", mode, "is only for the mode user")
        if (mode == "fd") != (fd is not None):
            raise ConfigError("net fd", fd, "is only for the mode fd")
        if not 1 <= queues <= MAX_QUEUES:
            raise ConfigError("net queues", queues, f"must be 1 to {MAX_QUEUES}")
        if queues > 1 and mode in ("user", "fd"):
            raise ConfigError("net queues", queues, f"must be 1 for the mode {mode}")
        if mtu is not None and not 68 <= mtu <= 65535:
            raise ConfigError("mtu", mtu, "must be 68 to 65535 bytes")
        if mode != "auto" and (address is not None or nat):
            raise ConfigError(
                "net addr", address, "and nat are only for the mode auto: an existing tap is left as it is"
            )
        if nat and address is None:
            raise ConfigError("nat", True, "needs addr=, the host's side of the guest's network")
        check_names(host_dev_name=host_dev_name, pcap=pcap)
        self.host_dev_name = host_dev_name
        self.mode = mode
        self.fd = fd
        self.guest_mac = guest_mac
        self.queues = queues
        self.mtu = mtu
        self.pcap = pcap
        self.address = address
        self.nat = nat
        self.loopback = loopback
        self.iface_id = iface_id
        self.rx_rate_limiter = rx_rate_limiter
        self.tx_rate_limiter = tx_rate_limiter

    @classmethod
    def parse(cls, text: str) -> NetConfig:
        """From ``tap=NAME|auto|user|fd=N[,nat][,loopback]`` and the keys below, each with a value.

        :raises ConfigError: it is something else
        """
        keys = ("tap", "fd", "mac", "queues", "mtu", "pcap", "addr", "id", "rx_bps", "tx_bps")
        _, found = parse_options("--net", text, ("auto", "user", "nat", "loopback"), keys)
        modes = [mode for mode in ("tap", "auto", "user", "fd") if mode in found]
        if len(modes) != 1:
            raise ConfigError("--net", text, "must have one of tap=NAME, auto, user and fd=N")
        return cls(
            found.get("tap"),
            mode=modes[0],
            fd=parse_count("fd", found["fd"], 0, 1 << 20) if "fd" in found else None,
            guest_mac=found.get("mac"),
            queues=parse_count("queues", found.get("queues", "1"), 1, MAX_QUEUES),
            mtu=parse_count("mtu", found["mtu"], 68, 65535) if "mtu" in found else None,
            pcap=found.get("pcap"),
            address=found.get("addr"),
            nat="nat" in found,
            loopback="loopback" in found,
            iface_id=found.get("id"),
            rx_rate_limiter=RateLimiterConfig.per_second(found.get("rx_bps"), None),
            tx_rate_limiter=RateLimiterConfig.per_second(found.get("tx_bps"), None),
        )


class VsockConfig(Config):
    """The socket device.

    :param guest_cid: of the guest, 3 to 2^32 - 1
    :param uds_path: the unix socket that host programs connect to; guest connections go to ``PATH_PORT``
    :param vsock_id: its name in the API, where it means nothing
    :raises ConfigError: a reserved CID, or a path that no unix socket can have
    """

    __slots__ = ("guest_cid", "uds_path", "vsock_id")

    def __init__(self, guest_cid: int, uds_path: str, *, vsock_id: str | None = None) -> None:
        if not MIN_CID <= guest_cid <= MAX_CID:
            raise ConfigError("guest_cid", guest_cid, f"must be a number from {MIN_CID} to {MAX_CID}")
        if not uds_path or "\0" in uds_path:
            raise ConfigError("uds_path", repr(uds_path), "must be the path of a unix socket")
        if len(os.fsencode(uds_path)) > MAX_UDS_PATH:
            raise ConfigError("uds_path", uds_path, f"must be at most {MAX_UDS_PATH} bytes long")
        self.guest_cid = guest_cid
        self.uds_path = os.fspath(uds_path)
        self.vsock_id = vsock_id

    @classmethod
    def parse(cls, text: str) -> VsockConfig:
        """From ``cid=N,uds=PATH``.

        :raises ConfigError: it is something else
        """
        _, found = parse_options("--vsock", text, (), ("cid", "uds"))
        for key in ("cid", "uds"):
            if key not in found:
                raise ConfigError("--vsock", text, f"lacks {key}=; give cid=N,uds=PATH")
        return cls(parse_count("cid", found["cid"], MIN_CID, MAX_CID), found["uds"])


class FsConfig(Config):
    """One shared directory.

    :param tag: the name by which the guest mounts it, 1 to 36 bytes
    :param shared_dir: the directory
    :param read_only: the guest cannot change anything
    :param cache_policy: ``auto``, ``always`` or ``none``
    :param submounts: what is mounted below the directory is shown, too
    :param dax: bytes of the DAX window, a multiple of 2 MiB; 0: none
    :param threads: request queues, each with a thread
    :param squash: (uid, gid) of every access, or None
    :param is_root_device: the guest's root file system
    :param rate_limiter: None: no limit
    :raises ConfigError: a value out of its range
    """

    __slots__ = (
        "cache_policy", "dax", "is_root_device", "rate_limiter", "read_only", "shared_dir", "squash", "submounts",
        "tag", "threads",
    )  # fmt: skip

    def __init__(
        self,
        tag: str,
        shared_dir: str,
        *,
        read_only: bool = False,
        cache_policy: str = "auto",
        submounts: bool = False,
        dax: int = 0,
        threads: int = 1,
        squash: tuple[int, int] | None = None,
        is_root_device: bool = False,
        rate_limiter: RateLimiterConfig | None = None,
    ) -> None:
        if not shared_dir:
            raise ConfigError("share", shared_dir, "the path of the directory is empty")
        # The tag is a word of the kernel's command line where the share is the root file system.
        if not 0 < len(tag.encode()) <= 36 or not tag.isprintable() or " " in tag:
            raise ConfigError("share tag", tag, "must be 1 to 36 bytes without spaces")
        if cache_policy not in ("auto", "always", "none"):
            raise ConfigError("share cache", cache_policy, "must be auto, always or none")
        if dax < 0 or dax % (2 << 20):
            raise ConfigError("share dax", dax, "bytes must be a multiple of 2 MiB")
        if not 1 <= threads <= MAX_FS_THREADS:
            raise ConfigError("share threads", threads, f"must be 1 to {MAX_FS_THREADS}")
        if squash is not None and not all(0 <= number < (1 << 32) - 1 for number in squash):
            raise ConfigError("share squash", squash, "must be a user and a group number")
        if dax and rate_limiter is not None and rate_limiter.limits:
            raise ConfigError("share dax", dax, "and rate limits exclude one another: DAX accesses are not counted")
        self.tag = tag
        self.shared_dir = os.fspath(shared_dir)
        check_names(shared_dir=self.shared_dir)
        self.read_only = read_only
        self.cache_policy = cache_policy
        self.submounts = submounts
        self.dax = dax
        self.threads = threads
        self.squash = squash
        self.is_root_device = is_root_device
        self.rate_limiter = rate_limiter

    @classmethod
    def parse(cls, text: str, *, is_root_device: bool = False) -> FsConfig:
        """From ``TAG=DIR[,ro][,submounts][,cache=][,dax=][,threads=][,squash=UID:GID][,bps=][,iops=]``.

        :raises ConfigError: it is something else
        """
        keys = ("cache", "dax", "threads", "squash", "bps", "iops")
        first, found = parse_options("--share", text, ("ro", "submounts"), keys, first=True)
        tag, equals, path = first.partition("=")
        if not equals:
            raise ConfigError("--share", text, "must begin with TAG=DIRECTORY")
        squash = None
        if "squash" in found:
            uid, _, gid = found["squash"].partition(":")
            most = (1 << 32) - 2
            squash = parse_count("squash", uid, 0, most), parse_count("squash", gid, 0, most)
        return cls(
            tag,
            path,
            read_only="ro" in found,
            cache_policy=found.get("cache", "auto"),
            submounts="submounts" in found,
            dax=parse_size("dax", found.get("dax", "0")),
            threads=parse_count("threads", found.get("threads", "1"), 1, MAX_FS_THREADS),
            squash=squash,
            is_root_device=is_root_device,
            rate_limiter=RateLimiterConfig.per_second(found.get("bps"), found.get("iops")),
        )


class BalloonConfig(Config):
    """The memory balloon.

    :param amount_mib: what the guest is asked to give back
    :param deflate_on_oom: the guest may take it again when it runs out of memory
    :param stats_polling_interval_s: seconds between two readings of the guest's statistics; 0: none
    :param free_page_reporting: the guest gives back what it does not use, by itself
    """

    __slots__ = ("amount_mib", "deflate_on_oom", "free_page_reporting", "stats_polling_interval_s")

    def __init__(
        self,
        amount_mib: int = 0,
        *,
        deflate_on_oom: bool = True,
        stats_polling_interval_s: int = 0,
        free_page_reporting: bool = True,
    ) -> None:
        if amount_mib < 0:
            raise ConfigError("balloon amount_mib", amount_mib, "must be 0 or more")
        if not 0 <= stats_polling_interval_s < 1 << 16:
            raise ConfigError("stats_polling_interval_s", stats_polling_interval_s, "must be 0 to 65535 seconds")
        self.amount_mib = amount_mib
        self.deflate_on_oom = deflate_on_oom
        self.stats_polling_interval_s = stats_polling_interval_s
        self.free_page_reporting = free_page_reporting

    @classmethod
    def parse(cls, text: str) -> BalloonConfig:
        """From ``[MIB][,stats=SECONDS][,no-oom][,no-reporting]``.

        :raises ConfigError: it is something else
        """
        amount, found = parse_options("--balloon", text, ("no-oom", "no-reporting"), ("stats",), first=True)
        return cls(
            parse_count("--balloon", amount or "0", 0, 1 << 30),
            deflate_on_oom="no-oom" not in found,
            stats_polling_interval_s=parse_count("stats", found.get("stats", "0"), 0, 65535),
            free_page_reporting="no-reporting" not in found,
        )


class EntropyConfig(Config):
    """The host's random numbers for the guest.

    :param rate_limiter: None: no limit
    """

    __slots__ = ("rate_limiter",)

    def __init__(self, rate_limiter: RateLimiterConfig | None = None) -> None:
        self.rate_limiter = rate_limiter


class MmdsConfig(Config):
    """How the guest reaches the metadata service.

    :param network_interfaces: ``iface_id`` of those by which it does
    :param version: ``V1``: whoever asks is told; ``V2``: whoever has asked for a token before
    :param ipv4_address: of the service, 169.254.1.0 to 169.254.254.255
    :param imds_compat: the guest gets text, whatever it says it accepts
    :raises ConfigError: no interface, or a value out of its range
    """

    __slots__ = ("imds_compat", "ipv4_address", "network_interfaces", "version")

    def __init__(
        self,
        network_interfaces: Sequence[str],
        *,
        version: str = "V1",
        ipv4_address: str = DEFAULT_MMDS_ADDRESS,
        imds_compat: bool = False,
    ) -> None:
        if not network_interfaces:
            problem = "The list of network interface IDs that allow forwarding MMDS requests is empty."
            raise ConfigError("network_interfaces", "", problem)
        if version not in ("V1", "V2"):
            raise ConfigError("mmds version", version, "must be V1 or V2")
        parts = ipv4_address.split(".")
        plain = all(part.isascii() and part.isdigit() and len(part) < 4 and str(int(part)) == part for part in parts)
        numbers = [int(part) for part in parts] if plain and len(parts) == 4 else [0] * 4
        # Source: RFC 3927 §2.1: the first and the last 256 are reserved.
        if numbers[:2] != [169, 254] or not 1 <= numbers[2] <= 254 or numbers[3] > 255:
            raise ConfigError("ipv4_address", ipv4_address, "The MMDS IPv4 address is not link local.")
        self.network_interfaces = tuple(network_interfaces)
        self.version = version
        self.ipv4_address = ipv4_address
        self.imds_compat = imds_compat
