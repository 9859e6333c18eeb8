# SPDX-License-Identifier: Apache-2.0
"""pyvmm: a KVM virtual machine monitor that can be imported: ``from vmm import Machine``."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.config.cpu_template import CpuTemplate
    from vmm.config.devices import (
        BalloonConfig,
        DriveConfig,
        EntropyConfig,
        MmdsConfig,
        NetConfig,
        NetworkPolicy,
        RateLimiterConfig,
        ShareConfig,
        VsockConfig,
    )
    from vmm.config.vm import VmConfig
    from vmm.errors import ConfigError, GuestError, HostError, KvmError, SnapshotError, VmmError
    from vmm.exits import Exit, Stop, StopReason
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
    "GuestError",
    "HostError",
    "Image",
    "KvmError",
    "Machine",
    "MmdsConfig",
    "NetConfig",
    "NetworkPolicy",
    "Pool",
    "RateLimiterConfig",
    "Sandbox",
    "ShareConfig",
    "SnapshotError",
    "Stop",
    "StopReason",
    "VmConfig",
    "VmmError",
    "VsockConfig",
]

__version__ = "0.1.0"

_HOMES = {
    name: home
    for home, names in {
        "vmm.config.cpu_template": "CpuTemplate",
        "vmm.config.devices": "BalloonConfig DriveConfig EntropyConfig MmdsConfig NetConfig NetworkPolicy "
        "RateLimiterConfig ShareConfig VsockConfig",
        "vmm.config.vm": "VmConfig",
        "vmm.errors": "ConfigError GuestError HostError KvmError SnapshotError VmmError",
        "vmm.exits": "Exit Stop StopReason",
        "vmm.machine.machine": "Machine",
        "vmm.machine.pool": "Pool",
        "vmm.machine.snapshot": "Image",
        "vmm.sandbox": "Sandbox",
    }.items()
    for name in names.split()
}


if not TYPE_CHECKING:  # a checker knows every name, and tells a misspelt one

    def __getattr__(name: str) -> object:
        # Imported on first use: `import vmm.errors` must not pay for the whole machine.
        if name not in _HOMES:
            guess = ""
            if name[0].isupper():  # `from vmm import logger` asks here first, and no launch has time for a guess
                from vmm.config import did_you_mean

                guess = did_you_mean(name, _HOMES)
            raise AttributeError(f"module 'vmm' has no attribute {name!r}{guess}")
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__} - {"TYPE_CHECKING", "annotations"})
