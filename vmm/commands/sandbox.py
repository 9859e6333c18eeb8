# SPDX-License-Identifier: Apache-2.0
"""``pyvmm sandbox``: a command in a VM of its own, of an image that stays as it is."""

from __future__ import annotations

import contextlib
import sys

from vmm.commands.exec import add_command_arguments, command_words, run
from vmm.config.devices import NetworkPolicy
from vmm.errors import ConfigError
from vmm.sandbox import Sandbox

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``pyvmm sandbox``."""
    add = parser.add_argument
    add("image", metavar="IMAGE", help="a pulled image, such as debian or python:3.12")
    add(
        "--memory", metavar="SIZE", default="512M", help="memory of the VM; its written files are in it (default: 512M)"
    )
    add("--cpus", metavar="N", type=int, default=1, help="vCPUs (default: 1)")
    add(
        "--mount", metavar="PATH=DIR[,ro]", action="append", default=[],
        help="show the host's DIR at PATH in the guest; may be repeated",
    )  # fmt: skip
    add(
        "--read-only", action="store_true",
        help="let only /tmp, /var/tmp, /run, the image's volumes and mounts be written",
    )  # fmt: skip
    add("--network", choices=("none", "user"), default="none", help="user: the host's network by passt (default: none)")
    add("--pcap", metavar="FILE", help="record every frame of the network in FILE, for tcpdump -r")
    add(
        "--allow", metavar="RULE", action="append", default=[],
        help="let the guest reach only this: a name such as pypi.org or *.pypi.org, or a network such as 10.1.0.0/16,"
        " optionally with :PORT; may be repeated",
    )  # fmt: skip
    add(
        "--deny",
        metavar="NETWORK",
        action="append",
        default=[],
        help="a network that the guest may not reach, even if --allow has it; may be repeated",
    )
    add(
        "--publish", metavar="[HOST:]PORT:PORT", action="append", default=[],
        help="a TCP port of this host, on 127.0.0.1 or on HOST, that leads to the second PORT, of the guest's loopback;"
        " may be repeated",
    )  # fmt: skip
    add("--timeout", metavar="S", type=float, help="end the sandbox after S seconds (default: never)")
    add("--name", help="name for pyvmm exec, and hostname (default: a new one)")
    add("--kernel", metavar="PATH", help="a kernel with all drivers built in (default: the image's)")
    add(
        "--entrypoint", metavar="PROGRAM",
        help="run this in place of the image's entrypoint, with CMD as its arguments; empty: CMD is the program",
    )  # fmt: skip
    add("--wait", action="store_true", help="run no command; print the name and wait for pyvmm exec, until Ctrl-C")
    add_command_arguments(
        parser,
        "the image's, or a shell",
        "arguments of the image's entrypoint; without one, a program and its arguments",
    )


def main(args: argparse.Namespace) -> int:
    """Run the command; its exit status is ours."""
    if args.wait and args.command:
        raise ConfigError("--wait", " ".join(args.command), "takes no command")
    ports = [_ports(word) for word in args.publish]
    with Sandbox(
        args.image, memory=args.memory, cpus=args.cpus, mounts=dict(_mount(word) for word in args.mount),
        timeout=args.timeout, name=args.name, read_only=args.read_only, network=_network(args), pcap=args.pcap,
        kernel=args.kernel,
    ) as sandbox, contextlib.ExitStack() as stack:  # fmt: skip
        for host, host_port, port in ports:
            stack.enter_context(sandbox.publish(port, host_port, host=host))
        if not args.wait:
            return run(sandbox, args, _command(args, sandbox))
        print(sandbox.name, flush=True)
        sandbox.machine.wait()
        print(f"pyvmm sandbox: {sandbox.why}", file=sys.stderr)
    return 1


def _command(args: argparse.Namespace, sandbox: Sandbox) -> list[str]:
    words = command_words(args)
    if args.entrypoint is not None:
        return [args.entrypoint, *words] if args.entrypoint else words
    return [*sandbox.entrypoint, *words] if words else sandbox.program


def _network(args: argparse.Namespace) -> str | NetworkPolicy:
    if not args.allow and not args.deny:
        return str(args.network)
    if not args.allow:
        raise ConfigError("--deny", args.deny[0], "needs --allow: without it nothing is allowed")
    return NetworkPolicy(args.allow, deny=args.deny)


def _ports(word: str) -> tuple[str, int, int]:
    rest, _, port = word.rpartition(":")
    host, _, host_port = rest.rpartition(":")
    numbers = [int(each) if each.isascii() and each.isdigit() else 0 for each in (host_port, port)]
    if not all(0 < number < 65536 for number in numbers):
        raise ConfigError("--publish", word, "must be PORT:PORT or HOST:PORT:PORT, each 1 to 65535, the guest's last")
    return host.strip("[]") or "127.0.0.1", numbers[0], numbers[1]


def _mount(word: str) -> tuple[str, str | tuple[str, str]]:
    path, equals, directory = word.partition("=")
    if not equals or not directory or not path.startswith("/"):
        raise ConfigError("--mount", word, "must be PATH=DIR or PATH=DIR,ro, and PATH an absolute path of the guest")
    return path, (directory.removesuffix(",ro"), "ro") if directory.endswith(",ro") else directory
