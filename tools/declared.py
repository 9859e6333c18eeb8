# SPDX-License-Identifier: Apache-2.0
"""Write the files that follow from the declarations of ``vmm.config``: ``python -m tools.declared``.

``tests/vmm/test_declared.py`` fails where one is not as this would write it.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from vmm.config.devices import DEVICES, NetworkPolicy, RateLimiterConfig  # noqa: E402
from vmm.config.option import REQUIRED, Config, type_taken  # noqa: E402
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


_PAGE = """# Configuration

`Machine(...)` takes the parameters of `VmConfig`, or one that was made before. A configuration prints as the call that
makes it, compares, and refuses a parameter that it does not have; `config.replaced(name=value)` is a copy with another
value. A value out of its range is a `ConfigError`, which names the field, the value and what is allowed.

In the tables: the parameter of the library, its default, the word on the command line of `pyvmm run`, the field in the
API and in `--config-file`, and what it means. `python -m tools.declared` writes this page.
"""


def _default(config: type[Config], name: str) -> str:
    default = config.OPTIONS[name].default
    return "" if default is REQUIRED else f"`{default!r}`"


def page() -> str:
    """The tables of the reference."""
    text = _PAGE
    for config in (VmConfig, *DEVICES, NetworkPolicy, RateLimiterConfig):
        text += f"\n::: vmm.{config.__name__}\n    options:\n      members: false\n"
        text += "\n| parameter | type | default | word | API | |\n|---|---|---|---|---|---|\n"
        for name, each in config.OPTIONS.items():
            words = ", ".join(f"`{word}`" for word in each.told)
            kind = type_taken(config, name).replace("|", "\\|")
            cells = (f"`{name}`", f"`{kind}`", _default(config, name), words, each.api and f"`{each.api}`", each.help)
            text += f"| {' | '.join(cells)} |\n"
    return text + "\n::: vmm.CpuTemplate\n"


FILES = {"vmm/config/settings.py": settings, "docs/reference/configuration.md": page}

if __name__ == "__main__":
    for path, text in FILES.items():
        (ROOT / path).write_text(text())
