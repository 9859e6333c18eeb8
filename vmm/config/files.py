# SPDX-License-Identifier: Apache-2.0
"""Defaults of options from files: ``config.toml``, then ``config.d/*.toml`` by name; a later file goes before.

A file has a table for each command, ``[run]`` and ``[serve]``; its keys are the names of options without ``--``. A
switch is true or false, an option that may be repeated a list, any other a text or a number.
"""

from __future__ import annotations

import os
import re
import tomllib
from contextlib import contextmanager

from vmm.config import attribute, only
from vmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

# What a file may say. Not what is one VM's own, as its kernel or its socket, nor what makes it less safe.
ALLOWED = {
    "run": (
        "append", "balloon", "console", "cpus", "disk", "kvm", "memory", "net", "poll", "protocol", "rng", "share",
        "unpack", "virtio-console",
    ),
    "serve": (
        "boot-timer", "http-api-max-payload-size", "level", "mmds-size-limit", "module", "show-level",
        "show-log-origin",
    ),
}  # fmt: skip


def paths(directory: str) -> list[str]:
    """The files below `directory`, in their order.

    :raises ConfigError: the directory cannot be read
    """
    base, more = os.path.join(directory, "config.toml"), os.path.join(directory, "config.d")
    try:
        names = sorted(name for name in os.listdir(more) if name.endswith(".toml") and not name.startswith("."))
    except FileNotFoundError:
        names = []
    except OSError as error:
        raise ConfigError(more, "", f"cannot be read: {error.strerror}") from None
    return [base] * os.path.lexists(base) + [os.path.join(more, name) for name in names]


def read(path: str) -> dict[str, dict[str, tuple[Any, str]]]:
    """What one file says: by command and option, the value and the source, as ``FILE:LINE``.

    :raises ConfigError: the file cannot be read, or has an option that is not allowed in files
    """
    try:
        with open(path, "rb") as file:
            text = file.read().decode()
        document = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(path, "", f"cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(path, "", f"is not TOML: {error}") from None
    found: dict[str, dict[str, tuple[Any, str]]] = {}
    for command, table in document.items():
        if command not in ALLOWED or not isinstance(table, dict):
            raise ConfigError(f"{path}:", command, f"is not a table of options{only(command, tuple(ALLOWED))}")
        for key, value in table.items():
            source = _source(path, text, command, key)
            if key not in ALLOWED[command]:
                raise ConfigError(f"{source}:", key, f"cannot be set in [{command}]{only(key, ALLOWED[command])}")
            found.setdefault(command, {})[key] = value, source
    return found


def _source(path: str, text: str, command: str, key: str) -> str:
    # tomllib does not say where a key is. One that is written otherwise, as in an inline table, has no line.
    table = ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[\s*([\w-]+)\s*\]", line):
            table = header[1]
        elif table == command and re.match(rf"""\s*["']?{re.escape(key)}["']?\s*=""", line):
            return f"{path}:{number}"
    return path


@contextmanager
def named(source: str) -> Iterator[None]:
    """A context in which a ConfigError is about a file's value: it names the file and line."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{source}: {error.field}", error.value, error.problem) from None


def fill(args: Any, command: str, options: Any, directory: str) -> dict[str, str]:
    """Give `args` what the files below `directory` say; see ``vmm.config.fill_from_files``.

    :raises ConfigError: a file cannot be read, or has a value of another type
    """
    found: dict[str, tuple[Any, str]] = {}
    for path in paths(directory):
        found |= read(path).get(command, {})
    sources = {}
    for option, metavar, default, _ in options:
        name = option.removeprefix("--")
        if name not in found or getattr(args, attribute(option)) != default:
            continue
        if name == "append" and args.cmdline is not None:
            continue  # the command line has all of it
        value, source = found[name]
        setattr(args, attribute(option), _value(f"{source}: {name}", value, metavar, default))
        sources[option] = source
    return sources


def _value(field: str, value: Any, metavar: str | None, default: Any) -> Any:
    # As the command line would have it.
    if metavar is None:
        if not isinstance(value, bool):
            raise ConfigError(field, value, "must be true or false")
        return value
    if isinstance(default, list):
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise ConfigError(field, value, 'must be a list of strings, e.g. ["user"]')
        return list(value)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ConfigError(field, value, "must be a string or a number")
    return str(value)
