# SPDX-License-Identifier: Apache-2.0
"""``pyvmm config show``: what ``pyvmm run`` with the same words would run, and where each value comes from."""

from __future__ import annotations

from vmm.commands import run, serve
from vmm.config import Arguments, attribute, fill_from_files
from vmm.config.vm import VmConfig

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from vmm.config.option import Config

_DEVICES = {"drives": "--disk", "nets": "--net", "shares": "--share", "vsock": "--vsock", "balloon": "--balloon"}
_NO_KERNEL = "(none)"
OPTIONS = run.OPTIONS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments: those of ``pyvmm run``."""
    parser.add_argument("what", metavar="show", choices=("show",), help="print the configuration")
    run.add_arguments(parser)


def main(args: Arguments) -> int:
    """Print it."""
    sources = fill_from_files(args, "run", run.OPTIONS)
    kernel, args.kernel = args.kernel, args.kernel or _NO_KERNEL
    config = run.config_from(args, sources)
    lines = list(_lines(args, config, sources))
    if kernel is None:
        lines[0] = ("kernel", _NO_KERNEL, "")
    defaults = Arguments(serve.OPTIONS)
    for option, source in serve.from_files(defaults).items():
        lines.append((f"serve {option}", str(getattr(defaults, attribute(option))), source))
    widths = [max(len(line[column]) for line in lines) for column in (0, 1)]
    for name, value, source in lines:
        print(f"{name:{widths[0]}}  {value:{min(widths[1], 40)}}  {source}".rstrip())
    return 0


def _lines(args: Arguments, config: VmConfig, sources: dict[str, str]) -> Iterator[tuple[str, str, str]]:
    # Parameter, value and where it comes from. A list has a line for each.
    for name, each in VmConfig.OPTIONS.items():
        value = getattr(config, name)
        option = each.word or _DEVICES.get(name, "")
        if option in sources:
            source = sources[option]
        elif name == "kernel" or (option and getattr(args, attribute(option)) not in (None, False, [])):
            source = "command line"
        elif value == each.default or (name == "console" and value == run.CONSOLE):
            source = "default"
        else:
            source = "command line" if args.rootfs is not None and name in ("drives", "shares") else "image"
        several: tuple[Config, ...] | None = value if isinstance(value, tuple) else None
        for one in several or (value,):
            yield name, config.shown(name, one), source
