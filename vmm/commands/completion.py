# SPDX-License-Identifier: Apache-2.0
"""``pyvmm completion``: what makes a shell complete pyvmm's subcommands, options and files."""

from __future__ import annotations

from vmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

SHELLS = ("bash", "zsh", "fish")
# What an option's or an argument's value is, by its placeholder in the help.
_FILES = ("F", "FILE", "PATH", "KERNEL", "ROOTFS", "PATH[,ro][,...]", "PROGRAM")
_DIRECTORIES = ("DIR",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the argument of ``pyvmm completion``."""
    parser.add_argument("shell", metavar="SHELL", choices=SHELLS, help=f"the shell: {', '.join(SHELLS)}")


def main(args: argparse.Namespace) -> int:
    """Print the completion.

    :raises ConfigError: shtab, which makes it, is not installed
    """
    print(completion(args.shell), end="")
    return 0


def completion(shell: str) -> str:
    """The text that `shell` reads.

    :raises ConfigError: shtab, which makes it, is not installed
    """
    try:
        import shtab
    except ImportError:
        raise ConfigError("completion", shell, "needs shtab: pip install shtab, beside pyvmm") from None
    from vmm.commands.parser import whole

    parser = whole()
    _tell_files(parser, shtab.FILE, shtab.DIRECTORY)
    return str(shtab.complete(parser, shell)).rstrip("\n") + "\n"


def _tell_files(parser: argparse.ArgumentParser, file: object, directory: object) -> None:
    for action in parser._actions:
        if isinstance(action.choices, dict):
            for other in action.choices.values():
                _tell_files(other, file, directory)
        elif action.metavar in _FILES:
            action.complete = file  # type: ignore[attr-defined]  # shtab's own attribute
        elif action.metavar in _DIRECTORIES:
            action.complete = directory  # type: ignore[attr-defined]
