# SPDX-License-Identifier: Apache-2.0
"""Between the API's bodies and ``vmm.config``, ``vmm.device_config``: the same VM, said in two ways."""

from __future__ import annotations

from msgspec import UNSET
from msgspec.structs import replace

from boot.cmdline import Cmdline, parameter
from vmm.api import types
from vmm.config import VmConfig
from vmm.device_config import (
    BalloonConfig,
    DriveConfig,
    EntropyConfig,
    FsConfig,
    MmdsConfig,
    NetConfig,
    RateLimiterConfig,
    VsockConfig,
)
from vmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeVar

    from msgspec import UnsetType

    _T = TypeVar("_T")
    Bucket = tuple[int, int, int]

# For a boot source without boot_args; Firecracker's own.
DEFAULT_BOOT_ARGS = "reboot=k panic=1 nomodule 8250.nr_uarts=0 i8042.noaux i8042.nomux i8042.dumbkbd swiotlb=noforce"
DEFAULT_MACHINE = types.MachineConfiguration(vcpu_count=1, mem_size_mib=128)
MAX_VCPUS = 32
_MIB = 1 << 20


def _given(value: _T | UnsetType, default: _T) -> _T:
    return default if value is UNSET else value


def _unless(value: _T, default: _T) -> _T | UnsetType:
    return UNSET if value == default else value


# From the API


def bucket(body: types.TokenBucket | None) -> Bucket | None:
    """What a limiter takes; a bucket that holds nothing or is never filled limits nothing."""
    if body is None:
        return None
    if not body.size or not body.refill_time:
        return (0, 0, 0)
    return body.size, body.one_time_burst or 0, body.refill_time


def limiter(body: types.RateLimiter | None) -> RateLimiterConfig | None:
    """The limits of a device.

    :raises ConfigError: a number that no limiter can count to
    """
    if body is None:
        return None
    buckets = bucket(body.bandwidth), bucket(body.ops)
    return RateLimiterConfig(*(each if each != (0, 0, 0) else None for each in buckets))


def shown_limiter(body: types.RateLimiter | None, old: types.RateLimiter | None = None) -> types.RateLimiter | None:
    """A limiter as it is told of: what limits nothing is left out, what was not given is as it was."""

    def shown(new: types.TokenBucket | None, before: types.TokenBucket | None) -> types.TokenBucket | None:
        if new is None:
            return before
        if bucket(new) == (0, 0, 0):
            return None
        return types.TokenBucket(size=new.size, one_time_burst=new.one_time_burst or None, refill_time=new.refill_time)

    given, before = body or types.RateLimiter(), old or types.RateLimiter()
    found = types.RateLimiter(bandwidth=shown(given.bandwidth, before.bandwidth), ops=shown(given.ops, before.ops))
    return None if found == types.RateLimiter() else found


def shown_drive(body: types.Drive) -> types.Drive:
    """A drive as it is told of, with what was left out."""
    return replace(
        body, is_read_only=bool(body.is_read_only), io_engine=body.io_engine or "Sync",
        rate_limiter=shown_limiter(body.rate_limiter),
    )  # fmt: skip


def drive(body: types.Drive) -> DriveConfig:
    """:raises ConfigError: the body does not describe a supported disk"""
    if body.socket is not None:
        raise ConfigError("socket", body.socket, "vhost-user drives are not supported; give path_on_host")
    if body.path_on_host is None:
        raise ConfigError("path_on_host", "", "is missing")
    return DriveConfig(
        body.path_on_host,
        is_read_only=bool(body.is_read_only),
        drive_id=body.drive_id,
        is_root_device=body.is_root_device,
        queues=_given(body.num_queues, 1),
        io_engine=body.io_engine or "Sync",
        direct=_given(body.is_direct, False),
        cache_type=body.cache_type,
        rate_limiter=limiter(body.rate_limiter),
        image_format=_given(body.image_format, "raw"),
        backing_file=_given(body.backing_file, None),
        backing_format=_given(body.backing_format, None),
        any_size=True,
    )


def net(body: types.NetworkInterface) -> NetConfig:
    """:raises ConfigError: the body does not describe a supported interface"""
    return NetConfig(
        _given(body.host_dev_name, "") or None,
        mode=_given(body.mode, "tap"),
        guest_mac=body.guest_mac,
        queues=_given(body.num_queues, 1),
        mtu=_given(body.mtu, None),
        pcap=_given(body.pcap, None),
        address=_given(body.address, None),
        nat=_given(body.nat, False),
        loopback=_given(body.loopback, False),
        iface_id=body.iface_id,
        rx_rate_limiter=limiter(body.rx_rate_limiter),
        tx_rate_limiter=limiter(body.tx_rate_limiter),
    )


def share(body: types.SharedFs) -> FsConfig:
    """:raises ConfigError: the body does not describe a supported share"""
    return FsConfig(
        body.tag,
        body.shared_dir,
        read_only=body.read_only,
        cache_policy=body.cache_policy,
        submounts=body.submounts,
        dax=body.cache_size,
        threads=body.num_queues,
        squash=body.squash,
        is_root_device=body.is_root_device,
        rate_limiter=limiter(body.rate_limiter),
    )


def balloon(body: types.Balloon) -> BalloonConfig:
    """:raises ConfigError: the body does not describe a supported balloon"""
    return BalloonConfig(
        body.amount_mib,
        deflate_on_oom=body.deflate_on_oom,
        stats_polling_interval_s=body.stats_polling_interval_s,
        free_page_reporting=_given(body.free_page_reporting, False),
    )


def vsock(body: types.Vsock) -> VsockConfig:
    """:raises ConfigError: the body does not describe a supported socket device"""
    return VsockConfig(body.guest_cid, body.uds_path, vsock_id=_given(body.vsock_id, None) or None)


def mmds(body: types.MmdsConfig) -> MmdsConfig:
    """:raises ConfigError: the address is not link-local"""
    address = body.ipv4_address or "169.254.169.254"
    return MmdsConfig(body.network_interfaces, version=body.version, ipv4_address=address)


def _mmds_body(config: MmdsConfig) -> types.MmdsConfig:
    return types.MmdsConfig(
        version=config.version,  # type: ignore[arg-type]  # MmdsConfig checked it
        network_interfaces=list(config.network_interfaces),
        ipv4_address=config.ipv4_address,
    )


def entropy(body: types.EntropyDevice) -> EntropyConfig:
    """:raises ConfigError: a number that no limiter can count to"""
    return EntropyConfig(limiter(body.rate_limiter))


def vm_config(whole: types.VmConfiguration) -> VmConfig:
    """The machine's configuration.

    The root device's parameters are put after the others, as Firecracker does, and a root disk is the first.

    :raises ConfigError: it cannot be
    """
    boot, machine = whole.boot_source, whole.machine_config or DEFAULT_MACHINE
    host = _given(whole.pyvmm, types.Host())
    serial = _given(whole.serial, types.Serial())
    drives = sorted(whole.drives, key=lambda each: not each.is_root_device)
    line = Cmdline(DEFAULT_BOOT_ARGS if boot.boot_args is None else boot.boot_args)
    if drives and drives[0].is_root_device:
        root = drives[0]
        device = "/dev/vda" if root.partuuid is None else f"PARTUUID={root.partuuid}"
        line.append(f"{parameter('root', device)} {'ro' if root.is_read_only else 'rw'}")
    for each in _given(whole.fs, []):
        if each.is_root_device:
            line.append(f"{parameter('root', each.tag)} rootfstype=virtiofs {'ro' if each.read_only else 'rw'}")
    return VmConfig(
        boot.kernel_image_path,
        initrd=boot.initrd_path,
        cmdline=str(line),
        cpus=machine.vcpu_count,
        smt=machine.smt,
        cpu_template=whole.cpu_config.template() if isinstance(whole.cpu_config, types.CpuConfig) else None,
        huge_pages=machine.huge_pages,
        track_dirty_pages=machine.track_dirty_pages,
        memory=_given(host.memory, machine.mem_size_mib * _MIB),
        drives=[drive(each) for each in drives],
        network_interfaces=[net(each) for each in whole.network_interfaces],
        mmds=None if whole.mmds_config is None else mmds(whole.mmds_config),
        vsock=None if whole.vsock is None else vsock(whole.vsock),
        shares=[share(each) for each in _given(whole.fs, [])],
        entropy=None if whole.entropy is None else entropy(whole.entropy),
        balloon=None if whole.balloon is None else balloon(whole.balloon),
        console=_given(host.console, "raw") if serial.serial_out_path is None else f"file:{serial.serial_out_path}",
        console_rate_limiter=limiter(serial.rate_limiter),
        virtio_console=_given(host.virtio_console, False),
        poll_us=_given(host.poll_us, 0),
        protocol=_given(host.protocol, "auto"),
        unpack=_given(host.unpack, "auto"),
        exit_port=_given(host.exit_port, None),  # a guest that we do not know has no say in how we end
    )


# To the API


def _bucket_body(each: Bucket | None) -> types.TokenBucket | None:
    if each is None:
        return None
    return types.TokenBucket(size=each[0], one_time_burst=each[1] or None, refill_time=each[2])


def _limiter_body(config: RateLimiterConfig | None) -> types.RateLimiter | None:
    if config is None:
        return None
    return types.RateLimiter(bandwidth=_bucket_body(config.bandwidth), ops=_bucket_body(config.ops))


def _drive_body(config: DriveConfig, place: int, *, root: bool) -> types.Drive:
    return types.Drive(
        drive_id=config.drive_id or f"drive_{place}",
        is_root_device=root,
        cache_type=config.cache_type,  # type: ignore[arg-type]  # DriveConfig checked it
        is_read_only=config.is_read_only,
        path_on_host=config.path_on_host,
        rate_limiter=_limiter_body(config.rate_limiter),
        io_engine=config.io_engine,  # type: ignore[arg-type]
        num_queues=_unless(config.queues, 1),
        is_direct=_unless(config.direct, False),
        image_format=_unless(config.image_format or "raw", "raw"),  # type: ignore[arg-type]
        backing_file=UNSET if config.backing_file is None else config.backing_file,
        backing_format=_unless(config.backing_format, None),  # type: ignore[arg-type]
    )


def _net_body(config: NetConfig, place: int) -> types.NetworkInterface:
    if config.mode == "fd":
        raise ConfigError("net fd", config.fd, "is an open descriptor, which cannot be written to a file")
    return types.NetworkInterface(
        iface_id=config.iface_id or f"eth{place}",
        host_dev_name=config.host_dev_name or UNSET,
        guest_mac=config.guest_mac,
        rx_rate_limiter=_limiter_body(config.rx_rate_limiter),
        tx_rate_limiter=_limiter_body(config.tx_rate_limiter),
        mode=_unless(config.mode, "tap"),  # type: ignore[arg-type]
        num_queues=_unless(config.queues, 1),
        mtu=UNSET if config.mtu is None else config.mtu,
        pcap=UNSET if config.pcap is None else config.pcap,
        address=UNSET if config.address is None else config.address,
        nat=_unless(config.nat, False),
        loopback=_unless(config.loopback, False),
    )


def _share_body(config: FsConfig, *, root: bool) -> types.SharedFs:
    return types.SharedFs(
        tag=config.tag,
        shared_dir=config.shared_dir,
        read_only=config.read_only,
        cache_policy=config.cache_policy,  # type: ignore[arg-type]
        submounts=config.submounts,
        cache_size=config.dax,
        num_queues=config.threads,
        squash=config.squash,
        is_root_device=root,
        rate_limiter=_limiter_body(config.rate_limiter),
    )


def _vsock_body(config: VsockConfig) -> types.Vsock:
    return types.Vsock(
        guest_cid=config.guest_cid,
        uds_path=config.uds_path,
        vsock_id=UNSET if config.vsock_id is None else config.vsock_id,
    )


def _balloon_body(config: BalloonConfig) -> types.Balloon:
    return types.Balloon(
        amount_mib=config.amount_mib,
        deflate_on_oom=config.deflate_on_oom,
        stats_polling_interval_s=config.stats_polling_interval_s,
        free_page_reporting=_unless(config.free_page_reporting, False),
    )


def _entropy_body(config: EntropyConfig) -> types.EntropyDevice:
    return types.EntropyDevice(rate_limiter=_limiter_body(config.rate_limiter))


def vm_body(config: VmConfig) -> types.VmConfiguration:
    """The configuration file for a machine that was described in another way.

    :raises ConfigError: something of it cannot be said in a file
    """
    if config.cpu_template is not None:
        raise ConfigError("cpu_template", "", "was read from a file; name that file")
    if config.kvm != "/dev/kvm":
        raise ConfigError("--kvm", config.kvm, "cannot be expressed in a configuration file")
    # The command line names the root device by itself, unless its words were all given.
    added = config.root_parameters
    place = None
    if added:
        roots = [each.is_root_device for each in config.drives]
        place = roots.index(True) if True in roots else None
    if place:  # neither none nor the first, where Firecracker would put it
        added, place = "", None
    boot_args = config.rootless_cmdline if added else config.full_cmdline
    whole_mib = config.memory % _MIB == 0
    host = types.Host(
        console=_unless(config.console, "raw"),
        virtio_console=_unless(config.virtio_console, False),
        poll_us=_unless(config.poll_us, 0),
        protocol=_unless(config.protocol, "auto"),
        unpack=_unless(config.unpack, "auto"),
        exit_port=_unless(config.exit_port, None),
        memory=UNSET if whole_mib else config.memory,
    )
    return types.VmConfiguration(
        boot_source=types.BootSource(kernel_image_path=config.kernel, initrd_path=config.initrd, boot_args=boot_args),
        machine_config=types.MachineConfiguration(
            vcpu_count=config.cpus,
            mem_size_mib=config.memory // _MIB,
            smt=config.smt,
            track_dirty_pages=config.track_dirty_pages,
            huge_pages=config.huge_pages,  # type: ignore[arg-type]  # VmConfig checked it
        ),
        drives=[_drive_body(each, index, root=index == place) for index, each in enumerate(config.drives)],
        network_interfaces=[_net_body(each, index) for index, each in enumerate(config.network_interfaces)],
        mmds_config=_mmds_body(config.mmds) if config.mmds else None,
        vsock=_vsock_body(config.vsock) if config.vsock else None,
        fs=[_share_body(each, root=bool(added) and each.is_root_device) for each in config.shares] or UNSET,
        entropy=_entropy_body(config.entropy) if config.entropy else None,
        balloon=_balloon_body(config.balloon) if config.balloon else None,
        serial=types.Serial(rate_limiter=_limiter_body(limits)) if (limits := config.console_rate_limiter) else UNSET,
        pyvmm=UNSET if host == types.Host() else host,
    )
