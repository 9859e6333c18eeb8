# SPDX-License-Identifier: Apache-2.0
"""Waiting for what comes by itself: for every layer's tests."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PATIENCE = 30.0  # seconds; only a test that fails waits so long


def until(found: Callable[[], Any], what: Callable[[], object] = lambda: "") -> Any:
    """What `found` gives once it gives something true.

    :param what: is said where that does not come
    """
    deadline = time.monotonic() + PATIENCE
    while not (something := found()):
        assert time.monotonic() < deadline, what() or found
        time.sleep(0.001)
    return something


def has_ended(process: int) -> bool:
    """Whether a process is gone, or a zombie; whoever is its parent may reap it at any moment."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):  # before it was opened, or before it was read
        return True
