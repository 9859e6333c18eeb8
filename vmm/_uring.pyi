# SPDX-License-Identifier: Apache-2.0
def probe() -> int:
    """Whether there are rings: 0, or why there are none, as an error number."""

def stock(count: int) -> int:
    """Make up to `count` rings, 64 at most; from here on this process makes no other, and gives them out by turns.

    :returns: how many there are
    """
