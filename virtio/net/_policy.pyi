# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterable, Sequence

REASONS: tuple[str, ...]
MOST_LEARNED: int

_Rule = tuple[bytes, int, int, int]

class Policy:
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
        guest_bits: int = 32,
    ) -> None: ...
    def learn(self, entries: Iterable[tuple[bytes, int, int, int]]) -> None: ...
    def learned(self) -> list[tuple[bytes, int, int, int, int]]: ...
    def allows(self, address: bytes) -> bool: ...
    @property
    def pointer(self) -> int: ...
    @property
    def counters(self) -> dict[str, int]: ...
