# SPDX-License-Identifier: Apache-2.0
"""``pyvmm exec``: a command in a sandbox that runs, on this terminal."""

from __future__ import annotations

import errno
import os
import select
import signal
import sys

from vmm.errors import ConfigError, HostError
from vmm.machine.terminal import raw
from vmm.sandbox import Process, Session, attach
from vmm.sandbox.channel import F_STDIN, FRAME_MAX, Deadline, frame
from vmm.sandbox.errors import SandboxGone

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

_FOREVER = Deadline(None)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``pyvmm exec``."""
    parser.add_argument("name", metavar="NAME", help="the sandbox, as pyvmm ps lists it")
    add_command_arguments(parser)


def add_command_arguments(
    parser: argparse.ArgumentParser, default: str = "a shell", what: str = "a program and its arguments"
) -> None:
    """Those that say how a command runs, and the command."""
    add = parser.add_argument
    add(
        "-e",
        "--env",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="set an environment variable; may be repeated",
    )
    add(
        "-u", "--user", metavar="USER[:GROUP]", help="user and group, by name or number (default: the image's, or root)"
    )
    add("-w", "--cwd", metavar="DIR", help="working directory (default: the image's, or the user's home)")
    import argparse

    command = add("command", metavar="CMD", nargs=argparse.REMAINDER, help=f"{what} (default: {default})")
    command.required = False  # which argparse takes it for, and says so where another one is missing


def environment(words: list[str]) -> dict[str, str]:
    """The variables of ``--env``.

    :raises ConfigError: a word has no =
    """
    for word in words:
        if not word.partition("=")[1]:
            raise ConfigError("--env", word, "must be NAME=VALUE")
    return dict(word.split("=", 1) for word in words)


def main(args: argparse.Namespace) -> int:
    """Run it; its exit status is ours."""
    return run(attach(args.name), args, command_words(args))


def command_words(args: argparse.Namespace) -> list[str]:
    """The command, without a ``--`` before it."""
    return list(args.command[1:] if args.command[:1] == ["--"] else args.command)


def run(session: Session, args: argparse.Namespace, command: list[str]) -> int:
    """Run `command`, or a shell, as `args` says, on this terminal, and return its status."""
    terminal = os.isatty(0) and os.isatty(1)
    size = os.get_terminal_size(0) if terminal else None
    with session.exec(
        command or ["/bin/sh", "-l"] if terminal else command or ["/bin/sh"], env=environment(args.env), user=args.user,
        cwd=args.cwd, terminal=(size.lines or 24, size.columns or 80) if size else None,
    ) as process:  # fmt: skip
        return connect(process, terminal=terminal)


def connect(process: Process, *, terminal: bool) -> int:
    """Copy this process's standard streams to and from a command, until it ends; returns its status."""
    process.limit = 0
    for fd, stream in ((1, process.stdout), (2, process.stderr)):
        stream.on_data = _writer(fd)
        stream.on_data(stream.take())  # what was said before it was asked where to
    bell, ring = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    ring_with: dict[int, bytes] = {signal.SIGTERM: b"t", **({signal.SIGWINCH: b"w"} if terminal else {})}
    handlers = dict.fromkeys(ring_with, lambda number, _: os.write(ring, ring_with[number]))
    try:
        with raw(0 if terminal else None, handlers):
            return _bridge(process, bell, terminal=terminal)
    finally:
        os.close(bell)
        os.close(ring)


def _bridge(process: Process, bell: int, *, terminal: bool) -> int:
    channel = process.channel
    left = memoryview(b"")
    more, resized = True, False
    while not process.ended:
        if channel.buffered:
            process.pump(_FOREVER)
            continue
        poll = select.poll()
        poll.register(channel, select.POLLIN | (select.POLLOUT if left else 0))
        if more and not left:
            poll.register(0, select.POLLIN)
        poll.register(bell, select.POLLIN)
        ready = dict(poll.poll())
        rung = os.read(bell, 4096) if bell in ready else b""
        resized |= b"w" in rung
        if resized and not left:  # it goes the way that the keys go, and not into one of their frames
            resized = False
            try:
                size = os.get_terminal_size(0)
                process.resize(size.lines, size.columns)
            except OSError:
                pass  # the terminal is gone
        if b"t" in rung:
            process.send_signal(process.stop_signal)
        if 0 in ready:
            data = _read(terminal=terminal)
            more = bool(data)
            left = memoryview(frame(F_STDIN, data))  # of nothing: its end
        if left:
            try:
                left = left[channel.send_some(left) :]
            except SandboxGone:  # but it may have said something before
                left, more = memoryview(b""), False
        if ready.get(channel.fileno(), 0) & ~select.POLLOUT:
            process.pump(_FOREVER)
    result = process.wait()
    if result.out_of_memory:
        print("pyvmm: the sandbox was out of memory", file=sys.stderr)
    return result.exit_code


def _read(*, terminal: bool) -> bytes:
    # Nothing is the end, as of a terminal that is gone.
    try:
        return os.read(0, FRAME_MAX)
    except OSError as error:
        if error.errno != errno.EIO or not terminal:
            raise
        return b""


def _writer(fd: int) -> Callable[[bytes], None]:
    terminal = os.isatty(fd)

    def write(data: bytes) -> None:
        try:
            while data:
                data = data[os.write(fd, data) :]
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise
            if error.errno != errno.EIO or not terminal:  # what a terminal that is gone was to show is lost
                raise HostError(error.errno or 0, f"write standard {('output', 'error')[fd - 1]}") from None

    return write
