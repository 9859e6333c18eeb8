# SPDX-License-Identifier: Apache-2.0
"""The options of what starts a VM: declared in one table, parsed without argparse.

Importing argparse costs as much as all of a VM's own start. What is not plain, help and mistakes included, is left to
it; ``tests/vmm/test_run_arguments.py`` compares the two.
"""

from __future__ import annotations

from vmm.config import attribute

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence
    from typing import Any

    # (option, metavar, default, help); what has no metavar is a switch, one whose default is a list may be repeated.
    Table = tuple[tuple[str, str | None, Any, str], ...]


class Arguments:
    """The parsed command line; the attributes of an ``argparse.Namespace``, without argparse."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...
        def __setattr__(self, name: str, value: Any) -> None: ...

    def __init__(self, table: Table, positional: Sequence[str] = ()) -> None:
        for option, _, default, _ in table:
            setattr(self, attribute(option), list(default) if isinstance(default, list) else default)
        for name in positional:
            setattr(self, name, None)


def declare(parser: argparse.ArgumentParser, table: Table) -> None:
    """Give `parser` the options."""
    for option, metavar, default, text in table:
        names = ("-v", option) if option == "--verbose" else (option,)
        if metavar is None:
            parser.add_argument(*names, action="store_true", help=text)
            continue
        kind = int if isinstance(default, int) else str
        action = "append" if isinstance(default, list) else "store"
        parser.add_argument(option, metavar=metavar, type=kind, action=action, default=default, help=text)


def parse(words: Sequence[str], table: Table, positional: Sequence[str] = ()) -> Arguments | None:
    """The arguments, where `words` are plain: whole options, as ``--option value`` or ``--option=value``.

    :param positional: the names of words that are no option's, in their order; each may be left out
    :returns: what argparse would make of them; None: leave it to argparse, its help and its messages
    """
    parsed = Arguments(table, positional)
    known = {option: (metavar, default) for option, metavar, default, _ in table}
    names, rest = iter(positional), iter(words)
    for word in rest:
        if not word.startswith("-"):
            if (name := next(names, None)) is None:
                return None
            setattr(parsed, name, word)
            continue
        option, equals, value = word.partition("=")
        if option not in known:
            return None
        metavar, default = known[option]
        if metavar is None:
            if equals:
                return None
            setattr(parsed, attribute(option), True)
            continue
        if not equals:
            value = next(rest, "-")
            if value.startswith("-") and not value[1:].isdecimal():
                return None
        if isinstance(default, list):
            getattr(parsed, attribute(option)).append(value)
        elif isinstance(default, int):
            if not (value.isascii() and value.isdigit()):
                return None
            setattr(parsed, attribute(option), int(value))
        else:
            setattr(parsed, attribute(option), value)
    return parsed
