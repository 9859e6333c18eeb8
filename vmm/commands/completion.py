# SPDX-License-Identifier: Apache-2.0
"""``pyvmm completion``: what makes a shell complete pyvmm's subcommands, options and files."""

from __future__ import annotations

from vmm.commands.run import PARAMETERS
from vmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

SHELLS = ("bash", "zsh", "fish")
# What an option's or an argument's value is, by its placeholder in the help.
_FILES = ("F", "FILE", "PATH", "KERNEL", "ROOTFS", "PATH[,ro][,...]", "PROGRAM", "SOURCE", "TARGET")
_DIRECTORIES = ("DIR",)
# Their NAME is that of a running VM, which the shell asks for.
_OF_A_VM = ("attach", "exec", "logs", "stop")
_NAMES = "pyvmm ps --quiet 2>/dev/null"
_RUNNING = {"bash": "_pyvmm_running", "zsh": f"($({_NAMES}))", "fish": f"({_NAMES})"}
# By option, the values that it may have.
CHOICES = {word: tuple(map(str, each.choices)) for word, (_, each) in PARAMETERS.items() if each.choices}
_PREAMBLE = {"bash": f'_pyvmm_running() {{ compgen -W "$({_NAMES})" -- "$1"; }}'}


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
    _tell_values(parser, shtab.FILE, shtab.DIRECTORY)
    return str(shtab.complete(parser, shell, preamble=_PREAMBLE.get(shell, ""))).rstrip("\n") + "\n"


def _tell_values(parser: argparse.ArgumentParser, file: object, directory: object, command: str = "") -> None:
    for action in parser._actions:
        choices = next((CHOICES[option] for option in action.option_strings if option in CHOICES), None)
        complete: object = None
        if isinstance(action.choices, dict):
            for name, other in action.choices.items():
                _tell_values(other, file, directory, command or name)
        elif choices is not None:
            action.choices = choices
        elif action.metavar in _FILES:
            complete = file
        elif action.metavar in _DIRECTORIES:
            complete = directory
        elif action.metavar == "NAME" and command in _OF_A_VM:
            complete = _RUNNING
        if complete is not None:
            action.complete = complete  # type: ignore[attr-defined]  # shtab's own attribute
