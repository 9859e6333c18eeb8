# SPDX-License-Identifier: Apache-2.0
"""Sandboxes: any command of any image in a VM of its own, from Python. See docs/sandbox.md."""

from __future__ import annotations

from vmm.sandbox.errors import (
    AgentError,
    CommandError,
    CommandKilled,
    CommandNotExecutable,
    CommandNotFound,
    CommandOutOfMemory,
    CommandTimeout,
    SandboxError,
    SandboxGone,
)
from vmm.sandbox.files import Change, Entry, Files
from vmm.sandbox.process import Process, Result
from vmm.sandbox.sandbox import Sandbox
from vmm.sandbox.session import Session, attach

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.sandbox.aio import AsyncFiles, AsyncProcess, AsyncSandbox

__all__ = [
    "AgentError", "AsyncFiles", "AsyncProcess", "AsyncSandbox",
    "Change", "CommandError", "CommandKilled", "CommandNotExecutable", "CommandNotFound",
    "CommandOutOfMemory", "CommandTimeout", "Entry", "Files", "Process", "Result", "Sandbox", "SandboxError",
    "SandboxGone", "Session", "attach",
]  # fmt: skip


def __getattr__(name: str) -> object:
    # asyncio is not imported for programs without it.
    if not name.startswith("Async") or name not in __all__:
        raise AttributeError(f"module 'vmm.sandbox' has no attribute {name!r}")
    from vmm.sandbox import aio

    return getattr(aio, name)
