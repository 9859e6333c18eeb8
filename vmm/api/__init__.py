# SPDX-License-Identifier: Apache-2.0
"""The REST API on a unix socket: Firecracker 1.12's, and a few calls of our own in its style."""

from __future__ import annotations

from vmm.errors import VmmError

API_VERSION = "1.12.1"


class ApiError(VmmError):
    """A request is refused with that ``fault_message`` and status, and nothing of it was done."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class FatalError(ApiError):
    """Refused, and the process ends with status 1 once that was answered: nothing is left to try again with."""


class refusing:
    """A context in which what is wrong with the request or the host becomes an ``ApiError`` that begins so."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, VmmError) and not isinstance(error, ApiError):
            raise ApiError(f"{self._prefix}: {error}") from error
