# SPDX-License-Identifier: Apache-2.0
"""Which thread gets signals, and how it wakes: the main one alone, by a descriptor.

Python runs handlers in the main thread, but the kernel gives a process's signal to any thread that does not block it:
with two signals at once (``timeout`` sends TERM and CONT, a closed terminal HUP and CONT) the second goes to another
thread while the main one is busy with the first, and then sleeps on. So every thread of ours blocks every signal
(``deaf``), and the main thread waits for a descriptor (``Bell``) that each signal writes to, whoever got it: the
program that embeds us may have threads of its own.
"""

from __future__ import annotations

import os
import select
import time

from vmm.errors import VmmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from collections.abc import Callable
    from types import FrameType

    Handler = Callable[[int, FrameType | None], object]
else:
    # Without `signal` above it, which makes its numbers enums: a tenth of a start.
    import _signal as signal

# What asks for an end.
ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
CONTINUED, CPU_LIMIT, BROKEN_PIPE, POWER = signal.SIGCONT, signal.SIGXCPU, signal.SIGPIPE, signal.SIGPWR
# Blocked, these could only kill.
_FAULTS = {signal.SIGSYS, signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}
_OTHERS = signal.valid_signals() - _FAULTS
on = signal.signal  # (number, handler); in the main thread
LONGEST_POLL = 0x7FFFFFFF // 1000  # seconds: poll(2) takes an int of milliseconds


def deaf() -> None:
    """Block every signal in the calling thread, but for the faults that are its own."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _OTHERS)


def on_end(handler: Handler) -> None:
    """Call `handler` when a signal asks for an end; one that was ignored when we started (nohup) stays ignored."""
    for number in ENDS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def on_power(press: Callable[[], object]) -> None:
    """SIGPWR presses the guest's power button by `press`, which says by a VmmError that nobody runs who could hear."""

    def handler(number: int, frame: object) -> None:
        try:
            press()
        except VmmError:
            pass

    on(POWER, handler)


class Bell:
    """Wakes the main thread: rung by other threads, and by every signal. A context manager, in the main thread.

    What a program has set by ``signal.set_wakeup_fd`` itself, as asyncio does, is written to as well.
    """

    def __enter__(self) -> Bell:
        self._out, self._in = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._before = signal.set_wakeup_fd(self._in, warn_on_full_buffer=False)
        self._poll = select.poll()
        self._poll.register(self._out, select.POLLIN)
        # A signal that another thread took just before this wrote to no descriptor, and Python (before 3.13) tells the
        # main thread of it only when that takes the GIL again: as it does once if there is something to hear.
        self.ring()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._before, warn_on_full_buffer=False)
        ends, self._in = (self._in, self._out), -1  # who rings late writes to nobody's descriptor
        for fd in ends:
            os.close(fd)

    def fileno(self) -> int:
        """What a byte is written to, to ring it; borrowed."""
        return self._in

    def ring(self) -> None:
        """Wake who waits; any thread. After the end of the context it does nothing."""
        _write(self._in, b"\0")

    def wait(self, ready: Callable[[], bool], timeout: float | None = None) -> bool:
        """Wait until `ready`, which is asked again whenever the bell is rung; handlers run meanwhile.

        :param timeout: seconds, or None for as long as it takes
        :returns: False: it was not in that time
        """
        end = None if timeout is None else time.monotonic() + timeout
        while not ready():
            left = None if end is None else max(0.0, end - time.monotonic())
            if self._poll.poll(None if left is None else min(left, LONGEST_POLL) * 1000 + 1):
                heard = os.read(self._out, 512)
                if self._before >= 0:
                    _write(self._before, heard.replace(b"\0", b""))
            elif left == 0:
                return False
        return True


def _write(fd: int, data: bytes) -> None:
    try:
        os.write(fd, data)
    except OSError:
        pass  # there is enough in it to wake anybody, or nobody waits any more
