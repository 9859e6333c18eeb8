# SPDX-License-Identifier: Apache-2.0
"""How a VM ends, and the exit status that says so."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import ClassVar


class StopReason:
    """Why a VM stopped. Compare reasons with ``is``. ``StopReason(value)`` finds one.

    This is not an ``Enum``, because importing that is a tenth of a start.

    :ivar name: its name below
    :ivar value: its text in messages and in the API
    :ivar status: the exit status of ``pyvmm run``; 1 is a host failure, 2 bad configuration. ``GUEST_EXIT`` has its own
    """

    POWEROFF: ClassVar[StopReason]
    RESET: ClassVar[StopReason]
    GUEST_EXIT: ClassVar[StopReason]
    PANIC: ClassVar[StopReason]
    TRIPLE_FAULT: ClassVar[StopReason]
    INTERNAL_ERROR: ClassVar[StopReason]
    FAIL_ENTRY: ClassVar[StopReason]
    REQUESTED: ClassVar[StopReason]

    name: str
    value: str
    status: int

    def __new__(cls, value: str) -> StopReason:
        if value not in _REASONS:
            raise ValueError(f"{value!r} is not a stop reason; allowed: {', '.join(_REASONS)}")
        return _REASONS[value]

    def __repr__(self) -> str:
        return f"StopReason.{self.name}"

    def __reduce__(self) -> tuple[object, ...]:
        return StopReason, (self.value,)  # a copy, pickled or not, is the one there is


_REASONS: dict[str, StopReason] = {}
for _name, _value, _status in (
    ("POWEROFF", "power-off", 0),
    ("RESET", "reset", 80),
    ("GUEST_EXIT", "guest exit", 0),
    ("PANIC", "panic", 81),
    ("TRIPLE_FAULT", "triple fault", 82),
    ("INTERNAL_ERROR", "KVM internal error", 83),
    ("FAIL_ENTRY", "KVM entry failure", 84),
    ("REQUESTED", "requested", 130),
):
    _REASONS[_value] = _reason = object.__new__(StopReason)
    _reason.name, _reason.value, _reason.status = _name, _value, _status
    setattr(StopReason, _name, _reason)


class Exit:
    """How a VM ended. Two with the same values are equal.

    :param reason: why it ended
    :param code: the guest's own exit code, for ``GUEST_EXIT``, 0 to 255
    :param detail: one line for people; may be empty
    """

    __slots__ = ("code", "detail", "reason")

    def __init__(self, reason: StopReason, code: int = 0, detail: str = "") -> None:
        self.reason = reason
        self.code = code
        self.detail = detail

    @property
    def status(self) -> int:
        """The exit status with which ``pyvmm run`` reports it."""
        return self.code if self.reason is StopReason.GUEST_EXIT else self.reason.status

    def __str__(self) -> str:
        code = f" {self.code}" if self.reason is StopReason.GUEST_EXIT else ""
        return f"{self.reason.value}{code}" + (f": {self.detail}" if self.detail else "")

    def __repr__(self) -> str:
        return f"Exit({self.reason!r}, {self.code}, {self.detail!r})"

    def _values(self) -> tuple[StopReason, int, str]:
        return self.reason, self.code, self.detail

    def __eq__(self, other: object) -> bool:
        return self._values() == other._values() if isinstance(other, Exit) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._values())


class Stop(Exception):
    """Raised by a bus device during a guest's access. The VM ends, and the guest runs no further instruction.

    It has the parameters of :class:`Exit`. ``Machine.wait`` then returns its ``exit``.
    """

    def __init__(self, reason: StopReason, code: int = 0, detail: str = "") -> None:
        if not isinstance(reason, StopReason):
            raise TypeError(f"Stop: reason must be a StopReason, such as StopReason.POWEROFF, not {reason!r:.60}")
        self.exit = Exit(reason, code, detail)
        super().__init__(str(self.exit))
