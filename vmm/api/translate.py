# SPDX-License-Identifier: Apache-2.0
"""Between the API's bodies and ``vmm.config``: the same VM, said in two ways."""

from __future__ import annotations

from msgspec import UNSET, Struct
from msgspec.structs import replace

from vmm.api import types
from vmm.cmdline import Cmdline, parameter
from vmm.config import devices
from vmm.config.option import REQUIRED, Config
from vmm.config.vm import VmConfig
from vmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, TypeVar

    from msgspec import UnsetType

    _T = TypeVar("_T")
    _B = TypeVar("_B", bound=Struct)
    _C = TypeVar("_C", bound=Config)
    Bucket = tuple[int, int, int]

# For a boot source without boot_args; Firecracker's own.
DEFAULT_BOOT_ARGS = "reboot=k panic=1 nomodule 8250.nr_uarts=0 i8042.noaux i8042.nomux i8042.dumbkbd swiotlb=noforce"
DEFAULT_MACHINE = types.MachineConfiguration(vcpu_count=1, mem_size_mib=128)
MAX_VCPUS = 32
_MIB = 1 << 20


def _given(value: _T | UnsetType, default: _T) -> _T:
    return default if value is UNSET else value


# From the API


def bucket(body: types.TokenBucket | None) -> Bucket | None:
    """What a limiter takes; a bucket that holds nothing or is never filled limits nothing."""
    if body is None:
        return None
    if not body.size or not body.refill_time:
        return (0, 0, 0)
    return body.size, body.one_time_burst or 0, body.refill_time


def limiter(body: types.RateLimiter | None) -> devices.RateLimiterConfig | None:
    """The limits of a device."""
    if body is None:
        return None
    buckets = bucket(body.bandwidth), bucket(body.ops)
    return devices.RateLimiterConfig(*(each if each != (0, 0, 0) else None for each in buckets))


def shown_limiter(body: types.RateLimiter | None, old: types.RateLimiter | None = None) -> types.RateLimiter | None:
    """A limiter as it is told of: what limits nothing is left out, what was not given is as it was."""
    found = old or types.RateLimiter()
    if body is not None and body.bandwidth is not None:
        found = replace(found, bandwidth=_bucket_body(bucket(body.bandwidth)))
    if body is not None and body.ops is not None:
        found = replace(found, ops=_bucket_body(bucket(body.ops)))
    return None if found == types.RateLimiter() else found


def shown_drive(body: types.Drive) -> types.Drive:
    """A drive as it is told of, with what was left out."""
    return replace(
        body, is_read_only=bool(body.is_read_only), io_engine=body.io_engine or "Sync",
        rate_limiter=shown_limiter(body.rate_limiter),
    )  # fmt: skip


def values_of(kind: type[Config], body: Struct) -> dict[str, Any]:
    """The parameters of `kind` by name, as a body of the API has them; those that it has no field for are left out.

    :raises ConfigError: a parameter is missing, or out of its range
    """
    values: dict[str, Any] = {}
    for name, each in kind.OPTIONS.items():
        if not each.api and each.meaning_of_none != each.default:
            values[name] = each.meaning_of_none
        if not each.api or not hasattr(body, each.api):
            continue
        value = getattr(body, each.api)
        if value is UNSET or value is None:
            value = each.meaning_of_none
            if value is REQUIRED:
                raise ConfigError(each.api, "", "is missing")
        elif isinstance(value, types.RateLimiter):
            value = limiter(value)
        elif isinstance(value, types.NetworkPolicy):
            value = config_of(devices.NetworkPolicy, value)
        elif isinstance(each.choices, dict):
            value = next(word for word, said in each.choices.items() if said == value)
        values[name] = each.checked(each.api, value)  # an error has the API's name
    return values


def config_of(kind: type[_C], body: Struct) -> _C:
    """The device that a body of the API describes.

    :raises ConfigError: the body does not describe a supported device
    """
    return kind(**values_of(kind, body))


def drive(body: types.Drive) -> devices.DriveConfig:
    """:raises ConfigError: the body does not describe a supported disk"""
    if body.socket is not None:
        raise ConfigError("socket", body.socket, "vhost-user drives are not supported; give path_on_host")
    return config_of(devices.DriveConfig, body)


def console_of(whole: types.VmConfiguration) -> dict[str, Any]:
    """The parameters of ``VmConfig`` for where the console's output goes."""
    serial, host = _given(whole.serial, types.Serial()), _given(whole.pyvmm, types.Host())
    path = serial.serial_out_path
    return {
        "console": f"file:{path}" if path is not None else _given(host.console, "raw"),
        "console_rate_limiter": limiter(serial.rate_limiter),
    }


def vm_config(whole: types.VmConfiguration) -> VmConfig:
    """The machine's configuration.

    The root device's parameters are put after the others, as Firecracker does, and a root disk is the first.

    :raises ConfigError: a value is invalid
    """
    boot, machine = whole.boot_source, whole.machine_config or DEFAULT_MACHINE
    drives = sorted(whole.drives, key=lambda each: not each.is_root_device)
    line = Cmdline(DEFAULT_BOOT_ARGS if boot.boot_args is None else boot.boot_args)
    if drives and drives[0].is_root_device:
        root = drives[0]
        device = "/dev/vda" if root.partuuid is None else f"PARTUUID={root.partuuid}"
        line.append(f"{parameter('root', device)} {'ro' if root.is_read_only else 'rw'}")
    for each in _given(whole.fs, []):
        if each.is_root_device:
            line.append(f"{parameter('root', each.tag)} rootfstype=virtiofs {'ro' if each.read_only else 'rw'}")
    host = _given(whole.pyvmm, types.Host())
    values = values_of(VmConfig, boot) | values_of(VmConfig, machine) | values_of(VmConfig, host)
    if host.memory is UNSET:
        values["memory"] = machine.mem_size_mib * _MIB
    values |= console_of(whole) | {"cmdline": str(line)}
    return VmConfig(
        cpu_template=whole.cpu_config.template() if isinstance(whole.cpu_config, types.CpuConfig) else None,
        drives=[drive(each) for each in drives],
        nets=[config_of(devices.NetConfig, each) for each in whole.network_interfaces],
        mmds=None if whole.mmds_config is None else config_of(devices.MmdsConfig, whole.mmds_config),
        vsock=None if whole.vsock is None else config_of(devices.VsockConfig, whole.vsock),
        shares=[config_of(devices.ShareConfig, each) for each in _given(whole.fs, [])],
        entropy=None if whole.entropy is None else config_of(devices.EntropyConfig, whole.entropy),
        balloon=None if whole.balloon is None else config_of(devices.BalloonConfig, whole.balloon),
        **values,
    )


# To the API


def _bucket_body(each: Bucket | None) -> types.TokenBucket | None:
    if each is None or each == (0, 0, 0):
        return None
    return types.TokenBucket(size=each[0], one_time_burst=each[1] or None, refill_time=each[2])


def _limiter_body(config: devices.RateLimiterConfig) -> types.RateLimiter:
    return types.RateLimiter(bandwidth=_bucket_body(config.bandwidth), ops=_bucket_body(config.ops))


def body_of(kind: type[_B], config: Config, **values: Any) -> _B:
    """The body of the API that describes what `config` does; an extension at its default is left out.

    :param values: fields that are said in another way
    :raises ConfigError: a device has a value that the API does not have
    """
    for name, each in config.OPTIONS.items():
        value = getattr(config, name)
        if not each.api and value not in (each.default, each.meaning_of_none) and not isinstance(config, VmConfig):
            raise ConfigError(config.field(name), value, "cannot be expressed in a configuration file")
        if each.api not in kind.__struct_fields__ or each.api in values:
            continue
        if each.extension and value in (None, each.meaning_of_none):
            continue
        if isinstance(value, devices.RateLimiterConfig):
            value = _limiter_body(value)
        elif isinstance(value, devices.NetworkPolicy):
            value = body_of(types.NetworkPolicy, value)
        elif isinstance(each.choices, dict):
            value = each.choices.get(value)
        elif isinstance(value, tuple) and name != "squash":
            value = list(value)
        values[each.api] = value
    return kind(**values)


def vm_body(config: VmConfig) -> types.VmConfiguration:
    """The configuration file for a machine that was described in another way.

    :raises ConfigError: something of it cannot be said in a file
    """
    if config.cpu_template is not None:
        raise ConfigError("cpu_template", "", "was read from a file; name that file")
    if config.kvm != "/dev/kvm":
        raise ConfigError("--kvm", config.kvm, "cannot be expressed in a configuration file")
    # The API adds the root device's words, too, but puts a root disk before the others.
    added = config.root_parameters != "" and not any(each.root for each in config.drives[1:])
    boot_args = config.cmdline_with("") if added else config.full_cmdline
    host = body_of(types.Host, config, **{} if config.memory % _MIB else {"memory": UNSET})
    return types.VmConfiguration(
        boot_source=body_of(types.BootSource, config, boot_args=boot_args),
        machine_config=body_of(types.MachineConfiguration, config, mem_size_mib=config.memory // _MIB),
        drives=[
            body_of(types.Drive, each, drive_id=each.id or f"drive_{index}", is_root_device=added and each.root)
            for index, each in enumerate(config.drives)
        ],
        network_interfaces=[
            body_of(types.NetworkInterface, each, iface_id=each.id or f"eth{index}")
            for index, each in enumerate(config.nets)
        ],
        mmds_config=body_of(types.MmdsConfig, config.mmds) if config.mmds else None,
        vsock=body_of(types.Vsock, config.vsock) if config.vsock else None,
        fs=[body_of(types.SharedFs, each, is_root_device=added and each.root) for each in config.shares] or UNSET,
        entropy=body_of(types.EntropyDevice, config.entropy) if config.entropy else None,
        balloon=body_of(types.Balloon, config.balloon) if config.balloon else None,
        serial=types.Serial(rate_limiter=_limiter_body(limits)) if (limits := config.console_rate_limiter) else UNSET,
        pyvmm=UNSET if host == types.Host() else host,
    )
