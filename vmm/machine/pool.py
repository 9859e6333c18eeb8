# SPDX-License-Identifier: Apache-2.0
"""Machines made ahead of need: copies of a booted machine, each ready to go on at once."""

from __future__ import annotations

import itertools
import threading
import time

from vmm.closing import Closers, Closing
from vmm.config import parse_size, size_text
from vmm.config.option import check_call
from vmm.errors import ConfigError, VmmError
from vmm.machine.machine import Machine
from vmm.machine.snapshot import Image, child_of
from vmm.signals import deaf

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from virtio.device import VirtioDevice
    from vmm.config.vm import VmConfig

_QUIET = 0.01  # seconds


class Pool(Closing):
    """Keeps `size` copies of a machine ready; a context manager.

    :param source: a machine, which is frozen now and then goes on; or an image
    :param size: the number of ready copies; a thread replaces those that are taken
    :param limit: the most copies, ready or taken; at the limit ``take`` waits until one is closed. None: no limit
    :param memory: the most guest RAM that these copies may have together, in bytes or as ``"8G"``. Each counts with all
        of its RAM, although it shares what it has not written. None: no limit
    :param change: called with a copy's configuration and number; returns the configuration to use. See
        ``Machine.fork``
    :param devices: called with a copy's number; returns your own devices for it. See ``Machine.fork``
    :param isolated: run each copy in its own process
    :raises SnapshotError: the machine cannot be frozen or shared
    :raises ConfigError: `memory` is not a size, or is too small for `size` copies

    The caller of ``take`` closes the copy. The pool closes the copies that nobody has taken.
    """

    def __init__(
        self,
        source: Machine | Image,
        *,
        size: int = 4,
        limit: int | None = None,
        memory: int | str | None = None,
        change: Callable[[VmConfig, int], VmConfig] | None = None,
        devices: Callable[[int], Sequence[VirtioDevice]] | None = None,
        isolated: bool = False,
    ) -> None:
        check_call("Pool", Pool.__init__, locals())
        if size < 1:
            raise ValueError(f"Pool: size must be 1 or more, not {size}")
        if limit is not None and limit < size:
            raise ValueError(f"Pool: limit must be at least the size, {size}, not {limit}")
        if memory is not None:
            each = source.config.memory
            most = parse_size("Pool memory", memory) // each
            if most < size:
                least = size_text(size * each)
                raise ConfigError("Pool memory", memory, f"must be at least {least}, for {size} copies")
            limit = most if limit is None else min(limit, most)
        self._make = child_of(source, change, devices, isolated=isolated)
        self._size = size
        self._limit = limit
        self._ready: list[Any] = []  # Machine, or Isolated
        self._taken: list[Any] = []
        self._numbers = itertools.count()
        self._taken_at = 0.0
        self._failure: BaseException | None = None
        self._closed = False
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._refill, name="pool", daemon=True)
        self._thread.start()

    def take(self, timeout: float | None = None) -> Any:
        """A running copy: a ``Machine``, or an ``Isolated`` if the pool is isolated.

        :param timeout: seconds to wait for a copy; None: no limit
        :raises TimeoutError: no copy was ready in time
        :raises VmmError: the pool is closed
        :raises Exception: the exception with which making copies failed
        """
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            with self._change:
                self._change.notify_all()  # a limit may have become free: nobody tells of a copy that was closed
                left = None if end is None else end - time.monotonic()
                if not self._change.wait_for(lambda: self._ready or self._closed or self._failure, left):
                    raise TimeoutError(f"no copy was ready within {timeout} s")
                if self._closed:
                    raise VmmError("the pool is closed")
                if not self._ready and self._failure is not None:
                    failure, self._failure = self._failure, None
                    self._change.notify_all()
                    raise failure
                machine = self._ready.pop(0)
                self._taken.append(machine)
                self._taken_at = time.monotonic()
                self._change.notify_all()
            try:
                machine.wake()
                return machine
            except VmmError:
                killed = machine.state == "Stopped"  # its process, while it waited here: another may be well
                machine.close()
                if not killed:
                    raise

    @property
    def ready(self) -> int:
        """The number of copies that are ready."""
        return len(self._ready)

    def _refill(self) -> None:
        deaf()
        while True:
            with self._change:
                while not self._closed and (not self._may_make() or self._is_busy()):
                    self._change.wait(_QUIET if self._is_busy() else 0.05 if self._is_full() else None)
                if self._closed:
                    return
            try:
                machine = self._make(next(self._numbers))
                try:
                    machine.start(paused=True)
                except BaseException:
                    machine.close()
                    raise
            except BaseException as failure:  # who takes hears of it
                with self._change:
                    self._failure = failure
                    self._change.notify_all()
                continue
            with self._change:
                if not self._closed:
                    self._ready.append(machine)
                    self._change.notify_all()
                    continue
            machine.close()
            return

    def _is_full(self) -> bool:
        if self._limit is None:
            return False
        self._taken = [machine for machine in self._taken if not machine.closed]
        return len(self._ready) + len(self._taken) >= self._limit

    def _is_busy(self) -> bool:
        # Somebody has just taken one: to make another now would hold that one up, by the interpreter's lock.
        return bool(self._ready) and time.monotonic() - self._taken_at < _QUIET

    def _may_make(self) -> bool:
        return self._failure is None and len(self._ready) < self._size and not self._is_full()

    def wait_until_full(self, timeout: float) -> bool:
        """Wait until `size` copies are ready, at most `timeout` seconds; whether they are."""
        with self._change:
            return self._change.wait_for(lambda: len(self._ready) >= self._size, timeout)

    def close(self) -> None:
        """Close the copies that nobody has taken, and make no more; idempotent."""
        with self._change:
            self._closed = True
            self._change.notify_all()
        if self._thread is not threading.current_thread():
            self._thread.join()
        ready, self._ready = self._ready, []
        Closers(machine.close for machine in ready).close()
