# SPDX-License-Identifier: Apache-2.0
"""pyvmm: a KVM virtual machine monitor that can be imported: ``from vmm import Machine``."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.config import VmConfig
    from vmm.device_config import DriveConfig
    from vmm.events import Stop, StopReason
    from vmm.machine import Machine
    from vmm.pool import Pool
    from vmm.sandbox import Sandbox
    from vmm.snapshot import Image

__all__ = ["DriveConfig", "Image", "Machine", "Pool", "Sandbox", "Stop", "StopReason", "VmConfig"]

_HOMES = {
    "DriveConfig": "vmm.device_config",
    "Image": "vmm.snapshot",
    "Machine": "vmm.machine",
    "Pool": "vmm.pool",
    "Sandbox": "vmm.sandbox",
    "Stop": "vmm.events",
    "StopReason": "vmm.events",
    "VmConfig": "vmm.config",
}


def __getattr__(name: str) -> object:
    # Imported on first use: `import vmm.errors` must not pay for the whole machine.
    if name not in _HOMES:
        raise AttributeError(f"module 'vmm' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
