# SPDX-License-Identifier: Apache-2.0
"""What a VM and each of its devices is to be; and here, how words of a command line are read."""

from __future__ import annotations

import os

from vmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

    # (option, metavar, default, help); what has no metavar is a switch, one whose default is a list may be repeated.
    Table = tuple[tuple[str, str | None, Any, str], ...]

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def attribute(option: str) -> str:
    """The attribute of parsed arguments that has the value of an option, as ``dry_run`` of ``--dry-run``."""
    return option.removeprefix("--").replace("-", "_")


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


def parse_plain(words: Sequence[str], table: Table, positional: Sequence[str] = ()) -> Arguments | None:
    """The arguments, where `words` are plain: whole options, as ``--option value`` or ``--option=value``.

    :param positional: the names of the positional arguments, in order; each may be left out
    :returns: what argparse would make of them; None: leave it to argparse, its help and its messages

    Importing argparse costs as much as all of a VM's own start; ``tests/vmm/test_run_arguments.py`` compares the two.
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
        else:
            setattr(parsed, attribute(option), value)
    return parsed


def fill_from_files(args: Any, command: str, options: Any) -> dict[str, str]:
    """Give `args` what files below ``$PYVMM_CONFIG`` or /etc/pyvmm have for options that are left out.

    :param options: the command's: ``(option, metavar, default, help)``, without a metavar a switch
    :returns: where each value that was given comes from, by option
    :raises ConfigError: a file cannot be read, or says what it may not
    """
    directory = os.environ.get("PYVMM_CONFIG", "/etc/pyvmm")
    if not directory or not os.path.isdir(directory):
        return {}
    from vmm.config.files import fill

    return fill(args, command, options, directory)


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """``; did you mean X?`` where one of `allowed` is close to `word`, else ``""``."""
    from difflib import get_close_matches  # only after a mistake

    close = get_close_matches(word, list(allowed), 1, 0.6)
    return f"; did you mean {close[0]}?" if close else ""


def only(word: str, allowed: Sequence[str]) -> str:
    """``; did you mean X? allowed: X, Y``, where `word` is not one of `allowed`."""
    return f"{did_you_mean(word, allowed) or ';'} allowed: {', '.join(allowed)}"


def check_names(**names: str | None) -> None:
    """Refuse names of files and interfaces that hold a NUL byte: the kernel would read only up to it.

    :raises ConfigError: a name has a NUL byte in it
    """
    for field, name in names.items():
        if name is not None and "\0" in name:
            raise ConfigError(field, repr(name), "must have no NUL in it")


def check_path(field: str, path: str | os.PathLike[str]) -> str:
    """`path` as text.

    :raises ConfigError: the path is empty, or has a NUL byte in it
    """
    path = os.fspath(path)
    if not path:
        raise ConfigError(field, "", "is empty")
    check_names(**{field: path})
    return path


def parse_size(field: str, text: str | int) -> int:
    """Bytes of a size as people write it: ``512M``, ``2G``, ``1.5GiB``, ``65536``.

    :param field: the option it came from, for the message
    :raises ConfigError: the text is not a size
    """
    allowed = "a size is a positive number with K, M, G or T, e.g. 512M or 2G"
    if isinstance(text, int):
        return text
    number = text.strip().upper()
    for suffix in ("IB", "B"):
        number = number.removesuffix(suffix)
    unit = number[-1:] if number[-1:] in _UNITS else ""
    number = number[: len(number) - len(unit)].strip()
    whole, point, part = number.partition(".")
    # str.isdigit() takes other scripts' digits; int() would too, and a size in them is a typing mistake.
    if not number.isascii() or not whole.isdigit() or (point and not part.isdigit()) or len(number) > 18:
        raise ConfigError(field, text, allowed)
    scale = 10 ** len(part)
    return int(int(whole + part) * _UNITS[unit] // scale)


def parse_words(option: str, text: str, words: Sequence[str], *, first: bool = False) -> tuple[str, dict[str, str]]:
    """Take ``flag,key=value,...`` apart; a comma inside a word is written twice.

    :param option: where it came from, for the message
    :param words: those that are known; one with a value ends in ``=``
    :param first: the first word is a path or the like, taken as it is
    :returns: the first word, or ``""``, and the values of the rest by name, ``""`` of one that stands alone
    :raises ConfigError: an unknown word, a value missing or too much, a word given twice
    """
    given = [word.replace("\0", ",") for word in text.replace(",,", "\0").split(",")]
    found: dict[str, str] = {}
    for word in given[1:] if first else given:
        key, equals, value = word.partition("=")
        if key + equals not in words or (equals and not value):
            raise ConfigError(option, text, f"unknown option {word!r}{only(key + equals, words)}")
        if key in found:
            raise ConfigError(option, text, f"has {key} more than once")
        found[key] = value
    return given[0] if first else "", found


def size_text(value: int) -> str:
    """Bytes as :func:`parse_size` reads them, in the largest unit that divides them."""
    for shift, unit in ((30, "G"), (20, "M"), (10, "K")):
        if value >> shift << shift == value:
            return f"{value >> shift}{unit}"
    return str(value)


def parse_count(field: str, text: str, least: int, most: int | None) -> int:
    """A whole number as people write it.

    :raises ConfigError: the text is not a number from `least` to `most`
    """
    value = int(text) if text.isascii() and text.isdigit() and len(text) < 20 else -1
    if value < least or (most is not None and value > most):
        raise ConfigError(field, text, f"must be a number from {least}" + (f" to {most}" if most is not None else ""))
    return value
