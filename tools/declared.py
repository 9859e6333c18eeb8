# SPDX-License-Identifier: Apache-2.0
"""Write the files that follow from the declarations of ``vmm.config``: ``python -m tools.declared``.

``tests/vmm/test_declared.py`` fails where one is not as this would write it.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

# Behind the path, which says where they are.
from vmm.config import devices  # noqa: E402
from vmm.config.devices import DEVICES, NetworkPolicy, RateLimiterConfig  # noqa: E402
from vmm.config.option import REQUIRED, Config, Option  # noqa: E402
from vmm.config.vm import VmConfig  # noqa: E402


def settings() -> str:
    """The module of ``VmConfig``, with its parameters as keywords of ``Machine``."""
    lines = [f"        {name}: {type_taken(VmConfig, name)}\n" for name in VmConfig.OPTIONS]
    return _replaced("vmm/config/vm.py", "".join(lines), "        ")


def _replaced(path: str, made: str, indent: str = "") -> str:
    # The file, with `made` between its two comments that say so.
    whole = (ROOT / path).read_text()
    begin, end = f"{indent}# Written by ``python -m tools.declared``, from here\n", f"{indent}# to here.\n"
    return f"{whole.partition(begin)[0]}{begin}{made}{end}{whole.partition(end)[2]}"


def type_stored(config: type[Config], name: str) -> str:
    """The type of an attribute, as text."""
    text: str = config.__annotations__[name]
    return text.removeprefix("Given[").partition(", ")[0] if text.startswith("Given[") else text


def type_taken(config: type[Config], name: str) -> str:
    """The type of a parameter, as text."""
    text: str = config.__annotations__[name]
    return text.removesuffix("]").partition(", ")[2] if text.startswith("Given[") else text


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


class Made(NamedTuple):
    """A body of the API whose fields are parameters of a configuration.

    :param about: its docstring, which the API's document shows
    :param fields: in this order; ``*``: all others that are declared; ``!``: it must be in a PATCH
    :param check: the function that checks it whole
    :param kinds: types and defaults that no declaration has
    """

    name: str
    config: type[Config]
    about: str
    fields: str = "*"
    check: str = ""
    kinds: Mapping[str, str] = MappingProxyType({})


_MACHINE = "vcpu_count mem_size_mib smt cpu_template track_dirty_pages huge_pages"
_OF_MACHINE = {"mem_size_mib": "U64", "cpu_template": "Template | UnsetType | None = UNSET"}
BODIES = (
    Made("BootSource", VmConfig, "The kernel, its initial ramdisk and its command line.",
         "kernel_image_path initrd_path boot_args"),
    Made("MachineConfiguration", VmConfig, "The machine's vCPUs, memory and CPU template.", _MACHINE,
         kinds=_OF_MACHINE),
    Made("MachineConfigurationUpdate", VmConfig,
         "A change of the machine configuration: the given fields are replaced.", _MACHINE, kinds=_OF_MACHINE),
    Made("Host", VmConfig, "Extensions that `pyvmm run` writes: see ``VmConfig``.",
         kinds=dict.fromkeys(("protocol", "unpack"), "str | UnsetType = UNSET")),
    Made("Drive", devices.DriveConfig,
         "A disk. `num_queues`, `is_direct`, `image_format`, `backing_file` and `backing_format` are pyvmm's own.",
         "drive_id partuuid is_root_device cache_type is_read_only path_on_host rate_limiter io_engine socket *",
         kinds=dict.fromkeys(("partuuid", "socket"), "str | None = None")),
    Made("PartialDrive", devices.DriveConfig, "A change of a running VM's disk.",
         "drive_id! path_on_host rate_limiter"),
    Made("NetworkPolicy", devices.NetworkPolicy,
         "What a guest may reach, an extension: `allow` has names and networks, `deny` networks."),
    Made("NetworkInterface", devices.NetConfig,
         "A network interface. Firecracker has `iface_id`, `host_dev_name`, `guest_mac` and the rate limiters; the "
         "other fields are pyvmm's, as in ``pyvmm run --net``.",
         "iface_id host_dev_name guest_mac rx_rate_limiter tx_rate_limiter *", "_check_interface"),
    Made("PartialNetworkInterface", devices.NetConfig, "A change of a running VM's interface.",
         "iface_id! rx_rate_limiter tx_rate_limiter"),
    Made("SharedFs", devices.ShareConfig,
         "A shared directory, served by this process: an extension of pyvmm with Dragonball's field names. "
         "`cache_size` is that of the DAX window in bytes, `squash` the user and group of every access; with "
         "`submounts` what is mounted below the directory is shown, too."),
    Made("PartialFs", devices.ShareConfig, "A change of a running VM's shared directory.", "tag! rate_limiter"),
    Made("Vsock", devices.VsockConfig, "The socket device; `vsock_id` is deprecated and ignored."),
    Made("Balloon", devices.BalloonConfig,
         "The memory balloon. `free_page_reporting` is an extension, which newer versions of Firecracker have, too."),
    Made("BalloonUpdate", devices.BalloonConfig, "A new target size of the balloon.", "amount_mib!"),
    Made("BalloonStatsUpdate", devices.BalloonConfig,
         "A new interval between two readings of the guest's statistics.", "stats_polling_interval_s!"),
    Made("EntropyDevice", devices.EntropyConfig, "The entropy device: the guest reads the host's random numbers."),
    Made("MmdsConfig", devices.MmdsConfig,
         "The network interfaces that reach the metadata service, its address and its version.",
         "version *", "_check_mmds"),
)  # fmt: skip
# What a parameter's type is in a body, if not a number or text.
_KINDS = {
    "bool": "bool",
    "NetworkPolicy | None": "NetworkPolicy",
    "RateLimiterConfig | None": "RateLimiter",
    "Sequence[str]": "list[str]",
    "tuple[int, int] | None": "tuple[U32, U32]",
}


def _field(config: type[Config], name: str, each: Option) -> str:
    # Its type, and its default if it has one.
    default = each.default if each.api_default is Option.api_default else each.api_default
    mapped = each.choices if isinstance(each.choices, dict) else None
    if each.choices:
        words = mapped.values() if mapped else each.choices
        kind = f"Literal[{', '.join(json.dumps(word) for word in words if word)}]"
    elif each.api_bits:
        kind = f"U{each.api_bits + 1 & ~1}"  # 63 bits of U64
    elif each.least is not None:
        kind = f"Annotated[int, Meta(ge={each.least}, le={each.most})]"
    else:
        kind = _KINDS.get(type_stored(config, name), "str")
    if each.extension:
        return f"{kind} | UnsetType{' | None' if each.nullable else ''} = UNSET"
    if default is REQUIRED:
        return kind
    if mapped:
        default = mapped.get(default)
    nullable = each.nullable or default is None
    said = json.dumps(default) if isinstance(default, str | tuple) else repr(default)
    return f"{kind}{' | None' if nullable else ''} = {said}"


def _body(made: Made) -> str:
    declared = {each.api: (name, each) for name, each in made.config.OPTIONS.items() if each.api}
    fields = made.fields.split()
    if fields[-1] == "*":  # of a VM, what Firecracker has is in bodies of its own
        others = [api for api, (_, each) in declared.items() if each.extension or made.config is not VmConfig]
        fields[-1:] = [api for api in others if api not in fields]
    about = textwrap.wrap(f'    """{made.about}', 117, subsequent_indent="    ")
    lines = [f"class {made.name}(Body, kw_only=True):", *about]
    lines[-1] += '"""'
    lines.append("")
    for field in fields:
        api = field.removesuffix("!")
        said = made.kinds.get(api) or _field(made.config, *declared[api])
        if "!" in made.fields or made.name.endswith("Update"):  # a PATCH: what is left out stays
            kind = said.partition(" = ")[0].replace(" | UnsetType", "").removesuffix(" | None")
            said = kind if api != field else f"{kind} | None = None"
        lines.append(f"    {api}: {said}")
    if made.check:
        lines += ["", "    def __post_init__(self) -> None:", f"        {made.check}(self)"]
    return "\n".join(lines)


def bodies() -> str:
    """The module of all bodies of the API, of which a part follows from the declarations."""
    return _replaced("vmm/api/types.py", "\n\n{}\n\n\n".format("\n\n\n".join(map(_body, BODIES))))


FILES = {
    "vmm/config/vm.py": settings,
    "vmm/api/types.py": bodies,
    "docs/reference/configuration.md": page,
}

if __name__ == "__main__":
    for path, text in FILES.items():
        (ROOT / path).write_text(text())
