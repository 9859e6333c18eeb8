# SPDX-License-Identifier: Apache-2.0
"""Commands and files of a sandbox of this process, or of another process by name."""

from __future__ import annotations

import functools
import os

from vmm.closing import Closing
from vmm.config.option import check_call
from vmm.errors import ConfigError, line
from vmm.sandbox import registry
from vmm.sandbox.channel import F_DONE, F_FAILED, Deadline, Link, failure, out_of_turn
from vmm.sandbox.errors import SandboxError
from vmm.sandbox.files import Files
from vmm.sandbox.process import DEFAULT_LIMIT, Process, Result

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    from vmm.sandbox.channel import Parameter
    from vmm.sandbox.e2b.commands import Commands
    from vmm.sandbox.ports import Provided, Published


def attach(name: str) -> Session:
    """A running sandbox of another process of this user, by name.

    :raises ConfigError: no sandbox of this name is running
    """
    about = registry.about(name)
    return Session(Link(registry.socket_of(name), lambda: registry.why_ended(name)), about)


def check_port(field: str, port: int, *, any_free: bool = False) -> None:
    """Refuse what cannot be a TCP port.

    :param any_free: 0 is allowed
    :raises ConfigError: `port` cannot be one
    """
    if not (0 if any_free else 1) <= port <= 65535:
        raise ConfigError(field, port, "must be 1 to 65535" + (", or 0 for any free one" if any_free else ""))


class Session(Closing):
    """What can be done in a sandbox, wherever it runs. ``attach`` makes one, and :class:`vmm.sandbox.Sandbox` is one.

    :param about: ``env``, ``cwd`` and ``user`` of commands that say nothing else
    """

    def __init__(self, link: Link, about: dict[str, Any]) -> None:
        self._link = link
        self._about = about
        self.files = Files(link)

    def run(
        self,
        command: str | Sequence[str | os.PathLike[str]],
        *,
        input: bytes | str | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        user: str | int | None = None,
        limits: Mapping[str, int | tuple[int, int]] | None = None,
        timeout: float | None = 60,
        limit: int = DEFAULT_LIMIT,
        check: bool = False,
        on_stdout: Callable[[bytes], object] | None = None,
        on_stderr: Callable[[bytes], object] | None = None,
    ) -> Result:
        """Run a command to its end. Parameters are those of ``exec``, and:

        :param input: data for its standard input; None: it is closed
        :param timeout: seconds; None: no limit
        :param check: a status other than 0 is an error
        :param on_stdout: called with each piece of output as it comes; `on_stderr` likewise
        :raises CommandTimeout: the command took too long, and was killed
        :raises CommandError: with `check`: its status is not 0; the class says why
        :raises SandboxGone: the sandbox has ended
        """
        check_call("Sandbox.run", Session.run, locals())
        deadline = Deadline(timeout)
        with Process(
            self._link, self._about, command, limit, deadline, env=env, cwd=cwd, user=user, limits=limits,
            input=input is not None, quiet=True,
        ) as process:  # fmt: skip
            process.stdout.on_data, process.stderr.on_data = on_stdout, on_stderr
            result = process.communicate_until(deadline, input)
        return result.check() if check else result

    def exec(
        self,
        command: str | Sequence[str | os.PathLike[str]],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        user: str | int | None = None,
        terminal: tuple[int, int] | None = None,
        limits: Mapping[str, int | tuple[int, int]] | None = None,
        keep: bool = False,
        timeout: float | None = 60,
        limit: int = DEFAULT_LIMIT,
    ) -> Process:
        """Start a command.

        :param command: a line for /bin/sh, or a program and its arguments
        :param env: added to that of the sandbox
        :param cwd: its directory
        :param user: ``NAME``, ``UID`` or ``USER:GROUP``
        :param terminal: rows and columns of a terminal that it gets; None: pipes
        :param limits: limits by resource, such as ``{"nofile": 100, "cpu": (1, 2)}``; see setrlimit(2)
        :param keep: let it go on when the handle is closed; otherwise it is killed then
        :param timeout: seconds that it may take to start
        :param limit: bytes of each stream that are kept; what is more is thrown away and told
        :raises ConfigError: a value that cannot be
        :raises SandboxGone: the sandbox has ended
        """
        check_call("Sandbox.exec", Session.exec, locals())
        return Process(
            self._link, self._about, command, limit, Deadline(timeout), env=env, cwd=cwd, user=user, terminal=terminal,
            limits=limits, keep=keep,
        )  # fmt: skip

    @property
    def program(self) -> list[str]:
        """The program that a container image names, with its arguments; empty: it names none."""
        return list(self._about.get("program", ()))

    @property
    def entrypoint(self) -> list[str]:
        """The part of ``program`` that stays if its arguments are others; may be empty."""
        return list(self._about.get("entrypoint", ()))

    def close(self) -> None:
        """Close the connections to the agent that are kept for the next call; idempotent."""
        self._link.close()

    @functools.cached_property
    def commands(self) -> Commands:
        """The same by E2B's names."""
        from vmm.sandbox.e2b.commands import Commands

        return Commands(self)

    def connect(self, port: int, timeout: float | None = 10) -> socket.socket:
        """Connect to a TCP port of the guest's loopback.

        :returns: a stream, yours to close
        :raises ConfigError: `port` is not 1 to 65535
        :raises ConnectionRefusedError: no program of the guest listens there
        """
        check_call("Sandbox.connect", Session.connect, locals())
        check_port("port", port)
        deadline, doing = Deadline(timeout), f"port {port}"
        with self._link.connect(deadline, doing) as channel:
            channel.request(deadline, doing, "tcp", port=port)
            kind, data = channel.read(deadline, doing, last=True)
            if kind == F_FAILED:
                number, _ = failure(data)
                raise OSError(number, os.strerror(number), doing)
            if kind != F_DONE:
                raise out_of_turn(doing)
            return channel.take()

    def publish(self, port: int, host_port: int = 0, *, host: str = "127.0.0.1") -> Published:
        """Let programs of the host reach a TCP port of the guest's loopback.

        :param host_port: port of the host; 0: any free one
        :param host: address to listen on
        :returns: yours to close; its ``address`` says where it listens
        :raises ConfigError: a port that cannot be
        :raises HostError: the host's port is not available
        :raises SandboxGone: the sandbox has ended
        """
        from vmm.sandbox.ports import Published

        check_call("Sandbox.publish", Session.publish, locals())
        check_port("port", port)
        check_port("host_port", host_port, any_free=True)
        self._link.must_run()
        return Published(self, port, host, host_port)

    def provide(self, host_port: int, port: int | None = None, *, host: str = "127.0.0.1") -> Provided:
        """Let programs of the guest reach a TCP port of this host at a port of their own loopback.

        :param port: port in the guest; 0: any free one, None: the same
        :param host: address of the host's port
        :returns: yours to close; its ``port`` says where it listens
        :raises ConfigError: a port that cannot be
        :raises OSError: the guest's port is not available
        :raises SandboxGone: the sandbox has ended
        """
        from vmm.sandbox.ports import Provided

        check_call("Sandbox.provide", Session.provide, locals())
        check_port("host_port", host_port)
        port = host_port if port is None else port
        check_port("port", port, any_free=True)
        self._link.must_run()
        return Provided(self._link, host_port, port, host)

    def _ask(self, deadline: Deadline, verb: str, **parameters: Parameter) -> None:
        with self._link.take(deadline, verb) as channel:
            channel.request(deadline, verb, verb, **parameters)
            kind, data = channel.read(deadline, verb)
            self._link.keep(channel)
        if kind == F_FAILED:
            number, what = failure(data)
            raise SandboxError(f"{verb}: {line(what)}: {os.strerror(number)}")
        if kind != F_DONE:
            raise out_of_turn(verb)
