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

__all__ = [
    "AgentError", "Change", "CommandError", "CommandKilled", "CommandNotExecutable", "CommandNotFound",
    "CommandOutOfMemory", "CommandTimeout", "Entry", "Files", "Process", "Result", "Sandbox", "SandboxError",
    "SandboxGone", "Session", "attach",
]  # fmt: skip
