# SPDX-License-Identifier: Apache-2.0
"""The configuration of each device, checked when it is made: one for the command line, the library and the API."""

from __future__ import annotations

import os

from vmm.config import check_names, check_path, parse_count, parse_size
from vmm.config.option import REQUIRED, Config, option
from vmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, Self

    from vmm.config.typed import Given

MAX_QUEUES = 8
MAX_FS_THREADS = 32
# Those below are reserved (virtio 1.2 §5.10.4), and so are all ones, which Kata gives nevertheless.
MIN_CID = 3
MAX_CID = 0xFFFF_FFFF
MAX_UDS_PATH = 107  # sockaddr_un, less its final NUL
_BPS, _IOPS = "limit of bytes a second, with K, M or G", "limit of operations a second"


def _name(field: str, name: str) -> str:
    check_names(**{field: name})
    return name


def _bucket(field: str, bucket: tuple[int, int, int]) -> tuple[int, int, int]:
    if not all(0 <= value < 1 << 63 for value in bucket):
        raise ConfigError(field, bucket, "must have three numbers from 0 to 2^63 - 1")
    return bucket


class RateLimiterConfig(Config, title="rate_limiter"):
    """Token buckets as in Firecracker's API: ``(size, one_time_burst, refill_time)``, with a time in milliseconds."""

    bandwidth: tuple[int, int, int] | None = option(
        help="in bytes; None: no limit", default=None, kw_only=False, field="rate_limiter.bandwidth", check=_bucket
    )
    ops: tuple[int, int, int] | None = option(
        help="in operations; None: no limit", default=None, kw_only=False, field="rate_limiter.ops", check=_bucket
    )

    @property
    def limits(self) -> bool:
        """Whether there is any limit. A size or a time of 0 means no limit."""
        return any(bucket is not None and bucket[0] and bucket[2] for bucket in (self.bandwidth, self.ops))

    @classmethod
    def per_second(cls, bps: str | None, iops: str | None = None) -> RateLimiterConfig | None:
        """Parse the words ``bps=`` (bytes, with K, M, G) and ``iops=`` into buckets of a tenth of a second.

        :raises ConfigError: the value is not a number of at least 10
        """
        buckets: list[tuple[int, int, int] | None] = []
        for field, text in (("bps", bps), ("iops", iops)):
            value = None if text is None else parse_size(field, text)
            if value is not None and value < 10:
                raise ConfigError(field, text, "must be a number of at least 10, optionally with K, M or G")
            buckets.append(None if value is None else (value // 10, 0, 100))
        return None if buckets == [None, None] else cls(*buckets)


class DriveConfig(Config, title="disk", usage="PATH[,ro][,...]"):
    """One disk."""

    path: Given[str, str | os.PathLike[str]] = option(
        help="a raw image, a block device or a qcow2 image; write a comma in the path twice",
        kw_only=False, word="PATH", check=check_path, api="path_on_host", api_default=None,
    )  # fmt: skip
    read_only: bool = option(
        help="the guest cannot write it", default=False, word="ro", api="is_read_only", api_default=None
    )
    root: bool = option(
        help="the guest's root file system is on it", default=False, api="is_root_device", api_default=REQUIRED
    )
    id: str | None = option(
        help="its name in messages and in the API (default: by its position); its first 20 bytes are its serial number",
        default=None, word="id=", api="drive_id", api_default=REQUIRED,
    )  # fmt: skip
    queues: int = option(
        help="virtqueues, 1 to 8, with at most as many threads as half of the CPUs (default: 1)",
        default=1, least=1, most=MAX_QUEUES, word="queues=", api="num_queues", extension=True,
    )  # fmt: skip
    engine: str | None = option(
        help="sync or io_uring (default: what suits the file)",
        default=None, choices={"sync": "Sync", "io_uring": "Async"}, word="engine=",
        api="io_engine", api_default=None, api_means="sync",
    )  # fmt: skip
    direct: bool = option(
        help="bypass the host's page cache (O_DIRECT)", default=False, word="direct", api="is_direct", extension=True
    )
    cache: str = option(
        help="writeback: a flush of the guest reaches the disk (default); unsafe: it does not",
        default="writeback", choices={"unsafe": "Unsafe", "writeback": "Writeback"}, word="cache=",
        api="cache_type", api_default="unsafe",
    )  # fmt: skip
    rate_limiter: RateLimiterConfig | None = option(
        help="None: no limit", default=None, words={"bps=": _BPS, "iops=": _IOPS}, parse=RateLimiterConfig.per_second,
        api="rate_limiter", api_default=None,
    )  # fmt: skip
    format: str | None = option(
        help="raw or qcow2 (default: raw; an image that looks like another format is refused)",
        default=None, choices=("raw", "qcow2"), word="format=", api="image_format", api_means="raw", extension=True,
    )  # fmt: skip
    backing: Given[str | None, str | os.PathLike[str] | None] = option(
        help="the backing file of a qcow2 image; without this, an image that names one is refused",
        default=None, word="backing=", check=check_path, api="backing_file", extension=True,
    )  # fmt: skip
    backing_format: str | None = option(
        help="format of the backing file: raw (default) or qcow2",
        default=None, choices=("raw", "qcow2"), word="backing_format=", api="backing_format", extension=True,
    )  # fmt: skip
    any_size: bool = option(
        help="allow an empty file, and one that ends within a sector (those last bytes are left out): "
        "a runtime's placeholders, which are replaced by real disks while the VM runs",
        default=False, api_means=True,
    )  # fmt: skip

    def _check(self) -> None:
        if self.backing is not None and self.format != "qcow2":
            raise ConfigError("backing", self.backing, "is only for a qcow2 image (format=qcow2)")
        if self.backing_format is not None and self.backing is None:
            problem = "is only for an image with a backing file (backing=FILE)"
            raise ConfigError("backing_format", self.backing_format, problem)


def _allowed(field: str, words: Sequence[str]) -> tuple[str, ...]:
    from vmm.config.policy import rules

    rules(field, words)
    return tuple(words)


def _denied(field: str, words: Sequence[str]) -> tuple[str, ...]:
    from vmm.config.policy import rules

    if names := rules(field, words)[1]:
        raise ConfigError(field, names[0][0], "must be a network: a name that is not allowed is denied")
    return tuple(words)


class NetworkPolicy(Config, title="network policy"):
    """All that a guest may reach. A rule is a name such as ``pypi.org`` or ``*.pypi.org``, or a network such as
    ``10.1.0.0/16``. It may end in a port or ports: ``:443`` or ``:8000-8010``."""

    allow: Sequence[str] = option(
        help="names and networks that the guest may reach", default=(), kw_only=False, check=_allowed, api="allow"
    )
    deny: Sequence[str] = option(
        help="networks that the guest may not reach, even if allow= has them", default=(), check=_denied, api="deny"
    )

    @classmethod
    def of_words(cls, allow: str | None, deny: str | None) -> NetworkPolicy:
        """Parse the words ``allow=`` and ``deny=``, each a list of rules joined by +.

        :raises ConfigError: an invalid rule
        """
        return cls(allow.split("+") if allow else (), deny=deny.split("+") if deny else ())


class NetConfig(Config, title="net", usage="tap=NAME|auto|user[,...]"):
    """One network interface."""

    tap: str | None = option(
        help="a tap that exists already; for the mode auto the name of the new one (default: pyvmmN)",
        default=None, kw_only=False, check=_name, words={"tap=": "a tap that exists already"},
        api="host_dev_name", extension=True,
    )  # fmt: skip
    mode: str = option(
        help="tap; auto: a new tap, removed with the VM; user: passt, without privileges; fd: an open tap",
        default="tap", choices={"tap": "tap", "auto": "auto", "user": "user", "fd": ""},
        words={"auto": "a new tap, removed with the VM; needs CAP_NET_ADMIN", "user": "by passt, without privileges"},
        api="mode", extension=True,
    )  # fmt: skip
    fd: int | None = option(
        help="for the mode fd: an open tap, by its descriptor, owned by the VM from here on",
        default=None, least=0, most=1 << 20, words={"fd=": "an open tap, by its descriptor"},
    )  # fmt: skip
    mac: str | None = option(
        help="the guest's MAC address, such as 06:00:ac:10:00:02 (default: always the same for the same tap)",
        default=None, word="mac=", api="guest_mac", api_default=None,
    )  # fmt: skip
    queues: int = option(
        help="pairs of virtqueues, 1 to 8, with at most as many threads as half of the CPUs (default: 1)",
        default=1, least=1, most=MAX_QUEUES, word="queues=", api="num_queues", extension=True,
    )  # fmt: skip
    mtu: int | None = option(
        help="MTU in bytes, 68 to 65535, for the guest and for a new tap (default: the guest's own)",
        default=None, least=68, most=65535, word="mtu=", api="mtu", api_bits=16, extension=True,
    )  # fmt: skip
    pcap: Given[str | None, str | os.PathLike[str] | None] = option(
        help="a file that records every frame", default=None, word="pcap=", check=check_path, api="pcap", extension=True
    )
    address: str | None = option(
        help="the host's address on a new tap, such as 10.0.0.1/24",
        default=None, word="addr=", api="address", extension=True,
    )  # fmt: skip
    nat: bool = option(
        help="the host forwards for the guest; needs auto and addr=",
        default=False, word="nat", api="nat", extension=True,
    )  # fmt: skip
    loopback: bool = option(
        help="with user: the gateway's address reaches the host's loopback and everything that listens there",
        default=False, word="loopback", api="loopback", extension=True,
    )  # fmt: skip
    policy: NetworkPolicy | None = option(
        help="all that the guest may reach; None: everything, but with user not the host's loopback",
        default=None, parse=NetworkPolicy.of_words, api="policy", extension=True,
        words={
            "allow=": "the only names and networks that the guest may reach, joined by +",
            "deny=": "networks that the guest may not reach, even if allow= has them",
        },
    )  # fmt: skip
    id: str | None = option(
        help="its name in messages and in the API (default: by its position)",
        default=None, word="id=", api="iface_id", api_default=REQUIRED,
    )  # fmt: skip
    rx_rate_limiter: RateLimiterConfig | None = option(
        help="of what the guest receives; None: no limit", default=None, parse=RateLimiterConfig.per_second,
        words={"rx_bps=": "limit of bytes a second that the guest receives, with K, M or G"},
        api="rx_rate_limiter", api_default=None,
    )  # fmt: skip
    tx_rate_limiter: RateLimiterConfig | None = option(
        help="of what the guest sends; None: no limit", default=None, parse=RateLimiterConfig.per_second,
        words={"tx_bps=": "limit of bytes a second that the guest sends, with K, M or G"},
        api="tx_rate_limiter", api_default=None,
    )  # fmt: skip

    def _check(self) -> None:
        mode = self.mode
        if mode == "tap" and not self.tap:
            raise ConfigError("net tap", self.tap, "must be the name of a tap")
        if self.loopback and mode != "user":
            raise ConfigError("loopback", mode, "is only for the mode user")
        if self.policy is not None and (self.loopback or self.queues > 1):
            words = "loopback" if self.loopback else f"queues={self.queues}"
            raise ConfigError("net allow", words, "must be without loopback, and with one pair of queues")
        if (mode == "fd") != (self.fd is not None):
            raise ConfigError("net fd", self.fd, "is only for the mode fd")
        if self.queues > 1 and mode in ("user", "fd"):
            raise ConfigError("net queues", self.queues, f"must be 1 for the mode {mode}")
        if mode != "auto" and (self.address is not None or self.nat):
            problem = "and nat are only for the mode auto: an existing tap is left as it is"
            raise ConfigError("net addr", self.address, problem)
        if self.nat and self.address is None:
            raise ConfigError("nat", True, "needs addr=, the host's side of the guest's network")

    @classmethod
    def parse(cls, text: str, **values: Any) -> Self:
        """Parse ``tap=NAME|auto|user|fd=N[,nat][,loopback]`` and the other words of ``--net``."""
        modes = [word for word in cls.take(text)[1] if word in ("tap", "auto", "user", "fd")]
        if len(modes) != 1:
            raise ConfigError("--net", text, "must have one of tap=NAME, auto, user and fd=N")
        return super().parse(text, mode=modes[0], **values)


def _socket_path(field: str, path: str) -> str:
    path = check_path(field, path)
    if len(os.fsencode(path)) > MAX_UDS_PATH:
        raise ConfigError(field, path, f"must be at most {MAX_UDS_PATH} bytes long")
    return path


class VsockConfig(Config, title="vsock", usage="cid=N,uds=PATH"):
    """The socket device."""

    cid: int = option(
        help="the guest's CID, 3 or more",
        kw_only=False, least=MIN_CID, most=MAX_CID, word="cid=", api="guest_cid", api_bits=32,
    )  # fmt: skip
    path: str = option(
        help="the unix socket to which programs of the host connect (pyvmm vsock); the guest connects to PATH_PORT",
        kw_only=False, word="uds=", check=_socket_path, api="uds_path",
    )  # fmt: skip
    id: str | None = option(
        help="its name in the API, where it means nothing", default=None, api="vsock_id", nullable=True, extension=True
    )


def _tag(field: str, tag: str) -> str:
    # The tag is a word of the kernel's command line where the share is the root file system.
    if not 0 < len(tag.encode()) <= 36 or not tag.isprintable() or " " in tag:
        raise ConfigError(field, tag, "must be 1 to 36 bytes without spaces")
    return tag


def _window(field: str, size: int) -> int:
    if size < 0 or size % (2 << 20):
        raise ConfigError(field, size, "bytes must be a multiple of 2 MiB")
    return size


def _ids(field: str, ids: Sequence[int]) -> tuple[int, ...]:
    if not all(0 <= number < (1 << 32) - 1 for number in ids):
        raise ConfigError(field, ids, "must be a user and a group number")
    return tuple(ids)


def _parse_ids(text: str) -> tuple[int, int]:
    uid, _, gid = text.partition(":")
    most = (1 << 32) - 2
    return parse_count("squash", uid, 0, most), parse_count("squash", gid, 0, most)


class ShareConfig(Config, title="share", usage="TAG=DIR[,ro][,...]"):
    """One shared directory."""

    tag: str = option(
        help="the name by which the guest mounts it, 1 to 36 bytes", kw_only=False, check=_tag, field="share tag",
        words={"TAG=DIR": "the tag by which the guest mounts it, and the directory"}, api="tag",
    )  # fmt: skip
    path: Given[str, str | os.PathLike[str]] = option(
        help="the directory", kw_only=False, check=check_path, api="shared_dir"
    )
    read_only: bool = option(help="the guest cannot change anything", default=False, word="ro", api="read_only")
    submounts: bool = option(
        help="also show what is mounted below the directory", default=False, word="submounts", api="submounts"
    )
    cache: str = option(
        help="how long the guest trusts what it has read: auto (default), always or none",
        default="auto", choices=("auto", "always", "none"), word="cache=", api="cache_policy",
    )  # fmt: skip
    dax: int = option(
        help="size of the window into which files are mapped, a multiple of 2M (default: none)",
        default=0, check=_window, word="dax=", parse=lambda text: parse_size("dax", text),
        api="cache_size", api_bits=63,
    )  # fmt: skip
    threads: int = option(
        help="request queues, each with a thread, 1 to 32 (default: 1)",
        default=1, least=1, most=MAX_FS_THREADS, word="threads=", api="num_queues",
    )  # fmt: skip
    squash: tuple[int, int] | None = option(
        help="make every access as UID:GID", default=None, check=_ids, word="squash=", parse=_parse_ids,
        api="squash",
    )  # fmt: skip
    root: bool = option(help="the guest's root file system", default=False, api="is_root_device")
    rate_limiter: RateLimiterConfig | None = option(
        help="None: no limit", default=None, words={"bps=": _BPS, "iops=": _IOPS}, parse=RateLimiterConfig.per_second,
        api="rate_limiter",
    )  # fmt: skip

    def _check(self) -> None:
        if self.dax and self.rate_limiter is not None and self.rate_limiter.limits:
            raise ConfigError(
                "share dax", self.dax, "and rate limits exclude one another: DAX accesses are not counted"
            )

    @classmethod
    def parse(cls, text: str, **values: Any) -> Self:
        """Parse ``TAG=DIR`` and the other words of ``--share``."""
        tag, equals, path = cls.take(text)[0].partition("=")
        if not equals:
            raise ConfigError("--share", text, "must begin with TAG=DIRECTORY")
        return super().parse(text, tag=tag, path=path, **values)


class BalloonConfig(Config, title="balloon", usage="MIB[,...]"):
    """The memory balloon."""

    amount_mib: int = option(
        help="memory in MiB that the guest is asked to give back",
        default=0, kw_only=False, least=0, word="MIB", field="balloon amount_mib",
        api="amount_mib", api_default=REQUIRED, api_bits=32,
    )  # fmt: skip
    deflate_on_oom: bool = option(
        help="the guest may take memory back when it runs out", default=True,
        words={"no-oom": "the guest may not take memory back when it runs out"},
        api="deflate_on_oom", api_default=REQUIRED,
    )  # fmt: skip
    stats_interval_s: int = option(
        help="interval of the guest's statistics in seconds; 0: none",
        default=0, least=0, most=65535, word="stats=",
        api="stats_polling_interval_s", api_bits=16,
    )  # fmt: skip
    free_page_reporting: bool = option(
        help="the guest reports unused memory by itself, and the host takes it back", default=True,
        words={"no-reporting": "the guest does not report unused memory by itself"},
        api="free_page_reporting", api_means=False, extension=True,
    )  # fmt: skip


def check_amount(amount_mib: int, memory_mib: int) -> None:
    """Refuse a balloon that is larger than the guest's memory.

    :raises ConfigError: `amount_mib` is more than `memory_mib`
    """
    if amount_mib > memory_mib:
        raise ConfigError("balloon amount_mib", amount_mib, f"must be at most {memory_mib}, the guest's memory")


class EntropyConfig(Config, title="rng"):
    """The entropy device: random numbers of the host for the guest."""

    rate_limiter: RateLimiterConfig | None = option(
        help="None: no limit", default=None, kw_only=False, api="rate_limiter"
    )


def _names(field: str, names: Sequence[str]) -> tuple[str, ...]:
    if not names:
        problem = "The list of network interface IDs that allow forwarding MMDS requests is empty."
        raise ConfigError(field, "", problem)
    return tuple(names)


def _link_local(field: str, address: str) -> str:
    parts = address.split(".")
    plain = all(part.isascii() and part.isdigit() and len(part) < 4 and str(int(part)) == part for part in parts)
    numbers = [int(part) for part in parts] if plain and len(parts) == 4 else [0] * 4
    # Source: RFC 3927 §2.1: the first and the last 256 are reserved.
    if numbers[:2] != [169, 254] or not 1 <= numbers[2] <= 254 or numbers[3] > 255:
        raise ConfigError(field, address, "The MMDS IPv4 address is not link local.")
    return address


class MmdsConfig(Config, title="mmds"):
    """How the guest reaches the metadata service."""

    interfaces: Sequence[str] = option(
        help="the ids of the network interfaces by which it does", kw_only=False, check=_names,
        field="network_interfaces", api="network_interfaces",
    )  # fmt: skip
    version: str = option(
        help="V1: whoever asks is told; V2: whoever has asked for a token before",
        default="V1", choices=("V1", "V2"), api="version",
    )  # fmt: skip
    address: str = option(
        help="of the service, 169.254.1.0 to 169.254.254.255",
        default="169.254.169.254", check=_link_local, field="ipv4_address", api="ipv4_address", nullable=True,
    )  # fmt: skip
    imds_compat: bool = option(help="the guest gets text, whatever it says it accepts", default=False)


DEVICES = (DriveConfig, NetConfig, ShareConfig, VsockConfig, BalloonConfig, EntropyConfig, MmdsConfig)
