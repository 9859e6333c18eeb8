# SPDX-License-Identifier: Apache-2.0
"""The bodies of the API, typed: what a request may hold, what an answer holds, one for the socket and the config file.

Names and defaults are those of Firecracker 1.12. Fields of ours are left out of an answer where nobody set them, so
that a configuration without them is one that Firecracker takes.

Those of the machine and its devices follow from the declarations in ``vmm.config``: ``python -m tools.declared``
writes them between the two comments that say so.

Annotations here are values, not text that msgspec would have to compile when a type is first used.

Source: the OpenAPI document of Firecracker 1.12.
"""

from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from vmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.config.cpu_template import CpuTemplate

U8 = Annotated[int, Meta(ge=0, le=(1 << 8) - 1)]
U16 = Annotated[int, Meta(ge=0, le=(1 << 16) - 1)]
U32 = Annotated[int, Meta(ge=0, le=(1 << 32) - 1)]
U64 = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]  # as far as msgspec, and any file or memory, goes
_BYTES = set(map(str, range(256)))
_HEX = set("0123456789abcdefABCDEF")
Template = Literal["C3", "T2", "T2S", "T2CL", "T2A", "None"]


class Body(Struct, forbid_unknown_fields=True):
    """A JSON object; unknown fields are refused."""


class TokenBucket(Body, kw_only=True):
    """A token bucket: `size` tokens, refilled in `refill_time` milliseconds; `one_time_burst` more at the start."""

    size: U64
    one_time_burst: U64 | None = None
    refill_time: U64


class RateLimiter(Body, kw_only=True):
    """Token buckets for bytes and operations. A missing bucket sets no limit; in a PATCH it stays as it is."""

    bandwidth: TokenBucket | None = None
    ops: TokenBucket | None = None


class CpuidRegisterModifier(Body, kw_only=True):
    """Bits of one register of a CPUID leaf: ``0b``, then from the highest bit 0, 1, or x to keep the bit."""

    register: Literal["eax", "ebx", "ecx", "edx"]
    bitmap: str


class CpuidLeafModifier(Body, kw_only=True):
    """Changes to one CPUID leaf. Numbers are strings in hexadecimal (``0x``), binary (``0b``) or decimal."""

    leaf: str
    subleaf: str
    flags: U32
    modifiers: list[CpuidRegisterModifier]


class RegisterModifier(Body, kw_only=True):
    """Bits of one model-specific register."""

    addr: str
    bitmap: str


class CpuConfig(Body, kw_only=True):
    """A CPU template: changes to the guest's CPUID and MSRs before its first instruction."""

    kvm_capabilities: list[str] = []
    cpuid_modifiers: list[CpuidLeafModifier] = []
    msr_modifiers: list[RegisterModifier] = []

    def __post_init__(self) -> None:
        self.template()

    def template(self) -> "CpuTemplate":
        """:raises ConfigError: a number or a bitmap is malformed"""
        from vmm.config.cpu_template import Bits, CpuTemplate, parse_number

        required: list[int] = []
        dropped: list[int] = []
        for word in self.kvm_capabilities:
            number = word.removeprefix("!")
            if not (number.isascii() and number.isdigit() and int(number) < 1 << 32):
                raise ConfigError("kvm_capabilities", word, "must be a capability number, optionally after a !")
            (dropped if word.startswith("!") else required).append(int(number))
        leaves: dict[tuple[int, int, int], dict[str, Bits]] = {}
        for leaf in self.cpuid_modifiers:
            names = "cpuid_modifiers leaf", "cpuid_modifiers subleaf"
            key = parse_number(names[0], leaf.leaf), parse_number(names[1], leaf.subleaf), leaf.flags
            leaves[key] = {
                each.register: Bits.written("cpuid_modifiers bitmap", each.bitmap, 32) for each in leaf.modifiers
            }
        msrs = {
            parse_number("msr_modifiers addr", each.addr): Bits.written("msr_modifiers bitmap", each.bitmap, 64)
            for each in self.msr_modifiers
        }
        return CpuTemplate(capabilities=required, not_required=dropped, cpuid=leaves, msrs=msrs)


class Logger(Body, kw_only=True):
    """Where log messages are written, and which of them."""

    log_path: str | None = None
    level: str | None = None
    show_level: bool | None = None
    show_log_origin: bool | None = None
    module: str | None = None

    def __post_init__(self) -> None:
        if self.level is not None:
            from vmm.logger import parse_level

            parse_level(self.level)


class Metrics(Body, kw_only=True):
    """The file or FIFO to which metrics are written."""

    metrics_path: str


class Serial(Body, kw_only=True):
    """The file or FIFO for the serial port's output instead of stdout; what exceeds the rate limit is lost."""

    serial_out_path: str | None = None
    rate_limiter: RateLimiter | None = None


class Action(Body, kw_only=True):
    """An action to perform."""

    action_type: Literal["InstanceStart", "FlushMetrics", "SendCtrlAltDel"]


class VmState(Body, kw_only=True):
    """Pause or resume the vCPUs."""

    state: Literal["Paused", "Resumed"]


class SnapshotCreate(Body, kw_only=True):
    """Where to write a snapshot of the paused VM, and which type."""

    snapshot_path: str
    mem_file_path: str
    snapshot_type: Literal["Full", "Diff"] = "Full"


class MemBackend(Body, kw_only=True):
    """The source of a snapshot's memory: a file, or the socket of a page fault handler."""

    backend_type: Literal["File", "Uffd"]
    backend_path: str


class NetworkOverride(Body, kw_only=True):
    """A tap that replaces the one of a network interface in the snapshot."""

    iface_id: str
    host_dev_name: str


class VsockOverride(Body, kw_only=True):
    """A unix socket that replaces the one of the snapshot's socket device; the guest keeps its CID."""

    uds_path: str


class SnapshotLoad(Body, kw_only=True):
    """A snapshot to go on from; one of `mem_backend` and `mem_file_path`.

    `vsock_override`, `track_dirty_pages` (another name for `enable_diff_snapshots`) and `clock_realtime` (which changes
    nothing: the guest's clock always goes on by the host's) are Firecracker 1.16's.
    """

    snapshot_path: str
    mem_backend: MemBackend | None = None
    mem_file_path: str | None = None
    enable_diff_snapshots: bool = False
    resume_vm: bool = False
    network_overrides: list[NetworkOverride] = []
    vsock_override: VsockOverride | None = None
    track_dirty_pages: bool = False
    clock_realtime: bool = False


def _check_interface(self: "NetworkInterface") -> None:
    if self.host_dev_name is UNSET and self.mode in (UNSET, "tap"):
        raise ValueError("Object missing required field `host_dev_name`")
    mac = self.guest_mac
    if mac is not None:
        parts = mac.split(":")
        if len(parts) != 6 or not all(len(part) == 2 and set(part) <= _HEX for part in parts):
            raise ValueError(f"guest_mac {mac}: must be a MAC address, e.g. 06:00:ac:10:00:02")
        self.guest_mac = mac.lower()


def _check_mmds(self: "MmdsConfig") -> None:
    parts = ("0.0.0.0" if self.ipv4_address is None else self.ipv4_address).split(".")
    if len(parts) != 4 or not all(part in _BYTES for part in parts):
        raise ValueError(f"ipv4_address {self.ipv4_address}: must be an IPv4 address, e.g. 169.254.169.254")


# Written by ``python -m tools.declared``, from here


class BootSource(Body, kw_only=True):
    """The kernel, its initial ramdisk and its command line."""

    kernel_image_path: str
    initrd_path: str | None = None
    boot_args: str | None = None


class MachineConfiguration(Body, kw_only=True):
    """The machine's vCPUs, memory and CPU template."""

    vcpu_count: U8
    mem_size_mib: U64
    smt: bool = False
    cpu_template: Template | UnsetType | None = UNSET
    track_dirty_pages: bool = False
    huge_pages: Literal["None", "2M"] = "None"


class MachineConfigurationUpdate(Body, kw_only=True):
    """A change of the machine configuration: the given fields are replaced."""

    vcpu_count: U8 | None = None
    mem_size_mib: U64 | None = None
    smt: bool | None = None
    cpu_template: Template | None = None
    track_dirty_pages: bool | None = None
    huge_pages: Literal["None", "2M"] | None = None


class Host(Body, kw_only=True):
    """Extensions that `pyvmm run` writes: see ``VmConfig``."""

    memory: U64 | UnsetType = UNSET
    virtio_console: bool | UnsetType = UNSET
    poll_us: U32 | UnsetType = UNSET
    console: str | UnsetType = UNSET
    exit_port: U16 | UnsetType | None = UNSET
    protocol: str | UnsetType = UNSET
    unpack: str | UnsetType = UNSET


class Drive(Body, kw_only=True):
    """A disk. `num_queues`, `is_direct`, `image_format`, `backing_file` and `backing_format` are pyvmm's own."""

    drive_id: str
    partuuid: str | None = None
    is_root_device: bool
    cache_type: Literal["Unsafe", "Writeback"] = "Unsafe"
    is_read_only: bool | None = None
    path_on_host: str | None = None
    rate_limiter: RateLimiter | None = None
    io_engine: Literal["Sync", "Async"] | None = None
    socket: str | None = None
    num_queues: Annotated[int, Meta(ge=1, le=8)] | UnsetType = UNSET
    is_direct: bool | UnsetType = UNSET
    image_format: Literal["raw", "qcow2"] | UnsetType = UNSET
    backing_file: str | UnsetType = UNSET
    backing_format: Literal["raw", "qcow2"] | UnsetType = UNSET


class PartialDrive(Body, kw_only=True):
    """A change of a running VM's disk."""

    drive_id: str
    path_on_host: str | None = None
    rate_limiter: RateLimiter | None = None


class NetworkPolicy(Body, kw_only=True):
    """What a guest may reach, an extension: `allow` has names and networks, `deny` networks."""

    allow: list[str] = []
    deny: list[str] = []


class NetworkInterface(Body, kw_only=True):
    """A network interface. Firecracker has `iface_id`, `host_dev_name`, `guest_mac` and the rate limiters; the other
    fields are pyvmm's, as in ``pyvmm run --net``."""

    iface_id: str
    host_dev_name: str | UnsetType = UNSET
    guest_mac: str | None = None
    rx_rate_limiter: RateLimiter | None = None
    tx_rate_limiter: RateLimiter | None = None
    mode: Literal["tap", "auto", "user"] | UnsetType = UNSET
    num_queues: Annotated[int, Meta(ge=1, le=8)] | UnsetType = UNSET
    mtu: U16 | UnsetType = UNSET
    pcap: str | UnsetType = UNSET
    address: str | UnsetType = UNSET
    nat: bool | UnsetType = UNSET
    loopback: bool | UnsetType = UNSET
    policy: NetworkPolicy | UnsetType = UNSET

    def __post_init__(self) -> None:
        _check_interface(self)


class PartialNetworkInterface(Body, kw_only=True):
    """A change of a running VM's interface."""

    iface_id: str
    rx_rate_limiter: RateLimiter | None = None
    tx_rate_limiter: RateLimiter | None = None


class SharedFs(Body, kw_only=True):
    """A shared directory, served by this process: an extension of pyvmm with Dragonball's field names. `cache_size`
    is that of the DAX window in bytes, `squash` the user and group of every access; with `submounts` what is mounted
    below the directory is shown, too."""

    tag: str
    shared_dir: str
    read_only: bool = False
    submounts: bool = False
    cache_policy: Literal["auto", "always", "none"] = "auto"
    cache_size: U64 = 0
    num_queues: Annotated[int, Meta(ge=1, le=32)] = 1
    squash: tuple[U32, U32] | None = None
    is_root_device: bool = False
    rate_limiter: RateLimiter | None = None


class PartialFs(Body, kw_only=True):
    """A change of a running VM's shared directory."""

    tag: str
    rate_limiter: RateLimiter | None = None


class Vsock(Body, kw_only=True):
    """The socket device; `vsock_id` is deprecated and ignored."""

    guest_cid: U32
    uds_path: str
    vsock_id: str | UnsetType | None = UNSET


class Balloon(Body, kw_only=True):
    """The memory balloon. `free_page_reporting` is an extension, which newer versions of Firecracker have, too."""

    amount_mib: U32
    deflate_on_oom: bool
    stats_polling_interval_s: U16 = 0
    free_page_reporting: bool | UnsetType = UNSET


class BalloonUpdate(Body, kw_only=True):
    """A new target size of the balloon."""

    amount_mib: U32


class BalloonStatsUpdate(Body, kw_only=True):
    """A new interval between two readings of the guest's statistics."""

    stats_polling_interval_s: U16


class EntropyDevice(Body, kw_only=True):
    """The entropy device: the guest reads the host's random numbers."""

    rate_limiter: RateLimiter | None = None


class MmdsConfig(Body, kw_only=True):
    """The network interfaces that reach the metadata service, its address and its version."""

    version: Literal["V1", "V2"] = "V1"
    network_interfaces: list[str]
    ipv4_address: str | None = "169.254.169.254"

    def __post_init__(self) -> None:
        _check_mmds(self)


# to here.


class VmConfiguration(Struct, kw_only=True, rename="kebab"):
    """A whole VM: what ``GET /vm/config`` answers and ``--config-file`` takes; other keys there are ignored."""

    balloon: Balloon | None = None
    drives: list[Drive] = []
    boot_source: BootSource
    cpu_config: CpuConfig | str | None = None
    logger: Logger | None = None
    machine_config: MachineConfiguration | None = None
    metrics: Metrics | None = None
    mmds_config: MmdsConfig | None = None
    network_interfaces: list[NetworkInterface] = []
    vsock: Vsock | None = None
    entropy: EntropyDevice | None = None
    serial: Serial | UnsetType = UNSET
    fs: list[SharedFs] | UnsetType = UNSET
    pyvmm: Host | UnsetType = UNSET


class InstanceInfo(Body, kw_only=True):
    """The instance: its id, state and version."""

    id: str
    state: Literal["Not started", "Running", "Paused"]
    vmm_version: str
    app_name: str


class Version(Body, kw_only=True):
    """The Firecracker version whose API this is."""

    firecracker_version: str


class Fault(Body, kw_only=True):
    """Why a request was refused."""

    fault_message: str


class BalloonStats(Body, kw_only=True):
    """The balloon's target and actual size, and the guest's memory statistics."""

    target_pages: U32
    actual_pages: U32
    target_mib: U32
    actual_mib: U32
    swap_in: U64 | UnsetType = UNSET
    swap_out: U64 | UnsetType = UNSET
    major_faults: U64 | UnsetType = UNSET
    minor_faults: U64 | UnsetType = UNSET
    free_memory: U64 | UnsetType = UNSET
    total_memory: U64 | UnsetType = UNSET
    available_memory: U64 | UnsetType = UNSET
    disk_caches: U64 | UnsetType = UNSET
    hugetlb_allocations: U64 | UnsetType = UNSET
    hugetlb_failures: U64 | UnsetType = UNSET
    oom_kill: U64 | UnsetType = UNSET
    alloc_stall: U64 | UnsetType = UNSET
    async_scan: U64 | UnsetType = UNSET
    direct_scan: U64 | UnsetType = UNSET
    async_reclaim: U64 | UnsetType = UNSET
    direct_reclaim: U64 | UnsetType = UNSET
