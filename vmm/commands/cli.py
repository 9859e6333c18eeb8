# SPDX-License-Identifier: Apache-2.0
"""The ``pyvmm`` command: finds the subcommand, parses its arguments, turns errors into one line and a status.

Only the subcommand that runs is imported.
"""

from __future__ import annotations

import io
import os
import sys

from vmm import __version__, launched
from vmm.errors import ConfigError, host_problem, line

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType
    from typing import Any, NoReturn

COMMANDS = {
    "run": "boot a kernel, with a shell on this terminal",
    "serve": "serve Firecracker's API on a unix socket, with its options",
    "jailer": "serve in a jail, with the options of Firecracker's jailer",
    "pull": "fetch a kernel and a root file system to run",
    "config": "show the configuration that run would use, and the source of each value",
    "ctl": "show and change a served VM while it runs",
    "link": "make the file by which a runtime starts pyvmm as firecracker or jailer",
    "prepare": "make later starts of pyvmm on this host faster",
    "vsock": "connect this terminal or a pipe to a port of a guest",
    "check": "tell what this host offers",
    "lab": "run a command on an emulated machine that has real KVM",
    "sandbox": "run a command of an image in its own VM",
    "exec": "run a command in a running sandbox",
    "cp": "copy files to and from a running sandbox",
    "ps": "list the running VMs of this host",
    "attach": "connect this terminal to the console of a running VM",
    "stop": "end a VM: press its power button, then send SIGTERM",
    "logs": "print what a VM has logged",
    "completion": "print a shell's completion of pyvmm's command lines",
}

# By the name that it is started by, what it is (pyvmm link).
PROGRAMS = {"firecracker": "serve", "jailer": "jailer"}

# What ends its start by itself.
STARTS = ("run", "serve", "jailer")

STATUS_HOST = 1
STATUS_CONFIG = 2
STATUS_INTERRUPTED = 130


def parse(name: str, module: ModuleType, words: list[str]) -> Any:
    """The parsed arguments of a subcommand, or an exit status: after --help, or a mistake, which was told."""
    # Of some, the words after -- are another program's.
    rest = getattr(module, "REST", "")
    own = words[: words.index("--")] if rest and "--" in words else words
    parsed: Any = None
    if name in STARTS:
        from vmm.config import parse_plain

        parsed = parse_plain(own, module.OPTIONS, getattr(module, "POSITIONAL", ()))
    if parsed is None:
        from vmm.commands.parser import make_parser

        parser = make_parser(name, module)
        try:
            # Intermixed: KERNEL --option value ROOTFS. What `lab` takes, the rest of its line, argparse cannot mix.
            parsed = parser.parse_intermixed_args(own) if hasattr(module, "OPTIONS") else parser.parse_args(own)
        except SystemExit as end:
            return end.code
    if rest:
        setattr(parsed, rest, words[len(own) + 1 :])
    return parsed


class _Unheard(io.FileIO):
    # Standard error whose reader is gone, or whose disk is full: what it cannot say keeps nothing from being done.
    def write(self, data: Any) -> int:
        try:
            return super().write(data) or len(data)
        except OSError:
            return len(data)


def _hold_standard_descriptors() -> None:
    # Started with stdin or stdout closed, the next open would become them: a guest's memory as our terminal.
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    # The interpreter has none where the descriptor was closed.
    sys.stdout = sys.stdout or open(1, "w", closefd=False)
    if sys.stderr is sys.__stderr__:  # else it is that of a test
        unheard = io.BufferedWriter(_Unheard(2, "w", closefd=False))
        sys.stderr = io.TextIOWrapper(unheard, errors="backslashreplace", line_buffering=True)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # names of files need not be UTF-8


def main(argv: Sequence[str] | None = None) -> int:
    """Run one ``pyvmm`` command line.

    :param argv: arguments without the program's name; ``sys.argv`` if left out
    :returns: the exit status: the command's own, 1 for a host failure, 2 for a mistake in the arguments
    """
    name = ""
    try:
        launched.hear_interrupts(True)
        _hold_standard_descriptors()
        arguments = list(sys.argv[1:] if argv is None else argv)
        program = os.path.basename(sys.argv[0]) if argv is None else ""
        if program in PROGRAMS:
            arguments.insert(0, PROGRAMS[program])
        elif arguments and arguments[0].startswith("--") and arguments[0] not in ("--help", "--version"):
            arguments.insert(0, "serve")
        name = " ".join(arguments[:1])
        status = _run(arguments)
        sys.stdout.flush()
        return status
    except ConfigError as error:
        return _tell(name, str(error), STATUS_CONFIG)
    except KeyboardInterrupt:
        return STATUS_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output went away; nothing more can be said, not even by the interpreter's own flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return STATUS_HOST
    except Exception as error:
        problem = host_problem(error)
        if problem is None:
            raise  # a mistake of ours, which a traceback says best
        return _tell(name, problem, STATUS_HOST)


def _tell(name: str, problem: str, status: int) -> int:
    print(f"pyvmm {name}".strip() + f": {problem}", file=sys.stderr)
    return status


def _run(arguments: list[str]) -> int:
    match arguments[:1]:
        case [] | ["-h"] | ["--help"] | ["help"]:
            from vmm.commands.guide import overview
            from vmm.commands.parser import with_headings

            print(with_headings(overview(), sys.stdout), end="")
            return 0 if arguments else STATUS_CONFIG
        case ["--version"] | ["-V"]:
            print(f"pyvmm {__version__}")
            return 0
        case [str(name), *_] if name not in COMMANDS:
            from vmm.commands.parser import paint
            from vmm.config import only

            program = paint("pyvmm:", 1, sys.stderr)
            print(f"{program} {line(name)} is not a command{only(name, tuple(COMMANDS))}", file=sys.stderr)
            return STATUS_CONFIG
    name, *rest = arguments
    if name in STARTS:
        launched.spare_threading()
    else:
        launched.finish_start()
    module = __import__(f"vmm.commands.{name}", fromlist=["main"])
    args = parse(name, module, rest)
    status: int = args if isinstance(args, int) else module.main(args)
    return status


def entry() -> NoReturn:
    """The ``pyvmm`` program. Ends without taking the interpreter down, which costs as much as starting it."""
    status = main()
    launched.hear_interrupts(False)
    launched.drop_socket()
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        pass  # its reader is gone, or it was closed from the start
    os._exit(status)


if __name__ == "__main__":
    launched.forget_current_directory()
    entry()
