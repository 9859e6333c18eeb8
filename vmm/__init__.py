# SPDX-License-Identifier: Apache-2.0
"""pyvmm: a KVM virtual machine monitor that can be imported: ``from vmm import Machine``."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:  # each as itself: it is of this module, too
    from vmm.config.cpu_template import CpuTemplate as CpuTemplate
    from vmm.config.devices import BalloonConfig as BalloonConfig
    from vmm.config.devices import DriveConfig as DriveConfig
    from vmm.config.devices import EntropyConfig as EntropyConfig
    from vmm.config.devices import MmdsConfig as MmdsConfig
    from vmm.config.devices import NetConfig as NetConfig
    from vmm.config.devices import NetworkPolicy as NetworkPolicy
    from vmm.config.devices import RateLimiterConfig as RateLimiterConfig
    from vmm.config.devices import ShareConfig as ShareConfig
    from vmm.config.devices import VsockConfig as VsockConfig
    from vmm.config.vm import VmConfig as VmConfig
    from vmm.errors import ConfigError as ConfigError
    from vmm.errors import GuestError as GuestError
    from vmm.errors import HostError as HostError
    from vmm.errors import KvmError as KvmError
    from vmm.errors import SnapshotError as SnapshotError
    from vmm.errors import VmmError as VmmError
    from vmm.exits import Exit as Exit
    from vmm.exits import Stop as Stop
    from vmm.exits import StopReason as StopReason
    from vmm.machine.machine import Machine as Machine
    from vmm.machine.pool import Pool as Pool
    from vmm.machine.snapshot import Image as Image
    from vmm.sandbox import Sandbox as Sandbox

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
__all__ = [*_HOMES]


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
