# SPDX-License-Identifier: Apache-2.0
"""The kernel command line: the user's words, and those that the configuration and the machine add.

Only this module parses and writes command lines, by the kernel's own rules.

Source: next_arg() and parse_args() of lib/cmdline.c and kernel/params.c; isspace() of lib/ctype.c.
"""

from __future__ import annotations

from vmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    Word = tuple[int, int, bytes, bool]  # where it starts, where it ends, its name without quotes, has it a value

#: Bytes that x86 Linux keeps: COMMAND_LINE_SIZE is 2048 with the NUL (arch/x86/include/asm/setup.h).
DEFAULT_LIMIT = 2047
# The kernel's isspace: a NO-BREAK SPACE of Latin-1 is one, and may be half of a UTF-8 character.
_SPACE = b" \t\n\v\f\r\xa0"


class Cmdline:
    """A command line being put together; ``str()`` of it is the result. White space stays as it was written.

    What comes after a lone ``--`` belongs to init, so what is added goes before it.

    :param text: text of the user
    :raises ConfigError: a character that no kernel takes, or an open quote, which would swallow added words
    """

    __slots__ = ("_for_init", "_text")

    def __init__(self, text: str = "") -> None:
        self._text = b""
        self._for_init: bytes | None = None  # what follows the "--", if there is one
        self.append(text)

    def has(self, name: str) -> bool:
        """Tell whether the kernel is given ``name`` or ``name=...``; ``-`` and ``_`` are the same to it."""
        wanted = _plain(name.encode())
        return any(_plain(each) == wanted for _, _, each, _ in _words(self._text))

    def append(self, part: str) -> None:
        """Add ``part``, one parameter or several: to the kernel's own, and what follows a ``--`` of its own to init's.

        :raises ConfigError: as for the whole
        """
        ours, rest = _for_whom(_bytes(part))
        if ours.count(b'"') % 2:
            raise ConfigError("cmdline", None, f"a double quote is not closed: {part.strip()}")
        self._text = _joined(self._text, ours)
        if rest is not None:
            self._for_init = _joined(self._for_init or b"", rest)

    def remove(self, *names: str) -> None:
        """Take away every parameter of one of these names; init's stay."""
        unwanted = {_plain(name.encode()) for name in names}
        for start, end, name, _ in reversed(_words(self._text)):
            if _plain(name) in unwanted:
                self._text = _joined(self._text[:start], self._text[end:])

    def encode(self, limit: int = DEFAULT_LIMIT) -> bytes:
        """The line as the kernel reads it, ended by a NUL.

        :param limit: the most bytes without the NUL that this kernel keeps
        :raises ConfigError: the line is longer
        """
        line = self._line()
        if len(line) > limit:
            raise ConfigError("cmdline", None, f"is {len(line)} bytes long; this kernel takes {limit}")
        return line + b"\0"

    def __str__(self) -> str:
        return self._line().decode("utf-8", "surrogateescape")

    def _line(self) -> bytes:
        return self._text if self._for_init is None else _joined(self._text, _joined(b"--", self._for_init))


def parameter(name: str, value: str) -> str:
    """The word ``name=value`` as the kernel takes it apart again, in quotes where the value holds white space.

    :raises ConfigError: the value cannot be written
    """
    if '"' in value:
        raise ConfigError("cmdline", f"{name}={value}", "a value cannot contain a double quote")
    return f'{name}="{value}"' if any(byte in _SPACE for byte in _bytes(value)) else f"{name}={value}"


def _bytes(text: str) -> bytes:
    # What came from our own command line may not be UTF-8: its bytes go through as they were.
    try:
        line = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise ConfigError(
            "cmdline", None, f"character {error.start} is {text[error.start]!r}, half of a surrogate pair"
        ) from None
    if b"\0" in line:
        at = text.index("\0")
        raise ConfigError("cmdline", None, f"character {at} is '\\x00', at which the kernel stops reading")
    return line


def _words(line: bytes) -> list[Word]:
    # As next_arg(): a quote opens and closes anywhere in a word; the first "=" after its first byte ends its name.
    words: list[Word] = []
    at = 0
    while at < len(line):
        if line[at] in _SPACE:
            at += 1
            continue
        start, quoted = at, False
        while at < len(line) and (quoted or line[at] not in _SPACE):
            quoted ^= line[at] == 0x22
            at += 1
        word = line[start:at]
        name = word.removeprefix(b'"')
        equals = name.find(b"=", 1)
        if equals > 0:
            name = name[:equals]
        elif name != word:
            name = name.removesuffix(b'"')
        words.append((start, at, name, equals > 0))
    return words


def _for_whom(line: bytes) -> tuple[bytes, bytes | None]:
    # The kernel's parameters, and init's: what comes after "--", or None without a "--".
    for start, end, name, valued in _words(line):
        if name == b"--" and not valued:
            return line[:start], line[end:]
    return line, None


def _joined(left: bytes, right: bytes) -> bytes:
    return (left.rstrip(_SPACE) + b" " + right.lstrip(_SPACE)).strip(_SPACE)


def _plain(name: bytes) -> bytes:
    return name.replace(b"-", b"_")
