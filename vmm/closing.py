# SPDX-License-Identifier: Apache-2.0
"""What owns something of the host's: its users close it, or have a ``with`` do that."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self


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
