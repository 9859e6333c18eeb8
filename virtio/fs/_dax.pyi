from typing import Self

# SPDX-License-Identifier: Apache-2.0
class Window:
    """A window of files in guest physical memory; safe from any thread."""

    size: int
    mapped: int
    repairs: int
    def __new__(cls, size: int) -> Self: ...
    @property
    def address(self) -> int:
        """Where this process has it, for ``KVM_SET_USER_MEMORY_REGION``."""
    def repair(self) -> bool:
        """Put memory where a mapped file has ended meanwhile; whether there was such a place."""
