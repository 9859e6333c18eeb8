# SPDX-License-Identifier: Apache-2.0
"""Write the files that follow from the declarations of ``vmm.config``: ``python -m tools.declared``.

``tests/vmm/test_declared.py`` fails where one is not as this would write it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import msgspec

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from vmm.api import types  # noqa: E402
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


_TYPED = '''\
# SPDX-License-Identifier: Apache-2.0
"""The bodies that ``vmm.api.types`` makes, for type checkers; ``python -m tools.declared`` writes it."""

from typing import Literal

from msgspec import UNSET, UnsetType

from vmm.api.types import Body, RateLimiter
'''


def _named(kind: Any) -> str:
    # A type as it is written.
    if get_origin(kind) is Annotated:
        return _named(get_args(kind)[0])
    inner = get_args(kind)
    if get_origin(kind) is Literal:
        return f"Literal[{', '.join(json.dumps(each) for each in inner)}]"
    if get_origin(kind) in (Union, UnionType):
        return " | ".join(_named(each) for each in inner)
    if inner:
        return f"{get_origin(kind).__name__}[{', '.join(map(_named, inner))}]"
    return "None" if kind is type(None) else str(kind.__name__)


def bodies() -> str:
    """The bodies of the API that the declarations make."""
    text = _TYPED
    for kind in (types.Drive, types.NetworkInterface, types.SharedFs, types.Vsock, types.Balloon, types.EntropyDevice,
                 types.MmdsConfig, types.Host):  # fmt: skip
        text += f'\n\nclass {kind.__name__}(Body, kw_only=True):\n    """See ``vmm.config``."""\n\n'
        for field in msgspec.structs.fields(kind):
            default = field.default if field.default_factory is msgspec.NODEFAULT else []
            said = {msgspec.NODEFAULT: "", msgspec.UNSET: " = UNSET"}.get(default)
            if said is None:
                said = f" = {json.dumps(default) if isinstance(default, str) else repr(default)}"
            text += f"    {field.name}: {_named(field.type)}{said}\n"
    return text


FILES = {"vmm/config/settings.py": settings, "vmm/api/typed.py": bodies, "docs/reference/configuration.md": page}

if __name__ == "__main__":
    for path, text in FILES.items():
        (ROOT / path).write_text(text())
