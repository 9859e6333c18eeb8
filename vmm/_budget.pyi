# SPDX-License-Identifier: Apache-2.0
KEPT: int

def set_descriptor_limit(limit: int) -> None:
    """Divide `limit` descriptors: KEPT are no guest's, a quarter of the others is not for look-ups."""

def raise_descriptor_limit() -> int:
    """Let this process have as many descriptors as the host allows it, and divide them; how many there are."""

class Budget:
    """An amount that many holders share; safe from any thread."""

    limit: int
    def __init__(self, limit: int) -> None: ...
    @property
    def used(self) -> int:
        """What they have now."""
    def ask(self, amount: int) -> bool:
        """Take `amount`; False: there is not so much left."""
    def put_back(self, amount: int) -> None:
        """Give `amount` back, which was taken before."""
