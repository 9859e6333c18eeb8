# SPDX-License-Identifier: Apache-2.0
"""Errors of a sandbox, by cause. Errors of files in the guest are OSErrors, like those of the host."""

from __future__ import annotations

from vmm.errors import VmmError, line

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.sandbox.process import Result


class SandboxError(VmmError):
    """The root of the errors below."""


class SandboxGone(SandboxError):
    """The sandbox or its agent has ended; the message says why. All waiting calls raise it at once."""


class AgentError(SandboxError):
    """The guest's agent sent an invalid answer."""


class CommandTimeout(SandboxError, TimeoutError):
    """A command, or a file operation, was not done in time; the command was killed.

    :ivar result: the command's output until then, or None
    """

    def __init__(self, message: str, result: Result | None = None) -> None:
        super().__init__(message)
        self.result = result


class CommandError(SandboxError):
    """A command's exit status is not 0.

    :ivar result: its :class:`vmm.sandbox.Result`
    """

    def __init__(self, result: Result) -> None:
        said = result.stderr.strip().splitlines()
        super().__init__(f"{line(result.command)}: {result.cause}" + (f": {line(said[-1])}" if said else ""))
        self.result = result


class CommandNotFound(CommandError):
    """The program does not exist: status 127."""


class CommandNotExecutable(CommandError):
    """The file is not a program, or permission is denied: status 126."""


class CommandKilled(CommandError):
    """A signal ended the command."""


class CommandOutOfMemory(CommandKilled):
    """The guest's kernel killed the command because memory ran out."""
