# SPDX-License-Identifier: Apache-2.0
"""The bodies of the API, typed: what a request may hold, what an answer holds, one for the socket and the config file.

Names and defaults are those of Firecracker 1.12. Fields of ours are left out of an answer where nobody set them, so
that a configuration without them is one that Firecracker takes.

The bodies of devices are made of the declarations in ``vmm.config``, by ``_body``.

Annotations here are values, not text that msgspec would have to compile when a type is first used.

Source: the OpenAPI document of Firecracker 1.12.
"""

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType, defstruct

from vmm.config import devices
from vmm.config.option import REQUIRED, Config, Option, type_stored
from vmm.config.vm import VmConfig

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.kvm.cpu_template import CpuTemplate

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
        from vmm.kvm.cpu_template import parse_template

        return parse_template(
            self.kvm_capabilities,
            [(leaf.leaf, leaf.subleaf, leaf.flags, [(each.register, each.bitmap) for each in leaf.modifiers])
             for leaf in self.cpuid_modifiers],
            [(each.addr, each.bitmap) for each in self.msr_modifiers],
        )  # fmt: skip


class PartialDrive(Body, kw_only=True):
    """A change of a running VM's disk."""

    drive_id: str
    path_on_host: str | None = None
    rate_limiter: RateLimiter | None = None


class PartialNetworkInterface(Body, kw_only=True):
    """A change of a running VM's interface."""

    iface_id: str
    rx_rate_limiter: RateLimiter | None = None
    tx_rate_limiter: RateLimiter | None = None


class BalloonUpdate(Body, kw_only=True):
    """A new target size of the balloon."""

    amount_mib: U32


class BalloonStatsUpdate(Body, kw_only=True):
    """A new interval between two readings of the guest's statistics."""

    stats_polling_interval_s: U16


class PartialFs(Body, kw_only=True):
    """A change of a running VM's shared directory."""

    tag: str
    rate_limiter: RateLimiter | None = None


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


def _check_interface(self: Any) -> None:
    if self.host_dev_name is UNSET and self.mode in (UNSET, "tap"):
        raise ValueError("Object missing required field `host_dev_name`")
    mac = self.guest_mac
    if mac is not None:
        parts = mac.split(":")
        if len(parts) != 6 or not all(len(part) == 2 and set(part) <= _HEX for part in parts):
            raise ValueError(f"guest_mac {mac}: must be six bytes as 06:00:ac:10:00:02")
        self.guest_mac = mac.lower()


def _check_mmds(self: Any) -> None:
    parts = ("0.0.0.0" if self.ipv4_address is None else self.ipv4_address).split(".")
    if len(parts) != 4 or not all(part in _BYTES for part in parts):
        raise ValueError(f"ipv4_address {self.ipv4_address}: must be four numbers as 169.254.169.254")


def _body(name: str, config: type[Config], about: str, *, first: str = "", check: Any = None, **kinds: Any) -> Any:
    """A body of the API whose fields are the parameters of `config` that the API has.

    :param about: its docstring, which the API's document shows
    :param first: Firecracker's fields in its order, where the declarations have another
    :param check: judges it whole
    :param kinds: by field: its type, where no declaration can name it; one that is no parameter of `config` may be null
    """
    fields: dict[str, tuple[Any, ...]] = dict.fromkeys(first.split(), ())
    for key, each in config.OPTIONS.items():
        if each.api:
            fields[each.api] = _field(config, key, each, kinds.get(each.api))
    fields |= {field: (kind | None, None) for field, kind in kinds.items() if not fields.get(field)}
    listed = [(field, *each) for field, each in fields.items()]
    namespace = {"__doc__": about} | ({"__post_init__": check} if check else {})
    return defstruct(name, listed, bases=(Body,), namespace=namespace, module=__name__, kw_only=True)


def _field(config: type[Config], key: str, each: Option, kind: Any) -> tuple[Any, ...]:
    # Its type, and its default if it has one.
    choices = each.choices
    mapped = isinstance(choices, dict)
    if kind is not None:
        pass
    elif choices:
        kind = Literal[tuple(filter(None, choices.values() if isinstance(choices, dict) else choices))]
    elif each.api_bits:
        kind = Annotated[int, Meta(ge=0, le=(1 << each.api_bits) - 1)]
    elif each.least is not None:
        kind = Annotated[int, Meta(ge=each.least, le=each.most)]
    else:
        kind = bool if type_stored(config, key) == "bool" else str
    if each.extension:
        return (kind | UnsetType | None if each.nullable else kind | UnsetType), UNSET
    default = each.default_of_api
    if default is REQUIRED:
        return (kind,)
    nullable = each.nullable or default is None
    return (kind | None if nullable else kind), (choices[default] if mapped and default is not None else default)


if TYPE_CHECKING:

    class _Declared(Body):
        # Its fields are those of the declarations, which no type checker reads.
        def __init__(self, **fields: Any) -> None: ...
        def __getattr__(self, name: str) -> Any: ...
        def __setattr__(self, name: str, value: Any) -> None: ...

    class Drive(_Declared): ...

    class NetworkInterface(_Declared): ...

    class SharedFs(_Declared): ...

    class Vsock(_Declared): ...

    class Balloon(_Declared): ...

    class EntropyDevice(_Declared): ...

    class MmdsConfig(_Declared): ...

    class Host(_Declared): ...

else:
    _RATE = {"rate_limiter": RateLimiter}
    Drive = _body(
        "Drive", devices.DriveConfig,
        "A disk. `num_queues`, `is_direct`, `image_format`, `backing_file` and `backing_format` are pyvmm's own.",
        first="drive_id partuuid is_root_device cache_type is_read_only path_on_host rate_limiter io_engine socket",
        **_RATE, partuuid=str, socket=str,
    )  # fmt: skip
    NetworkInterface = _body(
        "NetworkInterface", devices.NetConfig,
        "A network interface. Firecracker has `iface_id`, `host_dev_name`, `guest_mac` and the rate limiters; the "
        "other fields are pyvmm's, as in ``pyvmm run --net``.",
        first="iface_id host_dev_name guest_mac rx_rate_limiter tx_rate_limiter",
        check=_check_interface, rx_rate_limiter=RateLimiter, tx_rate_limiter=RateLimiter,
    )  # fmt: skip
    SharedFs = _body(
        "SharedFs", devices.ShareConfig,
        "A shared directory, served by this process: an extension of pyvmm with Dragonball's field names. `cache_size` "
        "is that of the DAX window in bytes, `squash` the user and group of every access; with `submounts` what is "
        "mounted below the directory is shown, too.",
        **_RATE, squash=tuple[U32, U32],
    )  # fmt: skip
    Vsock = _body("Vsock", devices.VsockConfig, "The socket device; `vsock_id` is deprecated and ignored.")
    Balloon = _body(
        "Balloon", devices.BalloonConfig,
        "The memory balloon. `free_page_reporting` is an extension, which newer versions of Firecracker have, too.",
    )  # fmt: skip
    EntropyDevice = _body(
        "EntropyDevice", devices.EntropyConfig,
        "The entropy device: the guest reads the host's random numbers.", **_RATE,
    )  # fmt: skip
    MmdsConfig = _body(
        "MmdsConfig", devices.MmdsConfig,
        "The network interfaces that reach the metadata service, its address and its version.",
        first="version", check=_check_mmds, network_interfaces=list[str],
    )  # fmt: skip
    Host = _body("Host", VmConfig, "Extensions that `pyvmm run` writes: see ``VmConfig``.", protocol=str, unpack=str)


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


class HttpFault(Body, kw_only=True):
    """Why the HTTP request was malformed."""

    error: str


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
