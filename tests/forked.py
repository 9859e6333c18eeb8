# SPDX-License-Identifier: Apache-2.0
"""``fork`` for tests that go on in the child."""

from __future__ import annotations

import os
import threading
import time

PATIENCE = 2.0  # seconds; io_uring's own threads, which do no harm, may stay longer


def fork() -> int:
    """``os.fork`` once no thread is ending, which ``Thread.join`` does not wait for.

    GCC 12's AddressSanitizer does not take its allocator's locks at a fork. If a thread that ends has one, the child
    waits for it for ever.
    """
    if os.environ.get("PYVMM_SANITIZER") != "address":
        return os.fork()
    deadline = time.monotonic() + PATIENCE
    while len(os.listdir("/proc/self/task")) > threading.active_count() and time.monotonic() < deadline:
        time.sleep(0.001)
    return os.fork()
