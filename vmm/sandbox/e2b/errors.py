# SPDX-License-Identifier: Apache-2.0
"""Errors by E2B's names. Each is an error of vmm.sandbox, too."""

from __future__ import annotations

import contextlib
import errno

from vmm.errors import ConfigError, VmmError
from vmm.sandbox import errors

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmm.sandbox.process import Result


class SandboxException(errors.SandboxError):
    """The root of the errors below."""


class TimeoutException(SandboxException, errors.CommandTimeout):
    """It was not done in time."""


class InvalidArgumentException(SandboxException, ValueError):
    """A value that cannot be."""


class NotEnoughSpaceException(SandboxException):
    """The sandbox's files are as large as they may be together."""


class NotFoundException(SandboxException):
    """What was asked for does not exist."""


class FileNotFoundException(NotFoundException):
    """The file does not exist."""


class SandboxNotFoundException(NotFoundException):
    """The sandbox does not exist."""


class SandboxNotRunningException(TimeoutException):
    """The sandbox has ended; the message says why."""


class CommandExitException(SandboxException, errors.CommandError):
    """A command's exit status is not 0.

    :ivar stdout: what it wrote, as text; `stderr` likewise
    :ivar exit_code: its status
    :ivar error: how it ended, in words
    """

    def __init__(self, result: Result) -> None:
        errors.CommandError.__init__(self, result)
        self.stdout, self.stderr = result.stdout, result.stderr
        self.exit_code = result.exit_code
        self.error = result.cause


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Our errors as E2B's."""
    try:
        yield
    except SandboxException:
        raise
    except errors.CommandTimeout as error:
        raise TimeoutException(str(error), error.result) from error
    except errors.SandboxGone as error:
        raise SandboxNotRunningException(str(error)) from error
    except ConfigError as error:
        raise InvalidArgumentException(str(error)) from error
    except (IsADirectoryError, NotADirectoryError) as error:
        raise InvalidArgumentException(str(error)) from error
    except FileNotFoundError as error:
        raise FileNotFoundException(str(error)) from error
    except (VmmError, OSError) as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise (NotEnoughSpaceException if full else SandboxException)(str(error)) from error
