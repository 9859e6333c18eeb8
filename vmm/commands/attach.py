# SPDX-License-Identifier: Apache-2.0
"""``pyvmm attach``: the console of a VM that runs, on this terminal."""

from __future__ import annotations

import os
import select
import socket
import struct
import sys
from contextlib import nullcontext

from vmm.commands import running
from vmm.commands.vsock import bridge
from vmm.errors import ConfigError, HostError
from vmm.machine.terminal import raw

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

STATUS_TAKEN = 1
ESCAPE = b"\x1d"  # Ctrl-], as in virsh console and telnet
_END_SECONDS = 1  # from the end of a console that was killed to that of its process
# How to start a VM that has a console to attach to, by the command that runs it.
_WAYS = {
    "sandbox": "is a sandbox, whose console is pyvmm's; for a shell in it: pyvmm exec {}",
    "python": 'has no console to attach to; its program gives it one: Machine(..., console="unix:PATH")',
    "copy": "is a copy of a VM, and has no console",
    "run": "has no console to attach to; start it with: pyvmm run --console unix:PATH",
}
_SERVED = 'has no console to attach to; its --config-file gives it one: "pyvmm": {{"console": "unix:PATH"}}'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the argument of ``pyvmm attach``."""
    about = "of a VM, as pyvmm ps lists it, or its PID, or the PATH of its --console unix:PATH"
    parser.add_argument("name", metavar="NAME", help=about)


def main(args: argparse.Namespace) -> int:
    """Join the console to this terminal; 0 after Ctrl-], or when the VM has ended."""
    path = args.name if "/" in args.name else _path_of(running.named(args.name))
    terminal = os.isatty(0)
    with _connect(path) as stream:
        process = _process_of(stream)
        if terminal:
            print(f"pyvmm attach: {args.name}: press Ctrl-] to leave", file=sys.stderr)
        with raw(0, {}) if terminal else nullcontext():
            left = bridge(stream, 0, 1, ESCAPE if terminal else b"")
    if left:
        end = "left"
    elif ended := _has_ended(path, process):
        end = "the VM has ended"
    else:
        end = "another client has taken the console"
    # The cursor may stand in the guest's line.
    print("\n" * terminal + f"pyvmm attach: {args.name}: {end}", file=sys.stderr)
    return 0 if left or ended else STATUS_TAKEN


def _path_of(each: running.Running) -> str:
    paths = running.consoles(each.pid)
    if not paths:
        raise ConfigError("NAME", each.name, _WAYS.get(each.kind, _SERVED).format(each.name))
    if len(paths) > 1:
        raise ConfigError("NAME", each.name, f"has {len(paths)} consoles; give the path of one: {', '.join(paths)}")
    return paths[0]


def _connect(path: str) -> socket.socket:
    stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # A path into a jail may be too long for a socket's address; by its directory it is not.
        directory = os.open(os.path.dirname(path) or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            near = f"/proc/self/fd/{directory}/{os.path.basename(path)}"
            stream.connect(min(path, near, key=len))
        finally:
            os.close(directory)
    except (FileNotFoundError, NotADirectoryError):
        stream.close()
        raise ConfigError("NAME", path, "is not there; it is the PATH of a running VM's --console unix:PATH") from None
    except OSError as error:
        stream.close()
        if not error.errno:
            raise ConfigError("NAME", path, "is too long for a unix socket") from None
        raise HostError(error.errno, "connect to", path) from None
    return stream


def _process_of(stream: socket.socket) -> int | None:
    # A descriptor of the process that listens; None: it is not seen from here, or has ended.
    pid, _, _ = struct.unpack("3i", stream.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    try:
        return os.pidfd_open(pid)
    except OSError:
        return None


def _has_ended(path: str, process: int | None) -> bool:
    # A VM that ends removes its socket first. One that is killed leaves it there.
    return not os.path.lexists(path) or process is None or bool(select.select([process], [], [], _END_SECONDS)[0])
