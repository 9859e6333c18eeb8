# SPDX-License-Identifier: Apache-2.0
"""E2B's Python interface to sandboxes of this host: ``from vmm.sandbox.e2b import Sandbox``, not ``from e2b``.

Names, parameters and results are those of E2B's SDK 2.63; docs/sandbox.md says what differs, and what there is not.
``Sandbox.native`` is the :class:`vmm.Sandbox` below it.
"""

from __future__ import annotations

from vmm.sandbox.e2b.aio import AsyncCommandHandle, AsyncSandbox, AsyncWatchHandle
from vmm.sandbox.e2b.commands import CommandHandle, CommandResult, ProcessInfo, PtyOutput, PtySize, Stderr, Stdout
from vmm.sandbox.e2b.errors import (
    CommandExitException,
    FileNotFoundException,
    InvalidArgumentException,
    NotEnoughSpaceException,
    NotFoundException,
    SandboxException,
    SandboxNotFoundException,
    SandboxNotRunningException,
    TimeoutException,
)
from vmm.sandbox.e2b.files import EntryInfo, FilesystemEvent, FilesystemEventType, FileType, WatchHandle, WriteInfo
from vmm.sandbox.e2b.sandbox import ALL_TRAFFIC, Sandbox, SandboxInfo, SandboxState

__all__ = [
    "ALL_TRAFFIC", "AsyncCommandHandle", "AsyncSandbox", "AsyncWatchHandle", "CommandExitException", "CommandHandle",
    "CommandResult", "EntryInfo", "FileNotFoundException", "FileType", "FilesystemEvent", "FilesystemEventType",
    "InvalidArgumentException", "NotEnoughSpaceException", "NotFoundException", "ProcessInfo", "PtyOutput", "PtySize",
    "Sandbox", "SandboxException", "SandboxInfo", "SandboxNotFoundException", "SandboxNotRunningException",
    "SandboxState", "Stderr", "Stdout", "TimeoutException", "WatchHandle", "WriteInfo",
]  # fmt: skip
