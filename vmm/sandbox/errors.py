# SPDX-License-Identifier: Apache-2.0
"""What a sandbox fails with, by cause. Errors of the guest's files are OSErrors, as those of the host's are."""

from __future__ import annotations

from vmm.errors import VmmError, line

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.sandbox.process import Result


class SandboxError(VmmError):
    """The root of the errors below."""


class SandboxGone(SandboxError):
    """The sandbox has ended, or its agent has; says why. Every call that waits for it fails so at once."""


class AgentError(SandboxError):
    """The guest answered what no agent answers."""


class CommandTimeout(SandboxError, TimeoutError):
    """A command, or a file operation, was not done in time; the command was killed.

    :ivar result: what a command had written until then, or None
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
    """There is no such program: status 127."""


class CommandNotExecutable(CommandError):
    """It is no program, or not permitted: status 126."""


class CommandKilled(CommandError):
    """A signal ended it."""


class CommandOutOfMemory(CommandKilled):
    """The guest's kernel killed it, because there was no memory left."""
