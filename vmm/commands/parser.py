# SPDX-License-Identifier: Apache-2.0
"""argparse as every subcommand uses it: one line for a mistake, a guess at what was meant, groups and examples."""

from __future__ import annotations

import argparse
import os
import re
import sys

from vmm.commands import guide
from vmm.commands.cli import COMMANDS, STATUS_CONFIG
from vmm.config import did_you_mean, only
from vmm.errors import line

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from types import ModuleType
    from typing import IO, Any, NoReturn

    from vmm.config import Table

_HEADING = re.compile(r"^([A-Za-z][^\n]*:)(?=\n)|^(usage:)", re.MULTILINE)


def coloured(stream: IO[str] | None) -> bool:
    """Whether `stream` may get colours: it is a terminal that has them, and ``NO_COLOR`` is not set.

    Source: https://no-color.org
    """
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") == "dumb"
    return not plain and stream is not None and stream.isatty()


def paint(text: str, code: int, stream: IO[str] | None) -> str:
    """`text` with the terminal's attribute `code` (1: bold, 31: red, 32: green, 33: yellow), where colours are fit.

    Source: ECMA-48 §8.3.117, SGR.
    """
    return f"\x1b[{code}m{text}\x1b[0m" if coloured(stream) else text


def with_headings(text: str, stream: IO[str] | None) -> str:
    """A help text, its headings bold where colours are fit."""
    return _HEADING.sub("\x1b[1m\\g<0>\x1b[0m", text) if coloured(stream) else text


class Parser(argparse.ArgumentParser):
    """``--help`` ends with the command's words, examples and exit statuses."""

    def __init__(self, *args: Any, **options: Any) -> None:
        options |= {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter}
        self.error_status = STATUS_CONFIG
        super().__init__(*args, **options)
        self.color = False  # of Python 3.14: the headings are painted here, for every version

    def error(self, message: str) -> NoReturn:
        """End with one line, where argparse would print its usage too."""
        if message.startswith("unrecognized arguments: "):
            word = message.split()[2].partition("=")[0]
            if word.startswith("-"):
                message += did_you_mean(word, _options(self))
            elif "--disk" in _options(self):
                message += f"; a second disk is: --disk {word}"
        name = paint(f"{self.prog}:", 1, sys.stderr)
        self.exit(self.error_status, f"{name} {line(message)} (see {self.prog} --help)\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            allowed = [str(choice) for choice in action.choices]
            raise argparse.ArgumentError(action, f"{value!r} is not one of them{only(str(value), allowed)}")

    def print_help(self, file: Any = None) -> None:
        """Print it where argparse would pass over that it cannot be written."""
        print(with_headings(self.format_help(), file or sys.stdout), end="", file=file)


def _options(parser: argparse.ArgumentParser) -> Iterable[str]:
    # All of it, and of its subcommands: argparse tells only the outermost parser that a word is left over.
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for other in action.choices.values():
                yield from _options(other)


def make_parser(name: str, module: ModuleType) -> Parser:
    """The parser of the subcommand `name`, which `module` has."""
    parser = Parser(prog=f"pyvmm {name}", description=COMMANDS[name], epilog=guide.epilog(name))
    fill(parser, name, module)
    return parser


def fill(parser: Parser, name: str, module: ModuleType) -> None:
    """Declare the arguments of the subcommand `name`, and its table of options, if it has any."""
    parser.error_status = getattr(module, "STATUS_ARGUMENTS", STATUS_CONFIG)
    if hasattr(module, "add_arguments"):
        module.add_arguments(parser)
    declare(parser, getattr(module, "OPTIONS", ()), guide.GROUPS.get(name, {}))


def declare(parser: argparse.ArgumentParser, table: Table, groups: dict[str, tuple[str, ...]]) -> None:
    """Give `parser` the options.

    :param groups: options by the title under which they are shown; the others stay with --help
    """
    places: dict[str, argparse._ArgumentGroup] = {}
    for title, options in groups.items():
        places |= dict.fromkeys(options, parser.add_argument_group(title))
    for option, metavar, default, text in table:
        place = places.get(option, parser)
        names = ("-v", option) if option == "--verbose" else (option,)
        if metavar is None:
            place.add_argument(*names, action="store_true", help=text)
            continue
        action = "append" if isinstance(default, list) else "store"
        place.add_argument(option, metavar=metavar, action=action, default=default, help=text)


def whole(names: Sequence[str] = tuple(COMMANDS)) -> Parser:
    """One parser of all subcommands, from which a completion or a manual page is made."""
    parser = Parser(prog="pyvmm", description="A KVM virtual machine monitor for Linux micro-VMs.")
    parser.add_argument("-V", "--version", action="store_true", help="print the version, and end")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name in names:
        module = __import__(f"vmm.commands.{name}", fromlist=["main"])
        one = commands.add_parser(name, help=COMMANDS[name], description=COMMANDS[name], epilog=guide.epilog(name))
        fill(one, name, module)
    return parser
