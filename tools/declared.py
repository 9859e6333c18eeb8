# SPDX-License-Identifier: Apache-2.0
"""Write the files that follow from the declarations of ``vmm.config``: ``python -m tools.declared``.

``tests/vmm/test_declared.py`` fails where one is not as this would write it.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from vmm.config.option import type_taken  # noqa: E402
from vmm.config.vm import VmConfig  # noqa: E402

_SETTINGS = '''\
# SPDX-License-Identifier: Apache-2.0
"""``VmConfig``'s parameters as keywords of ``Machine``, for type checkers; ``python -m tools.declared`` writes it."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os
    from collections.abc import Sequence
    from typing import TypedDict

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
    from vmm.kvm.cpu_template import CpuTemplate

    class VmSettings(TypedDict, total=False):
        """See :class:`vmm.config.vm.VmConfig`."""

'''


def settings() -> str:
    """The keywords of ``Machine``."""
    lines = [f"        {name}: {type_taken(VmConfig, name)}\n" for name in VmConfig.OPTIONS]
    return _SETTINGS + "".join(lines)


FILES = {"vmm/config/settings.py": settings}

if __name__ == "__main__":
    for path, text in FILES.items():
        (ROOT / path).write_text(text())
