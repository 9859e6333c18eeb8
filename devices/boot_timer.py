# SPDX-License-Identifier: Apache-2.0
"""Firecracker's boot timer: the guest writes one byte when it has booted, and the log tells the time.

Source: Firecracker 1.12.1 as it runs: the first of the virtio-mmio windows, 0xd0000000, is the timer's.
"""

from __future__ import annotations

import time

from vmm import logger

BOOTED = 123
MOST = 10  # lines


class BootTimer:
    """Bus device; the time runs from when it is made.

    A write of ``BOOTED``, a byte at the first address, logs one line at level Info, ten times at most: no guest can
    flood the log. Anything else is ignored. Reads as 0.
    """

    __slots__ = ("_cpu", "_left", "_start")

    def __init__(self) -> None:
        self._start = time.monotonic_ns()
        self._cpu = time.process_time_ns()
        self._left = MOST

    def read(self, offset: int, data: memoryview) -> None:
        data[:] = bytes(len(data))

    def write(self, offset: int, data: memoryview) -> None:
        if offset == 0 and len(data) == 1 and data[0] == BOOTED and self._left:
            self._left -= 1
            wall = (time.monotonic_ns() - self._start) // 1000
            cpu = (time.process_time_ns() - self._cpu) // 1000
            logger.info(f"Guest-boot-time = {wall:6} us {wall // 1000} ms, {cpu:6} CPU us {cpu // 1000} CPU ms")
