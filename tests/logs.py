# SPDX-License-Identifier: Apache-2.0
"""The log between tests, which have one process."""

from __future__ import annotations

from vmm import logger


def forget_log() -> None:
    """Let the logger be as before its first ``configure``."""
    before, logger._settings, logger._missed = logger._settings, logger._Settings(), 0
    logger._tell_watchers()
    if before.sink is not None:
        before.sink.close()
