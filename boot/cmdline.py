# SPDX-License-Identifier: Apache-2.0
"""The kernel command line: what the user wrote, and what the machine adds to it."""

from __future__ import annotations

from vmm.errors import ConfigError

#: Characters that x86 Linux keeps: COMMAND_LINE_SIZE is 2048 with the NUL (arch/x86/include/asm/setup.h).
DEFAULT_LIMIT = 2047


def split(text: str) -> list[str]:
    """Return the parameters of ``text``: split at white space outside double quotes, as the kernel does.

    Source: next_arg() in lib/cmdline.c.
    """
    words: list[str] = []
    word = ""
    quoted = False
    for char in text:
        if char == '"':
            quoted = not quoted
        if char.isspace() and not quoted:
            if word:
                words.append(word)
            word = ""
        else:
            word += char
    if word:
        words.append(word)
    return words


class Cmdline:
    """A command line being put together; ``str()`` of it is the result.

    Parameters after a lone ``--`` belong to init, so what the machine adds goes before it.

    :raises ConfigError: for a character that no kernel takes
    """

    __slots__ = ("_for_init", "_text")

    def __init__(self, text: str = "") -> None:
        check_characters(text)
        words = split(text)
        self._for_init = ""
        self._text = text.strip()
        if "--" in words:
            at = words.index("--")
            self._text = " ".join(words[:at])
            self._for_init = " ".join(words[at:])

    def has(self, name: str) -> bool:
        """Tell whether ``name`` or ``name=...`` is there; ``-`` and ``_`` are the same to the kernel."""
        wanted = name.replace("-", "_")
        return any(word.split("=", 1)[0].replace("-", "_") == wanted for word in split(self._text))

    def append(self, part: str) -> None:
        """Add ``part`` (one parameter or several) before the parameters of init.

        :raises ConfigError: for a character that no kernel takes
        """
        check_characters(part)
        self._text = f"{self._text} {part.strip()}".strip()

    def default(self, part: str) -> None:
        """Add the parameter ``part`` unless one of the same name is there already."""
        if not self.has(part.split("=", 1)[0]):
            self.append(part)

    def __str__(self) -> str:
        return f"{self._text} {self._for_init}".strip()


def check_characters(text: str) -> None:
    """Refuse what a kernel would cut off or misread.

    :raises ConfigError: for NUL, another control character, or anything beyond ASCII
    """
    if text.isascii() and text.isprintable():
        return
    for at, char in enumerate(text):
        if (char < " " and char != "\t") or char > "~":
            raise ConfigError("cmdline", None, f"character {at} is {char!r}; only printable ASCII is allowed")


def encode(text: str, limit: int = DEFAULT_LIMIT) -> bytes:
    """Return ``text`` as the kernel reads it, ended by a NUL.

    :param limit: the most characters without the NUL that this kernel keeps
    :raises ConfigError: when it is longer, or holds a character that cannot be passed
    """
    check_characters(text)
    if len(text) > limit:
        raise ConfigError("cmdline", None, f"is {len(text)} characters long; this kernel takes {limit}")
    return text.encode("ascii") + b"\0"
