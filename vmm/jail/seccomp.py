# SPDX-License-Identifier: Apache-2.0
"""Put a seccomp filter on each thread: an allowlist for each kind of thread (``vmm.jail.rules``).

Every thread that ``vmm.threads.spawn`` starts puts on the filter of its kind before anything else. ``guard`` arranges
this, and does not affect existing threads. For ``pyvmm serve``, ``enable`` first puts the filter ``base`` on the
whole process.

A filter can only be narrowed, and a new thread inherits its maker's. So a thread with a filter, such as the vCPU that
starts a driver, makes no threads. ``fc_spawn`` makes them: its filter allows what any kind may do, and in a program
that embeds pyvmm it has none.

A system call that is not allowed ends the process with status 148 and one line on stderr that names it.
"""

from __future__ import annotations

import errno
import gc
import os
import threading
from _queue import SimpleQueue  # `queue` itself imports more, on the path of a launch

from vmm import logger, threads
from vmm.errors import host_errors
from vmm.jail import _seccomp
from vmm.signals import deaf

# By kind of thread, whether it opens no file.
KINDS = _seccomp.kinds()
STATUS_BAD_SYSCALL = 148
# A ring for each queue of the disks that a machine may have; further ones do without io_uring.
RINGS = 19


class Filters:
    """The filters of this process; ``vmm.threads`` calls ``start`` and ``install``.

    :param alone: no code but ours runs in this process: ``fc_spawn`` has a filter, too
    :param whole: there is one on every thread of the process already
    """

    def __init__(self, *, alone: bool, whole: bool = False) -> None:
        self.alone = alone
        self._whole = whole
        self._maker = 0  # the process that has fc_spawn: a forked child has none of its parent's threads
        self._making = threading.Lock()
        self._wanted: SimpleQueue[tuple[threading.Thread, SimpleQueue[BaseException | None]]] = SimpleQueue()

    def install(self, kind: str, below: tuple[int, bool] | None = None) -> None:
        """Put the filter of `kind` over what the calling thread has; it stays.

        :param below: as for ``vmm.threads.spawn``
        :raises HostError: the kernel refused it
        """
        with host_errors(f"confine a thread of kind {kind}"):
            if kind in KINDS:  # what makes threads would hand it down
                _seccomp.confine(KINDS[kind] or below is not None, *(below or ()))
            _seccomp.install(kind)

    def confines(self) -> bool:
        """Whether the calling thread has a filter."""
        return self._whole or _seccomp.is_confined()

    def start(self, thread: threading.Thread) -> None:
        """Start `thread`, from whatever thread.

        :raises RuntimeError: the host has no thread left
        """
        if not self.confines():
            self._have_maker()
            thread.start()
            return
        done: SimpleQueue[BaseException | None] = SimpleQueue()
        self._wanted.put((thread, done))
        if (problem := done.get()) is not None:
            raise problem

    def _have_maker(self) -> None:
        with self._making:
            if self._maker == os.getpid():
                return
            self._wanted = SimpleQueue()
            with host_errors("start a thread"):
                threading.Thread(target=self._make_threads, name="fc_spawn", daemon=True).start()
            self._maker = os.getpid()

    def _make_threads(self) -> None:
        deaf()  # threads inherit this
        if self.alone:
            self.install("spawn")
        while True:
            thread, done = self._wanted.get()
            try:
                thread.start()
                done.put(None)
            except Exception as error:  # no memory for it, too: this thread makes all others
                done.put(error)
            del thread, done


def _ready(*, alone: bool) -> None:
    # What has to be so before there is a filter; in the main thread.
    import time

    with host_errors("use seccomp filters; --no-seccomp or seccomp=False turns them off"):
        _seccomp.catch_faults(alone)
    logger.watch(_seccomp.log_to)
    # The C library reads files for these, once.
    time.localtime()
    os.strerror(errno.EPERM)


def guard(*, alone: bool) -> None:
    """Let every thread that ``vmm.threads`` starts from here on have its filter; idempotent.

    :param alone: no code but ours runs in this process
    :raises HostError: the kernel has no seccomp filters
    """
    if threads.guard is None:
        _ready(alone=alone)
        if not alone and _seccomp.collect_elsewhere not in gc.callbacks:
            gc.callbacks.append(_seccomp.collect_elsewhere)
        threads.guard = Filters(alone=alone)


def enable() -> None:
    """Put the filters in force, for this whole process and for good; idempotent.

    Before a machine is made, in the main thread. From here on this process can start no other program.

    :raises HostError: the kernel refuses
    """
    if threads.guard is not None:
        return
    from vmm import _uring
    from vmm.jail.preload import preload_later

    filters = Filters(alone=True, whole=True)
    _uring.stock(RINGS)
    _ready(alone=True)
    with host_errors("install seccomp filters"):
        _seccomp.install("base", whole_process=True)
    filters._have_maker()
    threads.guard = filters
    threads.no_programs = threads.no_programs or "and seccomp, which is on, forbids that"
    preload_later()
