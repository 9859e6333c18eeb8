# SPDX-License-Identifier: Apache-2.0
"""Writes the manual page, pyvmm.1, from the output of ``pyvmm COMMAND --help``; setup.py puts it into the wheel.

python tools/man_page.py FILE
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from vmm import __version__
from vmm.commands import guide
from vmm.commands.cli import COMMANDS
from vmm.commands.parser import whole

if TYPE_CHECKING:
    from collections.abc import Iterator


def _roff(text: str) -> str:
    """Escape `text` for roff: backslashes, hyphens, and lines that would be requests."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    return "\n".join("\\&" + line if line.startswith((".", "'")) else line for line in escaped.split("\n"))


def _action(action: argparse.Action, formatter: argparse.HelpFormatter) -> Iterator[str]:
    shown = formatter._format_action_invocation(action)
    yield f".TP\n.B {_roff(shown)}"
    yield _roff(formatter._expand_help(action)) if action.help else "\\&"


def _command(parser: argparse.ArgumentParser) -> Iterator[str]:
    formatter = parser._get_formatter()
    yield f'.SS "{_roff(parser.prog)}"'
    yield _roff((parser.description or "").strip().capitalize()) + "."
    usage = " ".join(parser.format_usage().removeprefix("usage: ").split())
    yield f".PP\n.B {_roff(usage)}"
    nested: list[argparse.ArgumentParser] = []
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.help != argparse.SUPPRESS]
        for action in actions:
            if isinstance(action, argparse._SubParsersAction):
                nested += dict.fromkeys(action.choices.values())
        actions = [action for action in actions if not isinstance(action, argparse._SubParsersAction)]
        if actions:
            yield f".PP\n{_roff((group.title or '').capitalize())}:"
            for action in actions:
                yield from _action(action, formatter)
    if parser.epilog:
        yield f".PP\n.nf\n{_roff(parser.epilog)}\n.fi"
    for one in nested:
        yield from _command(one)


def page() -> str:
    """The page, in roff.

    Source: man(7), groff_man(7).
    """
    parser = whole()
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    overview = guide.overview().partition("examples:")[0].partition("\n")[2].strip()
    parts = [
        f'.TH PYVMM 1 "" "pyvmm {__version__}" "User Commands"',
        ".SH NAME\npyvmm \\- KVM virtual machine monitor for Linux micro\\-VMs",
        ".SH SYNOPSIS\n.B pyvmm\n.I COMMAND\n.RI [ ARGUMENT ...]",
        f".SH DESCRIPTION\n.nf\n{_roff(overview)}\n.fi",
        ".SH COMMANDS",
    ]
    for name in COMMANDS:
        parts += _command(commands.choices[name])
    parts.append(
        ".SH ENVIRONMENT\n.TP\n.B XDG_CACHE_HOME\nwhere pulled images are, below pyvmm/images\n"
        ".TP\n.B XDG_RUNTIME_DIR\nwhere the sockets of running sandboxes are, below pyvmm\n"
        ".TP\n.B NO_COLOR\nif it is set, nothing is coloured"
    )
    return "\n".join(parts) + "\n"


def main() -> None:
    """Write the page."""
    path = Path(sys.argv[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page())


if __name__ == "__main__":
    main()
