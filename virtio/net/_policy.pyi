# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterable, Sequence

REASONS: tuple[str, ...]
MOST_LEARNED: int

_Rule = tuple[bytes, int, int, int]

class Policy:
    """What one guest may reach."""

    only_special: bool
    def __init__(
        self,
        guest: bytes = ...,
        gateway: bytes = ...,
        resolver: bytes = ...,
        allow: Sequence[_Rule] = (),
        deny: Sequence[_Rule] = (),
        *,
        only_special: bool = False,
    ) -> None: ...
    def learn(self, entries: Iterable[tuple[bytes, int, int]], seconds: int) -> None:
        """Allow addresses for so long; one that is there keeps the longer time."""

    def learned(self) -> list[tuple[bytes, int, int, int]]:
        """What was learned: a list of ``(address, first, last, seconds left)``."""

    def allows(self, address: bytes, port: int = 0) -> bool:
        """Whether a rule lets the guest reach an address, of 16 bytes, at any port, or at one."""

    def verdict(self, frame: bytes | bytearray) -> str:
        """What would become of `frame`: ``allowed``, ``resolver``, or a reason of `REASONS`."""

    @property
    def pointer(self) -> int:
        """Of the C struct Judge, for the device's thread; valid as long as this object."""

    @property
    def counters(self) -> dict[str, int]:
        """Frames and bytes by what became of them."""
