# SPDX-License-Identifier: Apache-2.0
"""``pyvmm lab``: run a command on an emulated machine that has real KVM."""

from __future__ import annotations

import argparse
import sys

from vmm import lab
from vmm.config import parse_size
from vmm.errors import ConfigError
from vmm.kvm.vm import runs_linux
from vmm.lab.machine import CPU


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``pyvmm lab``."""
    add = parser.add_argument
    keep = "keep changes in DIR; may be repeated"
    add("--write", metavar="DIR", action="append", default=[], help=keep)
    add(
        "--read", metavar="PATH", action="append", default=[],
        help="also show this file or directory; may be repeated. The machine sees the system's directories, the current"
        " one, and paths in COMMAND. It may not notice later changes",
    )  # fmt: skip
    add("--host-root", action="store_true", help="show all files of this host")
    add("--timeout", metavar="S", type=float, default=600, help="limit for the whole run, in seconds (default: 600)")
    add("--cpus", metavar="N", type=int, default=2, help="CPUs for COMMAND (default: 2)")
    add("--memory", metavar="SIZE", default="3G", help="memory of the machine (default: 3G)")
    add("--cpu", metavar="MODEL", default=CPU, help=f"CPU of the machine, as for QEMU's -cpu (default: {CPU})")
    add("--qemu", metavar="PROGRAM", help="the QEMU to use (default: the newest on this host)")
    add("-v", "--verbose", action="store_true", help="show the machine's own console afterwards")
    add("command", metavar="COMMAND", nargs=argparse.REMAINDER, help="the command with its arguments")


def main(args: argparse.Namespace) -> int:
    """Run it; its exit status is ours."""
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        raise ConfigError("COMMAND", "", "is missing: give the command to run")
    if not 0 < args.timeout < float("inf"):
        raise ConfigError("--timeout", args.timeout, "must be more than 0 seconds")
    if not 1 <= args.cpus <= 64:
        raise ConfigError("--cpus", args.cpus, "must be 1 to 64")
    if parse_size("--memory", args.memory) < 512 << 20:
        raise ConfigError("--memory", args.memory, "must be 512M or more")
    if runs_linux():
        print("pyvmm lab: this host's own KVM runs Linux; the lab is only slower", file=sys.stderr)
    return lab.run(
        command, write=args.write, read=args.read, host_root=args.host_root, timeout=args.timeout, cpus=args.cpus,
        memory=args.memory, cpu=args.cpu, qemu=args.qemu, verbose=args.verbose,
    )  # fmt: skip
