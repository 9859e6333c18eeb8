# SPDX-License-Identifier: Apache-2.0
"""The threads of a machine's vCPUs: start them, hold them for any number of reasons, and end them."""

from __future__ import annotations

import errno
import sys
import threading
import time

from vmm import logger, threads
from vmm.errors import HostError, KvmError, VmmError
from vmm.exits import Exit, Stop, StopReason
from vmm.kvm._vcpu import Gate
from vmm.signals import Bell

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any, TypeVar

    from vmm.kvm.vcpu import Vcpu

    _T = TypeVar("_T")


class Run:
    """How a machine runs, from before its start to after its end; for :class:`vmm.machine.machine.Machine`.

    :param windows: the guest's DAX windows at any time
    :param panicked: whether the guest has said that it panics, which explains a reset

    :ivar started: ``start`` was called
    :ivar ended: how it ended, or None
    :ivar failure: what a device or the host's KVM raised, and ``ended`` came of
    :ivar holds: why the vCPUs are held, each reason until it is released
    :ivar callbacks: called once with how it ended, on whatever thread
    """

    def __init__(self, windows: Callable[[], Iterable[Any]], panicked: Callable[[], bool]) -> None:
        self._windows = windows
        self._panicked = panicked
        self.vcpus: tuple[Vcpu, ...] = ()
        self.started = False
        self.ended: Exit | None = None
        self.failure: BaseException | None = None
        self.holds: set[str] = set()
        self.callbacks: list[Callable[[Exit], object]] = []
        self._threads: list[threading.Thread] = []
        self._own: set[threading.Thread] = set()  # those of vCPUs, from their beginning to their end
        self._doubted = False  # whether they have ended, though join() returns
        self._teller: threading.Thread | None = None  # who calls the callbacks
        self._told = threading.Event()  # they have returned
        self._change = threading.Condition()
        self._bells: list[Bell] = []  # of the main thread's wait(), inside `_change`
        self._gate = Gate()

    @property
    def running(self) -> bool:
        """Whether it was started and has not ended; it may be held."""
        return self.started and self.ended is None

    @property
    def state(self) -> str:
        """``Not started``, ``Running``, ``Paused`` or ``Stopped``."""
        if self.ended is not None:
            return "Stopped"
        if not self.started:
            return "Not started"
        return "Paused" if "pause" in self.holds else "Running"

    def start(self, kind: str | None) -> None:
        """Let every vCPU run, each on a thread of its own.

        :param kind: kind of thread, as for ``vmm.threads.spawn``
        :raises RuntimeError, HostError: the host has no thread left
        """
        for vcpu in self.vcpus:
            if self.ended is not None:
                return  # a signal's handler may have closed the vCPUs, too
            name = f"fc_vcpu {vcpu.index}"
            self._threads.append(
                threads.spawn(kind, name, self._run_vcpu, vcpu, unconfined=lambda error: self.end(failure=error))
            )

    def end(self, stop: Exit | None = None, failure: BaseException | None = None) -> None:
        """End it, unless it has ended; from any thread.

        :param stop: how; None: because somebody wanted it to, or by `failure`
        """
        stop = stop or Exit(StopReason.REQUESTED)
        with self._change:
            if self.ended is not None:
                return
            if stop.reason is StopReason.RESET and self._panicked():
                stop = Exit(StopReason.PANIC)
            self.ended, self.failure, self._teller = stop, failure, threading.current_thread()
            self._gate.end()
            self._change.notify_all()
            for bell in self._bells:
                bell.ring()
        try:
            for vcpu in self.vcpus:
                vcpu.kick()
            logger.info(f"The VM ended: {stop if failure is None else failure}")
            if not self.callbacks or threads.guard is None or threads.guard.alone or not threads.guard.confines():
                self._tell(stop)
            else:  # they are the program's, and no filter is
                self._threads.append(threads.spawn(None, "on_exit", self._tell, stop))
        except (RuntimeError, HostError) as error:  # no thread is left
            self._told.set()
            logger.error(f"Nobody is told that the VM ended: {error}")
        except BaseException:  # a signal's handler's
            self._told.set()
            raise

    def wait(self, timeout: float | None) -> bool:
        """Whether it has ended within `timeout` seconds; None: however long it takes.

        In the main thread the handlers of signals run meanwhile, none of them late.
        """
        if threading.current_thread() is not threading.main_thread():
            with self._change:
                return self._change.wait_for(lambda: self.ended is not None, timeout)
        with Bell() as bell:
            with self._change:
                self._bells.append(bell)
            try:
                return bell.wait(lambda: self.ended is not None, timeout)
            finally:
                with self._change:
                    self._bells.remove(bell)

    def join(self) -> None:
        """Once it has ended: wait for its threads, and until the callbacks have returned; but not for who asks."""
        try:
            for thread in self._threads:
                if thread is not threading.current_thread():
                    thread.join()
        except BaseException:  # a signal's handler's: before Python 3.13 that thread seems to have ended now
            self._doubted = True
            raise
        while self._doubted and self._own - {threading.current_thread()}:
            time.sleep(0.001)
        if self._teller is not threading.current_thread():
            self._told.wait()

    def hold(self, reason: str) -> None:
        """Let no vCPU run until each reason is released; returns when none does.

        :raises VmmError: a vCPU's own thread asks, which would wait for itself
        :raises BaseException: what a handler of a signal raised meanwhile, as KeyboardInterrupt; nothing is held for it
        """
        self.refuse_own_threads()
        known = reason in self.holds
        try:
            with self._change:
                self.holds.add(reason)
                self._gate.shut()
                if not self.started:
                    return
            for vcpu in self.vcpus:
                vcpu.kick()
            self._gate.wait(len(self.vcpus))
        except BaseException:
            if not known:
                self.release(reason)
            raise

    def refuse_own_threads(self) -> None:
        """:raises VmmError: the caller is a vCPU's own thread, so it may not wait for who holds the vCPUs"""
        if threading.current_thread() in self._own:
            raise VmmError("a vCPU's own thread cannot hold the vCPUs; let another thread do this")

    def release(self, reason: str) -> None:
        """The reason is gone."""
        with self._change:
            self.holds.discard(reason)
            if not self.holds:
                self._gate.open()

    def while_held(self, reason: str, do: Callable[[], _T]) -> _T:
        """Call `do` while no vCPU runs; see ``hold``."""
        try:
            self.hold(reason)
            return do()
        finally:  # whatever failed, the guest is not held for good
            try:
                self.release(reason)
            except BaseException:  # a signal's handler's, as KeyboardInterrupt, where the call began: then once more
                self.release(reason)
                raise

    # On a vCPU's thread

    def _run_vcpu(self, vcpu: Vcpu) -> None:
        self._own.add(threading.current_thread())
        loop = vcpu.loop  # a callback may close the machine
        try:
            loop.attach(f"fc_vcpu {vcpu.index}", boots=vcpu.index == 0, gate=self._gate)
            while self.ended is None:
                self._run_once(vcpu)
        except Stop as stop:
            self.end(stop.exit)
        except BaseException as failure:  # a device's bug or the host's failure: wait() raises it
            self.end(failure=failure)
        finally:
            loop.detach()
            self._own.discard(threading.current_thread())

    def _run_once(self, vcpu: Vcpu) -> None:
        while True:
            windows = self._windows()
            seen = [window.repairs for window in windows]
            try:
                vcpu.run()
                return
            except KvmError as error:
                # Somebody truncated a file that the guest has mapped, and it touched what is gone: it gets zeros there.
                # Another vCPU that touched it too may have been first.
                for window in windows:
                    window.repair()
                if error.errno != errno.EFAULT or seen == [window.repairs for window in windows]:
                    raise

    def _tell(self, stop: Exit) -> None:
        self._teller = threading.current_thread()
        try:
            for callback in self.callbacks:
                try:
                    callback(stop)
                except Exception:  # of the program's: whoever ends the machine goes on, and so do the others
                    sys.excepthook(*sys.exc_info())
        finally:
            self._told.set()
