# SPDX-License-Identifier: Apache-2.0
"""How a VM ends, and the exit status that says so."""

from __future__ import annotations

from enum import Enum


class StopReason(Enum):
    """Why a VM stopped; the value is the name used in messages and in the API."""

    POWEROFF = "power-off"
    RESET = "reset"
    GUEST_EXIT = "guest exit"
    PANIC = "panic"
    TRIPLE_FAULT = "triple fault"
    INTERNAL_ERROR = "KVM internal error"
    FAIL_ENTRY = "KVM entry failure"
    REQUESTED = "requested"


# Exit statuses of `pyvmm run`; 1 is a host failure, 2 bad configuration, 130 a VM ended from the keyboard.
EXIT_STATUS = {
    StopReason.POWEROFF: 0,
    StopReason.RESET: 80,
    StopReason.PANIC: 81,
    StopReason.TRIPLE_FAULT: 82,
    StopReason.INTERNAL_ERROR: 83,
    StopReason.FAIL_ENTRY: 84,
    StopReason.REQUESTED: 130,
}


class Stop(Exception):
    """Raised by a bus device inside a guest's access: the VM ends, and the guest runs no further instruction.

    :param reason: why
    :param code: the guest's own exit code, for ``GUEST_EXIT``, 0 to 255
    :param detail: one line for a person, may be empty
    """

    def __init__(self, reason: StopReason, code: int = 0, detail: str = "") -> None:
        super().__init__(reason.value)
        self.reason = reason
        self.code = code
        self.detail = detail

    @property
    def status(self) -> int:
        """The process exit status this end maps to."""
        return self.code if self.reason is StopReason.GUEST_EXIT else EXIT_STATUS[self.reason]

    def __str__(self) -> str:
        code = f" {self.code}" if self.reason is StopReason.GUEST_EXIT else ""
        return f"{self.reason.value}{code}" + (f": {self.detail}" if self.detail else "")
