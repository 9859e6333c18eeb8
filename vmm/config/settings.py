# SPDX-License-Identifier: Apache-2.0
"""``VmConfig``'s parameters as keywords of ``Machine``, for type checkers; ``python -m tools.declared`` writes it."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os
    from collections.abc import Sequence
    from typing import TypedDict

    from vmm.config.cpu_template import CpuTemplate
    from vmm.config.devices import (
        BalloonConfig,
        DriveConfig,
        EntropyConfig,
        MmdsConfig,
        NetConfig,
        RateLimiterConfig,
        ShareConfig,
        VsockConfig,
    )

    class VmSettings(TypedDict, total=False):
        """See :class:`vmm.config.vm.VmConfig`."""

        kernel: str | os.PathLike[str]
        initrd: str | os.PathLike[str] | None
        cmdline: str | None
        append: str
        cpus: int
        smt: bool
        cpu_template: CpuTemplate | None
        memory: int | str
        huge_pages: str | None
        track_dirty_pages: bool
        drives: Sequence[DriveConfig]
        nets: Sequence[NetConfig]
        vsock: VsockConfig | None
        shares: Sequence[ShareConfig]
        entropy: EntropyConfig | bool | None
        balloon: BalloonConfig | None
        mmds: MmdsConfig | None
        virtio_console: bool
        poll_us: int
        console: str
        console_rate_limiter: RateLimiterConfig | None
        keyboard: bool
        boot_timer: bool
        kvm: str | os.PathLike[str]
        exit_port: int | None
        protocol: str
        unpack: str
