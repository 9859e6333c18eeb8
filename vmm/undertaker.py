# SPDX-License-Identifier: Apache-2.0
"""Closes what takes long to close: the last descriptor of a VM waits 15 to 20 ms for KVM's readers (SRCU)."""

from __future__ import annotations

import os
import threading
from _queue import SimpleQueue  # `queue` itself imports more, on the path of a launch

from vmm.errors import HostError
from vmm.threads import spawn

_queue: SimpleQueue[int | threading.Event] = SimpleQueue()
_thread: threading.Thread | None = None
_pid = 0
_lock = threading.Lock()


def bury(fds: list[int]) -> None:
    """Close `fds` soon, in this order, on a thread that waits in the caller's place."""
    global _thread, _pid
    with _lock:
        if _thread is None or _pid != os.getpid():  # a forked child has none of its parent's threads
            try:
                _thread = spawn("undertaker", "undertaker", _run, unconfined=lambda error: _run())
                _pid = os.getpid()
            except (RuntimeError, HostError):
                _thread = None  # there is none to be had: the caller waits itself
        bury_one = os.close if _thread is None else _queue.put
    for fd in fds:
        bury_one(fd)


def wait() -> None:
    """Return once all that was given to ``bury`` before is closed."""
    if _thread is not None and _pid == os.getpid():
        done = threading.Event()
        _queue.put(done)
        done.wait()


def _run() -> None:
    while True:
        task = _queue.get()
        if isinstance(task, int):
            os.close(task)
        else:
            task.set()
