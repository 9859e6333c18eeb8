# SPDX-License-Identifier: Apache-2.0
"""``pyvmm jailer``: ``pyvmm serve`` in a jail, with Firecracker's jailer's own options."""

from __future__ import annotations

import os
import shutil
import sys

from vmm import __version__
from vmm.config import did_you_mean
from vmm.errors import ConfigError, VmmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from typing import Any

STATUS_OK = 0
STATUS_GENERIC = STATUS_ARGUMENTS = 1

# (option, metavar, default, help); what has no metavar is a switch.
OPTIONS: tuple[tuple[str, str | None, Any, str], ...] = (
    ("--id", "ID", None, "the VM's id, 1 to 64 letters, digits and hyphens"),
    ("--exec-file", "FILE", None, "the program: pyvmm, or a link to it, whose name the jail's directory gets"),
    ("--uid", "UID", None, "the user that the VMM becomes"),
    ("--gid", "GID", None, "the group that the VMM becomes"),
    ("--chroot-base-dir", "DIR", "/srv/jailer", "where jails are (default: /srv/jailer)"),
    ("--netns", "FILE", None, "the network namespace to be in"),
    ("--cgroup", "FILE=VALUE", [], "set a file of the VMM's cgroup, as cpu.shares=10; may be repeated"),
    ("--cgroup-version", "N", "1", "1 or 2 (default: 1)"),
    ("--parent-cgroup", "PATH", None, "the cgroup above the VMM's (default: the program's name)"),
    ("--resource-limit", "WHAT=N", [], "fsize=BYTES, or no-file=NUMBER (default: no-file=2048); may be repeated"),
    (
        "--daemonize",
        None,
        False,
        "in a session of its own; the jailer ends once the VM runs, or the API answers",
    ),
    ("--new-pid-ns", None, False, "as the first process of a pid namespace"),
    ("--version", None, False, "print the jailer's version and pyvmm's own, and end"),
)
REQUIRED = ("--id", "--exec-file", "--uid", "--gid")


class Arguments:
    """The parsed command line: ``values`` by option, ``vmm`` for what comes after ``--``, or what is wrong with it."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {
            option: list(default) if isinstance(default, list) else default for option, _, default, _ in OPTIONS
        }
        self.vmm: list[str] = []
        self.mistake: ConfigError | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options, for ``--help``; ``parse_quickly`` parses them."""
    for option, metavar, _, text in OPTIONS:
        if metavar is None:
            parser.add_argument(option, action="store_true", help=text)
        else:
            parser.add_argument(option, metavar=metavar, help=text, required=option in REQUIRED)


def parse_quickly(words: list[str]) -> Arguments | None:
    """The arguments; ``--option value`` and ``--option=value``.

    :returns: None: help is asked for
    """
    parsed = Arguments()
    known = {option: metavar for option, metavar, _, _ in OPTIONS}
    rest = iter(words)
    try:
        for word in rest:
            option, equals, value = word.partition("=")
            if word == "--":
                parsed.vmm = list(rest)
            elif word in ("-h", "--help"):
                return None
            elif option not in known:
                guess = did_you_mean(option, known) or ";"
                raise ConfigError(word, "", f"is not an option{guess} options of the VMM come after --")
            elif known[option] is None:
                if equals:
                    raise ConfigError("jailer", word, "takes no value")
                parsed.values[option] = True
            else:
                if not equals:
                    value = next(rest, "--")
                    if value.startswith("--"):
                        raise ConfigError("jailer", option, f"needs a value, {known[option]}")
                if isinstance(parsed.values[option], list):
                    parsed.values[option].append(value)
                else:
                    parsed.values[option] = value
    except ConfigError as error:
        parsed.mistake = error
    return parsed


def main(args: Arguments) -> int:
    """Go into the jail, and serve there until the VM ends; ``pyvmm serve``'s exit codes, 1 where there is no jail."""
    if args.values["--version"]:
        from vmm.api import API_VERSION

        print(f"Jailer v{API_VERSION}\n\npyvmm {__version__}")
        return STATUS_OK
    try:
        if args.mistake is not None:
            raise args.mistake
        return _run(args)
    except VmmError as error:
        print(f"pyvmm jailer: {error}", file=sys.stderr)
        return STATUS_GENERIC


def _run(args: Arguments) -> int:
    from vmm import launched, threads
    from vmm.commands import cli, serve
    from vmm.jail import jailer
    from vmm.jail.preload import preload

    values = args.values
    for option in REQUIRED:
        if values[option] is None:
            raise ConfigError(option, "", "is missing")
    serve.check_id(values["--id"])
    check_program(values["--exec-file"])
    # Before: in there is no argparse, and nobody who sees what is wrong.
    vmm = cli.parse("serve", serve, ["--id", values["--id"], *args.vmm])
    if isinstance(vmm, int):
        return vmm
    serve.from_files(vmm)
    jail = jailer.Jail(
        values["--exec-file"], values["--id"], _number("--uid", values["--uid"]), _number("--gid", values["--gid"]),
        chroot_base_dir=values["--chroot-base-dir"], netns=values["--netns"], cgroups=values["--cgroup"],
        cgroup_version=_number("--cgroup-version", values["--cgroup-version"]),
        parent_cgroup=values["--parent-cgroup"], resource_limits=values["--resource-limit"],
        daemonize=values["--daemonize"], new_pid_ns=values["--new-pid-ns"],
    )  # fmt: skip
    launched.spare_httptools()
    launched.spare_msgspec()
    preload()
    launched.settle()
    jailer.close_what_was_inherited()
    jail.enter()
    threads.no_programs = "and there are no programs in a jail"
    sys.argv[0] = jail.program
    status = serve.main(vmm, on_ready=jail.settle, files=False)
    jail.settle(status)  # where it did not come so far
    return status


def check_program(path: str) -> None:
    """:raises ConfigError: it is not this program, nor a link to it"""
    from vmm.commands.link import is_link

    own = (sys.argv[0], os.path.join(os.path.dirname(sys.executable), "pyvmm"), shutil.which("pyvmm"))
    if not os.path.isfile(path):
        raise ConfigError("--exec-file", path, "must be an existing program")
    if not is_link(path) and not any(each and os.path.exists(each) and os.path.samefile(each, path) for each in own):
        raise ConfigError("--exec-file", path, "must be pyvmm or a link to it (pyvmm link firecracker DIR makes one)")


def _number(option: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) < 1 << 32):
        raise ConfigError(option, text, "must be a number below 2^32")
    return int(text)
