# SPDX-License-Identifier: Apache-2.0
"""The bodies that ``vmm.api.types`` makes, for type checkers; ``python -m tools.declared`` writes it."""

from typing import Literal

from msgspec import UNSET, UnsetType

from vmm.api.types import Body, RateLimiter


class Drive(Body, kw_only=True):
    """See ``vmm.config``."""

    drive_id: str
    partuuid: str | None = None
    is_root_device: bool
    cache_type: Literal["Unsafe", "Writeback"] = "Unsafe"
    is_read_only: bool | None = None
    path_on_host: str | None = None
    rate_limiter: RateLimiter | None = None
    io_engine: Literal["Sync", "Async"] | None = None
    socket: str | None = None
    num_queues: int | UnsetType = UNSET
    is_direct: bool | UnsetType = UNSET
    image_format: Literal["raw", "qcow2"] | UnsetType = UNSET
    backing_file: str | UnsetType = UNSET
    backing_format: Literal["raw", "qcow2"] | UnsetType = UNSET


class NetworkInterface(Body, kw_only=True):
    """See ``vmm.config``."""

    iface_id: str
    host_dev_name: str | UnsetType = UNSET
    guest_mac: str | None = None
    rx_rate_limiter: RateLimiter | None = None
    tx_rate_limiter: RateLimiter | None = None
    mode: Literal["tap", "auto", "user"] | UnsetType = UNSET
    num_queues: int | UnsetType = UNSET
    mtu: int | UnsetType = UNSET
    pcap: str | UnsetType = UNSET
    address: str | UnsetType = UNSET
    nat: bool | UnsetType = UNSET
    loopback: bool | UnsetType = UNSET


class SharedFs(Body, kw_only=True):
    """See ``vmm.config``."""

    tag: str
    shared_dir: str
    read_only: bool = False
    submounts: bool = False
    cache_policy: Literal["auto", "always", "none"] = "auto"
    cache_size: int = 0
    num_queues: int = 1
    squash: tuple[int, int] | None = None
    is_root_device: bool = False
    rate_limiter: RateLimiter | None = None


class Vsock(Body, kw_only=True):
    """See ``vmm.config``."""

    guest_cid: int
    uds_path: str
    vsock_id: str | UnsetType | None = UNSET


class Balloon(Body, kw_only=True):
    """See ``vmm.config``."""

    amount_mib: int
    deflate_on_oom: bool
    stats_polling_interval_s: int = 0
    free_page_reporting: bool | UnsetType = UNSET


class EntropyDevice(Body, kw_only=True):
    """See ``vmm.config``."""

    rate_limiter: RateLimiter | None = None


class MmdsConfig(Body, kw_only=True):
    """See ``vmm.config``."""

    version: Literal["V1", "V2"] = "V1"
    network_interfaces: list[str]
    ipv4_address: str | None = "169.254.169.254"


class Host(Body, kw_only=True):
    """See ``vmm.config``."""

    memory: int | UnsetType = UNSET
    virtio_console: bool | UnsetType = UNSET
    poll_us: int | UnsetType = UNSET
    console: str | UnsetType = UNSET
    exit_port: int | UnsetType | None = UNSET
    protocol: str | UnsetType = UNSET
    unpack: str | UnsetType = UNSET
