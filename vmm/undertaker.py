# SPDX-License-Identifier: Apache-2.0
"""Closes descriptors in the background: the last one of a VM waits 15 to 20 ms for KVM's readers (SRCU). It also unmaps
memory, and waits for the disk, while its caller does something else.
"""

from __future__ import annotations

import os
import threading
from _queue import SimpleQueue  # `queue` itself imports more, on the path of a launch

from vmm._mapping import move_aside, unmap
from vmm.errors import HostError
from vmm.threads import spawn

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from mmap import mmap

_MOST = 64  # tasks that wait; whoever comes then does its task itself, so that memory does not run out
_queue: SimpleQueue[Callable[[], object]] = SimpleQueue()
_thread: threading.Thread | None = None
_pid = 0
_lock = threading.Lock()
_leaving = False


def leave() -> None:
    """The process ends next, and its end closes and unmaps all: nothing is buried from here on."""
    global _leaving
    _leaving = True


def bury(fd: int) -> None:
    """Close `fd` soon, on a thread that waits in the caller's place; failures are not reported."""
    if not _leaving:
        _do(lambda: os.close(fd))


def bury_from_finalizer(
    fd: int, close: Callable[[int], None] = os.close, getpid: Callable[[], int] = os.getpid
) -> None:
    """The same for one, without a lock: the garbage collector may call a finalizer anywhere, in this module, too.

    :param close: not looked up at the call, nor `getpid`: at the interpreter's end, modules are empty
    """
    if _thread is not None and _queue and _pid == getpid():
        _queue.put(lambda: close(fd))
    else:
        close(fd)


def close_mapping(mapping: mmap, *, at_once: bool) -> None:
    """Close a mapping, at once or soon. One that a view is left of stays until the view goes."""

    def close() -> None:
        try:
            mapping.close()
        except BufferError:
            pass

    if at_once:
        close()
    elif not _leaving:
        _do(close)


def bury_pages(address: int, size: int) -> None:
    """Take the pages of a shared mapping away; they are unmapped soon. The mapping stays, without pages."""
    if not _leaving and (aside := move_aside(address, size)):
        _do(lambda: unmap(aside, size))


def be_there() -> None:
    """Start the thread, for whoever will need it soon and has the time now."""
    _do(lambda: None)


def sync(fd: int) -> Callable[[], None]:
    """Begin to write what the disk has not yet of the file `fd`, which stays open meanwhile.

    :returns: what waits until that is done, and raises its OSError
    """
    done: SimpleQueue[OSError | None] = SimpleQueue()

    def run() -> None:
        try:
            os.fsync(fd)
            done.put(None)
        except OSError as error:
            done.put(error)

    def wait() -> None:
        if (error := done.get()) is not None:
            raise error

    _do(run)
    return wait


def sync_and_bury(fd: int) -> None:
    """Write the file `fd` to the disk and close it, in the background; failures are not reported."""

    def run() -> None:
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    _do(run)


def _do(task: Callable[[], object]) -> None:
    global _thread, _pid
    with _lock:
        if _thread is None or _pid != os.getpid():  # a forked child has none of its parent's threads
            try:
                _thread = spawn("undertaker", "undertaker", _run, unconfined=lambda error: _run())
                _pid = os.getpid()
            except (RuntimeError, HostError):
                _thread = None  # no thread can be made: the caller waits itself
        there = _thread is not None
    if there and _queue.qsize() < _MOST:
        _queue.put(task)
    else:
        _perform(task)


def _perform(task: Callable[[], object]) -> None:
    try:
        task()
    except OSError:
        pass  # a close, as on a network's full disk: the descriptor is gone all the same


def wait() -> None:
    """Return once all that was given to ``bury`` before is closed."""
    if _thread is not None and _pid == os.getpid():
        done = threading.Event()
        _queue.put(done.set)
        done.wait()


def _run() -> None:
    while True:
        _perform(_queue.get())
