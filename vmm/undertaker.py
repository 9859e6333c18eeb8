# SPDX-License-Identifier: Apache-2.0
"""Closes what takes long to close: the last descriptor of a VM waits 15 to 20 ms for KVM's readers (SRCU)."""

from __future__ import annotations

import os
import threading
from _queue import SimpleQueue  # `queue` itself imports more, on the path of a launch

from vmm.errors import HostError
from vmm.threads import spawn

_queue: SimpleQueue[int | tuple[int] | threading.Event] = SimpleQueue()  # in a tuple: to be synced before
_thread: threading.Thread | None = None
_pid = 0
_lock = threading.Lock()


def bury(fds: list[int]) -> None:
    """Close `fds` soon, in this order, on a thread that waits in the caller's place."""
    for fd in fds:
        if _is_there():
            _queue.put(fd)
        else:
            os.close(fd)


def sync_and_bury(fd: int) -> None:
    """Close the file `fd` soon, and have what is not on the disk yet written before; nobody hears of a failure."""
    if _is_there():
        _queue.put((fd,))
    else:
        _sync_and_close(fd)


def _is_there() -> bool:
    # Whether there is a thread; where there is none to be had the caller waits itself.
    global _thread, _pid
    with _lock:
        if _thread is None or _pid != os.getpid():  # a forked child has none of its parent's threads
            try:
                _thread = spawn("undertaker", "undertaker", _run, unconfined=lambda error: _run())
                _pid = os.getpid()
            except (RuntimeError, HostError):
                _thread = None
        return _thread is not None


def _sync_and_close(fd: int) -> None:
    try:
        os.fsync(fd)
    except OSError:
        pass
    os.close(fd)


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
        elif isinstance(task, tuple):
            _sync_and_close(*task)
        else:
            task.set()
