# SPDX-License-Identifier: Apache-2.0
from typing import Self

class Window:
    size: int
    repairs: int
    def __new__(cls, size: int) -> Self: ...
    @property
    def address(self) -> int: ...
    def repair(self) -> bool: ...
