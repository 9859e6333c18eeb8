# SPDX-License-Identifier: Apache-2.0
"""pyvmm: a KVM virtual machine monitor that can be imported: ``from vmm import Machine``."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
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
    from vmm.errors import ConfigError, GuestError, HostError, KvmError, SnapshotError, VmmError
    from vmm.events import Exit, Stop, StopReason
    from vmm.kvm.cpu_template import CpuTemplate
    from vmm.machine.machine import Machine
    from vmm.machine.pool import Pool
    from vmm.machine.snapshot import Image
    from vmm.sandbox import Sandbox

__all__ = [
    "BalloonConfig",
    "ConfigError",
    "CpuTemplate",
    "DriveConfig",
    "EntropyConfig",
    "Exit",
    "FsConfig",
    "GuestError",
    "HostError",
    "Image",
    "KvmError",
    "Machine",
    "MmdsConfig",
    "NetConfig",
    "Pool",
    "RateLimiterConfig",
    "Sandbox",
    "SnapshotError",
    "Stop",
    "StopReason",
    "VmConfig",
    "VmmError",
    "VsockConfig",
]

__version__ = "0.1.0"

_HOMES = {
    "BalloonConfig": "vmm.device_config",
    "ConfigError": "vmm.errors",
    "CpuTemplate": "vmm.kvm.cpu_template",
    "DriveConfig": "vmm.device_config",
    "EntropyConfig": "vmm.device_config",
    "Exit": "vmm.events",
    "FsConfig": "vmm.device_config",
    "GuestError": "vmm.errors",
    "HostError": "vmm.errors",
    "Image": "vmm.machine.snapshot",
    "KvmError": "vmm.errors",
    "Machine": "vmm.machine.machine",
    "MmdsConfig": "vmm.device_config",
    "NetConfig": "vmm.device_config",
    "Pool": "vmm.machine.pool",
    "RateLimiterConfig": "vmm.device_config",
    "Sandbox": "vmm.sandbox",
    "SnapshotError": "vmm.errors",
    "Stop": "vmm.events",
    "StopReason": "vmm.events",
    "VmConfig": "vmm.config",
    "VmmError": "vmm.errors",
    "VsockConfig": "vmm.device_config",
}


def __getattr__(name: str) -> object:
    # Imported on first use: `import vmm.errors` must not pay for the whole machine.
    if name not in _HOMES:
        raise AttributeError(f"module 'vmm' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
