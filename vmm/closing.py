# SPDX-License-Identifier: Apache-2.0
"""What owns something of the host's: its users close it, or have a ``with`` do that."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol, Self, TypeVar

    class Closable(Protocol):
        def close(self) -> None: ...

    _T = TypeVar("_T", bound=Closable)


class Closing:
    """A context manager that closes itself at the end."""

    __slots__ = ()

    def close(self) -> None:
        """Give everything back; idempotent."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Closers(list["Callable[[], object]"]):
    """Calls that undo what an owner has made. ``contextlib.ExitStack`` is the like, but a start does not import it."""

    __slots__ = ()

    def own(self, thing: _T) -> _T:
        """Close `thing`, too; returns it."""
        self.append(thing.close)
        return thing

    def close(self) -> None:
        """Make the calls, the last one first; idempotent. One that raises keeps no other from being made.

        :raises BaseException: the first one's
        """
        failure: BaseException | None = None
        while self:
            try:
                self.pop()()
            except BaseException as error:
                failure = failure or error
        if failure is not None:
            raise failure
